"""One style for all pictures: readable at notebook width and in print, safe for colour-blind readers."""

from __future__ import annotations

import functools
import math
import textwrap

import matplotlib.pyplot as plt
import numpy as np

OKABE_ITO = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#222222")
"""The palette of Okabe and Ito."""

LINES = ("-", "--")
"""Seven colours and two line kinds tell fourteen classes apart."""

FIRST, SECOND, GUIDE = OKABE_ITO[0], OKABE_ITO[1], "#999999"
"""One thing, another thing beside it, and lines that only guide the eye."""

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
    """Colour and line kind of class ``i``."""
    return {"color": OKABE_ITO[i % len(OKABE_ITO)], "ls": LINES[i // len(OKABE_ITO) % len(LINES)]}


def square_root_scale(axis, which: str) -> None:
    """Make the ``x`` or ``y`` axis of probabilities square-rooted: rare findings are flat on a straight one."""

    def root(values):
        return np.sqrt(np.maximum(values, 0))  # matplotlib 3.10 asks for values left of 0 while it lays out, and warns of them

    getattr(axis, f"set_{which}scale")("function", functions=(root, np.square))


def readable(name: str) -> str:
    """A class's name as it stands in pictures."""
    return str(name).replace("_", " ")


def heading(figure, title: str = "", note: str = "") -> None:
    """Title over the picture, and under it the note that says what data it is of."""
    text = "\n".join([title, *textwrap.wrap(note, int(13.5 * figure.get_figwidth()))]).strip()
    if text:
        figure.suptitle(text, fontsize=9.5)


def small_panels(count: int, *, columns: int = 5, size: tuple[float, float] = (2.06, 2.05), **kwargs):
    """Figure and axes for ``count`` small panels and, always, at least one blank one after them for the legend."""
    rows = math.ceil((count + 1) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows + 0.5), squeeze=False,
                                layout="constrained", **kwargs)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count], axes.flat[count]
