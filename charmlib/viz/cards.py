"""Radiographs as cards of a page: each with boxes, a heat map in its own cells, its caption, and enlarged on a click.

Plain HTML and CSS (``web/explorer.css``), so that cards are the same in Voilà, JupyterLab and a notebook's stored output. The
opacity of the maps is the CSS variable ``--heat``.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from charmlib.files import readable

STYLE = f"<style>{(Path(__file__).with_name('web') / 'explorer.css').read_text()}</style>"


@dataclass(frozen=True)
class Card:
    """A radiograph (S, S) uint8, or None where it is not there, with its name and the lines of its caption.

    ``boxes`` are (finding, x0, y0, x1, y1) in shares of the sides; those of ``finding`` are solid, others dashed. ``heat``
    (h, w) is the map of ``finding``, of the picture without a ``margin`` (share of each side).
    """

    pixels: np.ndarray | None
    name: str
    lines: Sequence[str]
    finding: str = ""
    boxes: Sequence[tuple[str, float, float, float, float]] = ()
    heat: np.ndarray | None = None
    margin: float = 0.0


def text(value: object) -> str:
    """Data as text of a page: HTML in it is escaped, and bytes that are no text."""
    return html.escape(readable(str(value)))


def digits(probability: float) -> str:
    """A probability for reading."""
    return f"{probability:.3f}" if probability >= 0.01 else f"{probability:.2g}"


def slot_lines(slot: Mapping) -> list[str]:
    """What to say of a memory's slot, a row of an :class:`charmlib.training.bank_evidence.Explanation`: its image first."""
    image = "" if slot["image"] is None or slot["image"] != slot["image"] else str(slot["image"])
    return [Path(image).stem or "unknown", slot["labels"].replace("|", ", "), f"similarity {slot['similarity']:.3f}",
            *(f"{key} {slot[key]:+.3f}" for key in ("contribution", "weight") if key in slot)]


def cards(shown: Iterable[Card], ident: str) -> str:
    """The cards side by side; ``ident`` is a prefix of element ids that no other cards on the page have."""
    return f"<div class='cards'>{''.join(_card(card, f'{ident}-{i}') for i, card in enumerate(shown))}</div>"


def _card(card: Card, ident: str) -> str:
    boxes = [f"box of {', '.join(finding for finding, *_ in card.boxes)}"] if card.boxes else []
    seen = [] if card.heat is None else [f"{'heat map of' if card.heat.max() > 0 else 'no evidence for'} {card.finding}"]
    words = [*map(text, (card.name, *card.lines, *boxes, *seen))]
    caption = "<br>".join([f"<b>{words[0]}</b>", *words[1:]])
    if card.pixels is None:
        return (f"<figure><span class='pic none' role='img' aria-label='{words[0]}: no image'>no image</span>"
                f"<figcaption>{caption}</figcaption></figure>")
    picture = _picture(card, ", ".join(words))
    return (f"<figure><button popovertarget='{ident}' title='enlarge'>{picture}</button><figcaption>{caption}</figcaption>"
            f"<div popover id='{ident}'>{picture}<p><button popovertarget='{ident}'>close</button>{', '.join(words)}</p></div>"
            "</figure>")


def _picture(card: Card, words: str) -> str:
    out = [f"<img alt='{words}' src='{_source(Image.fromarray(card.pixels), 'jpeg')}'>"]
    if card.heat is not None and card.heat.max() > 0:
        from matplotlib import colormaps  # the page starts without it

        share = card.heat / card.heat.max()
        coloured = colormaps["inferno"](share, alpha=share, bytes=True)
        place = f"inset:{card.margin:.2%};width:{1 - 2 * card.margin:.2%};height:{1 - 2 * card.margin:.2%}"
        out.append(f"<img class='heat' alt='' style='{place}' src='{_source(Image.fromarray(coloured), 'png')}'>")
    for finding, x0, y0, x1, y1 in card.boxes:
        out.append(f"<i class='{'own' if finding == card.finding else 'other'}' style='left:{x0:.2%};top:{y0:.2%};"
                   f"width:{x1 - x0:.2%};height:{y1 - y0:.2%}'></i>")
    return f"<span class='pic'>{''.join(out)}</span>"


def _source(picture: Image.Image, kind: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"quality": 92} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
