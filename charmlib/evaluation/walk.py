"""One class's ROC curve as a path that can be walked: where one stands, and which images change sides on the way."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import expit

from charmlib.evaluation.metrics import known
from charmlib.evaluation.operating import figures


class Stand(NamedTuple):
    """A point of the curve: everything from ``threshold`` on is called positive."""

    threshold: float
    tp: int
    fp: int
    fn: int
    tn: int
    sensitivity: float
    specificity: float
    precision: float
    f1: float


class Walk:
    """The curve of a class; point 0 calls nothing positive, point ``last`` everything.

    ``rows`` are the samples with a known label, by descending probability; ``y`` and ``probability`` are theirs.

    Parameters
    ----------
    labels, logits : array-like of shape (n_samples, n_classes)
    c : int
        The class.
    """

    def __init__(self, labels, logits, c: int):
        y, score, rows = known(np.asarray(labels), np.asarray(logits), c)
        order = np.argsort(-score, kind="stable")
        self.y, self.rows = (y == 1)[order], rows[order]
        self.probability = expit(score[order].astype(np.float64))
        new = np.flatnonzero(np.diff(self.probability)) + 1
        self.ends = np.concatenate([[0], new, [len(order)]]) if len(order) else np.zeros(1, int)
        """Samples called positive at each point: whole groups of tied probabilities."""
        self.tp = np.concatenate([[0], np.cumsum(self.y)])[self.ends]
        self.fp = self.ends - self.tp

    @property
    def last(self) -> int:
        return len(self.ends) - 1

    def stand(self, point: int) -> Stand:
        """Threshold, counts and figures at a point."""
        tp, fp = int(self.tp[point]), int(self.fp[point])
        fn, tn = int(self.tp[-1]) - tp, int(self.fp[-1]) - fp
        threshold = float(self.probability[self.ends[point] - 1]) if point else float("inf")
        values = figures(tp, fp, fn, tn)
        return Stand(threshold, tp, fp, fn, tn, *(float(values[k]) for k in ("sensitivity", "specificity", "precision", "f1")))

    def at_threshold(self, threshold: float) -> int:
        """The point that calls exactly the samples with a probability of at least ``threshold``."""
        return int(np.searchsorted(self.ends, np.searchsorted(-self.probability, -threshold, side="right")))

    def stations(self, count: int = 201) -> np.ndarray:
        """Points, ascending and different, that are evenly spaced along the curve (steps right and up count alike)."""
        length = self.tp / max(self.tp[-1], 1) + self.fp / max(self.fp[-1], 1)
        return np.unique(np.searchsorted(length, np.linspace(0, length[-1], count) - 1e-12))

    def between(self, start: int, end: int) -> np.ndarray:
        """Places (in ``rows``) of the samples that change sides from one point to another, nearest to the new one first."""
        low, high = sorted((self.ends[start], self.ends[end]))
        places = np.arange(low, high)
        return places[::-1] if end > start else places

    def by_error(self, which: str = "all", point: int = 0) -> np.ndarray:
        """Places sorted by the distance of the probability from the label, the worst first.

        ``which``: 'all'; or of those at a point of the curve, 'missed' (positives that are not called) or 'false alarms'
        (negatives that are).
        """
        call = np.arange(len(self.y)) < self.ends[point]
        keep = {"all": np.ones(len(self.y), bool), "missed": self.y & ~call, "false alarms": ~self.y & call}[which]
        places = np.flatnonzero(keep)
        return places[np.argsort(-np.abs(self.y - self.probability)[keep], kind="stable")]
