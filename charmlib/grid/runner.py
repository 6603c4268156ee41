"""Run a grid on Dask: one child process a cell, everything that matters on disk, finished cells skipped."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from charmlib.data.dataset import find_data, open_dataset
from charmlib.evaluation.leaks import one_cross_validation
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_text, write_whole
from charmlib.grid import estimate, lease
from charmlib.grid.board import leaderboard
from charmlib.grid.budget import KAGGLE_WEEK, Budget, hours, seconds_of
from charmlib.grid.cells import (
    GridError,
    cell_hash,
    cell_status,
    code_hash,
    find_notebooks,
    notebook_code,
    read_identity,
    tidy,
)
from charmlib.grid.cluster import connect, gpus, local_cluster, other_cluster
from charmlib.grid.earlier import bring_earlier
from charmlib.grid.folders import remove_cell
from charmlib.grid.report import write_report
from charmlib.grid.schedule import Schedule
from charmlib.grid.space import refuse_without_space
from charmlib.grid.spec import Cell, Grid, load_grid, parse_shard
from charmlib.params import ParameterError, changes, with_absolute_paths

_DATA = ("data_root", "classes", "csv", "labels", "split", "valid_fraction", "limit", "image_size", "aspect",
         "cache_dir", "workers")


@dataclass(frozen=True)
class Means:
    """Where and how long cells run; see :func:`run_grid`."""

    workers: int | None = None
    scheduler: str | None = None
    scheduler_file: str | None = None
    any_worker: bool = False
    wait_workers: float = 60.0
    budget: float | None = None
    hung_after: float = 1800.0
    rerun_changed: bool = False

    @property
    def elsewhere(self) -> bool:
        """Whether the cells run on a cluster that is there already."""
        return bool(self.scheduler or self.scheduler_file)


def run_grid(path: str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
             workers: int | None = None, scheduler: str | None = None, scheduler_file: str | None = None,
             any_worker: bool = False, wait_workers: str | float = 60.0, shard: str | tuple[int, int] | None = None,
             budget: str | float | None = None, hung_after: str | float = 1800.0, continue_from: str | Path | None = None,
             dry_run: bool = False, rerun_changed: bool = False, notebooks: str | Path | None = None,
             say: Callable[[str], None] = print) -> pd.DataFrame:
    """Run or continue a grid; returns its leaderboard.

    Cells whose ``metrics.json`` is there are skipped, half-done ones go on after their last finished epoch. A cell that
    fails keeps its traceback (``error.txt`` and the executed notebook) and the others go on; the next call tries it again.
    One whose process or kernel is killed, or that hangs, is started again, once for each time that it gets further. Several
    calls on one folder, also from several machines, share the cells.

    Parameters
    ----------
    path, assignments
        See :func:`charmlib.grid.spec.load_grid`.
    out : path
        The grid's folder, ``runs/<name>`` by default.
    workers : int
        Workers of the local cluster: one a GPU, or one on a CPU, by default.
    scheduler, scheduler_file : str
        Use this Dask cluster instead; its workers must see ``out`` and the data under the same paths. A cell takes one ``GPU``
        of a worker's resources; with ``any_worker`` also workers that offer none. Without any worker after ``wait_workers``
        (seconds, or such as '5m') it is refused.
    shard : 'i/n' or (i, n)
        Only every n-th cell from the i-th on.
    budget : str or float
        A time such as '11h', from now on: a cell is started only if one epoch and its save fit, longest first; training ends in
        time at an epoch's end, and the report is written within it.
    hung_after : str or float
        A cell that shows no sign of life for so long (no batch, no file) is ended.
    continue_from : path
        An earlier session's folder of this grid, copied from first; on Kaggle attached outputs are found by themselves.
    dry_run : bool
        Only say what would run, and how long it would take once an epoch has been timed.
    rerun_changed : bool
        Run finished cells again whose parameters, notebooks, split or charmlib version are not those of now.
    say : callable
        Gets each line of progress.

    Raises
    ------
    charmlib.params.ParameterError
        The grid file, an assignment or a time is wrong.
    GridError
        A finished cell was made with other settings, a cluster cannot be used, or the disk is full.
    """
    if scheduler and scheduler_file:
        raise ParameterError("--scheduler and --scheduler-file name two clusters; give one of them")
    means = Means(workers, scheduler, scheduler_file, any_worker, seconds_of(wait_workers, "--wait-workers"),
                  None if budget is None else seconds_of(budget), seconds_of(hung_after, "--hung-after"), rerun_changed)
    if isinstance(shard, str):
        shard = parse_shard(shard)
    return run_loaded(load_grid(path, assignments), means, out=out, shard=shard, continue_from=continue_from, dry_run=dry_run,
                      notebooks=notebooks, say=say)


def run_loaded(grid: Grid, means: Means = Means(), *, out: str | Path | None = None, shard: tuple[int, int] | None = None,
               continue_from: str | Path | None = None, dry_run: bool = False, notebooks: str | Path | None = None,
               say: Callable[[str], None] = print) -> pd.DataFrame:
    """:func:`run_grid` for a grid that is not a file."""
    budget = Budget(means.budget)
    part = grid.shard(*shard) if shard else grid
    folder = Path(out or Path("runs") / grid.name).expanduser().resolve()
    books = find_notebooks(notebooks)
    if dry_run:
        _tell_plan(part, folder, means, say)
        return pd.DataFrame()
    _refuse_unusable(folder, means)
    bring_earlier(grid, folder, continue_from, say=say)

    def refresh(first: bool = False) -> pd.DataFrame:
        if first:  # the whole grid, also where this call runs a shard of it
            write_text(folder / "grid.yaml", as_yaml(grid))
        return leaderboard(folder, grid)

    run_cells(part, folder, books, means, budget=budget, split_folder=folder, refresh=refresh, say=say)
    board = refresh()
    write_report(folder, board, grid)
    left = [cell for cell in part.cells if cell_status(folder / cell.id) not in ("done", "failed")]
    if left and means.budget is not None:
        used = "is used" if budget.left() < 1 else f"has no room for more ({hours(budget.left())} are left of it)"
        say(f"the budget of {hours(means.budget)} {used}: {len(part.cells) - len(left)} of {len(part.cells)} cells are over, "
            f"{len(left)} left to run ({_time_left(grid, part, folder)}). The same command goes on with them.")
    return board


def _refuse_unusable(folder: Path, means: Means) -> None:
    """Say what cannot work before the images are decoded, which may take an hour."""
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not os.access(there, os.W_OK):
        raise GridError(f"{there} cannot be written to: name another --out (an earlier session's read-only output goes into "
                        "--continue-from)")
    if means.elsewhere:
        connect(means.scheduler, means.scheduler_file, means.wait_workers).close()


def run_cells(grid: Grid, folder: Path, notebooks: Path, means: Means = Means(), *, split_folder: Path,
              budget: Budget | None = None, refresh: Callable[..., object] = lambda first=False: None,
              say: Callable[[str], None] = print) -> None:
    """Run those cells of a grid that are not done, each in ``folder / id``; see :func:`run_grid`.

    ``refresh(first=True)`` is called before the first cell starts, ``refresh()`` after each that ends.
    """
    budget = budget or Budget()
    code = notebook_code(notebooks)
    splits = _prepare(grid, split_folder, say)
    hashes = {cell.id: cell_hash(cell.params, code, splits[cell.id]) for cell in grid.cells}
    todo = _todo(grid, folder, hashes, means.rerun_changed, say)
    refresh(first=True)
    if not todo:
        return
    jobs = [{**_job(cell, folder, notebooks), "hash": hashes[cell.id], "split": splits[cell.id], "code": code_hash(code),
             "hung_after": means.hung_after} for cell in todo]
    refuse_without_space(grid.cells, folder, means.workers or max(1, len(gpus())), say=say)
    if means.elsewhere:
        cluster = other_cluster(means.scheduler, means.scheduler_file, folder=folder, notebooks=notebooks, code=code_hash(code),
                                data_roots={job["params"]["data_root"] for job in jobs}, any_worker=means.any_worker,
                                wait=means.wait_workers)
    else:
        cluster = local_cluster(means.workers, len(jobs))
    with _sigterm_as_interrupt(), cluster as places:
        Schedule(list(grid.cells), jobs, folder, places, budget=budget, refresh=refresh, say=say).run()


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    def end(*_):
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_plan(grid: Grid, folder: Path, means: Means, say) -> None:
    """Each cell, where it stands and how long it still takes."""
    seconds = _seconds_left(grid, grid, folder)
    for cell, left in zip(grid.cells, seconds):
        status = cell_status(folder / cell.id)
        if status == "done" and changes(RunFolder(folder / cell.id).metrics["params"], cell.params):
            status = "done with other settings (refused without --rerun-changed)"
        say(f"{cell.id}: {status}" + (f", at most {hours(left)} left" if left else ""))
    say(f"{len(grid.cells)} cells in {folder}; nothing was run")
    at_once = means.workers or max(1, len(gpus()))
    if None in seconds:
        say("how long they take is known once one epoch has been timed here")
    else:
        total = sum(seconds)
        more = f", {hours(total / at_once)} with {at_once} at once" if at_once > 1 else ""
        say(f"at most {total / 3600:.2f} GPU hours are left{more}: {total / at_once / 3600 / KAGGLE_WEEK:.1%} of Kaggle's "
            f"{KAGGLE_WEEK} session hours a week")


def _seconds_left(grid: Grid, part: Grid, folder: Path) -> list[float | None]:
    """Of each cell of a part, by what has run of the whole grid."""
    pace = estimate.paces(folder, grid.cells)
    return [estimate.remaining(cell, folder / cell.id, pace[cell.id]) for cell in part.cells]


def _time_left(grid: Grid, part: Grid, folder: Path) -> str:
    seconds = _seconds_left(grid, part, folder)
    return "how long they take is not known yet" if None in seconds else f"at most {sum(seconds) / 3600:.2f} GPU hours"


def _prepare(grid: Grid, folder: Path, say) -> dict[str, str]:
    """Decode the images once for all cells, write the splits, and return the hash of each cell's."""
    splits, of_cell = {}, {}
    for cell in grid.cells:
        key = tuple(cell.params[name] for name in _DATA)
        if key not in splits:
            data = open_dataset({name: cell.params[name] for name in _DATA})
            splits[key] = data.split, data.split.frame(data.index)
            say(str(data))
        of_cell[cell.id] = splits[key][0].hash
    different = {split.hash: frame for split, frame in splits.values()}
    _refuse_leaking_splits(different, {split.hash: split.name for split, _ in splits.values()})
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in different.items():
        target = folder / ("split.csv" if len(different) == 1 else f"split_{name}.csv")
        write_whole(target, lambda temporary, frame=frame: frame.to_csv(temporary, index=False))
    return of_cell


