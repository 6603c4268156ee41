"""One style for all pictures: readable at notebook width and in print, safe for colour-blind readers; and shared elements."""

import functools
import textwrap

import numpy as np
from matplotlib.colors import to_rgb

from charmlib import files

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
"""The palette of Okabe and Ito."""

LINES = ("-", "--")
"""Seven colours and two line styles distinguish fourteen classes."""

FIRST, SECOND, GUIDE = OKABE_ITO[0], OKABE_ITO[1], "#999999"
"""The main colour, the colour of a second series, and that of reference lines."""

LONGEST = 40
"""Number of characters of a class's name that fit on a picture."""

RC = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
      "legend.fontsize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
      "legend.frameon": False, "figure.titlesize": 10.5, "axes.axisbelow": True, "text.parse_math": False}


def styled(draw):
    """Decorator: draw in the house style, whatever the notebook's own settings are."""

    @functools.wraps(draw)
    def inner(*args, **kwargs):
        import matplotlib.pyplot as plt  # the explorer's page starts without it

        with plt.rc_context(RC):
            return draw(*args, **kwargs)

    return inner


def class_style(i: int) -> dict:
    """Colour and line style of class ``i``."""
    return {"color": OKABE_ITO[i % len(OKABE_ITO)], "ls": LINES[i // len(OKABE_ITO) % len(LINES)]}


def readable(name: str) -> str:
    """A class's name for pictures: without underscores, a long one without its middle; bytes that are no text are escaped."""
    text = files.readable(str(name)).replace("_", " ")
    return text if len(text) <= LONGEST else f"{text[:LONGEST - 14]} … {text[-11:]}"


def heading(figure, title: str = "", note: str = ""):
    """Title over the picture, and under it a note on the data; returns the figure."""
    text = "\n".join([title, *textwrap.wrap(note, int(13.5 * figure.get_figwidth()))]).strip()
    if text:
        figure.suptitle(files.readable(text), fontsize=9.5)
    return figure


def ink_on(colour) -> str:
    """Black or white, which has more contrast on a colour (at least 4.5 : 1 on any)."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(colour)]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "white"


def number_map(axis, values, texts, rows, columns, *, fontsize: float, slanted: dict | None = None, **colours):
    """A heat map of ``values`` (r, c) with ``texts`` (r, c) in its fields.

    Fields without text stay blank. ``slanted`` are settings of the column labels, ``colours`` those of ``imshow``; returns
    its image for a colour bar.
    """
    image = axis.imshow(values, **colours)
    for (r, c), text in np.ndenumerate(texts):
        if text:
            ink = "black" if np.isnan(values[r, c]) else ink_on(image.cmap(image.norm(values[r, c])))
            axis.text(c, r, text, ha="center", va="center", fontsize=fontsize, color=ink)
    axis.set_xticks(range(len(columns)), columns, **(slanted or {}))
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    return image


def mark_stages(axis, stages, *, named: bool = False) -> None:
    """Epochs of each stage on the x axis, counted from 1 as in ``history.csv``, and a dotted line at each change of ``stages``
    (n_epochs,); ``named`` labels it."""
    stages = np.asarray(stages, dtype=str)
    starts, at = np.flatnonzero(stages[1:] != stages[:-1]) + 1, np.arange(len(stages))
    epochs = at - np.maximum.accumulate(np.where(np.isin(at, starts), at, 0))
    labelled = epochs % max(1, -(-len(at) // 10)) == 0
    axis.set_xticks(at[labelled] + 1, epochs[labelled] + 1)
    for epoch in starts:
        axis.axvline(epoch + 0.5, color=GUIDE, lw=1, ls=":")
        if named:
            axis.annotate(f"stage {stages[epoch]}", (epoch + 0.55, 0.02), xycoords=("data", "axes fraction"), fontsize=9,
                          color="#444444")
