"""Intervals of classes that few patients have, where a bootstrap over patients is too narrow: one patient gives no spread.

Below :data:`FEW` patients the bootstrap's limits are widened. AUC, average precision and sensitivity are means over positive
images of values between 0 and 1: the share of negatives scored below, the precision at the image's score, whether it is
called positive.

- One run: to the exact binomial limits (Clopper and Pearson 1934) of n trials for n patients, for the AUC of 2 n trials. Its
  values spread at most half as much as a coin's, A^2 (1 - A) / (1 + A) <= A (1 - A) / 2 (Hanley and McNeil 1982, exponential
  scores).
- The paired difference of two runs: to Student's t over the patients' mean differences. With one patient, to the limits of two
  unpaired runs.
- A mean over classes: by the squares of what its classes gained (method of variance estimates recovery, Zou and Donner 2008).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import scipy  # loads scipy.stats at its first use

from charmlib.evaluation.intervals import LEVEL, Interval, interval, intervals, mean_of_defined
from charmlib.evaluation.metrics import known
from charmlib.evaluation.operating import called

FEW = 15
"""Patients of a class below which the bootstrap interval is too narrow."""
TRIALS = {"auc": 2, "ap": 1, "sensitivity": 1}
"""Binomial trials a patient."""


def patients_with(labels, patients, classes: Sequence[str]) -> dict[str, int]:
    """Class -> number of patients with a positive image. ``labels`` (n_samples, n_classes), ``patients`` (n_samples,)."""
    labels, patients = np.asarray(labels), np.asarray(patients)
    return {str(name): len(np.unique(patients[labels[:, c] == 1])) for c, name in enumerate(classes)}


def widened(found: Interval, figure: str, value: float, patients: int) -> Interval:
    """The interval of one class, which ``patients`` have; see the module. ``figure``: a key of :data:`TRIALS`."""
    if not 0 < patients < FEW or np.isnan(found.low):
        return found
    low, high = _binomial(value, TRIALS[figure] * patients)
    return Interval(float(np.fmin(found.low, low)), float(np.fmax(found.high, high)), found.undefined)


def widened_by_class(drawn: np.ndarray, figure: str, values: Mapping[str, float], patients: Mapping[str, int]
                     ) -> dict[str, Interval]:
    """The interval of each class: resamples ``drawn`` (resamples, n_classes), ``values`` and ``patients`` by class."""
    return {name: widened(found, figure, value, patients[name]) for found, (name, value) in
            zip(intervals(drawn), values.items(), strict=True)}


def mean_interval(drawn: np.ndarray, values: Sequence[float], limits: Sequence[Interval], least: float = 0.0) -> Interval:
    """The interval of the mean over classes: ``drawn`` (resamples, n_classes), values and widened limits of those classes.

    ``least`` is the smallest possible value, -1 of a difference; the largest is 1.
    """
    out, values = interval(mean_of_defined(drawn)), np.asarray(values, float)
    if not (~np.isnan(values)).any() or np.isnan(out.low):
        return out
    own_limits = intervals(drawn)
    gained = [np.nansum([max((value - wide[side]) ** 2 - (value - own[side]) ** 2, 0) for value, wide, own in
                         zip(values, limits, own_limits)]) for side in (0, 1)]
    mean, count = float(np.nanmean(values)), int((~np.isnan(values)).sum())
    low, high = (mean + sign * np.sqrt(max(sign * (out[side] - mean), 0) ** 2 + gained[side] / count**2)
                 for side, sign in ((0, -1), (1, 1)))
    return Interval(float(max(min(low, out.low), least)), float(min(max(high, out.high), 1)), out.undefined)


def widened_difference(found: Interval, figure: str, first: np.ndarray, second: np.ndarray, patients: np.ndarray) -> Interval:
    """The interval of second minus first in one class: :func:`values_of_positives` of both, and the images' patients."""
    _, patient = np.unique(patients, return_inverse=True)
    count = int(patient.max(initial=-1)) + 1
    if not 0 < count < FEW or np.isnan(found.low):
        return found
    difference = second - first
    middle = difference.mean()
    if count == 1:
        one, two = (_binomial(values.mean(), TRIALS[figure]) for values in (first, second))
        low = middle - np.hypot(second.mean() - two[0], one[1] - first.mean())
        high = middle + np.hypot(two[1] - second.mean(), first.mean() - one[0])
    else:
        error = np.sqrt(count / (count - 1) * (np.bincount(patient, difference - middle) ** 2).sum()) / len(difference)
        low, high = middle + np.array([-1, 1]) * scipy.stats.t.ppf((1 + LEVEL) / 2, count - 1) * error
    return Interval(max(float(np.fmin(found.low, low)), -1.0), min(float(np.fmax(found.high, high)), 1.0), found.undefined)


def values_of_positives(figure: str, labels, logits, c: int, threshold: float | None = None) -> np.ndarray:
    """The values whose mean over the positive images of class ``c`` is 'auc', 'ap' or 'sensitivity' (at a probability)."""
    y, score, _ = known(np.asarray(labels), np.asarray(logits), c)
    positive, score = y == 1, score.astype(np.float64)
    if figure == "sensitivity":
        return called(score[positive], threshold).astype(float)
    if figure == "auc":
        negatives = np.sort(score[~positive])
        upto = sum(np.searchsorted(negatives, score[positive], side) for side in ("left", "right")) / 2  # ties half
        return upto / max(len(negatives), 1)
    return scipy.stats.rankdata(-score[positive], "max") / scipy.stats.rankdata(-score, "max")[positive]


def auc(labels, logits, c: int) -> float:
    """ROC-AUC of class ``c``, the mean of :func:`values_of_positives`; NaN without positives or negatives. Scikit-learn's
    checks its input at length, which takes too long for hundreds of runs."""
    y = np.asarray(labels)[:, c]
    return float(values_of_positives("auc", labels, logits, c).mean()) if (y == 1).any() and (y == 0).any() else float("nan")


def note(patients: Mapping[str, int]) -> str:
    """Which classes have widened intervals; '' if none has."""
    rare = [f"{name} ({count})" for name, count in patients.items() if 0 < count < FEW]
    return f"Intervals are widened for classes of fewer than {FEW} patients: {', '.join(rare)}" if rare else ""


def _binomial(share: float, trials: float) -> tuple[float, float]:
    hits, tail = share * trials, (1 - LEVEL) / 2
    return (float(scipy.stats.beta.ppf(tail, hits, trials - hits + 1)) if hits > 0 else 0.0,
            float(scipy.stats.beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0)
