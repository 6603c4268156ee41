"""ROC curves of all classes in one picture; ROC, precision-recall and reliability curves with one panel per class."""

import math
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit
from sklearn.metrics import precision_recall_curve, roc_curve

from charmlib.evaluation.calibration import calibration_error, reliability_curve
from charmlib.evaluation.intervals import precision_recall_bands, roc_bands
from charmlib.evaluation.metrics import auc_by_class, known
from charmlib.evaluation.runs import number
from charmlib.viz.style import FIRST, GUIDE, SECOND, class_style, heading, readable, styled


@styled
def plot_roc(predictions, *, title: str = "", note: str = ""):
    """All classes' curves with their AUC and number of positives in the legend; returns the figure.

    ``predictions`` are :class:`charmlib.evaluation.runs.Predictions`; ``note`` is printed under the title: split, images,
    patients.
    """
    aucs = auc_by_class(predictions.labels, predictions.logits, predictions.classes)
    findings = [aucs[predictions.classes[c]] for c in predictions.findings]
    defined = [v for v in findings if not np.isnan(v)]
    figure, axis = plt.subplots(figsize=(8.6, 5.7), layout="constrained")
    for i, name in enumerate(predictions.classes):
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

    ``part`` is the test part of ``metrics.json``.
    """
    operating = part.get("operating", {}).get(point, {})

    def draw(axis, name: str, y, score) -> None:
        false, true, _ = roc_curve(y, score)
        axis.plot(false, true, color=FIRST, lw=1.3)
        if name in operating:
            axis.plot(1 - operating[name]["specificity"], operating[name]["sensitivity"], "o", ms=5, color=SECOND)

    figure, axes, legend = _band_panels(predictions, part, "auc", roc_bands, draw, "ROC curve")
    for axis in axes:
        axis.plot([0, 1], [0, 1], color=GUIDE, lw=0.8, zorder=0)
        axis.set(yticks=[0, 0.5, 1], aspect="equal")
    if operating:
        legend.plot([], [], "o", ms=5, color=SECOND, ls="", label=f"{readable(point)} point\nof validation")
    return _label_panels(figure, legend, key="finding, positives\nAUC (95 % interval)", title=title, note=note,
                        x="false positive rate (1 - specificity)", y="true positive rate (sensitivity)")


@styled
def plot_precision_recall(predictions, part: Mapping, *, title: str = "", note: str = ""):
    """One panel per class: curve, 95 % band over patients, and the precision of chance; returns the figure.

    The precision axis is square-rooted. ``part`` is the test part of ``metrics.json``.
    """

    def draw(axis, name: str, y, score) -> None:
        precision, recall, _ = precision_recall_curve(y, score)
        axis.plot(recall[recall > 0], precision[recall > 0], color=FIRST, lw=1.2, drawstyle="steps-post")
        axis.axhline(y.mean(), color=GUIDE, lw=1, ls=":")

    figure, axes, legend = _band_panels(predictions, part, "ap", precision_recall_bands, draw, "precision")
    for axis in axes:
        _square_root_scale(axis, "y")
        axis.set_yticks([0, 0.1, 0.5, 1], ["0", "0.1", "0.5", "1"])
    legend.plot([], [], color=GUIDE, ls=":", label="share of positives\n(chance)")
    return _label_panels(figure, legend, key="finding, positives\nAP (95 % interval)", x="recall (sensitivity)", y="precision",
                        title=title, note=note)


@styled
def plot_reliability(predictions, temperature: float | None = 1.0, *, bins: int = 10, title: str = "", note: str = ""):
    """Bins of equally many images, as trained and at the temperature from validation (None: as trained only).

    Both axes are square-rooted, because most findings are rare. The numbers in a title are the expected calibration errors
    (15 equal bins) as trained, and at the temperature. Returns the figure.
    """
    series = [(1.0, FIRST, "o", "as trained"), *(
        [] if temperature is None else [(temperature, SECOND, "s", f"temperature {temperature:.2f}\n(from validation)")])]
    figure, axes, legend = _small_panels(len(predictions.classes), height=1.95)
    for c, axis in enumerate(axes):
        y, score, _ = known(predictions.labels, predictions.logits, c)
        errors, top = [], 0.0
        for t, colour, marker, _ in series:
            probability = expit(score.astype(np.float64) / t)
            mean, share, _ = reliability_curve(y, probability, bins=bins)
            axis.plot(mean, share, marker=marker, ms=3.5, lw=1.1, color=colour)
            errors.append(f"{calibration_error(y, probability):.3f}")
            top = max([top, *mean, *share])
        top = min(1.0, 1.08 * top) or 1.0
        ticks = _ticks(top)
        axis.plot([0, top], [0, top], color=GUIDE, lw=0.8, zorder=0)
        for which in ("x", "y"):
            _square_root_scale(axis, which)
            getattr(axis, f"set_{which}lim")(0, top)
            getattr(axis, f"set_{which}ticks")(ticks, [f"{v:g}" for v in ticks])
            getattr(axis, f"{which}axis").minorticks_off()
        axis.set_title(f"{readable(predictions.classes[c])}\n{', '.join(errors) if len(y) else 'no labels'}")
    for _, colour, marker, label in series:
        legend.plot([], [], marker=marker, ms=4, color=colour, label=label)
    legend.plot([], [], color=GUIDE, label="perfect")
    return _label_panels(figure, legend, key="finding\nECE" + (" of both" if len(series) > 1 else ""), title=title, note=note,
                        x="mean probability of a bin", y="share of positives in the bin")


def _band_panels(predictions, part: Mapping, metric: str, bands: Callable, draw: Callable, curve: str):
    """Figure, axes and legend: a panel a class, titled by its stored ``metric``, with the bands of a function, to
    which ``draw(axis, name, y, score)`` adds the curves."""
    classes, drawn = predictions.classes, bands(predictions.labels, predictions.logits, predictions.patients)
    figure, axes, legend = _small_panels(len(classes), sharex=True, sharey=True)
    for c, (name, axis) in enumerate(zip(classes, axes)):
        y, score, _ = known(predictions.labels, predictions.logits, c)
        axis.set(title=f"{readable(name)}\nno positives", xlim=(0, 1), ylim=(0, 1.01), xticks=[0, 0.5, 1])
        if 0 < y.sum() < len(y):
            axis.fill_between(*drawn[c], color=FIRST, alpha=0.22, lw=0)
            draw(axis, name, y, score)
            low, high, _ = map(number, part["intervals"][metric][name])
            limits = "" if np.isnan(low) else f" ({low:.2f} to {high:.2f})"
            axis.set_title(f"{readable(name)}, {int(y.sum()):,}\n{part[metric][name]:.3f}{limits}")
    legend.plot([], [], color=FIRST, label=curve)
    legend.fill_between([], [], color=FIRST, alpha=0.22, label="95 % band\n(patients)")
    return figure, axes, legend


def _small_panels(count: int, height: float = 2.05, **kwargs):
    """Figure and axes for ``count`` small panels, five in a row, and one blank panel after them for the legend."""
    rows = math.ceil((count + 1) / 5)
    figure, axes = plt.subplots(rows, 5, figsize=(10.3, height * rows + 0.5), squeeze=False, layout="constrained", **kwargs)
    for axis in axes.flat[count:]:
        axis.axis("off")
    return figure, axes.flat[:count], axes.flat[count]


def _label_panels(figure, legend, *, key: str, x: str, y: str, title: str = "", note: str = ""):
    """The legend of small panels in their blank one, titled by ``key``; common axis labels; heading. Returns the figure."""
    legend.legend(loc="center", title=key)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    return heading(figure, title, note)


def _square_root_scale(axis, which: str) -> None:
    """Make the ``x`` or ``y`` axis of probabilities square-rooted: rare findings are flat on a linear one."""

    # matplotlib 3.10 asks for values left of 0 during layout, and warns of them
    getattr(axis, f"set_{which}scale")("function", functions=(lambda values: np.sqrt(np.maximum(values, 0)), np.square))


def _ticks(top: float) -> list[float]:
    """0 and round shares up to ``top``, far enough apart on a square-rooted axis."""
    out = [0.0]
    for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0):
        if share <= top and np.sqrt(share / top) - np.sqrt(out[-1] / top) > 0.3:
            out.append(share)
    return out
