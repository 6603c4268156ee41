"""Many GPUs and many machines: real schedulers and workers, in network namespaces that see each other by a bridge only."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from charmlib.evaluation.runs import RunFolder
from charmlib.grid import run_grid
from charmlib.grid.cells import GridError
from charmlib.grid.cluster import Means, given_cluster, gpus
from tests.grid.conftest import CELLS, ROOT, epochs_done, family, wait_for

pytestmark = pytest.mark.slow


def started(folder: Path) -> list[str]:
    return [line.split(" ", 1)[1] for line in (folder / "log.txt").read_text().splitlines() if line.startswith("start")]


def test_one_worker_a_gpu_each_with_its_own_and_two_cells_side_by_side(light, tmp_path, monkeypatch):
    """As on Kaggle's two T4: nvidia-smi lists two cards, each cell sees one of them, and two run at the same time."""
    smi = tmp_path / "bin/nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-1)'\necho 'GPU 1: Tesla T4 (UUID: GPU-2)'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus() == ["0", "1"]
    result = light("-p", "stage1_epochs=6", pace=1.0)
    assert result.returncode == 0, result.stdout + result.stderr
    starts = {}
    for cell in ("k1", "k2"):
        (line,) = started(light.out / cell)
        starts[cell] = line.split()
    assert sorted(words[-1] for words in starts.values()) == ["0", "1"]
    times = sorted(float(words[7]) for words in starts.values())
    assert times[1] - times[0] < 6.0  # the second began while the first was training


