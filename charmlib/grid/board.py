"""``leaderboard.csv``: ranked by validation, with the test score and its interval beside, for reading."""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

import charmlib
from charmlib.evaluation.compare import holm, mean_auc_difference, p_of
from charmlib.evaluation.intervals import LEVEL
from charmlib.evaluation.leaks import refuse_leaks
from charmlib.evaluation.runs import valid_auc
from charmlib.evaluation.tables import class_rows, split_label
from charmlib.files import json_or_empty, write_csv, write_text
from charmlib.grid.cells import CellFolder, GridError
from charmlib.grid.spec import Grid, refuse_names
from charmlib.param_sources import read_yaml
from charmlib.params import PARAMS, coerce, effective, missing_need
from charmlib.training.recipes import phases, steps

DIFFERENCE = ["diff_first", "diff_low", "diff_high", "same_as_first"]
SEEDS = ["seeds_diff", "seeds_low", "seeds_high", "survives"]
LAST = ["valid_mean_auc", "test_mean_auc", "ci_low", "ci_high", "same_as_first", "diff_first", "diff_low", "diff_high",
        "configuration", *SEEDS, "split", "n_images", "n_patients", "positive_share", "seconds", "overhead_seconds",
        "training_of", "status"]

PLAIN = {"system": "charm", "use_momentum": False, "use_attention": False, "use_bank": False, "head": "charm", "refine": "none"}
"""Parameters that make a plain network."""
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

    Cells that agree in all parameters but the seed are one ``configuration``; the first has the highest mean validation AUC.
    ``seeds_diff`` is another's mean test AUC minus the first's over the seeds of both, with limits over patients and seeds;
    blank below two. It ``survives`` if every seed has its sign and it can be told from 0, corrected for their number.

    ``training_of`` names the cell whose training one shares, :mod:`charmlib.grid.sharing`.

    What is found of a cell is kept in :data:`KEPT`, and found anew once its files have changed.

    Raises GridError for a folder that holds no grid, and :class:`charmlib.evaluation.leaks.LeakError` if test images of a cell
    were in another's training part.
    """
    folder = Path(folder)
    kept = Kept(folder)
    record = kept.get("grid.yaml", [_state(folder / "grid.yaml")], lambda: read_record(folder)) if grid is None \
        else record_of(grid)
    axes = [axis for axis in record["axes"] if axis != "split"]  # which each board has
    cells = {cell["id"]: cell["params"] for cell in record["cells"]}
    # cells of another call of the same grid (a pinned axis, another shard) stay on the board
    others = {path.parent.name for name in ("metrics.json", "cell.json") for path in folder.glob(f"[!.]*/{name}")}
    runs = {cell: CellFolder(folder / cell) for cell in [*cells, *sorted(others - cells.keys())]}
    rows = [_row(run, axes, kept) for run in runs.values()]
    found = {row["cell"]: kept.of(runs[row["cell"]]) for row in rows if "split" in row}
    params = {cell: found[cell]["params"] if cell in found else cells.get(cell) for cell in runs}
    some = next((of["images"] for of in found.values()), None)  # stands for the cells that are not finished
    acts = {cell: found[cell]["acts"] if cell in found else _acting(p, some) for cell, p in params.items() if p}
    values, names = _values_that_act(params, axes, acts), _configurations({cell: acts[cell] for cell in found})
    board = pd.DataFrame([row | values[row["cell"]] | {"configuration": names.get(row["cell"])} for row in rows],
                         columns=["rank", "cell", *axes, *LAST, "reason"])
    order = board[board["status"] == "done"].groupby("split")["valid_mean_auc"].rank(ascending=False, method="first")
    board["rank"] = order.reindex(board.index).astype("Int64")
    unlike = {(of["split"], of["drawn"]): runs[cell] for cell, of in reversed(found.items())}
    refuse_leaks(list(unlike.values())[::-1] if len(unlike) > 1 else [], folds=True)
    several = {cell: runs[cell] for cell, of in found.items() if of["several"]}
    board = board.astype({"same_as_first": object, "survives": object})
    board = _with_differences(board, several, dict.fromkeys(several, 0), kept, "cell", DIFFERENCE)
    board["same_as_first"] = [told if pd.isna(told) else not told for told in board["same_as_first"]]
    board = _with_differences(board, several, {cell: of["params"]["seed"] for cell, of in found.items()}, kept, "configuration",
                              SEEDS)
    board = board.sort_values(["split", "rank", "status", "cell"], na_position="last")
    board = board.sort_values("status", key=lambda status: status == NO_VALIDATION, kind="stable", ignore_index=True)
    board = board if board["reason"].any() else board.drop(columns="reason")
    kept.save()
    if write:
        write_csv(folder / "leaderboard.csv", board)
    return board


KEPT = ".board.json"
"""In a grid's folder: what the last board found of its files, for the next one of the same code."""
_CODE = sha256(Path(__file__).read_bytes() + charmlib.__version__.encode()).hexdigest()


