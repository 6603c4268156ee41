"""ROC curves: all classes in one picture, and a panel a class with its interval band."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_curve

from charmlib.evaluation.curves import roc_bands
from charmlib.evaluation.metrics import auc_by_class, known
from charmlib.viz.style import FIRST, GUIDE, SECOND, class_style, heading, readable, small_panels, styled


@styled
def plot_roc(predictions, *, title: str = "", note: str = ""):
    """All classes' curves with their AUC and number of positives in the legend; returns the figure.

    Parameters
    ----------
    predictions : charmlib.evaluation.runs.Predictions
    title, note : str
        ``note`` stands under the title: split, images, patients.
    """
    aucs = auc_by_class(predictions.labels, predictions.logits, predictions.classes)
    defined = [v for v in aucs.values() if not np.isnan(v)]
    figure, axis = plt.subplots(figsize=(8.6, 5.7), layout="constrained")
    for i in np.argsort([-np.nan_to_num(v, nan=-1.0) for v in aucs.values()], kind="stable"):
        name = predictions.classes[i]
        if np.isnan(aucs[name]):
            axis.plot([], [], label=f"  n/a  {readable(name)} (no positives)", **class_style(i))
            continue
        y, score, _ = known(predictions.labels, predictions.logits, i)
        false, true, _ = roc_curve(y, score)
        axis.plot(false, true, lw=1.5, label=f"{aucs[name]:.3f}  {readable(name)} ({int(y.sum()):,})", **class_style(i))
    axis.plot([0, 1], [0, 1], color=GUIDE, lw=1, zorder=0)
    axis.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)", xlim=(0, 1),
             ylim=(0, 1.01))
    axis.set_aspect("equal")
    mean = f"mean {np.mean(defined):.3f}" + (f" of {len(defined)}" if len(defined) < len(aucs) else "") if defined else ""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside center right", fontsize=10,
                  title=f"AUC, finding (positives)\n{mean}")
    heading(figure, title, note)
    return figure


@styled
def plot_roc_bands(predictions, part: Mapping, *, point: str = "youden", title: str = "", note: str = ""):
    """A panel a class: curve, 95 % band over patients, and the operating point that validation chose; returns the figure.

    ``part`` is the test part of ``metrics.json``; panels are ordered by AUC.
    """
    bands = roc_bands(predictions.labels, predictions.logits, predictions.patients)
    operating = part.get("operating", {}).get(point, {})
    order = sorted(range(len(predictions.classes)), key=lambda c: -(part["auc"][predictions.classes[c]] or -1))
    figure, axes, legend = small_panels(len(order), sharex=True, sharey=True)
    for c, axis in zip(order, axes):
        name = predictions.classes[c]
        low, high, _ = part["intervals"]["auc"][name]
        y, score, _ = known(predictions.labels, predictions.logits, c)
        axis.plot([0, 1], [0, 1], color=GUIDE, lw=0.8, zorder=0)
        if 0 < y.sum() < len(y):
            false, true, _ = roc_curve(y, score)
            axis.fill_between(*bands[c], color=FIRST, alpha=0.22, lw=0)
            axis.plot(false, true, color=FIRST, lw=1.3)
            if name in operating:
                axis.plot(1 - operating[name]["specificity"], operating[name]["sensitivity"], "o", ms=5, color=SECOND)
            limits = f" ({low:.2f} to {high:.2f})" if low is not None and low == low else ""
            axis.set_title(f"{readable(name)}, {int(y.sum()):,}\n{part['auc'][name]:.3f}{limits}")
        else:
            axis.set_title(f"{readable(name)}\nno positives")
        axis.set(xlim=(0, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        axis.set_aspect("equal")
    legend.plot([], [], color=FIRST, label="ROC curve")
    legend.fill_between([], [], color=FIRST, alpha=0.22, label="95 % band\n(patients)")
    if operating:
        legend.plot([], [], "o", ms=5, color=SECOND, ls="", label=f"{readable(point)} point\nof validation")
    legend.legend(loc="center", title="finding, positives\nAUC (95 % interval)")
    figure.supxlabel("false positive rate (1 - specificity)", fontsize=9)
    figure.supylabel("true positive rate (sensitivity)", fontsize=9)
    heading(figure, title, note)
    return figure
