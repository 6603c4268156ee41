"""``leaderboard.csv``: ranked by validation, with the test score and its interval beside, for reading."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from charmlib.evaluation.intervals import interval, mean_of_defined
from charmlib.evaluation.leaks import refuse_leaks
from charmlib.evaluation.runs import RunFolder, valid_auc
from charmlib.files import write_whole
from charmlib.grid.cells import IDENTITY, GridError, cell_status
from charmlib.params import EARLIER

LAST = ["valid_mean_auc", "test_mean_auc", "ci_low", "ci_high", "same_as_first", "diff_first", "diff_low", "diff_high",
        "split", "n_images", "n_patients", "positive_share", "seconds", "overhead_seconds", "status"]

NO_VALIDATION = "no validation"
"""Status of a finished cell that was trained on the validation patients too (``valid_fraction`` 0)."""

_NEEDS = {"momentum": "use_momentum", "attention": "use_attention", **dict.fromkeys(
    ("k", "threshold", "bank_size", "strategy", "rule", "answer", "keys", "vote_weight", "vote_temperature",
     "vote_ridge", "retrieval", "bank_norm", "normalize_retrieved", "bank_momentum", "stage2_bank_momentum"), "use_bank")}
_ANSWERS = {**dict.fromkeys(("keys", "vote_weight", "vote_temperature", "vote_ridge"), "votes"),
            **dict.fromkeys(("retrieval", "bank_norm", "normalize_retrieved"), "features")}


def _says_something(axis: str, params) -> bool:
    """Whether an axis has a meaning in a cell: not where its part is switched off, or its kind of answer is not given."""
    answer = params.get("answer", EARLIER["answer"])
    return bool(params.get(_NEEDS.get(axis), True)) and _ANSWERS.get(axis, answer) == answer


def leaderboard(folder: str | Path, grid=None, *, write: bool = True) -> pd.DataFrame:
    """Collect the cells of a grid's folder, write ``leaderboard.csv`` there (unless told not to), and return it.

    Rank 1 has the highest **validation** mean AUC; the test column decides nothing. Quick checks and cells that are
    not done have no rank, nor has a control with shuffled labels. Ranks are only given within one split: cells of another
    split are another contest. Cells without a validation part have no rank either, and stand after all others.

    ``diff_first`` is a cell's mean test AUC less that of the cell ranked first, with its paired 95 % interval;
    ``same_as_first`` is True where that interval holds 0, so that the two cannot be told apart.

    Raises
    ------
    GridError
        The folder holds no grid.
    charmlib.evaluation.leaks.LeakError
        Test images of a cell were in another's training part.
    """
    folder = Path(folder)
    cells, axes = _cells(folder, grid)
    rows = []
    for cell, params in cells.items():
        row = {"rank": pd.NA, "cell": cell, "status": cell_status(folder / cell)}
        m = RunFolder(folder / cell).metrics if row["status"] == "done" else None
        params = m["params"] if m else params
        row |= {name: params[name] if _says_something(name, params) else None for name in axes}
        if m:
            drawn = " (drawn phantoms)" if m["data"]["drawn"] else ""
            row |= {"valid_mean_auc": valid_auc(m), "test_mean_auc": m["test"]["mean_auc"],
                    "split": f"{m['split']['name']} {m['split']['hash'][:8]}{drawn}",
                    "n_images": m["split"]["test"]["images"], "n_patients": m["split"]["test"]["patients"],
                    "positive_share": m["split"]["test"]["positive_share"],
                    "seconds": round(m["seconds"]["train"] + m["seconds"]["score"], 1),
                    "overhead_seconds": m["seconds"]["overhead"]}
            if m["quick_check"]:
                row["status"] = "quick check"
            elif m["params"].get("labels") == "shuffled":
                row["status"] = "control"
            elif m["valid"] is None:
                row["status"] = NO_VALIDATION
        rows.append(row)
    board = pd.DataFrame(rows, columns=["rank", "cell", *axes, *LAST])
    ranked = board["status"] == "done"
    order = board[ranked].groupby("split")["valid_mean_auc"].rank(ascending=False, method="first")
    board["rank"] = order.reindex(board.index).astype("Int64")
    refuse_leaks((folder / cell for cell in board["cell"][board["split"].notna()]), folds=True)
    board = _with_intervals(folder, board)
    board = board.sort_values(["split", "rank", "status", "cell"], na_position="last", ignore_index=True)
    apart = board["status"] == NO_VALIDATION
    board = pd.concat([board[~apart], board[apart]], ignore_index=True) if apart.any() else board
    if write:
        write_whole(folder / "leaderboard.csv", lambda temporary: board.to_csv(temporary, index=False))
    return board


def _with_intervals(folder: Path, board: pd.DataFrame) -> pd.DataFrame:
    """Fill in each cell's interval, and the paired difference of each ranked one from the first of its split, both from one
    bootstrap."""
    board = board.astype({"same_as_first": object})
    means = {}
    for i, row in board[board["split"].notna()].iterrows():
        samples = RunFolder(folder / row["cell"]).resamples
        if samples is not None:
            means[i] = mean_of_defined(samples.auc)
            board.loc[i, ["ci_low", "ci_high"]] = interval(means[i])[:2]
    for _, same_split in board[board["rank"].notna()].groupby("split"):
        first = same_split.loc[same_split["rank"].idxmin()]
        for i, row in same_split[same_split["rank"] > 1].iterrows():
            if i not in means or first.name not in means:
                continue
            low, high, _ = interval(means[i] - means[first.name])
            board.loc[i, ["diff_first", "diff_low", "diff_high"]] = row["test_mean_auc"] - first["test_mean_auc"], low, high
            board.loc[i, "same_as_first"] = bool(low <= 0 <= high)
    return board


def board_axes(board: pd.DataFrame) -> list[str]:
    """The grid's axes, which stand between a leaderboard's cells and scores."""
    columns = list(board.columns)
    return columns[columns.index("cell") + 1:columns.index("valid_mean_auc")]


def over_seeds(board: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and standard deviation over the seeds of each setting, ranked by validation; None without a seed axis.

    Ranked cells that agree in all axes but the seed are one setting. The spread over seeds is that of training, on one and
    the same test part; the intervals of :func:`leaderboard` are of drawing patients.
    """
    axes = board_axes(board)
    if "seed" not in axes:
        return None
    ranked = board[board["rank"].notna()]
    others = [a for a in axes if a != "seed"] + ["split"]
    if ranked.empty or ranked.groupby(others, dropna=False)["seed"].nunique().max() < 2:
        return None
    table = ranked.groupby(others, dropna=False, as_index=False).agg(
        seeds=("seed", "nunique"), valid_mean=("valid_mean_auc", "mean"), valid_sd=("valid_mean_auc", "std"),
        test_mean=("test_mean_auc", "mean"), test_sd=("test_mean_auc", "std"), test_low=("test_mean_auc", "min"),
        test_high=("test_mean_auc", "max"), n_images=("n_images", "first"), n_patients=("n_patients", "first"),
        positive_share=("positive_share", "first"))
    return table.sort_values("valid_mean", ascending=False, ignore_index=True)


def _cells(folder: Path, grid) -> tuple[dict[str, dict], list[str]]:
    """Cell -> parameters, and the axes' names: of the given grid, or of the one that the folder was made with."""
    if grid is not None:
        listed, axes = {c.id: c.params for c in grid.cells}, list(grid.axes)
    elif (folder / "grid.yaml").is_file():
        kept = yaml.safe_load((folder / "grid.yaml").read_text())
        listed, axes = {c["id"]: c["params"] for c in kept["cells"]}, list(kept["axes"])
    else:
        raise GridError(f"{folder} holds no grid (no grid.yaml)")
    # cells of another call of the same grid (a pinned axis, another shard) stay on the board
    others = sorted({p.parent.name for name in ("metrics.json", IDENTITY) for p in folder.glob(f"*/{name}")} - listed.keys())
    return listed | {name: {} for name in others}, [a for a in axes if a != "split"]  # which the board has anyway
