"""``leaderboard.csv``: ranked by validation, with the test score and its interval beside, for reading."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from charmlib.evaluation.compare import holm, mean_auc_difference, p_of
from charmlib.evaluation.intervals import LEVEL
from charmlib.evaluation.leaks import refuse_leaks
from charmlib.evaluation.runs import valid_auc
from charmlib.evaluation.tables import class_table, split_label
from charmlib.files import write_csv
from charmlib.grid.cells import CellFolder, GridError
from charmlib.grid.spec import Grid, refuse_names
from charmlib.param_sources import read_yaml
from charmlib.params import PARAMS, coerce, effective, missing_need
from charmlib.training.recipes import phases, steps

LAST = ["valid_mean_auc", "test_mean_auc", "ci_low", "ci_high", "same_as_first", "diff_first", "diff_low", "diff_high",
        "split", "n_images", "n_patients", "positive_share", "seconds", "overhead_seconds", "status"]

NO_VALIDATION = "no validation"  # status of a finished cell that was trained on the validation patients too
DAMAGED = "damaged"  # of a finished cell with a file that cannot be read


def leaderboard(folder: str | Path, grid: Grid | None = None, *, write: bool = True) -> pd.DataFrame:
    """Collect the cells of a grid's folder, write ``leaderboard.csv`` there (unless told not to), and return it.

    Rank 1 has the highest **validation** mean AUC; the test column decides nothing. Ranks compare cells of one split.
    Unfinished cells, quick checks, controls with shuffled labels and cells without a validation part have no rank; the last
    stand after all others.

    A column ``reason`` is there if a cell failed or is damaged, and says why; the others are on the board all the same.

    ``diff_first`` is a cell's mean test AUC minus that of the cell ranked first, with its paired 95 % interval;
    ``same_as_first`` is True where it cannot be told from 0, corrected for the number of cells (Holm 1979).

    Raises GridError for a folder that holds no grid, and :class:`charmlib.evaluation.leaks.LeakError` if test images of a cell
    were in another's training part.
    """
    folder = Path(folder)
    record = read_record(folder) if grid is None else record_of(grid)
    axes = [axis for axis in record["axes"] if axis != "split"]  # which each board has
    cells = {cell["id"]: cell["params"] for cell in record["cells"]}
    # cells of another call of the same grid (a pinned axis, another shard) stay on the board
    others = {path.parent.name for name in ("metrics.json", "cell.json") for path in folder.glob(f"[!.]*/{name}")}
    runs = {cell: CellFolder(folder / cell) for cell in [*cells, *sorted(others - cells.keys())]}
    rows = [_row(run, axes) for run in runs.values()]
    done = {row["cell"]: runs[row["cell"]] for row in rows if "split" in row}
    params = {cell: done[cell].metrics["params"] if cell in done else cells.get(cell) for cell in runs}
    values = _values_that_act(params, axes, {cell: run.metrics["images"] for cell, run in done.items()})
    board = pd.DataFrame([row | values[row["cell"]] for row in rows], columns=["rank", "cell", *axes, *LAST, "reason"])
    order = board[board["status"] == "done"].groupby("split")["valid_mean_auc"].rank(ascending=False, method="first")
    board["rank"] = order.reindex(board.index).astype("Int64")
    refuse_leaks(done.values(), folds=True)
    board = _with_intervals(board, done).sort_values(["split", "rank", "status", "cell"], na_position="last")
    board = board.sort_values("status", key=lambda status: status == NO_VALIDATION, kind="stable", ignore_index=True)
    board = board if board["reason"].any() else board.drop(columns="reason")
    if write:
        write_csv(folder / "leaderboard.csv", board)
    return board


def read_record(folder: Path) -> dict:
    """``grid.yaml`` of a grid's folder: name, axes, and cells with id, axes and params.

    Raises GridError without one, and ParameterError for one that `grid run` cannot have written; its ids make folders.
    """
    path = folder / "grid.yaml"
    if not path.is_file():
        raise GridError(f"{folder} holds no grid (no grid.yaml); name a folder that `grid run` wrote")
    record = read_yaml(path)
    try:
        refuse_names([cell["id"] for cell in record["cells"]], path)
        for params in filter(None, [cell["params"] for cell in record["cells"]]):
            params |= {name: coerce(name, params[name], str(path)) for name, p in PARAMS.items()
                       if name in params or (name != "run_dir" and not p.of)}
            _ = [params[axis] for axis in record["axes"]]
        return record
    except (KeyError, TypeError, AttributeError) as error:
        raise GridError(f"{path} is damaged or of another version ({type(error).__name__}: {error}); the same `grid run` "
                        "writes it anew") from error


def record_of(grid: Grid) -> dict:
    """The content of ``grid.yaml``."""
    return {"name": grid.name, "axes": list(grid.axes), "cells": [
        {"id": cell.id, "axes": cell.axes, "params": cell.params} for cell in grid.cells]}


def _values_that_act(params: Mapping[str, Mapping | None], axes: list[str], images: Mapping[str, Mapping]) -> dict[str, dict]:
    """Cell -> the values of its axes; None without effect, or if a cell of another value is the same run."""
    some = next(iter(images.values()), None)  # stands for the cells that are not finished
    acts = {cell: effective(p, some and steps(phases(p), images.get(cell, some))) for cell, p in params.items() if p}
    times = Counter(map(str, acts.values()))
    return {cell: {axis: None if not p or missing_need(axis, p) or (times[str(acts[cell])] > 1 and acts[cell].get(axis, p[axis])
                                                                    != p[axis]) else p[axis] for axis in axes}
            for cell, p in params.items()}


def _row(run: CellFolder, axes: list[str]) -> dict:
    row = {"cell": run.name, "status": run.status, "reason": run.reason}
    try:
        return row | _scores(run, axes) if run.done else row
    except Exception as error:  # a reader's of whatever kind
        words = f"{type(error).__name__}: {error}"
        return row | {"status": DAMAGED, "reason": str(error) if str(run.path) in str(error) else
                      f"{run.metrics_file} is damaged ({words}); remove {run} to run the cell again"}


def _scores(run: CellFolder, axes: list[str]) -> dict:
    """Status and scores of a finished cell; raises what the readers raise of all that board and report take from it."""
    m, status = run.metrics, "done"
    _ = [m["params"][axis] for axis in axes], m["bank"], run.resamples and run.resamples.auc[:, run.test.findings]
    effective(m["params"], steps(phases(m["params"]), m["images"]))
    class_table(m["test"], run.test.positives)
    for file in [run.history_file, *filter(Path.is_file, [run.bank_history_file])]:
        pd.read_csv(file)
    if m["quick_check"]:
        status = "quick check"
    elif m["params"]["labels"] == "shuffled":
        status = "control"
    elif m["valid"] is None:
        status = NO_VALIDATION
    drawn, part = " (drawn phantoms)" if m["data"]["drawn"] else "", m["split"]["test"]
    return {"status": status, "valid_mean_auc": valid_auc(m), "test_mean_auc": m["test"]["mean_auc"],
                  "split": split_label(m["split"]) + drawn,
                  "n_images": part["images"], "n_patients": part["patients"], "positive_share": part["positive_share"],
                  "seconds": round(m["seconds"]["train"] + m["seconds"]["score"], 1),
                  "overhead_seconds": m["seconds"]["overhead"]}


def _with_intervals(board: pd.DataFrame, runs: dict[str, CellFolder]) -> pd.DataFrame:
    """Fill in each cell's interval, and each ranked cell's paired difference to the first of its split, from one bootstrap."""
    board = board.astype({"same_as_first": object})
    for i, row in board[board["cell"].isin(runs)].iterrows():
        board.loc[i, ["ci_low", "ci_high"]] = runs[row["cell"]].metrics["test"]["intervals"]["mean_auc"][:2]
    several = [cell for cell, run in runs.items() if run.resamples is not None]
    for _, same_split in board[board["rank"].notna() & board["cell"].isin(several)].groupby("split"):
        first, others = same_split.loc[same_split["rank"].idxmin()], same_split[same_split["rank"] > 1]
        differences = others["test_mean_auc"] - first["test_mean_auc"]
        limits = [mean_auc_difference(runs[first["cell"]], runs[cell])[:2] for cell in others["cell"]]
        p = holm([p_of(*pair) for pair in zip(differences, limits)])
        for i, value, (low, high), corrected in zip(others.index, differences, limits, p):
            board.loc[i, ["diff_first", "diff_low", "diff_high"]] = value, low, high
            board.loc[i, "same_as_first"] = bool(corrected > 1 - LEVEL)
    return board


def board_axes(board: pd.DataFrame) -> list[str]:
    """The grid's axes: the columns between a leaderboard's cells and scores."""
    columns = list(board.columns)
    return columns[columns.index("cell") + 1:columns.index("valid_mean_auc")]


def over_seeds(board: pd.DataFrame) -> pd.DataFrame | None:
    """Mean and standard deviation over the seeds of each setting, ranked by validation; None without a seed axis.

    Ranked cells that agree in all axes but the seed are one setting. The spread over seeds is that of training, on one and
    the same test part; the intervals of :func:`leaderboard` are of drawing patients.
    """
    axes = board_axes(board)
    others = [axis for axis in axes if axis != "seed"] + ["split"]
    ranked = board[board["rank"].notna()]
    if "seed" not in axes or ranked.empty or ranked.groupby(others, dropna=False)["seed"].nunique().max() < 2:
        return None
    table = ranked.groupby(others, dropna=False, as_index=False).agg(
        seeds=("seed", "nunique"), valid_mean=("valid_mean_auc", "mean"), valid_sd=("valid_mean_auc", "std"),
        test_mean=("test_mean_auc", "mean"), test_sd=("test_mean_auc", "std"), test_low=("test_mean_auc", "min"),
        test_high=("test_mean_auc", "max"), n_images=("n_images", "first"), n_patients=("n_patients", "first"),
        positive_share=("positive_share", "first"))
    return table.sort_values("valid_mean", ascending=False, ignore_index=True)
