"""Reliability: the share of positives among images of about the same probability, a panel a class."""

from __future__ import annotations

import numpy as np
from scipy.special import expit

from charmlib.evaluation.calibration import calibration_error, reliability_curve
from charmlib.evaluation.metrics import known
from charmlib.viz.style import FIRST, GUIDE, SECOND, heading, readable, small_panels, square_root_scale, styled


@styled
def plot_calibration(predictions, temperature: float | None = 1.0, *, bins: int = 10, title: str = "", note: str = ""):
    """Bins of equally many images, as trained and at the temperature of the validation part (None: there was none); returns the
    figure.

    Both axes are square-rooted, because most findings are rare. The number in a title is the expected calibration error
    (15 equal bins) as trained, and at the temperature.
    """
    figure, axes, legend = small_panels(len(predictions.classes), size=(2.06, 1.95))
    for c, axis in enumerate(axes):
        y, score, _ = known(predictions.labels, predictions.logits, c)
        errors, top = [], 0.0
        for t, colour, marker in ((1.0, FIRST, "o"), (temperature, SECOND, "s"))[:1 if temperature is None else 2]:
            probability = expit(score.astype(np.float64) / t)
            mean, share, _ = reliability_curve(y, probability, bins=bins)
            axis.plot(mean, share, marker=marker, ms=3.5, lw=1.1, color=colour)
            errors.append(calibration_error(y, probability))
            top = max(top, *mean, *share) if len(mean) else top
        top = min(1.0, 1.08 * top) or 1.0
        axis.plot([0, top], [0, top], color=GUIDE, lw=0.8, zorder=0)
        for which in ("x", "y"):
            square_root_scale(axis, which)
            getattr(axis, f"set_{which}lim")(0, top)
            ticks = _ticks(top)
            getattr(axis, f"set_{which}ticks")(ticks, [f"{v:g}" for v in ticks])
            getattr(axis, f"{which}axis").minorticks_off()
        axis.set_title(f"{readable(predictions.classes[c])}\n{', '.join(f'{e:.3f}' for e in errors)}" if len(y) else
                       f"{readable(predictions.classes[c])}\nno labels")
    legend.plot([], [], marker="o", ms=4, color=FIRST, label="as trained")
    if temperature is not None:
        legend.plot([], [], marker="s", ms=4, color=SECOND, label=f"temperature {temperature:.2f}\n(from validation)")
    legend.plot([], [], color=GUIDE, label="perfect")
    legend.legend(loc="center", title="finding\nECE" + (" of both" if temperature is not None else ""))
    figure.supxlabel("mean probability of a bin", fontsize=9)
    figure.supylabel("share of positives in it", fontsize=9)
    heading(figure, title, note)
    return figure


def _ticks(top: float) -> list[float]:
    """0 and round shares up to ``top``, far enough apart on a square-rooted axis."""
    out = [0.0]
    for share in (0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0):
        if share <= top and np.sqrt(share / top) - np.sqrt(out[-1] / top) > 0.3:
            out.append(share)
    return out
