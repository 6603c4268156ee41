"""Operating points: thresholds that are chosen on validation data and then kept, and the confusion matrix at them."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from scipy.special import expit

from charmlib.evaluation.metrics import checked, known

POINTS = ("youden", "f1", "sensitivity_0.90")
"""The operating points that training stores."""

COUNTS = ("tp", "fp", "fn", "tn")
RATES = ("sensitivity", "specificity", "precision", "f1")


def choose_thresholds(labels, logits, classes: Sequence[str], points: Sequence[str] = POINTS
                      ) -> dict[str, dict[str, float | None]]:
    """Operating point -> class -> threshold, from validation data.

    - ``youden``: the largest sensitivity + specificity - 1 (Youden 1950);
    - ``f1``: the largest F1 score;
    - ``sensitivity_0.90`` (any share): the highest threshold with at least this sensitivity.

    A threshold is a probability, and a prediction is positive if its own is at least that. Where probabilities saturate
    (neighbouring logits from about 23 on have the same one), the threshold is the logit itself, which is outside of 0 to 1; see
    :func:`called`. Of equally good thresholds the highest is taken. None for a class without positives or without negatives.

    ``labels`` (0, 1 or NaN) and ``logits`` are of shape (n_samples, n_classes). Raises ValueError for an unknown operating
    point; lists the known ones.
    """
    labels, logits, _ = checked(labels, logits, classes)
    columns = {str(name): known(labels, logits, c)[:2] for c, name in enumerate(classes)}
    return {point: {name: _chosen(rule, y, score.astype(np.float64)) if 0 < y.sum() < len(y) else None
                    for name, (y, score) in columns.items()} for point, rule in {p: _rule(p) for p in points}.items()}


def _chosen(rule: Callable, y: np.ndarray, score: np.ndarray) -> float:
    logit = rule(y, score)
    probability = float(expit(logit))
    below = np.nextafter(np.float32(logit), np.float32(-np.inf))
    return probability if expit(np.float64(below)) < probability else logit


def _rule(point: str) -> Callable[[np.ndarray, np.ndarray], float]:
    share = re.fullmatch(r"sensitivity_(\d*\.?\d+)", point)
    if share and 0 < float(share[1]) <= 1:
        return partial(_sensitivity, share=float(share[1]))
    rules = {"youden": _youden, "f1": _best_f1}
    if point not in rules:
        raise ValueError(f"unknown operating point '{point}'; known are youden, f1 and sensitivity_S with 0 < S <= 1, "
                         "such as sensitivity_0.95")
    return rules[point]


def _youden(y: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import roc_curve

    false, true, thresholds = roc_curve(y, score, drop_intermediate=False)
    return float(thresholds[int(np.argmax((true - false)[1:])) + 1])  # at the first point no image is positive


def _best_f1(y: np.ndarray, score: np.ndarray) -> float:
    from sklearn.metrics import precision_recall_curve

    precision, recall, thresholds = precision_recall_curve(y, score)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300))[:-1]
    return float(thresholds[np.flatnonzero(f1 == f1.max())[-1]])


def _sensitivity(y: np.ndarray, score: np.ndarray, share: float) -> float:
    from sklearn.metrics import roc_curve

    _, true, thresholds = roc_curve(y, score, drop_intermediate=False)
    return float(thresholds[int(np.argmax(true >= share - 1e-12))])


def called(logits, threshold: float) -> np.ndarray:
    """Whether each prediction is positive: its probability, in float64, is at least the threshold; for a threshold outside of 0
    to 1, its logit is."""
    logits = np.asarray(logits, np.float64)
    return (expit(logits) if 0 <= threshold <= 1 else logits) >= threshold


def confusion(y, logits, threshold: float) -> tuple[np.ndarray, ...]:
    """Masks (n,) of one class's true positives, false positives, false negatives and true negatives, as in :data:`COUNTS`."""
    positive, call = np.asarray(y) == 1, called(logits, threshold)
    return call & positive, call & ~positive, ~call & positive, ~call & ~positive


def rates(tp, fp, fn, tn) -> dict[str, np.ndarray]:
    """Sensitivity, specificity, precision and F1 from counts (numbers or arrays of one shape); NaN for 0 / 0."""
    tp, fp, fn, tn = (np.asarray(v, np.float64) for v in (tp, fp, fn, tn))
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"sensitivity": tp / (tp + fn), "specificity": tn / (tn + fp), "precision": tp / (tp + fp),
                "f1": np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)}


def at_thresholds(labels, logits, classes: Sequence[str], thresholds: Mapping[str, float | None]) -> dict[str, dict]:
    """Class -> threshold, the four counts and the :func:`rates` at it; only for classes with a threshold.

    ``labels`` and ``logits`` are of shape (n_samples, n_classes); ``thresholds`` are as of :func:`choose_thresholds`.
    """
    labels, logits, _ = checked(labels, logits, classes)
    out = {}
    for c, name in enumerate(map(str, classes)):
        if thresholds.get(name) is not None:
            y, score, _ = known(labels, logits, c)
            counts = [int(mask.sum()) for mask in confusion(y, score, thresholds[name])]
            out[name] = {"threshold": float(thresholds[name]), **dict(zip(COUNTS, counts)),
                         **{k: float(v) for k, v in rates(*counts).items()}}
    return out
