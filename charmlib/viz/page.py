"""One self-contained HTML page: tables and pictures that open without network access."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd

from charmlib.files import readable, write_text

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{max-width:100%}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}th,td{padding:3px 9px;text-align:right;border-bottom:1px solid #ddd;
white-space:nowrap}th{border-bottom:2px solid #888;white-space:normal}.first tr:first-child td{font-weight:600}
.words td,.words th,td:first-child,th:first-child,.board td:nth-child(2),.board th:nth-child(2){text-align:left}
.note{color:#555}.drawn{background:#fff3cd;padding:.5em .8em;border-radius:4px}
.words td:nth-child(n+6),.notes td:last-child{white-space:normal}.notes td:last-child{text-align:left}
.notes td,.notes th{padding:3px 5px}
@media print{body{max-width:none;margin:0}h2{break-after:avoid}img,tr{break-inside:avoid}
.scroll{overflow:visible}table{font-size:8.5px}th,td{padding:1px 4px}}"""


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "note") -> str:
    """Plain text; the kind 'note' is grey."""
    return f"<p class='{kind}'>{html.escape(text)}</p>"


def table(frame: pd.DataFrame, kind: str = "") -> str:
    """A table of texts and numbers as they are; blank if missing. ``kind``: 'first' makes the first row bold, 'words'
    aligns left, 'board' the second column; 'notes' wraps the last."""
    return f"<div class='scroll {kind}'>{frame.astype(object).where(frame.notna(), '').to_html(index=False, border=0)}</div>"


def shown(frame: pd.DataFrame):
    """The same table in a notebook's output. pandas' own ``frame.style`` does not escape HTML in names."""
    from IPython.display import HTML

    return HTML(readable(table(frame)))


def png(figure, dpi: int = 110) -> bytes:
    """A matplotlib figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def picture(figure, title: str) -> str:
    """A matplotlib figure, or the bytes of a PNG, embedded in the page."""
    data = base64.b64encode(figure if isinstance(figure, bytes) else png(figure)).decode()
    return f"<img alt='{html.escape(title, quote=True)}' src='data:image/png;base64,{data}'>"


def pictures(drawn: Mapping) -> list[str]:
    """Each picture under its title; a mapping from title to figure or PNG."""
    return [part for title, figure in drawn.items() for part in (heading(title), picture(figure, title))]


def write_page(path: str | Path, title: str, parts: Iterable[str], *, drawn: bool = False) -> Path:
    """Write the page; ``drawn`` puts a warning on top that the images are not radiographs."""
    warning = ("<p class='drawn'>Made from <b>drawn phantoms</b>, not radiographs: this shows that the software works and "
               "nothing else.</p>") if drawn else ""
    write_text(path, readable(f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
                              f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{warning}\n" + "\n".join(parts)
                              + "\n<p class='note'>Research use only.</p></html>\n"))
    return Path(path)