class Kept:
    """What is found of files, each finding with the state of its files; only those that were asked for are saved again."""

    def __init__(self, folder: Path):
        self.path, content = folder / KEPT, json_or_empty(folder / KEPT)
        self._found = content["found"] if content.get("code") == _CODE else {}
        self._used: dict[str, list] = {}

    def get(self, name: str, state: list, find: Callable[[], Any]) -> Any:
        """The finding of this name, made by ``find`` unless it is there with this ``state``; both are plain JSON, since they
        are compared with what was read from a file."""
        if self._found.get(name, [None])[0] != state:
            self._found[name] = [state, find()]
        self._used[name] = self._found[name]
        return self._used[name][1]

    def of(self, run: CellFolder) -> dict:
        """What board and report take from a finished cell; raises what the readers of its files raise."""
        return self.get(f"cell {run.name}", state_of(run), lambda: _scores(run))

    def save(self) -> None:
        """Keep what was asked for, if it is not kept already and the folder can be written to."""
        content = {"code": _CODE, "found": self._used}
        with suppress(OSError):
            if json_or_empty(self.path) != content:
                write_text(self.path, json.dumps(content))


def state_of(run: CellFolder) -> list:
    """Time of change and size of each file of a finished cell that a board reads; None for a missing one."""
    return [_state(file) for file in (run.metrics_file, run.predictions_file, run.resamples_file, run.history_file,
                                      run.bank_history_file)]


def _state(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_ctime_ns, found.st_size]


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
        shared = record.pop("params", {})
        for cell in record["cells"]:
            cell["params"] = {**shared, **cell["params"]}
        for params in filter(None, [cell["params"] for cell in record["cells"]]):
            params |= {name: coerce(name, params[name] if name in params or p.hashed else p.default, str(path))
                       for name, p in PARAMS.items() if name in params or (name != "run_dir" and not p.of)}
            _ = [params[axis] for axis in record["axes"]]
        return record
    except (KeyError, TypeError, AttributeError) as error:
        raise GridError(f"{path} is damaged or of another version ({type(error).__name__}: {error}); the same `grid run` "
                        "writes it anew") from error


def record_of(grid: Grid) -> dict:
    """What :func:`read_record` reads of a grid."""
    return {"name": grid.name, "axes": list(grid.axes), "cells": [
        {"id": cell.id, "axes": cell.axes, "params": cell.params} for cell in grid.cells]}


def record_text(record: Mapping) -> str:
    """The text of ``grid.yaml``, in which parameters that all cells share stand once."""
    texts = [{name: repr(value) for name, value in cell["params"].items()} for cell in record["cells"]]
    shared = {name: value for name, value in (record["cells"] or [{"params": {}}])[0]["params"].items()
              if all(text.get(name) == repr(value) for text in texts)}
    cells = [{**cell, "params": {n: v for n, v in cell["params"].items() if n not in shared}} for cell in record["cells"]]
    return yaml.safe_dump({"name": record["name"], "axes": record["axes"], "params": shared, "cells": cells}, sort_keys=False)


def _acting(params: Mapping, images: Mapping[str, int] | None) -> dict:
    """The parameters as they act in the number of steps that so many images make."""
    return effective(params, images and steps(phases(params), images))


def _values_that_act(params: Mapping[str, Mapping | None], axes: list[str], acts: Mapping[str, Mapping]) -> dict[str, dict]:
    """Cell -> the values of its axes; None without effect, or if a cell of another value is the same run."""
    texts = {cell: str(values) for cell, values in acts.items()}
    times = Counter(texts.values())
    return {cell: {axis: None if not p or missing_need(axis, p) or (times[texts[cell]] > 1 and acts[cell].get(axis, p[axis])
                                                                    != p[axis]) else p[axis] for axis in axes}
            for cell, p in params.items()}


def _configurations(acts: Mapping[str, Mapping]) -> dict[str, str]:
    """Cell -> the name of its configuration: its first cell's without the seed, or whole where that is another's."""
    names: dict[str, str] = {}
    for cell, values in acts.items():
        short = re.sub(r"(^|_)seed=[^_]*", "", cell).strip("_") or "all seeds"
        names.setdefault(str({**values, "seed": None}), cell if short in names.values() else short)
    return {cell: names[str({**values, "seed": None})] for cell, values in acts.items()}


def _row(run: CellFolder, axes: list[str], kept: Kept) -> dict:
    row = {"cell": run.name, "status": run.status, "reason": run.reason}
    try:
        if not run.done:
            return row
        found = kept.of(run)
        _ = [found["params"][axis] for axis in axes]
        return row | found["row"]
    except Exception as error:  # a reader's of whatever kind
        words = f"{type(error).__name__}: {error}"
        return row | {"status": DAMAGED, "reason": str(error) if str(run.path) in str(error) else
                      f"{run.metrics_file} is damaged ({words}); remove {run} to run the cell again"}


