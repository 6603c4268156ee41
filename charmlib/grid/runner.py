"""Run a grid on Dask: one child process a cell, everything that matters on disk, finished cells skipped."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from charmlib.data.dataset import open_dataset
from charmlib.data.paths import resolve_data_root
from charmlib.evaluation.results import load_metrics
from charmlib.files import write_text, write_whole
from charmlib.grid.cells import IDENTITY, GridError, cell_hash, cell_status, find_notebooks, notebook_code
from charmlib.grid.leaderboard import leaderboard
from charmlib.grid.report import write_report
from charmlib.grid.spec import Cell, Grid, load_grid
from charmlib.params import with_absolute_paths
from charmlib.processes import with_this_package

_DATA = ("data_root", "classes", "csv", "labels", "split", "valid_fraction", "limit", "image_size", "aspect",
         "cache_dir", "workers")


def run_grid(path: str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
             workers: int | None = None, scheduler: str | None = None, scheduler_file: str | None = None,
             shard: tuple[int, int] | None = None, dry_run: bool = False, rerun_changed: bool = False,
             notebooks: str | Path | None = None, say: Callable[[str], None] = print) -> pd.DataFrame:
    """Run or continue a grid; returns its leaderboard.

    Cells whose ``metrics.json`` is there are skipped. A cell that fails keeps its traceback (``error.txt`` and the
    executed notebook) and the others go on; the next call tries it again.

    Parameters
    ----------
    path, assignments
        See :func:`charmlib.grid.spec.load_grid`.
    out : path
        The grid's folder, ``runs/<name>`` by default.
    workers : int
        Workers of the local cluster: one a GPU, or one on a CPU, by default.
    scheduler, scheduler_file : str
        Use this Dask cluster instead; its workers must see ``out`` and the data under the same paths.
    shard : (i, n)
        Only every n-th cell from the i-th on.
    dry_run : bool
        Only say what would run.
    rerun_changed : bool
        Run finished cells again whose parameters, notebooks, split or charmlib version are not those of now.
    say : callable
        Gets each line of progress.

    Raises
    ------
    charmlib.params.ParameterError
        The grid file or an assignment is wrong.
    GridError
        A finished cell was made with other settings, or a worker's cluster cannot be used.
    """
    return run_loaded(load_grid(path, assignments), out=out, workers=workers, scheduler=scheduler,
                      scheduler_file=scheduler_file, shard=shard, dry_run=dry_run, rerun_changed=rerun_changed,
                      notebooks=notebooks, say=say)


def run_loaded(grid: Grid, *, out: str | Path | None = None, workers: int | None = None, scheduler: str | None = None,
               scheduler_file: str | None = None, shard: tuple[int, int] | None = None, dry_run: bool = False,
               rerun_changed: bool = False, notebooks: str | Path | None = None,
               say: Callable[[str], None] = print) -> pd.DataFrame:
    """:func:`run_grid` for a grid that is not a file."""
    part = grid.shard(*shard) if shard else grid
    folder = Path(out or Path("runs") / grid.name).expanduser().resolve()
    books = find_notebooks(notebooks)
    if dry_run:
        for cell in part.cells:
            say(f"{cell.id}: {cell_status(folder / cell.id)}")
        say(f"{len(part.cells)} cells in {folder}; nothing was run")
        return pd.DataFrame()

    def refresh(first: bool = False) -> pd.DataFrame:
        if first:  # the whole grid, also where this call runs a shard of it
            write_text(folder / "grid.yaml", _as_yaml(grid))
        return leaderboard(folder, grid)

    run_cells(part, folder, books, split_folder=folder, workers=workers, scheduler=scheduler,
              scheduler_file=scheduler_file, rerun_changed=rerun_changed, refresh=refresh, say=say)
    board = refresh()
    write_report(folder, board, grid)
    return board


def run_cells(grid: Grid, folder: Path, notebooks: Path, *, split_folder: Path, workers: int | None = None,
              scheduler: str | None = None, scheduler_file: str | None = None, rerun_changed: bool = False,
              refresh: Callable[..., object] = lambda first=False: None, say: Callable[[str], None] = print) -> None:
    """Run those cells of a grid that are not done, each in ``folder / id``; see :func:`run_grid`.

    ``refresh(first=True)`` is called before the first cell starts, ``refresh()`` after each that ends.
    """
    hashes = _prepare(grid, split_folder, notebooks, say)
    todo = _todo(grid, folder, hashes, rerun_changed, say)
    refresh(first=True)
    if todo:
        jobs = [_job(cell, folder, hashes[cell.id], notebooks) for cell in todo]
        _run(jobs, workers, scheduler, scheduler_file, refresh, say)


def _prepare(grid: Grid, folder: Path, notebooks: Path, say) -> dict[str, str]:
    """Decode the images once for all cells, write the split, and compute every cell's hash."""
    code, splits, hashes = notebook_code(notebooks), {}, {}
    for cell in grid.cells:
        key = tuple(cell.params[name] for name in _DATA)
        if key not in splits:
            data = open_dataset({name: cell.params[name] for name in _DATA})
            splits[key] = data.split, data.split.frame(data.index)
            say(str(data))
        hashes[cell.id] = cell_hash(cell.params, code, splits[key][0].hash)
    different = {split.hash: frame for split, frame in splits.values()}
    _refuse_leaking_splits(different)
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in different.items():
        target = folder / ("split.csv" if len(different) == 1 else f"split_{name}.csv")
        write_whole(target, lambda temporary, frame=frame: frame.to_csv(temporary, index=False))
    return hashes


