"""Calibration: whether the share of positives among predictions of probability p is p."""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit
from sklearn.metrics import brier_score_loss

from charmlib.evaluation.metrics import known, mean_over_classes


def fit_temperature(labels, logits) -> float:
    """One temperature T for all classes that minimises the log loss of sigmoid(logits / T) (Guo et al. 2017, section 4).

    Fitted on validation data. A single number leaves every ranking and so every AUC unchanged. Guo et al. scale a softmax,
    here it is one sigmoid per class. A constant shift of the logits, as asymmetric loss causes, remains.

    ``labels`` (0, 1 or NaN, left out) and ``logits`` are of shape (n_samples, n_classes). The temperature is in [0.01, 100];
    1.0 without known labels.
    """
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    there = ~np.isnan(labels)
    y, z = labels[there], logits[there]
    if not len(y):
        return 1.0

    def loss(log_t: float) -> float:
        scaled = z * np.exp(-log_t)
        return float(np.mean(np.maximum(scaled, 0) + np.log1p(np.exp(-np.abs(scaled))) - scaled * y))

    found = minimize_scalar(loss, bounds=(np.log(0.01), np.log(100.0)), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def reliability_curve(y, probability, *, bins: int = 10, strategy: str = "quantile"
                      ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean probability, share of positives and number of samples of each filled bin.

    Like scikit-learn's ``calibration_curve``, but with the counts. ``y`` and ``probability`` are of shape (n_samples,); the
    ``strategy`` is 'uniform' bins of equal width over [0, 1], or 'quantile' bins that hold equally many samples.
    """
    y, probability = np.asarray(y, np.float64), np.asarray(probability, np.float64)
    if strategy not in ("uniform", "quantile"):
        raise ValueError(f"strategy {strategy!r}: wanted 'uniform' or 'quantile'")
    if not len(y):
        return np.empty(0), np.empty(0), np.empty(0, int)
    inner = np.linspace(0, 1, bins + 1)
    edges = np.percentile(probability, inner * 100) if strategy == "quantile" else inner
    bin_of = np.searchsorted(edges[1:-1], probability)
    count = np.bincount(bin_of, minlength=bins)
    filled = count > 0
    mean = np.bincount(bin_of, weights=probability, minlength=bins)[filled] / count[filled]
    share = np.bincount(bin_of, weights=y, minlength=bins)[filled] / count[filled]
    return mean, share, count[filled]


def calibration_error(y, probability, *, bins: int = 15, strategy: str = "uniform") -> float:
    """Expected calibration error: the mean distance of probability and share of positives over the bins, weighted by their
    samples (Naeini et al. 2015; 15 equal bins as in Guo et al. 2017). NaN without samples."""
    mean, share, count = reliability_curve(y, probability, bins=bins, strategy=strategy)
    return float(np.abs(mean - share) @ count / count.sum()) if len(count) else float("nan")


def calibration(labels, logits, classes: Sequence[str], temperature: float = 1.0, normal_class: str = "") -> dict:
    """ECE and Brier score (mean squared error of the probability) by class and their means over findings, at a temperature.

    Brier scores of rare findings are small for any network: predicting the prevalence p scores p (1 - p).
    """
    labels, logits = np.asarray(labels), np.asarray(logits)
    ece, brier = {}, {}
    for c, name in enumerate(classes):
        y, score, _ = known(labels, logits, c)
        probability = expit(score.astype(np.float64) / temperature)
        ece[str(name)] = calibration_error(y, probability)
        brier[str(name)] = float(brier_score_loss(y, probability, pos_label=1)) if len(y) else float("nan")
    means = {f"mean_{key}": mean_over_classes(values, normal_class=normal_class, what=what, why="no labels")
             for key, values, what in (("ece", ece, "ECE"), ("brier", brier, "Brier score"))}
    return {"temperature": temperature, **means, "ece": ece, "brier": brier}
