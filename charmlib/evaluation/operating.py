"""Operating points: thresholds that are chosen on validation data and then kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit
from sklearn.metrics import roc_curve


def youden_thresholds(labels, logits, classes: Sequence[str]) -> dict[str, float | None]:
    """For each class the probability at which sensitivity + specificity - 1 is largest (Youden 1950).

    A prediction counts as positive from the threshold on. None for a class without positives or negatives.

    Parameters
    ----------
    labels, logits : array-like of shape (n_samples, n_classes)
        Validation data; labels 0, 1 or NaN.
    """
    labels, logits = np.asarray(labels, np.float64), np.asarray(logits, np.float64)
    out: dict[str, float | None] = {}
    for i, name in enumerate(classes):
        known = ~np.isnan(labels[:, i])
        y = labels[known, i]
        if not 0 < y.sum() < len(y):
            out[name] = None
            continue
        false, true, thresholds = roc_curve(y, logits[known, i], drop_intermediate=False)
        best = int(np.argmax((true - false)[1:])) + 1  # the first point calls nothing positive
        out[name] = float(expit(thresholds[best]))
    return out
