"""ROC-AUC and average precision per class and their means; labels may be NaN, a class without positives is named."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score


def _check(labels, scores, classes) -> tuple[np.ndarray, np.ndarray, list[str]]:
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must both be (n_samples, n_classes)")
    classes = [str(c) for c in classes] if classes is not None else [f"class {i}" for i in range(labels.shape[1])]
    if len(classes) != labels.shape[1]:
        raise ValueError(f"{len(classes)} class names for {labels.shape[1]} columns")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).any(1).sum()} samples have scores that are not finite")
    return labels, scores, classes


def _by_class(metric, labels, scores, classes) -> dict[str, float]:
    labels, scores, classes = _check(labels, scores, classes)
    out = {}
    for i, name in enumerate(classes):
        known = ~np.isnan(labels[:, i])
        y = labels[known, i]
        out[name] = float(metric(y, scores[known, i])) if 0 < y.sum() < len(y) else float("nan")
    return out


def auc_by_class(labels, scores, classes: Sequence[str] | None = None) -> dict[str, float]:
    """ROC-AUC of each class by scikit-learn; NaN for a class without positives or without negatives.

    Parameters
    ----------
    labels : array-like of shape (n_samples, n_classes)
        0, 1, or NaN for unknown (left out, class by class).
    scores : array-like of shape (n_samples, n_classes)
        Logits or probabilities; must be finite.

    Raises
    ------
    ValueError
        Shapes differ, or a score is not finite.
    """
    return _by_class(roc_auc_score, labels, scores, classes)


def ap_by_class(labels, scores, classes: Sequence[str] | None = None) -> dict[str, float]:
    """Average precision of each class by scikit-learn; otherwise as :func:`auc_by_class`."""
    return _by_class(average_precision_score, labels, scores, classes)


def undefined(by_class: dict[str, float]) -> list[str]:
    """The classes whose value is NaN."""
    return [name for name, value in by_class.items() if np.isnan(value)]


def mean_over_classes(by_class: dict[str, float], *, what: str = "AUC") -> float:
    """Unweighted mean over the defined classes; warns of the others by name; NaN if none is defined."""
    left_out = undefined(by_class)
    if left_out:
        warnings.warn(f"{what} is undefined for {', '.join(left_out)} (no positives or no negatives) and left out of "
                      f"the mean over {len(by_class)} classes", stacklevel=2)
    values = [v for v in by_class.values() if not np.isnan(v)]
    return float(np.mean(values)) if values else float("nan")


def mean_auc(labels, scores, classes: Sequence[str] | None = None) -> float:
    """Mean ROC-AUC over the classes, as the published figures are; see :func:`mean_over_classes`."""
    return mean_over_classes(auc_by_class(labels, scores, classes))


def summarize(labels, scores, classes: Sequence[str]) -> dict:
    """What ``metrics.json`` holds of a part: mean_auc, mean_ap, auc and ap by class, undefined classes."""
    auc, ap = auc_by_class(labels, scores, classes), ap_by_class(labels, scores, classes)
    return {"mean_auc": mean_over_classes(auc), "mean_ap": mean_over_classes(ap, what="average precision"),
            "auc": auc, "ap": ap, "undefined": undefined(auc)}
