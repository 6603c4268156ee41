"""Run a grid on Dask: one child process a cell, all results on disk, finished cells skipped."""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
from fastcore.meta import delegates

import charmlib
from charmlib.data.dataset import digests, find_data, open_dataset
from charmlib.evaluation.leaks import one_cross_validation
from charmlib.files import write_csv, write_text
from charmlib.grid import lease
from charmlib.grid.board import leaderboard, record_of, record_text
from charmlib.grid.bring import bring_earlier, refuse_links, remove_cell
from charmlib.grid.budget import CARDS, KAGGLE_WEEK, Pace, existing, hours, paces, probed, refuse_without_space, remaining
from charmlib.grid.cells import CellFolder, GridError, cell_hash, code_hash, find_notebooks, notebook_code
from charmlib.grid.cluster import Means, connect, given_cluster, handling, local_cluster
from charmlib.grid.report import write_report
from charmlib.grid.schedule import Schedule
from charmlib.grid.sharing import shared_jobs, training_of
from charmlib.grid.spec import Cell, Grid, load_grid, parse_shard, read_cell, refuse_dead_axes, remarks
from charmlib.grid.worker import child_environment
from charmlib.param_sources import find_file, read_yaml, with_absolute_paths
from charmlib.params import READING, changes, mean_of

_LOOK = 120.0  # seconds of a budget that a test notebook may need
_DATA = (*READING, "data_root", "labels", "split", "never_test", "valid_fraction", "limit", "image_size", "aspect", "contrast",
         "cache_dir", "workers")


@delegates(Means)
def run_grid(grid: Grid | str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
             shard: str | tuple[int, int] | None = None, continue_from: str | Path | None = None, dry_run: bool = False,
             notebooks: str | Path | None = None, say: Callable[[str], None] = print, **kwargs) -> pd.DataFrame:
    """Run or continue a grid; returns its leaderboard.

    Finished cells are skipped, started ones go on after their last finished epoch. A failed cell keeps its traceback
    (``error.txt`` and the executed notebook) and the others go on; the next call tries it again. A cell that hangs or whose
    process or kernel is killed is started again, once for each time that it gets further. Several calls on one folder, also
    from several machines, share the cells.

    ``grid`` is a grid, or its file with ``assignments`` as in :func:`charmlib.grid.spec.load_grid`; ``out`` is its folder,
    ``runs/<name>`` by default. ``shard`` ('i/n' or (i, n)) takes only every n-th cell from the i-th on. ``continue_from`` is an
    earlier session's folder of this grid, copied from first; attached outputs are found by default on Kaggle. ``dry_run`` only
    says what would run, and how long it would take once an epoch has been timed. ``say`` gets each line of progress; the other
    arguments are those of :class:`charmlib.grid.cluster.Means`.

    Raises :class:`charmlib.params.ParameterError` if the grid file, an assignment or a time is wrong, and GridError if a
    finished cell was made with other settings, a cluster cannot be used, or the disk is full.
    """
    means = Means(**kwargs)
    grid = grid if isinstance(grid, Grid) else load_grid(grid, assignments)
    part = grid.shard(*(parse_shard(shard) if isinstance(shard, str) else shard)) if shard else grid
    folder = Path(out or Path("runs") / grid.name).expanduser().resolve()
    books = find_notebooks(notebooks)
    if CellFolder(folder).params_file.is_file():
        raise GridError(f"{folder} is the folder of a single run, which would hide a grid's cells: name another --out")
    if dry_run:
        _tell_plan(part, folder, means, say)
        return pd.DataFrame()
    _refuse_locked(folder, " (an earlier session's read-only output goes into --continue-from)")
    if means.given:  # refused here if it is not there, since decoding the images may take an hour
        connect(means, say).close()
    bring_earlier(grid, folder, continue_from, say=say)
    run_cells(part, folder, books, means, whole=grid, say=say)
    board = leaderboard(folder, grid)
    if not means.given and _look_at_first(board, grid, folder, books, means, say):
        board = leaderboard(folder, grid)
    write_report(folder, board, name=grid.name)
    over, spare = sum(CellFolder(folder / cell.id).status in ("done", "failed") for cell in part.cells), means.budget.left()
    if over < len(part.cells) and means.budget.seconds is not None:
        used = "is used" if spare < 1 else f"has no room for more ({hours(spare)} are left of it)"
        seconds = sum(_seconds_left(grid, part, folder))
        more = f"at most {seconds / 3600:.2f} GPU hours" if seconds < float("inf") else "how long they take is not known yet"
        say(f"the budget of {hours(means.budget.seconds)} {used}: {over} of {len(part.cells)} cells are over, "
            f"{len(part.cells) - over} left to run ({more}). The same command goes on with them.")
    return board


