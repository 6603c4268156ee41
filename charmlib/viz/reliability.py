"""Reliability diagrams: the share of positives over the predicted probability, one panel per class."""

import numpy as np
from scipy.special import expit

from charmlib.evaluation.calibration import calibration_error, reliability_curve
from charmlib.evaluation.metrics import known
from charmlib.viz.style import FIRST, GUIDE, SECOND, label_panels, readable, small_panels, square_root_scale, styled


@styled
def plot_reliability(predictions, temperature: float | None = 1.0, *, bins: int = 10, title: str = "", note: str = ""):
    """Bins of equally many images, as trained and at the temperature from validation (None: as trained only).

    Both axes are square-rooted, because most findings are rare. The numbers in a title are the expected calibration errors
    (15 equal bins) as trained, and at the temperature. Returns the figure.
    """
    series = [(1.0, FIRST, "o", "as trained")]
    if temperature is not None:
        series.append((temperature, SECOND, "s", f"temperature {temperature:.2f}\n(from validation)"))
    figure, axes, legend = small_panels(len(predictions.classes), size=(2.06, 1.95))
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
            square_root_scale(axis, which)
            getattr(axis, f"set_{which}lim")(0, top)
            getattr(axis, f"set_{which}ticks")(ticks, [f"{v:g}" for v in ticks])
            getattr(axis, f"{which}axis").minorticks_off()
        axis.set_title(f"{readable(predictions.classes[c])}\n{', '.join(errors) if len(y) else 'no labels'}")
    for _, colour, marker, label in series:
        legend.plot([], [], marker=marker, ms=4, color=colour, label=label)
    legend.plot([], [], color=GUIDE, label="perfect")
    return label_panels(figure, legend, key="finding\nECE" + (" of both" if len(series) > 1 else ""), title=title, note=note,
                        x="mean probability of a bin", y="share of positives in the bin")


def _ticks(top: float) -> list[float]:
    """0 and round shares up to ``top``, far enough apart on a square-rooted axis."""
    out = [0.0]
    for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0):
        if share <= top and np.sqrt(share / top) - np.sqrt(out[-1] / top) > 0.3:
            out.append(share)
    return out
