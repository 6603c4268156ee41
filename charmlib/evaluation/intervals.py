"""Intervals by bootstrap over patients: images of one patient are not independent."""

from __future__ import annotations

import numpy as np


def auc_resamples(labels, scores, patients, *, resamples: int = 1000, seed: int = 85) -> np.ndarray:
    """ROC-AUC of each class in resamples of patients with replacement.

    A resample gives each image the number of times its patient was drawn as its weight; scores are sorted once a
    class, tied scores count half. Equal to scikit-learn's weighted AUC.

    Parameters
    ----------
    labels, scores : array-like of shape (n_samples, n_classes)
        Labels 0, 1 or NaN (left out).
    patients : array-like of shape (n_samples,)

    Returns
    -------
    array of shape (resamples, n_classes); NaN where a resample has no positives or no negatives of a class.
    """
    labels, scores = np.asarray(labels, np.float64), np.asarray(scores, np.float64)
    _, patient = np.unique(np.asarray(patients), return_inverse=True)
    count = patient.max() + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    out = np.full((resamples, labels.shape[1]), np.nan)
    for c in range(labels.shape[1]):
        known = ~np.isnan(labels[:, c])
        order = np.argsort(scores[known, c], kind="stable")
        y = labels[known, c][order] == 1
        who = patient[known][order]
        value = scores[known, c][order]
        group = np.concatenate([[0], np.cumsum(np.diff(value) != 0)])  # ties share a group
        positives, positive_group = who[y], group[y]
        first = np.searchsorted(group, np.arange(group[-1] + 1) if len(group) else [])
        for r in range(resamples):
            weight = draws[r, who].astype(np.float64)
            negative = np.where(y, 0.0, weight)
            by_group = np.add.reduceat(negative, first) if len(first) else negative
            below = np.cumsum(by_group) - by_group / 2  # negatives below, ties half
            w = draws[r, positives]
            pairs = w.sum() * by_group.sum()
            if pairs > 0:
                out[r, c] = (w * below[positive_group]).sum() / pairs
    return out


def auc_interval(labels, scores, patients, *, level: float = 0.95, resamples: int = 200, seed: int = 85
                 ) -> tuple[float, float]:
    """Percentile interval of the mean AUC over classes, clustered by patient; a resample's undefined classes are left
    out of its mean. NaN for a single patient."""
    if len(np.unique(np.asarray(patients))) < 2:
        return float("nan"), float("nan")
    samples = auc_resamples(labels, scores, patients, resamples=resamples, seed=seed)
    defined = ~np.isnan(samples)
    keep = defined.any(1)
    if not keep.any():
        return float("nan"), float("nan")
    means = np.where(defined, samples, 0).sum(1)[keep] / defined.sum(1)[keep]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
