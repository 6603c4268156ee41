"""Leakage between runs: refuses a run beside another that was trained on its test images."""

import re
from collections.abc import Iterable, Mapping
from itertools import permutations
from pathlib import Path

import pandas as pd

from charmlib.evaluation.runs import RunFolder
from charmlib.files import reading
from charmlib.nih import TABLES

_OTHERS = ("pc", "chex", "mimic_nb", "mimic_ch", "mimic", "rsna", "kaggle", "google", "openi", "siim", "vin")


class LeakError(ValueError):
    """Runs that must not share a table or ensemble; names them and the images."""


def one_cross_validation(one: str, other: str) -> bool:
    """Whether two splits, by name, are folds 'fold:I/N' of one N: each tests what the other trains on, as intended."""
    return one.startswith("fold:") and other.startswith("fold:") and one.split("/")[1] == other.split("/")[1]


def split_of(run: str | Path | RunFolder) -> pd.DataFrame | None:
    """id, patient and part of a run's images, from ``split.csv`` in its folder or its grid's; None if neither belongs to it.

    A grid of several splits keeps ``split_<hash>.csv`` for each, and a folder may hold the file of another call. So the
    test part must be the images that the run was scored on.
    """
    run = RunFolder.of(run)
    scored, folder = set(run.test.ids.tolist()), run.path.resolve()
    for path in (*sorted(folder.glob("split*.csv")), *sorted(folder.parent.glob("split*.csv"))):
        with reading(path, "list of a split", "delete it; the same run writes it again"):
            frame = pd.read_csv(path, dtype=str).astype({"id": object, "part": object})
        if set(frame["id"][frame["part"] == "test"]) == scored:
            return frame
    return None


def leaked_start(params: Mapping, table: str) -> bool:
    """Whether the start weights may have seen the images of this table: torchxrayvision's (``norm`` 'xrv') and the NIH's.

    Their files are named by data sets ('pc-nih-rsna-siim-vin-resnet50-...', 'mimic_ch-densenet121-...'); 'all' is of all, and a
    file that names none counts as one of all.

    Raises
    ------
    LeakError
        They may, and ``allow_leak`` is not set.
    """
    seen = {*re.split(r"[-.]", Path(params["weights"]).name.lower())}
    if params["norm"] != "xrv" or params["weights"] in ("imagenet", "none") or table not in TABLES or (
            seen & {*_OTHERS} and not seen & {"nih", "all"}):
        return False
    if not params["allow_leak"]:
        raise LeakError(f"weights {params['weights']} have seen NIH images, or their name does not say what they have seen; "
                        f"{table} is the NIH's: scores would be of images that the network knows. Start from weights without "
                        "them (pc, chex, mimic_nb, mimic_ch, rsna), or say allow_leak: true, which every table then says")
    return True


def refuse_leaks(runs: Iterable[str | Path | RunFolder], *, folds: bool = False) -> None:
    """Raise if test images of one run were in the training or validation part of another.

    With ``folds``, runs of one cross-validation (``split`` 'fold:I/N' with one N) may share a table, because each is only
    read on its own test part.

    The LeakError names both runs, how many images, and some of them. It is also raised for a run of another split without
    ``split.csv``, which cannot be checked, and for drawn beside real images.
    """
    first: dict[str, RunFolder] = {}
    drawn: dict[bool, RunFolder] = {}
    for run in map(RunFolder.of, runs):
        first.setdefault(run.metrics["split"]["hash"], run)
        drawn.setdefault(run.metrics["data"]["drawn"], run)
    if len(drawn) > 1:
        raise LeakError(f"{drawn[True]} is on drawn phantoms, {drawn[False]} on radiographs: they cannot stand in one table")
    if len(first) < 2:
        return
    parts = []
    for run in first.values():
        frame = split_of(run)
        if frame is None:
            raise LeakError(f"{run} has another split than the others and no split.csv in its folder or its grid's: "
                            "whether its test images were in their training lists cannot be checked. Evaluate it alone.")
        test = frame["part"] == "test"
        parts.append((run, set(frame["id"][test]), set(frame["id"][frame["part"].isin(["train", "valid"])])))
    for (one, test, _), (other, _, seen) in permutations(parts, 2):
        both = test & seen
        if both and not (folds and one_cross_validation(one.metrics["split"]["name"], other.metrics["split"]["name"])):
            raise LeakError(f"{len(both):,} of {len(test):,} test images of {one} were in the training or "
                            f"validation part of {other} ({', '.join(sorted(both)[:3])}, ...): they cannot stand in "
                            "one table or ensemble. Keep runs of different splits apart.")
