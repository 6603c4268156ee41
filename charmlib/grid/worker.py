"""What a Dask worker does with a cell: start its process, watch it, end it with everything it started."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from charmlib.files import LEASE
from charmlib.grid.cells import RUNNING, Ended, GridError, code_hash, find_notebooks, notebook_code
from charmlib.session import DEADLINE, SCORING, end_children, with_this_package

_LOOK = 0.25
"""Seconds between two looks at a cell's process."""
_POLITE = 10.0
"""Seconds that a process gets to end by itself."""
_FIRST_SIGN = 120.0
"""Seconds that a kernel may take to start on a busy machine, however small the limit for hung cells is."""
WRAP_UP = 8.0
"""Seconds before the deadline at which training must have ended, for the notebook to be written as far as it got."""


class Outcome(NamedTuple):
    """How a cell's process ended, and its last line."""

    ended: Ended
    words: str


def work(job: dict, devices: Sequence[str]) -> Outcome:
    """Run one cell in a child process, on a Dask worker or without one.

    The process is ended, with all that it started, when it shows no sign of life for ``job["hung_after"]`` seconds, when the
    deadline has come, and when nobody waits for it any more (the runner was killed, stopped, or lost). Until it has written its
    first file it gets two minutes at least.
    """
    environment = child_environment(job.get("threads", 0), job.get("environment"))
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[_number() % len(devices)]
    for name in (DEADLINE, SCORING):
        environment.pop(name, None)
    if job.get("deadline") is not None:
        environment[DEADLINE] = str(job["deadline"] - WRAP_UP)
    if job.get("scoring_seconds") is not None:
        environment[SCORING] = str(job["scoring_seconds"])
    books = notebooks_here(job["notebooks"])
    if code_hash(notebook_code(books)) != job["code"]:
        raise GridError(f"the notebooks in {books} are not those that the grid was started with; install the same charmlib on "
                        "all machines")
    job = {**job, "notebooks": str(books), "started": time.time()}
    with tempfile.TemporaryFile("w+") as errors:
        with _one_start_at_a_time():
            child = subprocess.Popen([sys.executable, "-m", "charmlib.grid.child"], stdin=subprocess.PIPE,
                                     stdout=subprocess.DEVNULL, stderr=errors, text=True, env=environment,
                                     start_new_session=True)  # a Ctrl-C at the terminal is the runner's to answer
            with contextlib.suppress(BrokenPipeError):  # it was killed already, which the watch sees
                json.dump(job, child.stdin)
                child.stdin.close()
            time.sleep(job.get("stagger", 0.0))
        try:
            ended = _watch(child, job)
        finally:
            end_children(child.pid, itself=True)
        errors.seek(0)
        last = errors.read().strip().splitlines()[-1:] if ended == child.returncode else []  # else only the kernel's warnings
    return Outcome(ended, "".join(last).strip())


def _watch(child: subprocess.Popen, job: Mapping) -> Ended:
    life, wanted = SignsOfLife(Path(job["folder"])), _wanted()
    while child.poll() is None:
        time.sleep(_LOOK)
        if life.missing_for() > max(job.get("hung_after", float("inf")), 0.0 if life.began else _FIRST_SIGN):
            return Ended.HUNG
        late = job.get("deadline") is not None and time.time() > job["deadline"]
        if late or not wanted():
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_POLITE)
            return Ended.OUT_OF_TIME if late else Ended.STOPPED
    try:
        return Ended(child.returncode)
    except ValueError:  # a signal, or Python's own failure to start
        return Ended.CRASHED if child.returncode < 0 else Ended.FAILED


class SignsOfLife:
    """Notices when nothing in a cell's folder changes any more; the lease does not count, which a hung process renews too."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen, self.since, self.began = self._look(), time.monotonic(), False

    def missing_for(self) -> float:
        """Seconds since something last changed."""
        now = self._look()
        if now != self.seen:
            self.seen, self.since = now, time.monotonic()
            self.began = self.began or (self.folder / RUNNING).is_file()
        return time.monotonic() - self.since

    def _look(self) -> set[tuple[str, int]]:
        found = set()
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    if not entry.name.startswith(LEASE):
                        found.add((entry.name, entry.stat().st_mtime_ns))
        return found


def _wanted():
    """A function that says whether the runner still waits for this task."""
    from distributed import get_worker

    try:
        worker = get_worker()
        state = worker.state.tasks[worker.get_current_task()]
    except ValueError:  # not on a worker
        return lambda: True
    return lambda: state.state not in ("cancelled", "released", "forgotten") and worker.status.name in ("running", "paused")


def _number() -> int:
    """The worker's place among those of its cluster."""
    from distributed import get_worker

    name = str(get_worker().name)
    return int(name) if name.isdigit() else 0


def notebooks_here(theirs: str) -> Path:
    """The runner's notebooks, or on a machine that does not see them, this one's own."""
    return Path(theirs) if Path(theirs).is_dir() else find_notebooks()


@contextlib.contextmanager
def _one_start_at_a_time() -> Iterator[None]:
    """Kernels that start at once race for ports, so the starts of one machine take turns."""
    with open(Path(tempfile.gettempdir()) / f"charm-start-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
