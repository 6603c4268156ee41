"""Two runs on the same images: the paired difference, with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from charmlib.evaluation.intervals import (
    RESAMPLES,
    SEED,
    bootstrap,
    enough_patients,
    interval,
    mean_of_defined,
    operating_resamples,
    thresholds_of,
)
from charmlib.evaluation.metrics import ap_by_class, auc_by_class, mean_over_classes
from charmlib.evaluation.operating import at_thresholds
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.tables import MEAN


def aligned(first: Predictions, *others: Predictions) -> list[Predictions]:
    """The predictions in the image order of the first.

    Raises
    ------
    ValueError
        Other images, other classes (or in another order), or other labels of the same images.
    """
    out = [first]
    order = np.argsort(first.ids)
    for other in others:
        if first.classes != other.classes:
            raise ValueError(f"the runs have other classes or another order of them: {', '.join(first.classes)} and "
                             f"{', '.join(other.classes)}")
        theirs = np.argsort(other.ids)
        if not np.array_equal(first.ids[order], other.ids[theirs]):
            both = len(np.intersect1d(first.ids, other.ids))
            raise ValueError(f"the runs were scored on other images ({len(first.ids):,} and {len(other.ids):,}, {both:,} in "
                             "both): only runs of one test part can be paired")
        back = np.empty_like(order)
        back[order] = theirs
        moved = replace(other, ids=other.ids[back], patients=other.patients[back], labels=other.labels[back],
                        logits=other.logits[back])
        different = ~((moved.labels == first.labels) | (np.isnan(moved.labels) & np.isnan(first.labels)))
        if different.any():
            name = first.classes[int(np.flatnonzero(different.any(0))[0])]
            raise ValueError(f"the runs have other labels for {different.any(1).sum():,} of the same images (first of class "
                             f"{name}); was one made with shuffled labels or another table?")
        out.append(moved)
    return out


def compare(first: Predictions, second: Predictions, *, thresholds: Sequence[Mapping[str, float | None]] | None = None,
            resamples: int = RESAMPLES, seed: int = SEED) -> pd.DataFrame:
    """Second minus first in ROC-AUC and average precision, by class and in the mean, resampled together by patient.

    With ``thresholds``, those of both runs (class -> probability, each run's own, chosen on its validation part), also in
    sensitivity, specificity and F1; they stay fixed in the resamples.

    ``agree`` is the share of resamples whose difference has the sign of the difference on all images, of those that
    define it; ``undefined`` the share that does not. The means are over the classes that a resample defines.

    Returns
    -------
    DataFrame, one row a class and figure ('AUC', 'AP', with thresholds 'sensitivity', 'specificity' and 'F1'), and one a
    figure for the mean: class, figure, positives, first, second, difference, low, high, agree, undefined.

    Raises
    ------
    ValueError
        The two are not of the same images, classes and labels.
    """
    first, second = aligned(first, second)
    positives = (first.labels == 1).sum(0)
    several = enough_patients(first.patients)
    samples = [bootstrap(p.labels, p.logits, p.patients, resamples=resamples, seed=seed) for p in (first, second)] \
        if several else []
    nothing = [np.full((1, len(first.classes)), np.nan)] * 2
    figures = [("AUC", [auc_by_class(p.labels, p.logits, p.classes) for p in (first, second)],
                [s.auc for s in samples] or nothing),
               ("AP", [ap_by_class(p.labels, p.logits, p.classes) for p in (first, second)],
                [s.ap for s in samples] or nothing)]
    if thresholds is not None:
        figures += _at_thresholds((first, second), thresholds, resamples if several else 0, seed, nothing)
    rows = []
    for figure, values, found in figures:
        rows.append(_row(MEAN, figure, int(positives.sum()), [mean_over_classes(v, what=figure) for v in values],
                         mean_of_defined(found[1]) - mean_of_defined(found[0])))
        rows += [_row(name, figure, int(positives[c]), [v[name] for v in values], found[1][:, c] - found[0][:, c])
                 for c, name in enumerate(first.classes)]
    return pd.DataFrame(rows)


def _at_thresholds(runs, thresholds, resamples: int, seed: int, nothing) -> list[tuple]:
    stands = [at_thresholds(p.labels, p.logits, p.classes, t) for p, t in zip(runs, thresholds)]
    found = [operating_resamples(p.labels, p.logits, p.patients, thresholds_of(t, p.classes), resamples=resamples, seed=seed)
             for p, t in zip(runs, thresholds)] if resamples else None
    return [(figure, [{n: s.get(n, {}).get(figure.lower(), float("nan")) for n in p.classes} for p, s in zip(runs, stands)],
             [f[figure.lower()] for f in found] if found else nothing) for figure in ("sensitivity", "specificity", "F1")]


def _row(name: str, figure: str, positives: int, values, differences: np.ndarray) -> dict:
    low, high, undefined = interval(differences)
    difference = values[1] - values[0]
    defined = differences[~np.isnan(differences)]
    agree = float(np.mean(np.sign(defined) == np.sign(difference))) if len(defined) > 1 else float("nan")
    return {"class": name, "figure": figure, "positives": positives, "first": values[0], "second": values[1],
            "difference": difference, "low": low, "high": high, "agree": agree, "undefined": undefined}


def verdict(table: pd.DataFrame, first: str, second: str) -> str:
    """What :func:`compare` says of the two mean AUCs, in one sentence."""
    row = table[(table["class"] == MEAN) & (table["figure"] == "AUC")].iloc[0]
    if np.isnan(row["low"]):
        return "A single patient: the difference has no interval."
    words = "cannot be told apart" if row["low"] <= 0 <= row["high"] else \
        f"differ; {second if row['difference'] > 0 else first} is better"
    return (f"On these images the mean AUCs {words}: {row['difference']:+.4f} (95 % {row['low']:+.4f} to {row['high']:+.4f}), "
            f"{row['agree']:.1%} of the resamples agree in sign.")
