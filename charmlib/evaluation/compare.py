"""Two runs on the same images: the paired difference, with its interval."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import norm

from charmlib.evaluation import few, intervals
from charmlib.evaluation.metrics import ap_by_class, auc_by_class, mean_over_classes
from charmlib.evaluation.operating import at_thresholds
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.evaluation.tables import MEAN


def aligned(first: Predictions, *others: Predictions) -> list[Predictions]:
    """The predictions in the image order of the first.

    Raises ValueError for other images, other classes (or in another order), or other labels of the same images.
    """
    out = [first]
    order = np.argsort(first.ids)
    for other in others:
        if first.classes != other.classes:
            raise ValueError(f"the runs have other classes or another order of them: {', '.join(first.classes)} and "
                             f"{', '.join(other.classes)}")
        if not np.array_equal(first.ids, other.ids):  # cells of one grid have one order
            theirs = np.argsort(other.ids)
            if not np.array_equal(first.ids[order], other.ids[theirs]):
                both = len(np.intersect1d(first.ids, other.ids))
                raise ValueError(f"the runs were scored on other images ({len(first.ids):,} and {len(other.ids):,}, {both:,} "
                                 "in both): only runs of one test part can be paired")
            other = other.take(theirs[np.argsort(order)])
        out.append(other)
        labels = out[-1].labels
        different = ~((labels == first.labels) | (np.isnan(labels) & np.isnan(first.labels)))
        if different.any():
            name = first.classes[int(np.flatnonzero(different.any(0))[0])]
            raise ValueError(f"the runs have other labels for {different.any(1).sum():,} of the same images (first of class "
                             f"{name}); was one made with shuffled labels or another table?")
    return out


def compare(first: Predictions, second: Predictions, *, thresholds: Sequence[Mapping[str, float | None]] | None = None,
            resamples: int = intervals.RESAMPLES, seed: int = intervals.SEED) -> pd.DataFrame:
    """Second minus first in ROC-AUC and average precision, by class and in the mean, resampled together by patient.

    With ``thresholds``, also in sensitivity, specificity and F1. They are those of both runs (class -> probability, each
    run's own, chosen on its validation part) and stay fixed in the resamples.

    ``agree`` is the share of resamples whose difference has the sign of the difference on all images, among those that
    define it; ``undefined`` is the share of the others. The means are over the classes that a resample defines.

    Returns one row per class and metric ('AUC', 'AP', with thresholds 'sensitivity', 'specificity' and 'F1'), and one per
    metric for the mean of the findings: class, figure, positives, first, second, difference, low, high, agree, undefined.
    Raises ValueError as :func:`aligned`.
    """
    pair, classes = aligned(first, second), first.classes
    how = {"resamples": resamples, "seed": seed}
    samples = [intervals.bootstrap(p.labels, p.logits, p.patients, **how) if intervals.enough_patients(p.patients) else None
               for p in pair]
    nothing = np.full((1, len(classes)), np.nan)
    both = {"AUC": ([auc_by_class(p.labels, p.logits, classes) for p in pair], [getattr(s, "auc", nothing) for s in samples]),
            "AP": ([ap_by_class(p.labels, p.logits, classes) for p in pair], [getattr(s, "ap", nothing) for s in samples])}
    if thresholds is not None:
        matrices = [at_thresholds(p.labels, p.logits, classes, t) for p, t in zip(pair, thresholds)]
        drawn = [intervals.operating_resamples(p.labels, p.logits, p.patients, [t.get(name) for name in classes], **how)
                 for p, t in zip(pair, thresholds)]
        for metric in ("sensitivity", "specificity", "F1"):
            key = metric.lower()
            both[metric] = ([{name: m.get(name, {}).get(key, float("nan")) for name in classes} for m in matrices],
                            [d[key] for d in drawn])
    positives, findings, rows = first.positives, first.findings, []
    for metric, (values, drawn) in both.items():
        differences = drawn[1] - drawn[0]
        limits = class_differences([pair], metric.lower(), differences, thresholds)
        means = [mean_over_classes(v, normal_class=first.normal_class, what=metric) for v in values]
        rows.append(_row(MEAN, metric, sum(positives[classes[c]] for c in findings), means,
                         intervals.mean_of_defined(drawn[1][:, findings]) - intervals.mean_of_defined(drawn[0][:, findings]),
                         few.mean_interval(differences[:, findings], [values[1][classes[c]] - values[0][classes[c]]
                                                                      for c in findings], [limits[c] for c in findings], -1)))
        rows += [_row(name, metric, positives[name], [v[name] for v in values], differences[:, c], limits[c])
                 for c, name in enumerate(classes)]
    return pd.DataFrame(rows)


def class_differences(pairs: Sequence[Sequence[Predictions]], figure: str, differences: np.ndarray,
                      thresholds: Sequence[Mapping[str, float | None]] | None = None) -> list[intervals.Interval]:
    """The interval of each class's difference from its resamples (resamples, n_classes), widened where few patients have it.

    ``pairs`` are the two runs, of each seed if there are several; the difference is the mean over them.
    """
    found, test = intervals.intervals(differences), pairs[0][0]
    if figure not in few.TRIALS:
        return found
    held = list(few.patients_with(test.labels, test.patients, test.classes).values())
    at = thresholds if figure == "sensitivity" and thresholds else ({}, {})
    for c, name in enumerate(test.classes):
        if 0 < held[c] < few.FEW and (figure != "sensitivity" or all(t.get(name) is not None for t in at)):
            values = [np.mean([few.values_of_positives(figure, p.labels, p.logits, c, t.get(name)) for p in runs], 0)
                      for runs, t in zip(zip(*pairs), at)]
            found[c] = few.widened_difference(found[c], figure, *values, test.patients[test.labels[:, c] == 1])
    return found


def mean_auc_difference(first: RunFolder | Sequence[RunFolder], second: RunFolder | Sequence[RunFolder]) -> intervals.Interval:
    """The interval of the second run's mean AUC less the first's, from their stored resamples; all have one test part.

    Of two sequences of runs, the i-th of one seed, it is of the mean over seeds, and draws patients and seeds.
    Runs of other findings or labels are paired by patient only, without widening for rare classes.
    """
    sides = [list(side) if isinstance(side, Sequence) else [side] for side in (first, second)]
    names = [[run.test.classes[c] for c in run.test.findings] for run in (sides[0][0], sides[1][0])]
    one, two = (np.stack([run.resamples.auc[:, run.test.findings] for run in side]) for side in sides)  # (S, R, C) each
    try:
        pairs = list(zip(*(aligned(*(run.test.of(found) for run in side)) for side, found in zip(sides, names))))
        pairs = [aligned(*pair) for pair in pairs]
    except ValueError:
        return intervals.interval(intervals.over_seeds(np.stack([
            intervals.mean_of_defined(b) - intervals.mean_of_defined(a) for a, b in zip(one, two)])))
    differences = intervals.over_seeds(two - one)
    values = [b.test.auc[b.test.findings] - a.test.auc[a.test.findings] for a, b in zip(*sides)]
    return few.mean_interval(differences, np.mean(values, 0), class_differences(pairs, "auc", differences), -1)


def holm(p: Sequence[float]) -> np.ndarray:
    """P values corrected for their number by the step-down of Holm (1979)."""
    p = np.asarray(p, float)
    order = np.argsort(p)
    out = np.empty(len(p))
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return out


def p_of(value: float, limits: Sequence[float]) -> float:
    """The two-sided P value of a difference with a 95 % interval, as if normal on the side of 0."""
    if (width := value - limits[0] if value > 0 else limits[1] - value) <= 0:
        return float(value == 0)
    return float(2 * norm.sf(norm.isf((1 - intervals.LEVEL) / 2) * abs(value) / width))


def _row(name: str, metric: str, positives: int, values, differences: np.ndarray, limits: intervals.Interval) -> dict:
    low, high, undefined = limits
    difference = values[1] - values[0]
    defined = differences[~np.isnan(differences)]
    agree = float(np.mean(np.sign(defined) == np.sign(difference))) if len(defined) > 1 else float("nan")
    return {"class": name, "figure": metric, "positives": positives, "first": values[0], "second": values[1],
            "difference": difference, "low": low, "high": high, "agree": agree, "undefined": undefined}


def verdict(table: pd.DataFrame, first: str, second: str) -> str:
    """The conclusion of :func:`compare` on the two mean AUCs, in one sentence."""
    row = table[(table["class"] == MEAN) & (table["figure"] == "AUC")].iloc[0]
    if np.isnan(row["low"]):
        return "A single patient: the difference has no interval."
    alike = row["low"] <= 0 <= row["high"]
    words = "cannot be told apart" if alike else f"differ; {second if row['difference'] > 0 else first} is better"
    why = "; the interval is widened for classes of few patients" if alike and row["agree"] > (1 + intervals.LEVEL) / 2 else ""
    return (f"On these images the mean AUCs {words}: {row['difference']:+.4f} (95 % {row['low']:+.4f} to {row['high']:+.4f}), "
            f"{row['agree']:.1%} of the resamples agree in sign{why}.")
