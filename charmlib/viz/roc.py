"""ROC curves of all classes in one picture."""

from __future__ import annotations

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import roc_curve

from charmlib.evaluation.metrics import auc_by_class
from charmlib.viz.style import class_style


def plot_roc(predictions, *, title: str = "", note: str = ""):
    """All classes' curves with their AUC and number of positives in the legend; returns the figure.

    Parameters
    ----------
    predictions : charmlib.evaluation.results.Predictions
    title, note : str
        ``note`` stands under the title: split, images, patients.
    """
    aucs = auc_by_class(predictions.labels, predictions.logits, predictions.classes)
    defined = [v for v in aucs.values() if not np.isnan(v)]
    figure, axis = plt.subplots(figsize=(8.6, 5.7), layout="constrained")
    for i in np.argsort([-np.nan_to_num(v, nan=-1.0) for v in aucs.values()], kind="stable"):
        name = predictions.classes[i]
        label = name.replace("_", " ")
        if np.isnan(aucs[name]):
            axis.plot([], [], label=f"  n/a  {label} (no positives)", **class_style(i))
            continue
        known = ~np.isnan(predictions.labels[:, i])
        y = predictions.labels[known, i]
        false, true, _ = roc_curve(y, predictions.logits[known, i])
        axis.plot(false, true, lw=1.5, label=f"{aucs[name]:.3f}  {label} ({int(y.sum()):,})", **class_style(i))
    axis.plot([0, 1], [0, 1], color="#bbbbbb", lw=1, zorder=0)
    axis.set(xlabel="false positive rate (1 - specificity)", ylabel="true positive rate (sensitivity)", xlim=(0, 1),
             ylim=(0, 1.01))
    axis.set_aspect("equal")
    axis.grid(alpha=0.25)
    mean = f"mean {np.mean(defined):.3f}" + (f" of {len(defined)}" if len(defined) < len(aucs) else "") if defined else ""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside center right", frameon=False, fontsize=10,
                  title=f"AUC, finding (positives)\n{mean}")
    figure.suptitle("\n".join([title, *textwrap.wrap(note, 115)]).strip(), fontsize=10.5)
    return figure
