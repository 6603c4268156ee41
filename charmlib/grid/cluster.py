"""The Dask cluster that a grid runs on: this machine's own, one worker a GPU, or a given one."""

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import dask
import distributed
import distributed.client  # makes the loggers that _quiet silences

import charmlib
from charmlib.grid.budget import Budget, seconds_of
from charmlib.grid.cells import GridError, code_hash, notebook_code
from charmlib.grid.worker import notebooks_here, work
from charmlib.params import ParameterError

GPU = "GPU"  # the resource that a worker offers for each of its GPUs; a cell takes one


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


@dataclass
class Means:
    """Where and how long cells run; times are given in seconds, or as texts such as '5m'.

    - ``workers`` of the local cluster: one a GPU, or one on a CPU, by default.
    - ``scheduler``, ``scheduler_file``: use this Dask cluster instead; its workers must see the grid's folder and the data at
      the same paths. A cell takes one ``GPU`` of a worker's resources (``dask worker ... --resources GPU=1``, one worker a GPU
      with its own ``CUDA_VISIBLE_DEVICES``); with ``any_worker`` workers without that resource are used too, a cell each.
      Without any worker after ``wait_workers`` it is refused.
    - ``budget``: time from now on: a cell is started only if one epoch and its save fit, longest first; training ends in time
      at an epoch's end, and the report is written within it.
    - ``hung_after``: a cell without any sign of life (batch or file) for this time is ended.
    - ``rerun_changed``: run finished cells again whose parameters, notebooks, split or charmlib version have changed.

    Raises :class:`charmlib.params.ParameterError` for a wrong time, and for two clusters.
    """

    workers: int | None = None
    scheduler: str | None = None
    scheduler_file: str | None = None
    any_worker: bool = False
    wait_workers: str | float = 60.0
    budget: str | float | None = None
    hung_after: str | float = 1800.0
    rerun_changed: bool = False

    def __post_init__(self):
        if self.scheduler and self.scheduler_file:
            raise ParameterError("--scheduler and --scheduler-file name two clusters; give one of them")
        self.wait_workers = seconds_of(self.wait_workers, "--wait-workers")
        self.hung_after = seconds_of(self.hung_after, "--hung-after")
        self.budget = Budget(None if self.budget is None else seconds_of(self.budget))
        self.given = self.scheduler or self.scheduler_file  # the cluster that runs already, if one is named
        self.at_once = self.workers or max(1, len(gpus()))  # cells at once on this machine


class Cluster:
    """A Dask cluster as seats for cells: :meth:`seats` at once, each filled by :meth:`submit`.

    ``devices`` are shared out among the workers; ``threads`` (0: all) go to each cell; ``gpu`` says whether a cell takes a GPU
    resource or a whole worker.
    """

    def __init__(self, client, *, devices=(), threads: int = 0, gpu: bool = False):
        self.client, self.devices, self.gpu, self.threads = client, list(devices), gpu, threads

    def offers(self) -> list[dict]:
        """The resources of each worker (``scheduler_info`` lists five workers only)."""
        return self.client.run_on_scheduler(
            lambda dask_scheduler: [dict(worker.resources) for worker in dask_scheduler.workers.values()])

    def seats(self) -> int:
        """How many cells can run at once, now."""
        return sum(int(offer.get(GPU, 0)) if self.gpu else 1 for offer in self.offers())

    def submit(self, job: dict):
        """Start a cell; returns Dask's future."""
        # pure=False and no retries: whether a cell runs depends on its files, never on a cached key
        key = f"cell-{job['id']}-{uuid.uuid4().hex[:8]}"
        return self.client.submit(work, job | {"threads": self.threads}, self.devices, key=key, pure=False, retries=0,
                                  resources={GPU: 1} if self.gpu else None)