def _refuse_leaking_splits(frames: Mapping[str, pd.DataFrame]) -> None:
    """Refuse a grid whose cells could not stand on one leaderboard, before any is trained."""
    for (one, a), (other, b) in itertools.permutations(frames.items(), 2):
        both = set(a["id"][a["part"] == "test"]) & set(b["id"][b["part"] != "test"])
        if both:
            raise GridError(f"{len(both):,} test images of split {one} are in the training or validation part of {other}, "
                            f"such as {min(both)}: they cannot stand on one leaderboard. Make a grid for each split.")


def _todo(grid: Grid, folder: Path, hashes: dict[str, str], rerun_changed: bool, say) -> list[Cell]:
    todo, changed = [], []
    for cell in grid.cells:
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
        shutil.rmtree(folder / cell.id)
    done = len(grid.cells) - len(todo) - len(changed)
    say(f"{len(grid.cells)} cells: {done} done, {len(todo) + len(changed)} to run, in {folder}")
    return [cell for cell in grid.cells if cell in todo or cell in changed]


def _hash_of(folder: Path) -> str | None:
    """The hash that a finished or started cell was made under; None for one that has nothing to lose."""
    if cell_status(folder) == "done":
        return load_metrics(folder)["hash"] or "a run by hand"
    if (folder / IDENTITY).is_file() and ((folder / "resume.pt").is_file() or (folder / "model.json").is_file()):
        return json.loads((folder / IDENTITY).read_text())["hash"]
    return None


def _job(cell: Cell, folder: Path, hash_: str, notebooks: Path) -> dict:
    # absolute, because the notebooks run in the cell's folder
    params = with_absolute_paths({**cell.params, "data_root": str(resolve_data_root(cell.params["data_root"]))})
    return {"id": cell.id, "hash": hash_, "params": params, "folder": str(folder / cell.id), "notebooks": str(notebooks)}


def gpus() -> list[str]:
    """Names of the visible GPUs for CUDA_VISIBLE_DEVICES, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [g.strip() for g in visible.split(",") if g.strip() and g.strip() != "-1"]
    try:
        out = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in out.stdout.splitlines()))]


def child_environment(threads: int = 0, own: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a cell's process, without what Dask's nanny sets for workers that compute themselves.

    It pins OpenMP to one thread and makes malloc return memory eagerly: together they made an epoch on two cores take
    three times as long. ``own`` are such settings that the user made; ``threads`` > 0 is a share of the machine's
    cores for each of several cells at once.
    """
    env = dict(os.environ)
    for name, value in nanny_environment().items():
        if env.get(name) == value:
            del env[name]
    env |= own or {}
    env = with_this_package(env)
    if threads and "OMP_NUM_THREADS" not in env:
        env["OMP_NUM_THREADS"] = str(threads)
    return env


def nanny_environment() -> dict[str, str]:
    """What Dask's nanny puts into the environment of the workers that it starts."""
    import dask
    import distributed  # noqa: F401  (fills dask.config)

    return {name: str(value) for key in ("pre-spawn-environ", "environ")
            for name, value in dask.config.get(f"distributed.nanny.{key}", {}).items()}