def _look_at_first(board: pd.DataFrame, grid: Grid, folder: Path, books: Path, means: Means, say) -> bool:
    """Execute the test notebook of each cell ranked first that has none because it shares a training; whether any was."""
    names, looked = set(board["cell"][board["rank"].eq(1)]), False
    for cell in grid.cells:
        if cell.id in names and not (folder / cell.id / "test.ipynb").exists() and means.budget.left() > _LOOK:
            job = {"id": cell.id, "folder": str(folder / cell.id), "notebooks": str(books), "look": True, "threads": 0,
                   "params": _found(cell), "deadline": None, "scoring_seconds": None}
            say(f"{cell.id} is ranked first: its test notebook and report")
            ended = subprocess.run([sys.executable, "-m", "charmlib.grid.cell_process"], input=json.dumps(job), text=True,
                                   capture_output=True, env=child_environment(job))
            looked |= not ended.returncode
            if ended.returncode:
                say("without them: " + "".join(ended.stderr.strip().splitlines()[-1:]))
    return looked


def run_single(path: str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
               rerun_changed: bool = False, notebooks: str | Path | None = None, say=print) -> Path:
    """Train and test one parameter file, with the files and rules of a grid's cell; returns the run's folder.

    A finished run is left as it is. Raises ParameterError for wrong parameters, GridError for a finished run of other settings
    and for a run that failed (its traceback is in ``error.txt``).
    """
    path = find_file(path)
    folder = Path(out or Path("runs") / path.stem).resolve()
    if (folder / "grid.yaml").is_file():
        raise GridError(f"{folder} is the folder of a grid, whose cells a run there would hide: name another --out")
    _refuse_locked(folder)
    cell = read_cell(path, assignments, folder.name)
    grid = Grid(folder.parent.name, path, (cell,), given=tuple(cell.axes))
    run_cells(grid, folder.parent, find_notebooks(notebooks), Means(rerun_changed=rerun_changed), say=say)
    run = CellFolder(folder)
    if not run.done:
        raise GridError(f"the run failed; its traceback is in {run.error_file}")
    return folder


def run_cells(grid: Grid, folder: Path, notebooks: Path, means: Means, *, whole: Grid | None = None,
              say: Callable[[str], None] = print) -> None:
    """Run the unfinished cells of a grid, each in ``folder / id``; see :func:`run_grid`.

    With ``whole``, the grid of which these cells are a shard, its record and leaderboard are kept up to date; without one the
    split is written into the folder of the only cell.
    """
    code = notebook_code(notebooks)
    splits, images, seen = _prepare(grid, folder if whole else folder / grid.cells[0].id, say)
    if not whole or grid.cells == whole.cells:  # a shard does not show whether an axis has an effect
        refuse_dead_axes(grid, images)
    for line in remarks(grid, images):
        say(line)
    jobs = [{"id": cell.id, "folder": str(folder / cell.id), "notebooks": str(notebooks), "params": _found(cell),
             "hash": cell_hash(cell.params, code, splits[cell.id], seen[cell.id]), "split": splits[cell.id],
             "code": code_hash(code), "digests": seen[cell.id], "hung_after": means.hung_after} for cell in grid.cells]
    jobs = shared_jobs(_checked(jobs, folder, means.rerun_changed, say))
    if any("members" in job for job in jobs):
        say(f"{len(jobs)} trainings, which the cells share")
    refresh = partial(leaderboard, folder, whole) if whole else lambda: None
    if whole:
        write_text(folder / "grid.yaml", record_text(record_of(whole)))
    refresh()
    if not jobs:
        return
    refuse_without_space(grid.cells, folder, means.at_once, say=say)
    cluster = given_cluster(means, jobs, say) if means.given else local_cluster(means, len(jobs))
    with handling(signal.SIGTERM, _terminate), cluster as seats:
        Schedule(grid.cells, jobs, folder, seats, budget=means.budget, refresh=refresh, say=say).run()


