"""The part of a Dask worker: it starts a cell's process, watches it, and ends it with everything it started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import dask
import distributed

from charmlib.files import LEASE
from charmlib.grid import lease
from charmlib.grid.cells import CellFolder, Ended, GridError, code_hash, find_notebooks, notebook_code
from charmlib.session import DEADLINE, SCORING, end_children, with_this_package

_LOOK = 0.25  # seconds between two looks at a cell's process
_POLITE = 10.0  # seconds that a process gets to end by itself
_FIRST_SIGN = 120.0  # seconds that a kernel may take to start on a busy machine, whatever the limit for hung cells is
WRAP_UP = 8.0  # seconds between the end of training and the deadline, for writing the notebook as far as it got


def work(job: dict, devices: Sequence[str]) -> tuple[Ended, str]:
    """Run one cell in a child process of this Dask worker; returns how the process ended, and its last line.

    Three conditions end the process with all that it started: ``job["hung_after"]`` seconds without any change in its folder
    (two minutes at least until the kernel runs), the deadline, and a runner that was killed, stopped or lost.
    """
    environment = child_environment(job)
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[int(distributed.get_worker().name) % len(devices)]
    books = notebooks_here(job["notebooks"])
    if code_hash(notebook_code(books)) != job["code"]:
        raise GridError(f"the notebooks in {books} are not those that the grid was started with; install the same charmlib on "
                        "all machines")
    job = {**job, "notebooks": str(books), "started": time.time()}
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen([sys.executable, "-m", "charmlib.grid.cell_process"], stdin=subprocess.PIPE,
                                 stdout=subprocess.DEVNULL, stderr=errors, text=True, env=environment,
                                 start_new_session=True)  # the runner answers Ctrl-C at the terminal
        with contextlib.suppress(BrokenPipeError):  # it was killed already; _watch sees that
            json.dump(job, child.stdin)
            child.stdin.close()
        try:
            ended = _watch(child, job)
        finally:
            end_children(child.pid, itself=True)
        errors.seek(0)
        lines = errors.read().strip().splitlines()
        last = lines[-1:] if ended == child.returncode else [  # else only the kernel's warnings, and a lock that it waits for
            line for line in lines if line.startswith(lease.WAITING)][-1:]
    if ended is Ended.CRASHED and child.returncode < 0:
        last = [f"signal {signal.Signals(-child.returncode).name}"]
    return ended, "".join(last).strip()


def _watch(child: subprocess.Popen, job: Mapping) -> Ended:
    cell, worker = CellFolder(job["folder"]), distributed.get_worker()
    task = worker.state.tasks[worker.get_current_task()]
    seen, since, began = _files(cell), time.monotonic(), False
    while child.poll() is None:
        time.sleep(_LOOK)
        now = _files(cell)
        if now != seen:
            seen, since, began = now, time.monotonic(), began or cell.running_file.is_file()
        if time.monotonic() - since > max(job["hung_after"], 0.0 if began else _FIRST_SIGN):
            return Ended.HUNG
        late = job["deadline"] is not None and time.time() > job["deadline"]
        dropped = task.state in ("cancelled", "released", "forgotten") or worker.status.name not in ("running", "paused")
        if late or dropped:  # dropped: the runner no longer waits for it
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLITE)
            return Ended.OUT_OF_TIME if late else Ended.STOPPED
    try:
        return Ended(child.returncode)
    except ValueError:  # a signal, or Python's own failure to start
        return Ended.CRASHED if child.returncode < 0 else Ended.FAILED


def _files(cell: CellFolder) -> set[tuple[str, int]]:
    """Names and times of a cell's files but its lease, which a hung process renews too."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # no folder yet, or a file that went meanwhile: a change as well
        found.update((file.name, file.stat().st_mtime_ns) for file in os.scandir(cell) if not file.name.startswith(LEASE))
    return found


def notebooks_here(theirs: str) -> Path:
    """The runner's notebooks, or this machine's own where that folder does not exist."""
    return Path(theirs) if Path(theirs).is_dir() else find_notebooks()


def child_environment(job: Mapping) -> dict[str, str]:
    """The environment of a cell's process, without the variables that Dask's nanny sets in the workers of a given cluster.

    They pin OpenMP to one thread and make malloc return memory eagerly, which tripled the time of an epoch on two cores.
    ``job["threads"]`` > 0 is a cell's share of the machine's cores; a setting of the user's counts instead.
    """
    nanny = dask.config.get("distributed.nanny.pre-spawn-environ")
    env = with_this_package({k: v for k, v in os.environ.items() if k not in nanny or v != str(nanny[k])})
    if job["threads"]:
        env.setdefault("OMP_NUM_THREADS", str(job["threads"]))
    ends = None if job["deadline"] is None else job["deadline"] - WRAP_UP
    given = {DEADLINE: ends, SCORING: job["scoring_seconds"]}
    return {k: v for k, v in env.items() if k not in given} | {k: str(v) for k, v in given.items() if v is not None}
