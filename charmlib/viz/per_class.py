"""AUC of each class with its interval, beside published results on the same kind of split."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from charmlib.evaluation.published import per_class_beside
from charmlib.evaluation.runs import number
from charmlib.viz.style import FIRST, GUIDE, OKABE_ITO, error_bars, heading, readable, styled


@styled
def plot_per_class(metrics: Mapping, *, title: str = "", note: str = ""):
    """Bars with 95 % intervals over patients, and published results as markers or the reason why none are comparable.

    ``metrics`` is ``metrics.json``; returns the figure.
    """
    auc, intervals = metrics["test"]["auc"], metrics["test"]["intervals"]["auc"]
    names = sorted(auc, key=lambda name: -number(auc[name], -1))
    values = np.array([number(auc[name]) for name in names])
    limits = np.array([[number(v) for v in intervals[name][:2]] for name in names])
    published, remark = per_class_beside(metrics)
    figure, axis = plt.subplots(figsize=(10, 4.3), layout="constrained")
    at = np.arange(len(names))
    axis.bar(at, values - 0.5, bottom=0.5, width=0.62, color=FIRST, alpha=0.75, label="this run")
    axis.errorbar(at, values, yerr=error_bars(values, limits), fmt="none", ecolor="black", elinewidth=1.1, capsize=3,
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