def work(job: dict, devices: Sequence[str]) -> tuple[str, int, str]:
    """Run one cell in a child process (on a Dask worker); returns its id, exit status and last words."""
    env = child_environment(job.get("threads", 0), job.get("environment"))
    if devices:
        from distributed import get_worker

        name = str(get_worker().name)
        env["CUDA_VISIBLE_DEVICES"] = devices[int(name) % len(devices)] if name.isdigit() else devices[0]
    job = {**job, "started": time.time()}
    with _stagger():
        child = subprocess.Popen([sys.executable, "-m", "charmlib.grid.child"], stdin=subprocess.PIPE,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
        child.stdin.write(json.dumps(job))
        child.stdin.close()
        time.sleep(1.0 if job.get("threads") or len(devices) > 1 else 0.0)
    try:
        words = child.stderr.read()
        status = child.wait()
    except BaseException:
        child.terminate()
        raise
    return job["id"], status, "\n".join(words.strip().splitlines()[-3:])


@contextlib.contextmanager
def _stagger():
    """Kernels that start at once race for ports, so the starts of one machine take turns."""
    import fcntl
    import tempfile

    with open(Path(tempfile.gettempdir()) / f"charm-start-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(jobs: list[dict], workers, scheduler, scheduler_file, refresh, say) -> None:
    from distributed import Client, LocalCluster

    for noisy in ("distributed", "tornado", "asyncio"):  # their tracebacks at an interrupt hide what matters
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    devices = gpus() if not (scheduler or scheduler_file) else []
    cluster = None
    if scheduler or scheduler_file:
        client = Client(address=scheduler, scheduler_file=scheduler_file, timeout=30)
        if not client.scheduler_info()["workers"]:
            client.close()
            raise GridError(f"the cluster at {scheduler or scheduler_file} has no workers; start some and try again")
    else:
        count = min(workers or max(1, len(devices)), len(jobs))
        if count > 1:
            jobs = [{**job, "threads": max(1, (os.cpu_count() or 1) // count)} for job in jobs]
        own = {name: os.environ[name] for name in nanny_environment() if name in os.environ}
        jobs = [{**job, "environment": own} for job in jobs]
        cluster = LocalCluster(n_workers=count, threads_per_worker=1, processes=True, dashboard_address=None,
                               silence_logs=logging.CRITICAL)
        client = Client(cluster)
    tails = {job["id"]: _Tail(Path(job["folder"]) / "log.txt") for job in jobs}
    start, done = time.monotonic(), 0
    try:
        # pure=False and no retries: a cell is run because its result is not on disk, never because of a cached key
        futures = [client.submit(work, job, devices, key=f"cell-{job['id']}-{time.time_ns()}", pure=False, retries=0,
                                 priority=-i) for i, job in enumerate(jobs)]
        pending = set(futures)
        while pending:
            for future in [f for f in pending if f.done()]:
                pending.discard(future)
                done += 1
                _report_one(future, jobs[futures.index(future)], done, len(jobs), start, tails, say)
                refresh()
            for cell, tail in tails.items():
                for line in tail.new():
                    say(f"  {cell}  {line}")
            if pending:
                time.sleep(0.3)
    finally:
        client.close()
        if cluster is not None:
            cluster.close()


def _report_one(future, job, done, total, start, tails, say) -> None:
    for line in tails.pop(job["id"]).new():
        say(f"  {job['id']}  {line}")
    minutes = (time.monotonic() - start) / 60
    left = f", about {minutes / done * (total - done):.0f} min left" if done < total else ""
    if future.status != "finished":
        error = Path(job["folder"]) / "error.txt"
        error.parent.mkdir(parents=True, exist_ok=True)
        write_text(error, f"the worker failed: {future.exception()}\n")
        say(f"[{done}/{total}] {job['id']} FAILED: {future.exception()}")
        return
    _, status, words = future.result()
    if status == 0:
        metrics = load_metrics(job["folder"])
        say(f"[{done}/{total}] {job['id']}: valid AUC {metrics['valid']['mean_auc']:.4f}{left}")
    else:
        if not (Path(job["folder"]) / "error.txt").is_file():
            write_text(Path(job["folder"]) / "error.txt", f"the cell's process ended with status {status}\n{words}\n")
        say(f"[{done}/{total}] {job['id']} FAILED ({words.splitlines()[-1] if words else f'status {status}'}); "
            f"traceback in {job['folder']}/error.txt{left}")


class _Tail:
    """The lines that were added to a log since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.at = path.stat().st_size if path.is_file() else 0

    def new(self) -> list[str]:
        if not self.path.is_file():
            return []
        with open(self.path, errors="replace") as file:
            file.seek(self.at)
            text = file.read()
        whole, newline, _ = text.rpartition("\n")
        self.at += len((whole + newline).encode())
        return whole.splitlines() if newline else []


def _as_yaml(grid: Grid) -> str:
    import yaml

    return yaml.safe_dump({"name": grid.name, "axes": list(grid.axes), "cells": [
        {"id": c.id, "axes": c.axes, "params": c.params} for c in grid.cells]}, sort_keys=False)
