"""Several runs or views as one: merged probabilities, normal gating, and the test parts of a cross-validation together."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.special import expit, logit

from charmlib.evaluation.compare import aligned
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import ARRAYS, Predictions, RunFolder
from charmlib.nih import normal_class
from charmlib.params import UNHASHED

MERGES = ("mean", "max", "gmean", "median", "logit_mean")
_LEAST = -690.0  # log of the smallest probability, so that its logit is finite


def merge(logits: Sequence[np.ndarray], how: str = "mean", weights: Sequence[float] | None = None) -> np.ndarray:
    """Logits (n, C) of several views or members -> logits (n, C) float64 of their probabilities' mean, largest, geometric mean
    or median; 'logit_mean' takes the mean of the logits.

    ``weights`` (one of each, 0 or more) are scaled to the sum 1; the largest and the median have none. For an even number the
    median is the mean of the middle two logits (torch takes the lower). In hieuphamha19/CXR_LT the geometric mean adds 1e-8 to
    probabilities, and the median is of probabilities.

    Raises
    ------
    ValueError
        An unknown merge, or weights that do not fit; names them.
    """
    z = np.stack([np.asarray(values, np.float64) for values in logits])
    if how not in MERGES:
        raise ValueError(f"merge must be one of {', '.join(MERGES)}, got {how!r}")
    if weights is not None and (how in ("max", "median") or len(weights) != len(z) or min(weights) < 0 or not sum(weights) > 0
                                or not np.isfinite(weights).all()):
        raise ValueError(f"weights {', '.join(f'{w:g}' for w in weights)} for {len(z)} members and merge {how!r}: give each "
                         "one of 0 or more, with mean, gmean or logit_mean")
    if how in ("max", "median") or len(z) == 1:
        return z.max(0) if how == "max" else np.median(z, axis=0)
    if how == "logit_mean":
        return np.average(z, axis=0, weights=weights)
    if how == "gmean":
        return _logit_of_log(np.average(-np.logaddexp(0, -z), axis=0, weights=weights))
    # probabilities within float64's last steps of 0 and 1 have no finite logit
    return logit(np.clip(np.average(expit(z), axis=0, weights=weights), 1e-300, 1 - 2**-53))


def _logit_of_log(log_p: np.ndarray) -> np.ndarray:
    log_p = np.clip(log_p, _LEAST, -2.0**-53)
    return log_p - np.log(-np.expm1(log_p))


def gate(logits: np.ndarray, alpha: float, classes: Sequence[str], normal: str = "") -> np.ndarray:
    """Logits (n, C) of ``p_c (1 - p_normal)^alpha``, for every class but the normal one, found by its name.

    Normal gating of hieuphamha19/CXR_LT, which takes class 0 for the normal one. Order within an image stays.

    Raises
    ------
    ValueError
        No class means "no finding", or ``alpha`` is below 0.
    """
    if not 0 <= alpha < np.inf:
        raise ValueError(f"gate must be 0 or more, got {alpha}")
    if alpha == 0:
        return logits
    if not (name := normal_class(classes, normal)):
        raise ValueError(f"gate {alpha:g} needs a class that means 'no finding', and the classes are {', '.join(classes)}: "
                         "train with classes: nih15, or name it with normal_class")
    z, at = np.array(logits, np.float64), list(classes).index(name)
    out = _logit_of_log(-np.logaddexp(0, -z) - alpha * np.logaddexp(0, z[:, [at]]))
    out[:, at] = z[:, at]
    return out


def mean_ensemble(members: Sequence[Predictions], how: str = "mean", weights: Sequence[float] | None = None) -> Predictions:
    """Predictions whose logits (float64) are the members', combined by :func:`merge`.

    Raises ValueError as it, for fewer than two members, or if they differ in images, classes or labels. Leaks between
    their splits are checked by :func:`charmlib.evaluation.leaks.refuse_leaks`, which needs the runs' folders.
    """
    if len(members) < 2:
        raise ValueError(f"an ensemble needs at least two runs, found {len(members)}")
    same = aligned(*members)
    return replace(same[0], logits=merge([p.logits for p in same], how, weights))


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
