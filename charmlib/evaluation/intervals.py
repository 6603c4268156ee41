"""Intervals by bootstrap over patients, because images of one patient are not independent.

A resample draws as many patients as there are, with replacement (Davison and Hinkley 1997, section 2.4, with patients as
the units). The weight of an image is the number of times that its patient was drawn. Metrics of the same patients with
the same seed use the same draws, so differences of two runs are paired.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from charmlib.evaluation.metrics import known
from charmlib.evaluation.operating import COUNTS, RATES, confusion, rates
from charmlib.evaluation.runs import Predictions, write_arrays
from charmlib.files import Damaged, reading

RESAMPLES, SEED, LEVEL = 1000, 85, 0.95
BAND_X = np.linspace(0, 1, 101)
"""False positive rates, or recalls, at which curves have an interval."""


class Interval(NamedTuple):
    """``undefined`` is the share of resamples that do not define the metric; the limits are over the others."""

    low: float
    high: float
    undefined: float


class Resamples(NamedTuple):
    """ROC-AUC and average precision (resamples, n_classes); NaN if a resample has no positives or no negatives of a class."""

    auc: np.ndarray
    ap: np.ndarray


def bootstrap(labels, scores, patients, *, resamples: int = RESAMPLES, seed: int = SEED) -> Resamples:
    """ROC-AUC and average precision of each class in resamples of patients.

    Scores are sorted once for each class. The images between two positives are then folded into one row of a sparse matrix
    (rows x patients), so that a whole block of resamples is one sparse product. Equal to scikit-learn's weighted
    metrics to 1e-12; ties count half in the AUC and as one threshold in the average precision.

    ``labels`` (0, 1 or NaN, left out class by class) and ``scores`` are of shape (n_samples, n_classes), ``patients`` of shape
    (n_samples,). Memory beside the input: about 25 bytes a sample and class, and blocks of 16 million numbers.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    n, classes = labels.shape
    block = int(np.clip(2**24 // max(n, 1), 8, 64))
    rankings = [Ranking(*known(labels, scores, c, patient), len(names)) for c in range(classes)]
    auc, ap = np.full((2, resamples, classes), np.nan)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start = 0
        for weights in draws(len(names), resamples, seed, block):
            rows = slice(start, start + weights.shape[1])
            for c, found in enumerate(pool.map(lambda ranking, w=weights: ranking.auc_and_ap(w), rankings)):
                auc[rows, c], ap[rows, c] = found
            start = rows.stop
    return Resamples(auc, ap)


def save_resamples(path: str | Path, samples: Resamples | None) -> None:
    """Write the bootstrap of a test part for leaderboards to read; nothing is written for None."""
    if samples is not None:
        write_arrays(path, compress=False, auc=samples.auc, ap=samples.ap, seed=SEED)  # which gains a twentieth, and takes time


def read_resamples(path: str | Path, test: Predictions) -> Resamples | None:
    """The bootstrap of a test part: from its file, or made from the predictions; None for a single patient.

    A damaged file is named on standard error and does without.
    """
    try:
        with reading(path, "bootstrap of a test part", "it is made from the predictions instead"), \
                np.load(path, allow_pickle=False) as file:
            found = Resamples(file["auc"], file["ap"])
            if [v.shape[1:] for v in found] != [test.labels.shape[1:]] * 2:
                raise ValueError("of other classes")
            if file["seed"] == SEED:
                return found
    except FileNotFoundError:
        pass
    except Damaged as error:
        print(error, file=sys.stderr, flush=True)
    return bootstrap(test.labels, test.logits, test.patients) if enough_patients(test.patients) else None


def operating_resamples(labels, logits, patients, thresholds: Sequence[float | None], *, resamples: int = RESAMPLES,
                        seed: int = SEED) -> dict[str, np.ndarray]:
    """The :func:`~charmlib.evaluation.operating.rates` at fixed thresholds in resamples of patients.

    ``labels`` and ``logits`` are of shape (n_samples, n_classes); ``thresholds`` are n_classes probabilities, None where a
    class has none. Returns name of the rate -> array (resamples, n_classes), NaN if a resample does not define it; one row of
    NaN for a single patient.
    """
    labels, logits = np.asarray(labels), np.asarray(logits)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    if len(names) < 2:
        return dict.fromkeys(RATES, np.full((1, len(thresholds)), np.nan))
    counts = np.zeros((len(thresholds), len(COUNTS), len(names)))
    for c, threshold in enumerate(thresholds):
        y, score, who = known(labels, logits, c, patient)
        if threshold is not None:
            counts[c] = [np.bincount(who[mask], minlength=len(names)) for mask in confusion(y, score, threshold)]
    counts = counts.reshape(-1, len(names))
    found = [(counts @ weights).T.reshape(-1, len(thresholds), len(COUNTS))
             for weights in draws(len(names), resamples, seed, int(np.clip(2**24 // len(names), 8, 256)))]
    return rates(*np.moveaxis(np.concatenate(found), -1, 0))


def draws(patients: int, resamples: int, seed: int, block: int) -> Iterator[np.ndarray]:
    """How often each patient is drawn: blocks (patients, up to ``block``) of float64."""
    generator = np.random.default_rng(seed)
    for start in range(0, resamples, block):
        times = generator.multinomial(patients, np.full(patients, 1 / patients), size=min(block, resamples - start))
        yield np.ascontiguousarray(times.T, dtype=np.float64)


class Ranking:
    """One class, sorted by descending score and folded: groups g = 0..G-1 are the tied scores that hold positives.

    ``positives`` (G, patients) counts the positives in group g. ``negatives`` (2 G + 1, patients) counts, in row 2 g, those
    between group g - 1 and g, and in row 2 g + 1 those tied with group g.
    """

    def __init__(self, y: np.ndarray, score: np.ndarray, patient: np.ndarray, patients: int):
        order = np.argsort(-score, kind="stable")
        y, score, patient = y[order] == 1, score[order], patient[order]
        group = np.cumsum(np.concatenate([[0], score[1:] != score[:-1]])[:len(score)]).astype(np.int64)
        held = np.zeros(group[-1] + 1 if len(group) else 0, bool)
        held[group[y]] = True
        before = np.cumsum(held)[group] if len(group) else group  # groups with positives, up to and with this one
        row = np.where(held[group], 2 * before - 1, 2 * before) if len(group) else group
        count = int(held.sum())
        one = np.ones(len(y))
        self.positives = csr_array((one[y], (before[y] - 1, patient[y])), shape=(count, patients))
        self.negatives = csr_array((one[~y], (row[~y], patient[~y])), shape=(2 * count + 1, patients))

    def totals(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """For weights (patients, resamples): the positives in each group (G, resamples), the negatives scored strictly above
        it, those scored above or tied with it, and all negatives (resamples,)."""
        negatives = np.cumsum(self.negatives @ weights, axis=0)
        return self.positives @ weights, negatives[:-1:2], negatives[1::2], negatives[-1]

    def auc_and_ap(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """AUC and average precision (resamples,) for weights (patients, resamples)."""
        positives, above, upto, rest = self.totals(weights)
        total = positives.sum(0)
        defined = (total > 0) & (rest > 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            lost = np.einsum("gr,gr->r", positives, above) + np.einsum("gr,gr->r", positives, upto)
            auc = np.where(defined, 1 - lost / (2 * total * rest), np.nan)
            hits = np.cumsum(positives, axis=0)
            called_positive = upto + hits
            called_positive[called_positive == 0] = 1  # above the first drawn image no image is called positive
            hits /= called_positive
            ap = np.where(defined, np.einsum("gr,gr->r", positives, hits) / total, np.nan)
        return auc, ap


def mean_of_defined(samples: np.ndarray) -> np.ndarray:
    """(resamples,): the mean over the classes that a resample defines; NaN if it defines none."""
    defined = ~np.isnan(samples)
    count = defined.sum(1)
    return np.where(count > 0, np.where(defined, samples, 0).sum(1) / np.maximum(count, 1), np.nan)


def over_seeds(drawn: np.ndarray, seed: int = 0) -> np.ndarray:
    """Resamples (S, R, ...) -> (R, ...): the mean of S seeds drawn with replacement, the same seeds for all configurations."""
    chosen = np.random.default_rng(seed).integers(len(drawn), size=(drawn.shape[1], len(drawn)))
    return np.mean([drawn[chosen[:, s], np.arange(drawn.shape[1])] for s in range(len(drawn))], axis=0)


def interval(samples: np.ndarray, level: float = LEVEL) -> Interval:
    """Percentile interval of one metric (resamples,); NaN limits if fewer than two resamples define it."""
    defined = samples[~np.isnan(samples)]
    share = 1 - len(defined) / max(len(samples), 1)
    if len(defined) < 2:
        return Interval(float("nan"), float("nan"), share)
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), share)


def intervals(samples: np.ndarray, level: float = LEVEL) -> list[Interval]:
    """The :func:`interval` of each column of (resamples, n), with one look at all that every resample defines."""
    whole = ~np.isnan(samples).any(0) & (len(samples) > 1)
    limits = iter(np.quantile(samples[:, whole], [(1 - level) / 2, (1 + level) / 2], axis=0).T.tolist() if whole.any() else ())
    return [Interval(*next(limits), 0.0) if all_defined else interval(column, level)
            for all_defined, column in zip(whole, samples.T)]


def intervals_by_class(samples: np.ndarray, classes, level: float = LEVEL) -> dict[str, Interval]:
    """The interval of each column of (resamples, n_classes)."""
    return dict(zip(map(str, classes), intervals(samples, level)))


def enough_patients(patients) -> bool:
    """Whether there are at least two patients: a single one has no interval."""
    return len(np.unique(np.asarray(patients))) > 1


class Band(NamedTuple):
    """Pointwise limits ``low`` and ``high`` (101,) of a curve at ``x`` in 0 to 1; NaN for a single patient."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray


def roc_bands(labels, scores, patients, *, resamples: int = 300, seed: int = SEED) -> list[Band]:
    """For each class the interval of the sensitivity at each false positive rate, linear between the curve's points."""
    return _bands(labels, scores, patients, _sensitivity_at, resamples, seed)


def precision_recall_bands(labels, scores, patients, *, resamples: int = 300, seed: int = SEED) -> list[Band]:
    """For each class the interval of the precision at each recall, at the highest threshold that reaches it."""
    return _bands(labels, scores, patients, _precision_at, resamples, seed)


def _bands(labels, scores, patients, curve, resamples: int, seed: int) -> list[Band]:
    labels, scores = np.asarray(labels), np.asarray(scores)
    names, patient = np.unique(np.asarray(patients), return_inverse=True)
    nothing = Band(BAND_X, np.full(len(BAND_X), np.nan), np.full(len(BAND_X), np.nan))
    if len(names) < 2:
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
    return [Band(BAND_X, *np.quantile(np.stack(curves), limits, axis=0)) if len(curves) > 1 else nothing for curves in found]


def _sensitivity_at(hits: np.ndarray, above: np.ndarray, upto: np.ndarray, negatives: float) -> np.ndarray:
    before = np.concatenate([[0.0], hits[:-1]])  # level to the next group with positives, then up (diagonally with ties)
    false = np.concatenate([[0.0], np.stack([above, upto], 1).ravel() / negatives, [1.0]])
    return np.interp(BAND_X, false, np.concatenate([[0.0], np.stack([before, hits], 1).ravel() / hits[-1], [1.0]]))


def _precision_at(hits: np.ndarray, above: np.ndarray, upto: np.ndarray, negatives: float) -> np.ndarray:
    recall = hits / hits[-1]
    first = np.searchsorted(recall, np.maximum(BAND_X, recall[recall > 0][0]) - 1e-12)
    return (hits / np.maximum(hits + upto, 1))[first]
