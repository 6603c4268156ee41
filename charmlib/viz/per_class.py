"""AUC of each class with its interval, beside published figures of the same kind of split."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np

from charmlib.evaluation.published import per_class_beside
from charmlib.viz.style import FIRST, GUIDE, OKABE_ITO, heading, readable, styled

_MARKERS = ("D", "s", "^", "v")


@styled
def plot_per_class(metrics: Mapping, *, title: str = "", note: str = ""):
    """Bars with 95 % intervals over patients; published figures as marks where they belong, else the reason why there are
    none. ``metrics`` is ``metrics.json``; returns the figure."""
    part = metrics["test"]
    names = sorted(part["auc"], key=lambda n: -(part["auc"][n] or -1))
    values = np.array([np.nan if part["auc"][n] is None else part["auc"][n] for n in names], float)
    limits = np.array([[np.nan if v is None else v for v in part["intervals"]["auc"][n][:2]] for n in names], float)
    published, remark = per_class_beside(dict(metrics))
    figure, axis = plt.subplots(figsize=(10, 4.3), layout="constrained")
    at = np.arange(len(names))
    axis.bar(at, values - 0.5, bottom=0.5, width=0.62, color=FIRST, alpha=0.75, label="this run")
    reach = np.nan_to_num(np.clip(np.stack([values - limits[:, 0], limits[:, 1] - values]), 0, None))
    axis.errorbar(at, values, yerr=reach, fmt="none", ecolor="black", elinewidth=1.1, capsize=3, label="95 % interval")
    if published is not None:
        for k, (system, row) in enumerate(published.iterrows()):
            axis.plot(at, row.reindex(names).to_numpy(float), _MARKERS[k % len(_MARKERS)], ms=6, mec="white", mew=0.6,
                      color=OKABE_ITO[1 + k % (len(OKABE_ITO) - 1)], label=system)
    axis.axhline(0.5, color=GUIDE, lw=1)
    axis.set_xticks(at, [readable(n) for n in names], rotation=35, ha="right")
    axis.set(ylabel="ROC-AUC", ylim=(min(0.45, np.nanmin(limits, initial=0.5) - 0.02), 1.0))
    axis.grid(axis="x", visible=False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    heading(figure, title, f"{note}. {remark}" if note else remark)
    return figure
