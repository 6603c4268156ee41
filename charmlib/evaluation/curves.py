"""Pointwise interval bands of ROC and precision-recall curves, by bootstrap over patients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from charmlib.evaluation.intervals import LEVEL, SEED, Ranking, draws, enough_patients
from charmlib.evaluation.metrics import known

POINTS = np.linspace(0, 1, 101)


class Band(NamedTuple):
    """``low`` and ``high`` (n,) at each ``x`` (n,); all NaN where there is nothing to resample."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


def roc_bands(labels, scores, patients, *, resamples: int = 300, seed: int = SEED) -> list[Band]:
    """For each class the interval of the sensitivity at each false positive rate (linear between the curve's points)."""
    return _bands(labels, scores, patients, _sensitivity_at, resamples, seed)


def precision_recall_bands(labels, scores, patients, *, resamples: int = 300, seed: int = SEED) -> list[Band]:
    """For each class the interval of the precision at each recall (of the first threshold that reaches it)."""
    return _bands(labels, scores, patients, _precision_at, resamples, seed)


def _bands(labels, scores, patients, curve, resamples: int, seed: int) -> list[Band]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    nothing = Band(POINTS, np.full(len(POINTS), np.nan), np.full(len(POINTS), np.nan))
    if not enough_patients(patients):
        return [nothing] * labels.shape[1]
    rankings = [Ranking(*known(labels, scores, c, patient), len(names)) for c in range(labels.shape[1])]
    found: list[list[np.ndarray]] = [[] for _ in rankings]
    for weights in draws(len(names), resamples, seed, int(np.clip(2**24 // len(patient), 8, 64))):
        for ranking, curves in zip(rankings, found):
            positives, above, upto, rest = ranking.totals(weights)
            hits = np.cumsum(positives, axis=0)
            curves += [curve(hits[:, r], above[:, r], upto[:, r], rest[r]) for r in range(weights.shape[1])
                       if len(hits) and hits[-1, r] > 0 and rest[r] > 0]
    limits = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    return [Band(POINTS, *np.quantile(np.stack(curves), limits, axis=0)) if len(curves) > 1 else nothing for curves in found]


def _sensitivity_at(hits: np.ndarray, above: np.ndarray, upto: np.ndarray, negatives: float) -> np.ndarray:
    before = np.concatenate([[0.0], hits[:-1]])  # level from one group with positives to the next, then up (or aslant) to it
    false = np.concatenate([[0.0], np.stack([above, upto], 1).ravel() / negatives, [1.0]])
    return np.interp(POINTS, false, np.concatenate([[0.0], np.stack([before, hits], 1).ravel() / hits[-1], [1.0]]))


def _precision_at(hits: np.ndarray, above: np.ndarray, upto: np.ndarray, negatives: float) -> np.ndarray:
    recall = hits / hits[-1]
    first = np.searchsorted(recall, np.maximum(POINTS, recall[recall > 0][0]) - 1e-12)
    return (hits / np.maximum(hits + upto, 1))[first]
