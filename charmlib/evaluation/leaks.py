"""No run beside another that was trained on its test images."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import permutations
from pathlib import Path

import pandas as pd

from charmlib.evaluation.runs import RunFolder


class LeakError(ValueError):
    """Runs that must not stand in one table or ensemble; names them and the images."""


def one_cross_validation(one: str, other: str) -> bool:
    """Whether two splits, by name, are folds 'fold:I/N' of one N: each tests what the other trains on, as is meant."""
    return one.startswith("fold:") and other.startswith("fold:") and one.split("/")[1] == other.split("/")[1]


def split_of(run: str | Path) -> pd.DataFrame | None:
    """id, patient and part of a run's images, from ``split.csv`` in its folder or its grid's; None where neither is its.

    A grid of several splits keeps ``split_<hash>.csv`` for each, and a folder may hold the file of another call, so the
    test part must be the images that the run was scored on.
    """
    folder = Path(run).resolve()
    scored = set(RunFolder(folder).test.ids.tolist())
    for path in (p for place in (folder, folder.parent) for p in sorted(place.glob("split*.csv"))):
        frame = pd.read_csv(path, dtype=str)
        if set(frame["id"][frame["part"] == "test"]) == scored:
            return frame
    return None


def refuse_leaks(runs: Iterable[str | Path], *, folds: bool = False) -> None:
    """Raise if test images of one run were in the training or validation part of another.

    With ``folds``, runs of a cross-validation (``split`` 'fold:I/N' with one N) may stand beside each other, as each is only
    read on its own test part.

    Raises
    ------
    LeakError
        Names both runs, how many images, and some of them; or says that a run of another split cannot be checked, having
        no ``split.csv``; or that drawn and real images are mixed.
    """
    found: dict[str, dict] = {}
    drawn: dict[bool, str] = {}
    for run in runs:
        metrics = RunFolder(run).metrics
        found.setdefault(metrics["split"]["hash"], {"run": Path(run), "name": metrics["split"]["name"]})
        drawn.setdefault(bool(metrics["data"]["drawn"]), str(run))
    if len(drawn) > 1:
        raise LeakError(f"{drawn[True]} is on drawn phantoms, {drawn[False]} on radiographs: they cannot stand in one table")
    if len(found) < 2:
        return
    for entry in found.values():
        frame = split_of(entry["run"])
        if frame is None:
            raise LeakError(f"{entry['run']} has another split than the others and no split.csv in its folder or its grid's: "
                            "whether its test images were in their training lists cannot be checked. Evaluate it alone.")
        entry["test"] = set(frame["id"][frame["part"] == "test"])
        entry["seen"] = set(frame["id"][frame["part"].isin(["train", "valid"])])
    for one, other in permutations(found.values(), 2):
        if folds and one_cross_validation(one["name"], other["name"]):
            continue
        both = one["test"] & other["seen"]
        if both:
            raise LeakError(f"{len(both):,} of {len(one['test']):,} test images of {one['run']} were in the training or "
                            f"validation part of {other['run']} ({', '.join(sorted(both)[:3])}, ...): they cannot stand in "
                            "one table or ensemble. Keep runs of different splits apart.")
