"""ROC and precision-recall curves: all classes in one picture, and one panel per class with its interval band."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import precision_recall_curve, roc_curve

from charmlib.evaluation.intervals import Band, precision_recall_bands, roc_bands
from charmlib.evaluation.metrics import auc_by_class, known
from charmlib.evaluation.runs import number
from charmlib.viz.style import (
    FIRST,
    GUIDE,
    SECOND,
    class_style,
    heading,
    label_panels,
    readable,
    small_panels,
    square_root_scale,
    styled,
)


@styled
def plot_roc(predictions, *, title: str = "", note: str = ""):
    """All classes' curves with their AUC and number of positives in the legend; returns the figure.

    Parameters
    ----------
    predictions : charmlib.evaluation.runs.Predictions
    title, note : str
        ``note`` is printed under the title: split, images, patients.
    """
    aucs = auc_by_class(predictions.labels, predictions.logits, predictions.classes)
    findings = [aucs[predictions.classes[c]] for c in predictions.findings]
    defined = [v for v in findings if not np.isnan(v)]
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
             ylim=(0, 1.01), aspect="equal")
    mean = f"mean {np.mean(defined):.3f}" + (f" of {len(defined)}" if len(defined) < len(aucs) else "") if defined else ""
    mean += " findings" if mean and len(findings) < len(aucs) else ""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside center right", fontsize=10,
                  title=f"AUC, finding (positives)\n{mean}")
    return heading(figure, title, note)


@styled
def plot_roc_bands(predictions, part: Mapping, *, point: str = "youden", title: str = "", note: str = ""):
    """One panel per class: curve, 95 % band over patients, and the operating point from validation; returns the figure.

    ``part`` is the test part of ``metrics.json``; panels are in order of AUC.
    """
    operating = part.get("operating", {}).get(point, {})

    def draw(axis, name: str, y, score) -> None:
        false, true, _ = roc_curve(y, score)
        axis.plot(false, true, color=FIRST, lw=1.3)
        if name in operating:
            axis.plot(1 - operating[name]["specificity"], operating[name]["sensitivity"], "o", ms=5, color=SECOND)

    bands = roc_bands(predictions.labels, predictions.logits, predictions.patients)
    figure, axes, legend = _band_panels(predictions, part, "auc", bands, draw, "ROC curve")
    for axis in axes:
        axis.plot([0, 1], [0, 1], color=GUIDE, lw=0.8, zorder=0)
        axis.set(yticks=[0, 0.5, 1], aspect="equal")
    if operating:
        legend.plot([], [], "o", ms=5, color=SECOND, ls="", label=f"{readable(point)} point\nof validation")
    return label_panels(figure, legend, key="finding, positives\nAUC (95 % interval)", title=title, note=note,
                        x="false positive rate (1 - specificity)", y="true positive rate (sensitivity)")


@styled
def plot_precision_recall(predictions, part: Mapping, *, title: str = "", note: str = ""):
    """One panel per class: curve, 95 % band over patients, and the precision of chance; returns the figure.

    The precision axis is square-rooted. ``part`` is the test part of ``metrics.json``; panels are in order of AP.
    """

    def draw(axis, name: str, y, score) -> None:
        precision, recall, _ = precision_recall_curve(y, score)
        axis.plot(recall[recall > 0], precision[recall > 0], color=FIRST, lw=1.2, drawstyle="steps-post")
        axis.axhline(y.mean(), color=GUIDE, lw=1, ls=":")

    bands = precision_recall_bands(predictions.labels, predictions.logits, predictions.patients)
    figure, axes, legend = _band_panels(predictions, part, "ap", bands, draw, "precision")
    for axis in axes:
        square_root_scale(axis, "y")
        axis.set_yticks([0, 0.1, 0.5, 1], ["0", "0.1", "0.5", "1"])
    legend.plot([], [], color=GUIDE, ls=":", label="share of positives\n(chance)")
    return label_panels(figure, legend, key="finding, positives\nAP (95 % interval)", x="recall (sensitivity)", y="precision",
                        title=title, note=note)


def _band_panels(predictions, part: Mapping, metric: str, bands: Sequence[Band], draw: Callable, curve: str):
    """Figure, axes and legend: panels by descending ``metric`` with their bands, to which ``draw(axis, name, y, score)`` adds
    the curves, titled by the stored value."""
    classes = predictions.classes
    order = sorted(range(len(classes)), key=lambda c: -number(part[metric][classes[c]], -1))
    figure, axes, legend = small_panels(len(order), sharex=True, sharey=True)
    for c, axis in zip(order, axes):
        name = classes[c]
        y, score, _ = known(predictions.labels, predictions.logits, c)
        axis.set(title=f"{readable(name)}\nno positives", xlim=(0, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1])
        if 0 < y.sum() < len(y):
            axis.fill_between(*bands[c], color=FIRST, alpha=0.22, lw=0)
            draw(axis, name, y, score)
            low, high, _ = map(number, part["intervals"][metric][name])
            limits = "" if np.isnan(low) else f" ({low:.2f} to {high:.2f})"
            axis.set_title(f"{readable(name)}, {int(y.sum()):,}\n{part[metric][name]:.3f}{limits}")
    legend.plot([], [], color=FIRST, label=curve)
    legend.fill_between([], [], color=FIRST, alpha=0.22, label="95 % band\n(patients)")
    return figure, axes, legend
