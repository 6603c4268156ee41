"""The confusion matrix at an operating point: true and false positives and negatives of each class."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from charmlib.evaluation.runs import number
from charmlib.viz.style import FIRST, OKABE_ITO, SECOND, error_bars, heading, readable, styled

_BOX = {"fontsize": 8, "va": "center", "bbox": {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8}}


@styled
def plot_counts(operating: Mapping[str, Mapping], *, title: str = "", note: str = ""):
    """Counts at one operating point (``metrics['test']['operating'][point]``), one bar per class; returns the figure.

    Bars are shares of the positives (left) and of the negatives (right), so that rare findings are readable. The numbers are
    counts, and the whiskers 95 % intervals of sensitivity and specificity over patients.
    """
    names, rows = list(operating)[::-1], list(operating.values())[::-1]
    at = np.arange(len(names))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.33 * len(names) + 1.7), sharey=True, layout="constrained")
    sides = (("sensitivity", ("tp", "true positives"), ("fn", "false negatives"), FIRST),
             ("specificity", ("tn", "true negatives"), ("fp", "false positives"), OKABE_ITO[2]))
    for axis, (rate, (right, right_label), (wrong, wrong_label), colour) in zip(axes, sides):
        share = np.array([number(row[rate]) for row in rows])
        limits = np.array([[number(v) for v in row[f"{rate}_interval"][:2]] for row in rows])
        axis.barh(at, share, color=colour, height=0.72, label=right_label)
        axis.barh(at, 1 - share, left=share, color=SECOND, height=0.72, alpha=0.85, label=wrong_label)
        axis.errorbar(share, at, xerr=error_bars(share, limits), fmt="none", ecolor="black", elinewidth=1.1, capsize=2)
        for i, row in enumerate(rows):
            axis.text(0.015, i, f"{row[right]:,}", ha="left", **_BOX)
            axis.text(0.985, i, f"{row[wrong]:,}", ha="right", **_BOX)
        axis.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel=f"{rate} (95 % interval)")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(at, [f"{readable(name)}  (p ≥ {row['threshold']:.3f})" for name, row in zip(names, rows)])
    return heading(figure, title, note)
