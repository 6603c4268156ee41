"""The branches of a network of several beside what it answers with, on the same images."""

from dataclasses import replace

import numpy as np
import pandas as pd

from charmlib.evaluation import intervals
from charmlib.evaluation.compare import compare
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.evaluation.tables import MEAN, limits_of
from charmlib.files import reading


def read_branches(run: RunFolder, part: str = "test") -> dict[str, Predictions]:
    """Branch -> its predictions of a part ('test' or 'valid'), from ``branches.npz``; empty for a network without branches.

    Raises :class:`charmlib.files.Damaged` for a damaged file, or one of other images than ``predictions.npz``.
    """
    path, whole = run.branches_file, run.test if part == "test" else run.valid
    if not path.is_file():
        return {}
    with reading(path, "file of branches", "score again with the test notebook"), np.load(path, allow_pickle=False) as file:
        if not np.array_equal(file[f"{part}_ids"], whole.ids):
            raise ValueError("it is of other images than predictions.npz")
        names = [key.removeprefix(f"{part}_") for key in file if key.startswith(f"{part}_") and not key.endswith("_ids")]
        return {name: replace(whole, logits=file[f"{part}_{name}"]) for name in names}


def branch_table(run: RunFolder, *, resamples: int = intervals.RESAMPLES) -> pd.DataFrame | None:
    """Mean ROC-AUC of each branch and of the fusion on the test part, and the fusion less it, paired by patient.

    Columns: ``mean AUC``, and ``fusion less it`` with its 95 % limits ``fusion less it low`` and ``fusion less it high``. None
    for a network without branches.
    """
    rows, fusion = {}, {}
    for name, branch in read_branches(run).items():
        row = compare(branch, run.test, resamples=resamples).set_index(["class", "figure"]).loc[(MEAN, "AUC")]
        rows[name] = {"mean AUC": row["first"], "fusion less it": row["difference"],
                      **limits_of("fusion less it", (row["low"], row["high"]))}
        fusion = {"fusion": {"mean AUC": row["second"]}}
    return pd.DataFrame.from_dict(rows | fusion, "index") if rows else None