def _refuse_leaking_splits(frames: Mapping[str, pd.DataFrame], names: Mapping[str, str]) -> None:
    """Refuse a grid whose cells could not stand on one leaderboard before any is trained; folds of a cross-validation may."""
    for (one, a), (other, b) in itertools.permutations(frames.items(), 2):
        if one_cross_validation(names[one], names[other]):
            continue
        both = set(a["id"][a["part"] == "test"]) & set(b["id"][b["part"] != "test"])
        if both:
            raise GridError(f"{len(both):,} test images of split {one} are in the training or validation part of {other}, "
                            f"such as {min(both)}: they cannot stand on one leaderboard. Make a grid for each split.")


def _todo(grid: Grid, folder: Path, hashes: dict[str, str], rerun_changed: bool, say) -> list[Cell]:
    todo, changed = [], []
    for cell in grid.cells:
        tidy(folder / cell.id)
        kept = _hash_of(folder / cell.id)
        if kept not in (None, hashes[cell.id]):
            changed.append(cell)
        elif cell_status(folder / cell.id) != "done":
            todo.append(cell)
    if changed and not rerun_changed:
        names = ", ".join(c.id for c in changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
        raise GridError(f"{len(changed)} finished or started cells in {folder} were made with other parameters, notebooks, "
                        f"split or charmlib version: {names}. Use --rerun-changed to run them again (their results are "
                        "replaced), or another --out.")
    for cell in changed:
        remove_cell(folder / cell.id)
    done = len(grid.cells) - len(todo) - len(changed)
    say(f"{len(grid.cells)} cells: {done} done, {len(todo) + len(changed)} to run, in {folder}")
    return [cell for cell in grid.cells if cell in todo or cell in changed]


def _hash_of(folder: Path) -> str | None:
    """The hash that a finished or started cell was made under; None for one that has nothing to lose."""
    if cell_status(folder) == "done":
        return RunFolder(folder).metrics["hash"] or "a run by hand"
    if (folder / "resume.pt").is_file() or (folder / "model.json").is_file() or lease.holder(folder):
        return read_identity(folder).get("hash")
    return None


def _job(cell: Cell, folder: Path, notebooks: Path) -> dict:
    # absolute, because the notebooks run in the cell's folder
    params = with_absolute_paths({**cell.params, "data_root": str(find_data(cell.params["data_root"]))})
    return {"id": cell.id, "params": params, "folder": str(folder / cell.id), "notebooks": str(notebooks)}


def as_yaml(grid: Grid) -> str:
    """The record of a grid that its folder keeps: axes and every cell with all its parameters."""
    return yaml.safe_dump({"name": grid.name, "axes": list(grid.axes), "cells": [
        {"id": c.id, "axes": c.axes, "params": c.params} for c in grid.cells]}, sort_keys=False)
