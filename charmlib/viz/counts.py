"""What an operating point means in images: found and missed, called in vain and rightly left alone."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from charmlib.viz.style import FIRST, OKABE_ITO, SECOND, heading, readable, styled


@styled
def plot_counts(operating: Mapping[str, Mapping], *, title: str = "", note: str = ""):
    """Counts at one operating point (``metrics['test']['operating'][point]``), a bar a class; returns the figure.

    Bars are shares of the positives (left) and of the negatives (right), so that rare findings can be read too; counts are
    written in, and whiskers are the 95 % intervals of sensitivity and specificity over patients.
    """
    names = list(operating)[::-1]
    at = np.arange(len(names))
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.33 * len(names) + 1.7), sharey=True, layout="constrained")
    sides = ((axes[0], "sensitivity", "tp", "fn", "found", "missed", FIRST),
             (axes[1], "specificity", "tn", "fp", "rightly left alone", "called in vain", OKABE_ITO[2]))
    for axis, figure_name, right, wrong, said_right, said_wrong, colour in sides:
        share = np.array([_nan(operating[n][figure_name]) for n in names])
        axis.barh(at, share, color=colour, height=0.72, label=said_right)
        axis.barh(at, 1 - share, left=share, color=SECOND, height=0.72, alpha=0.85, label=said_wrong)
        limits = np.array([[_nan(v) for v in operating[n][f"{figure_name}_interval"][:2]] for n in names])
        reach = np.clip(np.stack([share - limits[:, 0], limits[:, 1] - share]), 0, None)
        axis.errorbar(share, at, xerr=np.nan_to_num(reach), fmt="none", ecolor="black", elinewidth=1.1, capsize=2)
        for i, n in enumerate(names):
            boxed = {"fontsize": 8, "va": "center", "bbox": {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8}}
            axis.text(0.015, i, f"{operating[n][right]:,}", ha="left", **boxed)
            axis.text(0.985, i, f"{operating[n][wrong]:,}", ha="right", **boxed)
        axis.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel=f"{figure_name} (95 % interval)")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(at, [f"{readable(n)}  (p ≥ {operating[n]['threshold']:.3f})" for n in names])
    heading(figure, title, note)
    return figure


def _nan(value) -> float:
    return float("nan") if value is None else float(value)
