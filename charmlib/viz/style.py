"""One style for all pictures: readable at notebook width and in print, safe for colour-blind readers; and shared elements."""

import functools
import textwrap

import matplotlib.pyplot as plt
import numpy as np

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
"""The palette of Okabe and Ito."""

LINES = ("-", "--")
"""Seven colours and two line styles distinguish fourteen classes."""

FIRST, SECOND, GUIDE = OKABE_ITO[0], OKABE_ITO[1], "#999999"
"""The main colour, the colour of a second series, and that of reference lines."""

RC = {"font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
      "legend.fontsize": 8.5, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
      "legend.frameon": False, "figure.titlesize": 10.5, "axes.axisbelow": True}


def styled(draw):
    """Decorator: draw in the house style, whatever the notebook's own settings are."""

    @functools.wraps(draw)
    def inner(*args, **kwargs):
        with plt.rc_context(RC):
            return draw(*args, **kwargs)

    return inner


def class_style(i: int) -> dict:
    """Colour and line style of class ``i``."""
    return {"color": OKABE_ITO[i % len(OKABE_ITO)], "ls": LINES[i // len(OKABE_ITO) % len(LINES)]}


def readable(name: str) -> str:
    """A class's name for pictures: without underscores."""
    return str(name).replace("_", " ")


def heading(figure, title: str = "", note: str = ""):
    """Title over the picture, and under it a note on the data; returns the figure."""
    text = "\n".join([title, *textwrap.wrap(note, int(13.5 * figure.get_figwidth()))]).strip()
    if text:
        figure.suptitle(text, fontsize=9.5)
    return figure


def number_map(axis, values, texts, rows, columns, *, white, fontsize: float, slanted: dict | None = None, **colours):
    """A heat map of ``values`` (r, c) with ``texts`` (r, c) in its fields, in white on the fields of the mask ``white``.

    Fields without text stay blank. ``slanted`` are settings of the column labels, ``colours`` those of ``imshow``; returns
    its image for a colour bar.
    """
    image = axis.imshow(values, **colours)
    for (r, c), text in np.ndenumerate(texts):
        if text:
            axis.text(c, r, text, ha="center", va="center", fontsize=fontsize, color="white" if white[r, c] else "black")
    axis.set_xticks(range(len(columns)), columns, **(slanted or {}))
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    return image


def mark_stages(axis, stages, *, named: bool = False) -> None:
    """Whole epochs on the x axis, and a dotted line at each change of ``stages`` (n_epochs,); ``named`` labels it."""
    stages = np.asarray(stages, dtype=str)
    axis.xaxis.get_major_locator().set_params(integer=True)
    for epoch in np.flatnonzero(stages[1:] != stages[:-1]) + 1:
        axis.axvline(epoch + 0.5, color=GUIDE, lw=1, ls=":")
        if named:
            axis.annotate(f"stage {stages[epoch]}", (epoch + 0.55, 0.02), xycoords=("data", "axes fraction"), fontsize=9,
                          color="#666666")
