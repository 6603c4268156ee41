"""Precision against recall, a panel a class: what ROC curves hide where findings are rare."""

from __future__ import annotations

from collections.abc import Mapping

from sklearn.metrics import precision_recall_curve

from charmlib.evaluation.curves import precision_recall_bands
from charmlib.evaluation.metrics import known
from charmlib.viz.style import FIRST, GUIDE, heading, readable, small_panels, square_root_scale, styled


@styled
def plot_precision_recall(predictions, part: Mapping, *, title: str = "", note: str = ""):
    """Curve, 95 % band over patients, and the share of positives that chance would give; the precision axis is square-rooted.
    Returns the figure.

    ``part`` is the test part of ``metrics.json``; panels are ordered by average precision.
    """
    bands = precision_recall_bands(predictions.labels, predictions.logits, predictions.patients)
    order = sorted(range(len(predictions.classes)), key=lambda c: -(part["ap"][predictions.classes[c]] or -1))
    figure, axes, legend = small_panels(len(order), sharex=True, sharey=True)
    for c, axis in zip(order, axes):
        name = predictions.classes[c]
        y, score, _ = known(predictions.labels, predictions.logits, c)
        square_root_scale(axis, "y")
        axis.set(xlim=(0, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1])
        axis.set_yticks([0, 0.1, 0.5, 1], ["0", "0.1", "0.5", "1"])
        if not 0 < y.sum() < len(y):
            axis.set_title(f"{readable(name)}\nno positives")
            continue
        precision, recall, _ = precision_recall_curve(y, score)
        low, high, _ = part["intervals"]["ap"][name]
        axis.fill_between(*bands[c], color=FIRST, alpha=0.22, lw=0)
        precision, recall = precision[recall > 0], recall[recall > 0]
        axis.plot(recall, precision, color=FIRST, lw=1.2, drawstyle="steps-post")
        axis.axhline(y.mean(), color=GUIDE, lw=1, ls=":")
        limits = f" ({low:.2f} to {high:.2f})" if low is not None and low == low else ""
        axis.set_title(f"{readable(name)}, {int(y.sum()):,}\n{part['ap'][name]:.3f}{limits}")
    legend.plot([], [], color=FIRST, label="precision")
    legend.fill_between([], [], color=FIRST, alpha=0.22, label="95 % band\n(patients)")
    legend.plot([], [], color=GUIDE, ls=":", label="share of positives\n(chance)")
    legend.legend(loc="center", title="finding, positives\nAP (95 % interval)")
    figure.supxlabel("recall (sensitivity)", fontsize=9)
    figure.supylabel("precision", fontsize=9)
    heading(figure, title, note)
    return figure
