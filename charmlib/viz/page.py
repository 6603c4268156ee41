"""One self-contained HTML page: tables and pictures that open without network access."""

import base64
import html
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from charmlib.files import readable, write_text

_STYLE = """:root{color-scheme:light dark;--ink:#222;--paper:#fff;--soft:#555;--line:#ddd;--strong:#888;--warn:#fff3cd;
--link:#0b57a4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--paper:#16181c;--soft:#b4b7bd;--line:#3a3d42;--strong:#8a8f98;
--warn:#4a3b00;--link:#8ab8ff}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:2em auto;
padding:0 1em;overflow-wrap:anywhere}a{color:var(--link)}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{max-width:100%;background:#fff;border-radius:4px}
.lead{font-size:1.15em}.scroll{overflow-x:auto;overflow-wrap:normal}summary{cursor:pointer}
@media(max-width:700px){img{max-width:none;width:700px}}
table{border-collapse:collapse;font-size:13px}th,td{padding:3px 9px;text-align:right;border-bottom:1px solid var(--line);
white-space:nowrap}th{border-bottom:2px solid var(--strong);white-space:normal}.first tr:first-child td{font-weight:600}
.words td,.words th,td:first-child,th:first-child,.board td:nth-child(2),.board th:nth-child(2){text-align:left}
.note{color:var(--soft)}.drawn{background:var(--warn);padding:.5em .8em;border-radius:4px}
.words td:nth-child(n+6),.notes td:last-child{white-space:normal}.notes td:last-child{text-align:left}
.notes td,.notes th{padding:3px 5px}
@media print{:root{--ink:#222;--paper:#fff;--soft:#555;--warn:#fff3cd}body{max-width:none;margin:0}h2{break-after:avoid}
img,tr{break-inside:avoid}.scroll{overflow:visible}table{font-size:8.5px}th,td{padding:1px 4px}}"""
ORDER = "Classes stand from the rarest in training to the most frequent."
HOW = {"ROC": "A curve nearer to the upper left corner is better; the diagonal is chance, AUC 0.5.",
       "Interval bands": "A band holds 95 % of the curves over resamples of patients; a dot is the operating point.",
       "Precision": "Precision is the share of called images that have the finding; the dotted line is a call at random.",
       "AUC": "A bar is a class's AUC, from chance upward; the line on it is its 95 % interval over patients.",
       "Counts": "Left are the images with the finding, right those without; the shorter the orange part, the fewer errors.",
       "Calibration": "On the diagonal a probability is the share of images that have the finding; below it, it is too high.",
       "Co-occurrence": "A row is a finding: its images on the diagonal, and the share of them that show the column's finding.",
       "Enrichment": "Right of the line at 1, the bank holds the finding more often than the training part does.",
       "Training": "A grey band marks the kept epoch of each stage; validation loss that rises alone is overfitting.",
       "Worst errors": "Above are images that most images without the finding outscore, below those that outscore most with "
       "it. Labels made from reports may themselves be wrong.",
       "Mean test AUC": "A field is a cell, brighter is better; fields whose intervals overlap may differ by chance.",
       "Where the network looks": "A map has few cells and is of the head alone; it may point at the finding, or at "
       "what comes with it.",
       "What the memory answers": "The first test image with each of the three rarest findings, and the slots with training "
       "images that count most; beside a logit stand its terms, beside a slot its contribution. A slot without the finding "
       "adds if it is less similar than such slots usually are.",
       "The two paths": "The first test image with each of the six rarest findings: dashed the crop, below the heat that it "
       "was cut by, and the crop as the second path saw it.",
       "What the memory banks": "A row is a cell's bank, a column a finding; 2 is twice as many slots as by a random draw.",
       "What filled": "Above the line at 1, the bank holds the finding more often than the training part does.",
       "Findings by part": "A bar is the share of a part's images with the finding; unequal bars show parts that differ.",
       "Patients": "Ages count each patient once; the last panel shows the views of each part.",
       "A training image": "Images are drawn at random and titled by all their findings."}
"""Beginning of a picture's title -> how to read it."""


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str, kind: str = "note") -> str:
    """Plain text; the kind 'note' is grey."""
    return f"<p class='{kind}'>{html.escape(text)}</p>"


def link(text: str, place: str) -> str:
    """A link to another file, by its path from the page's folder."""
    return f"<a href='{html.escape(quote(place, errors='surrogateescape'), quote=True)}'>{html.escape(text)}</a>"


def table(frame: pd.DataFrame, kind: str = "", links: Mapping[str, str] | None = None) -> str:
    """A table of texts and numbers as they are; blank if missing. ``kind``: 'first' makes the first row bold, 'words'
    aligns left, 'board' the second column; 'notes' wraps the last. ``links``: a cell's text -> the file that it leads to."""
    links = links or {}
    shown = frame.astype(object).where(frame.notna(), "").rename(columns=lambda name: html.escape(str(name), False))
    for column in shown:
        shown[column] = [value if not isinstance(value, str) else link(value, links[value]) if value in links
                         else html.escape(value, False) for value in shown[column]]
    return f"<div class='scroll {kind}' tabindex='0'>{shown.to_html(index=False, border=0, escape=False)}</div>"


def folded(title: str, part: str) -> str:
    """A part that a click on the title shows."""
    return f"<details><summary>{html.escape(title)}</summary>{part}</details>"


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
    return (f"<div class='scroll' tabindex='0'><img alt='{html.escape(title, quote=True)}' "
            f"src='data:image/png;base64,{data}'></div>")


def pictures(drawn: Mapping) -> list[str]:
    """Each picture under its title and a sentence of :data:`HOW`; a mapping from title to figure or PNG."""
    return [part for title, figure in drawn.items() for part in (
        heading(title), *(paragraph(text) for start, text in HOW.items() if title.startswith(start)), picture(figure, title))]


def write_page(path: str | Path, title: str, parts: Iterable[str], *, drawn: bool = False, made_from: str = "") -> Path:
    """Write the page; ``drawn`` puts a warning on top that the images are not radiographs, its head names ``made_from``."""
    warning = ("<p class='drawn'>Made from <b>drawn phantoms</b>, not radiographs: this shows that the software works and "
               "nothing else.</p>") if drawn else ""
    write_text(path, readable(f"<!doctype html><html lang='en'><meta charset='utf-8'>"
                              f"<meta name='made-from' content='{made_from}'>"
                              "<meta name='viewport' content='width=device-width,initial-scale=1'>"
                              f"<title>{html.escape(title)}</title>"
                              f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{warning}\n" + "\n".join(parts)
                              + "\n<p class='note'>Research use only.</p></html>\n"))
    return Path(path)