def _found(cell: Cell) -> dict:
    """A cell's parameters with absolute paths and the data's folder, because its notebooks run in the cell's own."""
    return with_absolute_paths(cell.params | {"data_root": str(find_data(cell.params["data_root"], cell.params["csv"]))})


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def _terminate(*_):
    raise Terminated


def _refuse_locked(folder: Path, more: str = "") -> None:
    place = existing(folder)
    if not (place.is_dir() and os.access(place, os.W_OK)):
        raise GridError(f"{place} {'cannot be written to' if place.is_dir() else 'is a file'}: name another --out{more}")


def _tell_plan(grid: Grid, folder: Path, means: Means, say) -> None:
    unknown = [cell for cell, left in zip(grid.cells, _seconds_left(grid, grid, folder)) if left == float("inf")]
    known, work = probed(unknown, say) if unknown else ({}, {})
    seconds = _seconds_left(grid, grid, folder, known)
    for cell, left in zip(grid.cells, seconds):
        run = CellFolder(folder / cell.id)
        changed = run.done and changes(run.metrics["params"], cell.params)
        say(f"{cell.id}: " + ("done with other settings (refused without --rerun-changed)" if changed else run.status)
            + (f", at most {hours(left)} left" if 0 < left < float("inf") else ""))
    trainings = len({training_of(cell.params) for cell in grid.cells})
    shared = f", which share {trainings} trainings," if trainings < len(grid.cells) else ""
    say(f"{len(grid.cells)} cells{shared} in {folder}; nothing was run")
    total, at_once = sum(seconds) / 3600, means.at_once
    more = f", {hours(3600 * total / at_once)} with {at_once} at once" if at_once > 1 else ""
    say(f"at most {total:.2f} GPU hours are left{more}: {total / at_once / KAGGLE_WEEK:.1%} of Kaggle's {KAGGLE_WEEK} session "
        "hours a week" + (", by a few steps on this machine and without decoding images" if unknown else "")
        if total < float("inf") else "how long they take is known once the data are there, or one epoch has been timed")
    if len(work) == len(grid.cells):  # afterwards finished epochs say more
        tflop = sum(_seconds_left(grid, grid, folder, work))
        say(f"{tflop:,.0f} TFLOP: " + ", ".join(f"{hours(tflop / best)} to {hours(tflop / worst)} on a {card} at {best:g} to "
                                               f"{worst:g} TFLOP/s" for card, (best, worst) in CARDS.items())
            + "; these rates are assumed, not measured")


def _seconds_left(grid: Grid, part: Grid, folder: Path, known: Mapping[str, Pace] | None = None) -> list[float]:
    """Of each cell of a part, by the finished epochs of the whole grid, or by what is ``known``; the first of those that share
    a training trains, and the first of those that share a mean of the weights too encodes."""
    pace, trained, found = {**paces(folder, grid.cells), **(known or {})}, set(), []
    for cell in part.cells:
        run, training, own = CellFolder(folder / cell.id), training_of(cell.params), pace[cell.id]
        mean = training, *mean_of(cell.params)
        found.append(remaining(cell, run, own) if training not in trained else 0.0 if run.done else
                     (own.scoring or 0.0) + (mean not in trained) * (own.looks or 0.0))
        trained |= set() if run.done else {training, mean}
    return found


