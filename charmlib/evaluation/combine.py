"""Several runs as one: the mean of an ensemble's probabilities, and the test parts of a cross-validation together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

from charmlib.evaluation.compare import aligned
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import ARRAYS, Predictions, RunFolder
from charmlib.params import UNHASHED


def mean_ensemble(members: Sequence[Predictions]) -> Predictions:
    """Predictions whose probabilities are the mean of the members', given as logits (float64).

    Raises ValueError for fewer than two members, or if they differ in images, classes or labels. Leaks between their splits
    are checked by :func:`charmlib.evaluation.leaks.refuse_leaks`, which needs the runs' folders.
    """
    if len(members) < 2:
        raise ValueError(f"an ensemble needs at least two runs, found {len(members)}")
    same = aligned(*members)
    mean = np.mean([expit(p.logits.astype(np.float64)) for p in same], axis=0)
    # probabilities within float64's last steps of 0 and 1 have no finite logit
    return replace(same[0], logits=logit(np.clip(mean, 1e-300, 1 - 2**-53)))


def out_of_fold(runs: Iterable[str | Path | RunFolder]) -> Predictions:
    """The test predictions of the runs of all folds as one part: every image scored once, by a network that was trained on
    other patients. See :func:`pooled`.

    It takes one finished run for each fold I of N, with ``split`` 'fold:I/N' and otherwise equal parameters. Raises ValueError
    for a run of another split, a fold that is missing or there twice, and runs that differ in a parameter or share a patient.
    """
    found: dict[str, RunFolder] = {}
    settings: list[dict] = []
    for run in map(RunFolder.of, runs):
        name = run.metrics["split"]["name"]
        if not name.startswith("fold:"):
            raise ValueError(f"{run} is of split '{name}', wanted fold:I/N: only folds hold every image once")
        settings.append({k: v for k, v in run.metrics["params"].items() if k not in (*UNHASHED, "split")}
                        | {"the number of folds": name.split("/")[1]})
        wrong = [k for k, v in settings[0].items() if v != settings[-1].get(k)]
        if wrong:
            raise ValueError(f"{run} differs from {next(iter(found.values()))} in {', '.join(wrong)}: not one cross-validation")
        if name in found:
            raise ValueError(f"{run} and {found[name]} are both {name}")
        found[name] = run
    if not found or len(found) != int(settings[0]["the number of folds"]):
        there = ", ".join(sorted(found)) or "none"
        raise ValueError(f"a cross-validation needs a finished run of each fold; there are {there}")
    parts, named = [run.test for run in found.values()], ", ".join(map(str, found.values()))
    if len({p.classes for p in parts}) > 1:
        raise ValueError(f"the folds {named} have other classes or another order of them")
    patients = np.concatenate([np.unique(p.patients) for p in parts])
    if len(patients) != len(np.unique(patients)):
        raise ValueError(f"a patient is in the test part of two of {named}: not folds of the same data")
    return pooled(parts)


def pooled(parts: Sequence[Predictions]) -> Predictions:
    """The predictions of several folds, one after another.

    Scores of different networks are pooled as they are. So an AUC over them is also lowered by differences in calibration
    between folds, in one configuration perhaps more than in another; :func:`auc_within_folds` is not. Report both.
    """
    return replace(parts[0], **{key: np.concatenate([getattr(p, key) for p in parts]) for key in ARRAYS},
                   about={key: np.concatenate([p.about[key] for p in parts]) for key in parts[0].about})


def auc_within_folds(parts: Sequence[Predictions]) -> dict[str, float]:
    """Class -> mean over folds of the AUC within each, over the folds that have positives of the class."""
    values = [list(auc_by_class(p.labels, p.logits, p.classes).values()) for p in parts]
    return dict(zip(parts[0].classes, np.nanmean(np.array(values, dtype=float), axis=0).tolist()))
