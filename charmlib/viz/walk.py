"""A walk along one class's ROC curve: counts and rates at each point, and the images that change sides between points."""

import numpy as np
from scipy.special import expit

from charmlib.evaluation.metrics import known
from charmlib.evaluation.operating import COUNTS, rates

ORDERS = ("largest error", "false negatives", "false positives")
"""Ways to list images; see :meth:`Walk.by_error`."""


class Walk:
    """The curve of a class: at point 0 no sample is called positive, at point ``last`` all are.

    ``rows`` are the samples with a known label, by descending probability; ``y`` and ``probability`` are in their order.
    ``labels`` and ``logits`` are of shape (n_samples, n_classes), ``c`` is the index of the class.
    """

    def __init__(self, labels, logits, c: int):
        y, score, rows = known(np.asarray(labels), np.asarray(logits), c)
        order = np.argsort(-score, kind="stable")
        self.y, self.rows = (y == 1)[order], rows[order]
        self.probability = expit(score[order].astype(np.float64))
        self.ends = np.unique(np.concatenate([[0], np.flatnonzero(np.diff(self.probability)) + 1, [len(order)]]))
        """Number of samples called positive at each point: whole groups of tied probabilities."""
        self.tp = np.concatenate([[0], np.cumsum(self.y)])[self.ends]
        self.fp = self.ends - self.tp
        self.last = len(self.ends) - 1

    def point(self, i: int) -> dict[str, float]:
        """Threshold, counts and rates at point ``i``, as :func:`charmlib.evaluation.operating.at_thresholds` gives them."""
        tp, fp = int(self.tp[i]), int(self.fp[i])
        counts = dict(zip(COUNTS, (tp, fp, int(self.tp[-1]) - tp, int(self.fp[-1]) - fp)))
        return {"threshold": float(self.probability[self.ends[i] - 1]) if i else float("inf"), **counts,
                **{k: float(v) for k, v in rates(**counts).items()}}

    def at_threshold(self, threshold: float) -> int:
        """The point at which exactly the samples with a probability of at least ``threshold`` are called positive.

        A finite threshold outside 0 to 1 is a logit, as of :func:`charmlib.evaluation.operating.choose_thresholds`.
        """
        threshold = threshold if 0 <= threshold <= 1 or np.isinf(threshold) else expit(threshold)
        return int(np.searchsorted(self.ends, np.searchsorted(-self.probability, -threshold, side="right")))

    def stations(self, count: int = 201) -> np.ndarray:
        """Up to ``count`` points in ascending order, evenly spaced along the curve."""
        length = self.tp / max(self.tp[-1], 1) + self.fp / max(self.fp[-1], 1)
        return np.unique(np.searchsorted(length, np.linspace(0, length[-1], count) - 1e-12))

    def between(self, start: int, end: int) -> np.ndarray:
        """Positions in ``rows`` of the samples that change sides from point ``start`` to ``end``, nearest to ``end`` first."""
        low, high = sorted((self.ends[start], self.ends[end]))
        return np.arange(low, high)[::-1 if end > start else 1]

    def by_error(self, order: str = "largest error", i: int = 0) -> np.ndarray:
        """Positions in ``rows`` by descending distance of the probability from the label; of all samples, or of the
        'false negatives' or 'false positives' at point ``i``."""
        call = np.arange(len(self.y)) < self.ends[i]
        keep = dict(zip(ORDERS, (np.ones(len(self.y), bool), self.y & ~call, ~self.y & call)))[order]
        return np.flatnonzero(keep)[np.argsort(-np.abs(self.y - self.probability)[keep], kind="stable")]