def _prepare(grid: Grid, folder: Path, say) -> tuple[dict[str, str], dict[str, dict[str, int]], dict[str, dict[str, str]]]:
    """Decode the images once for all cells, write the splits; returns the hash of each cell's, its training images and the
    digests of what it reads."""
    opened, of_cell, images, seen, known = {}, {}, {}, {}, {}
    for cell in grid.cells:
        key = tuple(cell.params[name] for name in _DATA)
        if key not in opened:
            data = opened[key] = open_dataset(dict(zip(_DATA, key)))
            say(str(data))
        of_cell[cell.id] = opened[key].split.hash
        images[cell.id] = opened[key].train_images()
        if (of := (key, cell.params["weights"])) not in known:
            known[of] = digests(opened[key], cell.params["weights"])
        seen[cell.id] = known[of]
    splits = {data.split.hash: (data.split.name, data.split.frame(data.index)) for data in opened.values()}
    _refuse_leaking_splits(splits)
    folder.mkdir(parents=True, exist_ok=True)
    for hash_, (_, frame) in splits.items():
        several = len(splits) > 1 or _differs(folder / "split.csv", frame)  # an earlier call's cells need theirs
        write_csv(folder / (f"split_{hash_}.csv" if several else "split.csv"), frame)
    return of_cell, images, seen


def _differs(path: Path, frame: pd.DataFrame) -> bool:
    """Whether a file holds another split; a damaged one holds none."""
    try:
        return not pd.read_csv(path, dtype=str).equals(frame.astype(str).reset_index(drop=True))
    except (OSError, ValueError):
        return False


def _refuse_leaking_splits(splits: Mapping[str, tuple[str, pd.DataFrame]]) -> None:
    """Refuse splits (hash -> name and frame) that test what another trains on, unless they are one cross-validation's."""
    for (one, (name, a)), (other, (other_name, b)) in itertools.permutations(splits.items(), 2):
        if one_cross_validation(name, other_name):
            continue
        both = set(a["id"][a["part"] == "test"]) & set(b["id"][b["part"] != "test"])
        if both:
            raise GridError(f"{len(both):,} test images of split {one} are in the training or validation part of {other}, "
                            f"such as {min(both)}: they cannot stand on one leaderboard. Make a grid for each split.")


def _checked(jobs: list[dict], folder: Path, rerun_changed: bool, say) -> list[dict]:
    """The jobs, whose finished cells have these settings; cells with others are refused, or removed for another run."""
    changed: dict[CellFolder, list[str]] = {}
    for job in jobs:
        cell = CellFolder(job["folder"])
        refuse_links(cell.path)
        cell.tidy()
        if (cell.done or cell.resumable or lease.holder(cell)) and (other := _other(cell, job)):
            changed[cell] = other
    if changed and not rerun_changed:
        names = [cell.name for cell in changed]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        other = ", ".join(dict.fromkeys(itertools.chain(*changed.values())))
        raise GridError(f"{len(names)} finished or started cells in {folder} were made with other {other}: {shown}. Go back to "
                        "what they were made with, use --rerun-changed to run them again (their results are replaced), or "
                        "another --out.")
    for cell in changed:
        remove_cell(cell.path)
    todo = [job for job in jobs if not CellFolder(job["folder"]).done]
    say(f"{len(jobs)} cells: {len(jobs) - len(todo)} done, {len(todo)} to run, in {folder}")
    return jobs


def _other(cell: CellFolder, job: Mapping) -> list[str]:
    """What of a finished or started cell is not as the job wants it, in words; empty for a cell that fits."""
    try:
        if (cell.metrics["hash"] if cell.done else cell.identity.get("hash", job["hash"])) == job["hash"]:
            return []
        params = cell.metrics["params"] if cell.done else read_yaml(cell.params_file)
        names, made = ", ".join(changes(params, job["params"])), cell.made_with
    except (ValueError, OSError, KeyError, TypeError, AttributeError, GridError) as error:
        return [f"files ({cell.name} is damaged: {error})"]
    wanted = {"split": job["split"], "notebooks' code": job["code"], "version of charmlib": charmlib.__version__,
              **job["digests"]}
    other = [f"parameters ({names})"] * bool(names) + [name for name, value in wanted.items() if made.get(name) != value]
    return other or ["settings"]
