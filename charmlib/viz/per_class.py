"""Bars by class: AUC with its interval beside published results, and counts at an operating point."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from charmlib.evaluation.published import per_class_beside
from charmlib.evaluation.runs import number
from charmlib.viz.style import FIRST, GUIDE, OKABE_ITO, SECOND, heading, readable, styled

_BOX = {"fontsize": 8, "va": "center", "bbox": {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 0.8}}


@styled
def plot_per_class(metrics: Mapping, *, title: str = "", note: str = ""):
    """Bars with 95 % intervals over patients, and published results as markers or the reason why none are comparable.

    ``metrics`` is ``metrics.json``; returns the figure.
    """
    auc, intervals = metrics["test"]["auc"], metrics["test"]["intervals"]["auc"]
    names = list(auc)
    values = np.array([number(auc[name]) for name in names])
    limits = np.array([[number(v) for v in intervals[name][:2]] for name in names])
    published, remark = per_class_beside(metrics)
    figure, axis = plt.subplots(figsize=(10, 4.3), layout="constrained")
    at = np.arange(len(names))
    axis.bar(at, values - 0.5, bottom=0.5, width=0.62, color=FIRST, alpha=0.75, label="this run")
    axis.errorbar(at, values, yerr=_error_bars(values, limits), fmt="none", ecolor="black", elinewidth=1.1, capsize=3,
                  label="95 % interval")
    for k, (system, row) in enumerate(published.iterrows() if published is not None else ()):
        axis.plot(at, row.reindex(names).to_numpy(float), "Ds^v"[k % 4], ms=6, mec="white", mew=0.6,
                  color=OKABE_ITO[1 + k % (len(OKABE_ITO) - 1)], label=system)
    axis.axhline(0.5, color=GUIDE, lw=1)
    axis.set_xticks(at, [readable(n) for n in names], rotation=35, ha="right")
    axis.set(ylabel="ROC-AUC", ylim=(min(0.45, np.nanmin(limits, initial=0.5) - 0.02), 1.0))
    axis.grid(axis="x", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return heading(figure, title, f"{note}. {remark}" if note else remark)


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
        axis.errorbar(share, at, xerr=_error_bars(share, limits), fmt="none", ecolor="black", elinewidth=1.1, capsize=2)
        for i, row in enumerate(rows):
            axis.text(0.015, i, f"{row[right]:,}", ha="left", **_BOX)
            axis.text(0.985, i, f"{row[wrong]:,}", ha="right", **_BOX)
        axis.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4), xlabel=f"{rate} (95 % interval)")
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(at, [f"{readable(name)}  (p ≥ {row['threshold']:.3f})" for name, row in zip(names, rows)])
    return heading(figure, title, note)


def _error_bars(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Lengths (2, n) of error bars from values (n,) and their limits (n, 2); 0 if undefined."""
    return np.nan_to_num(np.clip(np.stack([values - limits[:, 0], limits[:, 1] - values]), 0, None))