def test_gpus_that_the_user_chose_are_shared_out(light, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert light(pace=0.1).returncode == 0
    assert sorted(started(light.out / cell)[0].split()[-1] for cell in ("k1", "k2")) == ["3", "5"]


@pytest.fixture
def hosts():
    """Two machines and a third for the scheduler, as network namespaces joined by a bridge: name -> address."""
    if os.getuid() or subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        pytest.skip("network namespaces can be made by root with iproute2 only")
    tag = f"ch{os.getpid() % 10000}"
    bridge, net = f"{tag}b", f"10.{os.getpid() % 200 + 20}.7"
    names = {f"{tag}{i}": f"{net}.{i + 2}" for i in range(3)}

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    made = []
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{net}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for name, address in names.items():
            ip("netns", "add", name)
            made.append(name)
            ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"{name}v", "master", bridge, "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


@pytest.fixture
def cluster(hosts, tmp_path):
    """Starts a scheduler in the first namespace and workers in the others; ends them all."""
    processes = []
    (first, address), *others = hosts.items()

    def on(host, *words, environment=None):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        with open(tmp_path / "dask.log", "a") as log:
            process = subprocess.Popen(["ip", "netns", "exec", host, *words], env=env, stdout=log, stderr=subprocess.STDOUT,
                                       start_new_session=True, cwd=tmp_path)
        processes.append(process)
        return process

    class Cluster:
        scheduler = f"tcp://{address}:8786"
        file = tmp_path / "scheduler.json"
        machines = [name for name, _ in others]

        def begin(self, **environment):
            on(first, sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "8786", "--host", address,
               "--no-dashboard", "--scheduler-file", str(self.file), environment=environment)
            wait_for(self.file.is_file)
            return self

        def worker(self, machine, *options, wrapper=()):
            return on(machine, *wrapper, sys.executable, "-m", "distributed.cli.dask_worker", self.scheduler, "--nthreads", "1",
                      "--host", hosts[machine], "--local-directory", str(tmp_path / machine), "--no-dashboard", *options)

    yield Cluster()
    from charmlib.session import end_children

    for process in processes:
        end_children(process.pid, itself=True)


def test_a_grid_on_machines_that_a_network_joins(done, cluster, tmp_path):
    """Refused while there are no workers; then by a scheduler file, a GPU resource a cell, both cells at once."""
    path, quiet, _ = done
    cluster.begin()
    said = []
    with pytest.raises(GridError, match=r"has no workers \(waited 1 s, --wait-workers\)"):
        run_grid(path, out=tmp_path / "out", scheduler=cluster.scheduler, wait_workers=1, say=said.append)
    assert said[-1] == f"waiting for workers at {cluster.scheduler}, at most 1 s (--wait-workers)"
    cluster.worker(cluster.machines[0], "--resources", "GPU=1")
    cluster.worker(cluster.machines[1], "--resources", "GPU=1")
    time.sleep(6)
    board = run_grid(path, out=tmp_path / "out", scheduler_file=str(cluster.file), say=said.append)
    assert board["status"].tolist() == ["done"] * 2
    for cell in CELLS:
        ours, theirs = RunFolder(tmp_path / "out" / cell).metrics, RunFolder(quiet / cell).metrics
        assert ours["hash"] == theirs["hash"]
        assert ours["split"] == theirs["split"]  # not the scores' bits: these workers compute with other threads
        assert len((tmp_path / "out" / cell / "history.csv").read_text().splitlines()) == 5
    order = [line.split()[0] for line in said if "training on" in line or "valid AUC" in line]
    assert set(order[:2]) == set(CELLS)  # the second began before the first had ended


def test_workers_without_a_gpu_are_refused_or_used_when_told_to(light, cluster, tmp_path):
    cluster.begin()
    cluster.worker(cluster.machines[0])
    result = light("--scheduler", cluster.scheduler, "--wait-workers", "8s", k=[1])
    assert result.returncode == 2 and "offers a GPU" in result.stderr and "--any-worker" in result.stderr
    result = light("--scheduler", cluster.scheduler, "--any-worker", k=[1])
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_worker_that_does_not_see_the_folder_is_refused_by_name(light, cluster, tmp_path):
    """Its machine has another file system where the run folder lies here."""
    cluster.begin()
    hide = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {light.out.parent} && cd / && exec "$@"', "sh"]
    light.out.mkdir()
    cluster.worker(cluster.machines[0], "--resources", "GPU=1", wrapper=hide)
    result = light("--scheduler", cluster.scheduler, "--wait-workers", "20s", k=[1])
    assert result.returncode == 2 and "does not see" in result.stderr and "grid merge" in result.stderr, result.stderr


def test_a_scheduler_file_that_is_not_there_is_not_waited_on_for_ever(light, tmp_path):
    begin = time.monotonic()
    result = light("--scheduler-file", str(tmp_path / "none.json"), "--wait-workers", "2s", k=[1])
    assert result.returncode == 2 and "no file" in result.stderr and "dask scheduler --scheduler-file" in result.stderr
    assert f"waiting for the file {tmp_path / 'none.json'}, at most 2 s" in result.stdout
    both = light("--scheduler-file", "a.json", "--scheduler", "tcp://127.0.0.1:1", k=[1])
    assert both.returncode == 2 and "name two clusters" in both.stderr and time.monotonic() - begin < 40


def test_a_killed_runner_ends_its_cells_on_the_cluster_too(light, cluster, tmp_path):
    """The cluster lives on; nobody waits for its cells any more, so they end within 15 seconds and can be taken by the next."""
    cluster.begin()
    worker = cluster.worker(cluster.machines[0], "--resources", "GPU=1")
    runner = light("--scheduler", cluster.scheduler, "-p", "stage1_epochs=60", k=[1], pace=0.5, background=True)
    wait_for(lambda: epochs_done(light.out / "k1") >= 1, runner=runner)
    host = psutil.Process(worker.pid)
    cells = family(host, "charmlib.grid.cell_process") + family(host, "ipykernel")
    assert len(cells) == 2
    runner.kill()
    _, alive = psutil.wait_procs(cells, timeout=15)
    assert not alive and worker.poll() is None
    kept = epochs_done(light.out / "k1")
    again = light("--scheduler", cluster.scheduler, "-p", "stage1_epochs=60", "--budget", "25s", k=[1], pace=0.5)
    assert again.returncode == 0 and epochs_done(light.out / "k1") > kept


def test_a_machine_that_is_cut_off_never_runs_a_cell_twice_at_once(light, cluster, hosts, tmp_path):
    """The network of the worker that trains goes down: the scheduler gives its cell to the other, which waits for the lease."""
    cluster.begin(DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="4s")
    cluster.worker(cluster.machines[0], "--resources", "GPU=1")
    runner = light("--scheduler", cluster.scheduler, "-p", "stage1_epochs=30", k=[1], pace=0.5, background=True)
    cell = light.out / "k1"
    wait_for(lambda: epochs_done(cell) >= 2, runner=runner)
    cluster.worker(cluster.machines[1], "--resources", "GPU=1")
    subprocess.run(["ip", "-n", cluster.machines[0], "link", "set", "eth0", "down"], check=True)
    assert runner.wait(120) == 0, light.out.with_suffix(".log").read_text()
    lines = [line.split() for line in (cell / "log.txt").read_text().splitlines()]
    epochs = [int(words[1]) for words in lines if words[0] == "epoch"]
    assert epochs == sorted(set(epochs)) and epochs[-1] == 30  # none twice, none out of turn
    assert json.loads((cell / "metrics.json").read_text())["cell"] == "k1"


def test_a_worker_with_a_gpu_may_come_behind_others(monkeypatch):
    found = [[{}], [{}, {"GPU": 1}]]
    monkeypatch.setattr("charmlib.grid.cluster.connect", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr("charmlib.grid.cluster._refuse_strangers", lambda client, jobs: None)
    monkeypatch.setattr("charmlib.grid.cluster.Cluster.offers", lambda self: found.pop(0) if len(found) > 1 else found[0])
    with given_cluster(Means(scheduler="tcp://there", wait_workers=5), []) as seats:
        assert seats.gpu and seats.seats() == 1