@contextlib.contextmanager
def local_cluster(means: Means, cells: int) -> Iterator[Cluster]:
    """This machine's own workers, at most one a cell: threads of this process, which no other process can reach.

    Dask's scheduler and workers run the code of whoever connects to them, so none of them listens to a port; their pages, which
    Dask starts in any case, are closed again.
    """
    async def close_pages():
        for node in (cluster.scheduler, *cluster.workers.values()):
            node.http_server.stop()

    _quiet()
    count = min(means.at_once, cells)
    threads = max(1, (os.cpu_count() or 1) // count) if count > 1 else 0
    # a machine that slept hears no heartbeat of its own workers; :func:`work` takes the other out of the environment
    with (dask.config.set({"distributed.scheduler.worker-ttl": None, "distributed.nanny.pre-spawn-environ": {}}),
          distributed.LocalCluster(n_workers=count, threads_per_worker=1, processes=False, protocol="inproc://",
                                   dashboard_address=None, scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
                                   silence_logs=logging.CRITICAL) as cluster,
          distributed.Client(cluster) as client):
        cluster.sync(close_pages)
        yield Cluster(client, devices=gpus(), threads=threads)


@contextlib.contextmanager
def given_cluster(means: Means, jobs: list[dict], say: Callable[[str], None] = print) -> Iterator[Cluster]:
    """A Dask cluster that runs already, checked before anything runs on it.

    Raises GridError for no scheduler, no workers in time, none that offers a GPU, and workers that do not see the grid's folder
    or the data or have another charmlib or other notebooks; says which and the remedy.
    """
    with connect(means, say) as client:
        cluster, end = Cluster(client, gpu=not means.any_worker), time.monotonic() + means.wait_workers
        if not cluster.seats():
            say(f"waiting for workers at {means.given}, at most {means.wait_workers:.0f} s (--wait-workers)")
        while not cluster.seats():  # a worker with a GPU may come after others
            if time.monotonic() > end:
                count = len(cluster.offers())
                raise GridError(f"none of the {count} workers at {means.given} offers a GPU. Start them with --resources "
                                "GPU=1, one a GPU with its own CUDA_VISIBLE_DEVICES, or say --any-worker to use them as they "
                                "are, one cell each." if count else
                                f"the cluster at {means.given} has no workers (waited {means.wait_workers:.0f} s, "
                                f"--wait-workers); start some with `dask worker {client.scheduler.address} --resources GPU=1` "
                                "and try again")
            time.sleep(0.2)
        _refuse_strangers(client, jobs)
        cluster.gpu = any(GPU in offer for offer in cluster.offers())
        yield cluster


def connect(means: Means, say: Callable[[str], None] = print):
    """A client of the scheduler at an address, or of the one that a file names once it exists; GridError without one."""
    _quiet()
    file, end = means.scheduler_file, time.monotonic() + means.wait_workers
    if file and not Path(file).is_file():
        say(f"waiting for the file {file}, at most {means.wait_workers:.0f} s (--wait-workers)")
    while file and not Path(file).is_file():  # Dask would wait for it for ever
        if time.monotonic() > end:
            raise GridError(f"no file {file} (waited {means.wait_workers:.0f} s, --wait-workers): start the cluster with `dask "
                            f"scheduler --scheduler-file {file}`")
        time.sleep(0.2)
    try:
        return distributed.Client(address=means.scheduler, scheduler_file=file, timeout=30)
    except (OSError, TimeoutError, ValueError) as error:
        raise GridError(f"no Dask scheduler at {means.given} ({type(error).__name__}: {error}); start one with "
                        "`dask scheduler`") from error


def _refuse_strangers(client, jobs: list[dict]) -> None:
    folder, code = Path(jobs[0]["folder"]).parent, jobs[0]["code"]
    probe = folder / f".seen.{uuid.uuid4().hex}"
    probe.touch()
    try:
        wanted = [str(probe), *sorted({job["params"]["data_root"] for job in jobs})]
        found = client.run(_look_around, wanted, jobs[0]["notebooks"], on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    for worker, facts in found.items():
        if isinstance(facts, BaseException):
            raise GridError(f"worker {worker} cannot run charmlib ({type(facts).__name__}: {facts}): install charmlib "
                            f"{charmlib.__version__} there")
        missing, version, theirs = facts
        if missing:
            raise GridError(f"worker {worker} does not see {folder if missing[0] == str(probe) else missing[0]}: the run "
                            "folder and the data must be there under the same paths on all machines. For machines that share "
                            "no folder use --shard and `grid merge`.")
        if (version, theirs) != (charmlib.__version__, code):
            raise GridError(f"worker {worker} has charmlib {version} with notebooks {theirs}, this is {charmlib.__version__} "
                            f"with {code}: install the same on all machines")


def _look_around(wanted: list[str], notebooks: str) -> tuple[list[str], str, str]:
    """Missing paths, charmlib's version and the notebooks' hash on a worker."""
    return ([path for path in wanted if not Path(path).exists()], charmlib.__version__,
            code_hash(notebook_code(notebooks_here(notebooks))))


def _quiet() -> None:
    """Silence Dask, whose tracebacks at an interrupt or a lost connection hide ours; some loggers have their own level."""
    for name in ("distributed", "tornado", "asyncio", *logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)


@contextlib.contextmanager
def handling(number: int, handler: Callable | signal.Handlers) -> Iterator[None]:
    """Handle a signal, in child processes started meanwhile too if it is ignored. Only the main thread may; others skip it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