def _scores(run: CellFolder) -> dict:
    """What :meth:`Kept.of` gives; raises what the readers raise of all that board and report take from it."""
    m, status = run.metrics, "done"
    _ = run.resamples and run.resamples.auc[:, run.test.findings], run.history
    class_rows(m["test"])
    if run.bank_history_file.is_file():
        with open(run.bank_history_file, newline="") as file:
            if len({*map(len, csv.reader(file))}) != 1:
                raise ValueError(f"{run.bank_history_file.name} is not a table")
    if m["quick_check"]:
        status = "quick check"
    elif m["params"]["labels"] == "shuffled":
        status = "control"
    elif m["valid"] is None:
        status = NO_VALIDATION
    drawn, part = " (drawn phantoms)" if m["data"]["drawn"] else "", m["split"]["test"]
    low, high, _ = m["test"]["intervals"]["mean_auc"]
    row = {"status": status, "valid_mean_auc": valid_auc(m), "test_mean_auc": m["test"]["mean_auc"], "ci_low": low,
           "ci_high": high, "split": split_label(m["split"]) + drawn, "n_images": part["images"],
           "n_patients": part["patients"], "positive_share": part["positive_share"],
           "seconds": round(m["seconds"]["train"] + m["seconds"]["score"], 1), "overhead_seconds": m["seconds"]["overhead"],
           "training_of": m.get("shares_training_with")}
    return {"row": row, "params": m["params"], "images": m["images"], "acts": _acting(m["params"], m["images"]),
            "split": m["split"]["hash"], "drawn": m["data"]["drawn"], "several": run.resamples is not None,
            "enrichment": (m["bank"] or {}).get("enrichment")}


def _with_differences(board: pd.DataFrame, runs: Mapping[str, CellFolder], seeds: Mapping[str, int], kept: Kept, of: str,
                      columns: Sequence[str]) -> pd.DataFrame:
    """Fill in the paired difference of each ranked cell, or ``of`` each configuration over seeds, to the first of its split:
    value, limits, and whether it can be told from 0 in all seeds."""
    for _, ranked in board[board["rank"].notna() & board["cell"].isin(runs)].groupby("split"):
        cell, valid, auc = (ranked[name].to_dict() for name in ("cell", "valid_mean_auc", "test_mean_auc"))  # quicker to ask
        rows, found = ranked.groupby(of, sort=False).groups, {}
        cells = {name: {seeds[cell[i]]: i for i in group} for name, group in rows.items()}
        first = max(rows, key=lambda name: np.mean([valid[i] for i in rows[name]]))
        for name in cells:
            common = sorted(cells[first].keys() & cells[name].keys())
            if name == first or len(common) < (1 if of == "cell" else 2):
                continue
            at = [[cells[each][seed] for seed in common] for each in (first, name)]
            one, two = ([runs[cell[i]] for i in side] for side in at)
            limits = kept.get(f"{of} {name} less {first}", [[run.name, state_of(run)] for run in one + two],
                              lambda one=one, two=two: mean_auc_difference(one, two)[:2])
            found[name] = np.array([auc[b] - auc[a] for a, b in zip(*at)]), limits
        p = holm([p_of(by_seed.mean(), limits) for by_seed, limits in found.values()])
        told = [bool(len(set(np.sign(by_seed))) == 1 and corrected <= 1 - LEVEL)
                for (by_seed, _), corrected in zip(found.values(), p)]
        filled = {i: (by_seed.mean(), *limits, one) for (name, (by_seed, limits)), one in zip(found.items(), told)
                  for i in rows[name]}
        for column, values in zip(columns, zip(*filled.values())):  # by columns, since single rows take milliseconds each
            board.loc[list(filled), column] = list(values)
    return board


def board_axes(board: pd.DataFrame) -> list[str]:
    """The grid's axes: the columns between a leaderboard's cells and scores."""
    columns = list(board.columns)
    return columns[columns.index("cell") + 1:columns.index("valid_mean_auc")]


def over_seeds(board: pd.DataFrame) -> pd.DataFrame | None:
    """A row for each configuration of a leaderboard: mean and spread over its seeds, and its difference to the first.

    None if no configuration has two seeds. The rows stand by mean validation AUC; ranked cells count. A standard deviation over
    seeds is that of training, on one and the same test part; the intervals of single cells are of drawing patients.
    """
    ranked = board[board["rank"].notna()]
    grouped = ranked.groupby(["split", "configuration"], as_index=False)
    if ranked.empty or "seed" not in board or grouped["seed"].nunique()["seed"].max() < 2:
        return None
    same = [*(axis for axis in board_axes(board) if axis != "seed"), *SEEDS, "n_images", "n_patients", "positive_share"]
    table = grouped.agg(
        seeds=("seed", "nunique"), valid_mean=("valid_mean_auc", "mean"), valid_sd=("valid_mean_auc", "std"),
        test_mean=("test_mean_auc", "mean"), test_sd=("test_mean_auc", "std"), test_low=("test_mean_auc", "min"),
        test_high=("test_mean_auc", "max"), **{name: (name, "first") for name in same})
    return table.sort_values(["split", "valid_mean"], ascending=[True, False], ignore_index=True)
