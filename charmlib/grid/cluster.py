"""The Dask cluster that a grid runs on: this machine's own, one worker a GPU, or a given one."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import charmlib
from charmlib.grid.cells import GridError, code_hash, notebook_code
from charmlib.grid.worker import notebooks_here, work

GPU = "GPU"
"""The resource that a worker offers for each of its GPUs; a cell takes one."""


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


class Cluster:
    """A Dask cluster as seats for cells: :meth:`seats` at once, each filled by :meth:`submit`.

    ``devices`` are shared out among the workers; ``threads`` (0: all) and ``stagger`` (seconds between starts) go to each
    cell; ``gpu`` says whether a cell takes a GPU resource or a whole worker.
    """

    def __init__(self, client, *, devices=(), threads: int = 0, stagger: float = 0.0, gpu: bool = False):
        self.client, self.devices, self.gpu = client, list(devices), gpu
        self.own = {"threads": threads, "stagger": stagger}

    def seats(self) -> int:
        """How many cells can run at once, now."""
        offers = _offers(self.client)
        return sum(int(offer.get(GPU, 0)) for offer in offers) if self.gpu else len(offers)

    def submit(self, job: dict):
        """Start a cell; returns Dask's future."""
        # pure=False and no retries: whether a cell runs depends on its files, never on a cached key
        return self.client.submit(work, job | self.own, self.devices, key=f"cell-{job['id']}-{uuid.uuid4().hex[:8]}",
                                  pure=False, retries=0, resources={GPU: 1} if self.gpu else None)


@contextlib.contextmanager
def local_cluster(workers: int | None, cells: int) -> Iterator[Cluster]:
    """This machine's own workers: one a GPU, or one on a CPU, unless ``workers`` is given; at most one a cell."""
    import dask
    from distributed import Client, LocalCluster

    _quiet()
    devices = gpus()
    count = min(workers or max(1, len(devices)), cells)
    several = {"threads": max(1, (os.cpu_count() or 1) // count), "stagger": 1.0} if count > 1 else {}
    with dask.config.set({"distributed.nanny.pre-spawn-environ": {}}):  # or it pins cells to one thread
        with handling(signal.SIGINT, signal.SIG_IGN):  # a terminal sends Ctrl-C to all, and only the runner should answer
            cluster = LocalCluster(n_workers=count, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0",
                                   silence_logs=logging.CRITICAL)
        with cluster, Client(cluster) as client:
            yield Cluster(client, devices=devices, **several)


@contextlib.contextmanager
def given_cluster(address: str | None, scheduler_file: str | None, *, folder: Path, data_roots: set[str], code: str,
                  notebooks: Path, any_worker: bool = False, wait: float = 60.0) -> Iterator[Cluster]:
    """A Dask cluster that runs already, checked before anything runs on it.

    A cell takes one ``GPU`` of a worker's resources (``dask worker ... --resources GPU=1``, one worker a GPU with its own
    ``CUDA_VISIBLE_DEVICES``). With ``any_worker`` workers without that resource are used too, a cell each.

    Raises
    ------
    GridError
        No scheduler, no workers within ``wait`` seconds, none that offers a GPU, or workers that do not see the run folder or
        the data or have another charmlib or other notebooks; says which and the remedy.
    """
    where = address or scheduler_file
    with connect(address, scheduler_file, wait) as client:
        try:
            client.wait_for_workers(1, timeout=wait)
        except TimeoutError as error:
            raise GridError(f"the cluster at {where} has no workers (waited {wait:.0f} s, --wait-workers); start some with "
                            f"`dask worker {client.scheduler.address} --resources GPU=1` and try again") from error
        offers = _offers(client)
        gpu = any(GPU in offer for offer in offers)
        if not gpu and not any_worker:
            raise GridError(f"none of the {len(offers)} workers at {where} offers a GPU. Start them with --resources GPU=1, "
                            "one a GPU with its own CUDA_VISIBLE_DEVICES, or say --any-worker to use them as they are, one "
                            "cell each.")
        _refuse_strangers(client, folder, data_roots, notebooks, code)
        yield Cluster(client, gpu=gpu, stagger=1.0)


def connect(address: str | None, scheduler_file: str | None, wait: float = 60.0):
    """A client of the scheduler at an address, or of the one that a file names once it exists.

    Raises
    ------
    GridError
        No scheduler within ``wait`` seconds.
    """
    from distributed import Client

    _quiet()
    end = time.monotonic() + wait
    while scheduler_file and not Path(scheduler_file).is_file():  # Dask would wait for it for ever
        if time.monotonic() > end:
            raise GridError(f"no file {scheduler_file} (waited {wait:.0f} s, --wait-workers): start the cluster with `dask "
                            f"scheduler --scheduler-file {scheduler_file}`")
        time.sleep(0.2)
    try:
        return Client(address=address, scheduler_file=scheduler_file, timeout=30)
    except (OSError, TimeoutError, ValueError) as error:
        raise GridError(f"no Dask scheduler at {address or scheduler_file} ({type(error).__name__}: {error}); start one with "
                        "`dask scheduler`") from error


def _offers(client) -> list[dict]:
    """The resources of each worker (``scheduler_info`` lists five workers only)."""
    return client.run_on_scheduler(lambda dask_scheduler: [dict(w.resources) for w in dask_scheduler.workers.values()])


def _refuse_strangers(client, folder: Path, data_roots: set[str], notebooks: Path, code: str) -> None:
    """Refuse workers on which a cell could not run, or would be another cell."""
    probe = folder / f".seen.{uuid.uuid4().hex}"
    probe.touch()
    try:
        found = client.run(_look_around, str(probe), sorted(data_roots), str(notebooks), on_error="return")
    finally:
        probe.unlink(missing_ok=True)
    for worker, facts in found.items():
        if isinstance(facts, BaseException):
            raise GridError(f"worker {worker} cannot run charmlib ({type(facts).__name__}: {facts}): install charmlib "
                            f"{charmlib.__version__} there")
        if missing := facts["missing"]:
            raise GridError(f"worker {worker} does not see {missing[0]}: the run folder and the data must be there under the "
                            "same paths on all machines. For machines that share no folder use --shard and `grid merge`.")
        if (facts["version"], facts["code"]) != (charmlib.__version__, code):
            raise GridError(f"worker {worker} has charmlib {facts['version']} with notebooks {facts['code']}, this is "
                            f"{charmlib.__version__} with {code}: install the same on all machines")


def _look_around(probe: str, data_roots: list[str], notebooks: str) -> dict:
    missing = [str(Path(p).parent if p == probe else p) for p in (probe, *data_roots) if not Path(p).exists()]
    return {"version": charmlib.__version__, "code": code_hash(notebook_code(notebooks_here(notebooks))), "missing": missing}


def _quiet() -> None:
    """Silence Dask, whose tracebacks at an interrupt or a lost connection hide ours; some loggers have their own level."""
    import distributed.client  # noqa: F401  (makes them)

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
