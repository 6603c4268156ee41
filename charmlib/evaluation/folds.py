"""The runs of a cross-validation as one: every image scored once, by the run that has not seen its patient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.params import UNHASHED, stored


def out_of_fold(runs: Iterable[str | Path]) -> Predictions:
    """The test predictions of the runs of all folds as one part; see :func:`pooled`.

    Parameters
    ----------
    runs : paths
        One finished run for each fold I of N, with ``split`` 'fold:I/N' and otherwise equal parameters.

    Raises
    ------
    ValueError
        A run of another split; a fold that is missing or there twice; runs that differ in a parameter, or share a patient.
    """
    runs = [Path(run) for run in runs]
    found, first = {}, None
    for run in runs:
        metrics = RunFolder(run).metrics
        name = metrics["split"]["name"]
        if not name.startswith("fold:"):
            raise ValueError(f"{run} is of split '{name}', wanted fold:I/N: only folds hold every image once")
        params = {k: v for k, v in stored(metrics["params"]).items() if k not in (*UNHASHED, "split")}
        first = first or (run, params, name.split("/")[1])
        wrong = [k for k in params if params[k] != first[1].get(k)]
        if wrong or name.split("/")[1] != first[2]:
            raise ValueError(f"{run} differs from {first[0]} in {', '.join(wrong) or 'the number of folds'}: not one "
                             "cross-validation")
        if name in found:
            raise ValueError(f"{run} and {found[name]} are both {name}")
        found[name] = run
    if not runs or len(found) != int(first[2]):
        there = ", ".join(sorted(found)) or "none"
        raise ValueError(f"a cross-validation needs a finished run of each fold; there are {there}")
    parts = [RunFolder(run).test for run in found.values()]
    if len({p.classes for p in parts}) > 1:
        raise ValueError(f"the folds {', '.join(map(str, runs))} have other classes or another order of them")
    patients = [set(p.patients.tolist()) for p in parts]
    if sum(map(len, patients)) != len(set.union(*patients)):
        raise ValueError(f"a patient is in the test part of two of {', '.join(map(str, runs))}: not folds of the same data")
    return pooled(parts)


def pooled(parts: Sequence[Predictions]) -> Predictions:
    """The predictions of several folds, one after another.

    Scores of different networks are pooled as they are, so an AUC over them also pays for differences in calibration between
    folds, one configuration perhaps more than another; :func:`auc_within_folds` does not. Look at both.
    """
    return Predictions(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("ids", "patients", "labels", "logits")),
                       parts[0].classes)


def auc_within_folds(parts: Sequence[Predictions]) -> dict[str, float]:
    """Class -> mean over folds of the AUC within each; a fold without positives of a class has no say in it."""
    values = [list(auc_by_class(p.labels, p.logits, p.classes).values()) for p in parts]
    return dict(zip(parts[0].classes, np.nanmean(np.array(values, dtype=float), axis=0).tolist()))
