"""Small grids, real ones and light ones whose notebooks train nothing, and the processes that run them."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml

from charmlib.evaluation.runs import RunFolder
from charmlib.grid import run_grid
from charmlib.grid.cells import CellFolder
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
CELLS = ("m0.5_k1_t0.1", "m0.5_k2_t0.1")
# Every axis decides a result: k and threshold where slots answer with features, a momentum of 0.5 after eight steps.
SHORT = {"stage1_frozen_epochs": 0, "stage1_epochs": 2, "stage2_epochs": 2, "answer": "features", "strategy": "rarity"}

# What a real pair of notebooks leaves, without torch: each "epoch" takes a moment, saves, and minds the deadline.
_TRAIN = '''import json, os, psutil, time
from pathlib import Path
from charmlib import session
from charmlib.files import write_json, write_text
folder = Path(run_dir)
with open(folder / "log.txt", "a") as log:
    began = psutil.Process(os.getppid()).create_time()
    print(f"start pid {os.getpid()} of a cell begun at {began:.3f} on gpu {os.environ.get('CUDA_VISIBLE_DEVICES')}", file=log)
epochs = json.loads((folder / "resume.pt").read_text()) if (folder / "resume.pt").is_file() else 0
while epochs < stage1_epochs:
    time.sleep(PACE)
    session.alive()
    epochs += 1
    rows = "".join(f"1,{i},0.5,0.5,0.6,0.3,0.001,{PACE},,\\n" for i in range(epochs))
    head = "stage,epoch,train_loss,valid_loss,valid_auc,valid_ap,lr,seconds,bank_filled,bank_accepted\\n"
    write_text(folder / "history.csv", head + rows)
    write_text(folder / "resume.pt", str(epochs))
    with open(folder / "log.txt", "a") as log:
        print(f"epoch {epochs} pid {os.getpid()}", file=log)
    if epochs < stage1_epochs:
        session.stop_unless(1.2 * PACE, "the next epoch")
write_json(folder / "model.json", {"format": 1})
'''
_TEST = '''import json, shutil
from pathlib import Path
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_json
for name in ("predictions.npz", "resamples.npz"):
    shutil.copy(Path(FINISHED) / name, run_dir)
finished = json.loads((Path(FINISHED) / "metrics.json").read_text())
for key in ("format", "cell", "hash"):
    finished.pop(key)
write_json(RunFolder(run_dir).scored_file, finished | {"seconds": {"train": 1.0, "score": 0.1, "overhead": None}})
'''


def light_notebooks(folder: Path, finished: Path, *, pace: float = 0.3, first: str = "") -> Path:
    """A pair of notebooks that train nothing, in seconds: the scores are those of a ``finished`` run; ``first`` is code that
    the train notebook begins with."""
    folder.mkdir(parents=True)
    given = {"train": "run_dir: str = ''\nstage1_epochs: int = 1\nk: int = 1", "test": "run_dir: str = ''"}
    code = {"train": f"PACE = {pace}\n{first}\n{_TRAIN}",
            "test": f"FINISHED = {str(finished)!r}\n{_TEST}"}
    for name in ("train", "test"):
        book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "", "language": "python"}})
        book.cells = [nbformat.v4.new_code_cell(given[name], metadata={"tags": ["parameters"]}),
                      nbformat.v4.new_code_cell(code[name])]
        nbformat.write(book, folder / f"{name}.ipynb")
    return folder


def small_grid(folder: Path, phantoms: Path, *, base: dict | None = None, **axes) -> Path:
    """A grid file over ``axes``, a few seconds of training a cell."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump({**TINY, **SHORT, "data_root": str(phantoms), **(base or {})}))
    (folder / "grid_small.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "axes": axes}, sort_keys=False))
    return folder / "grid_small.yaml"


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A grid of two cells that differ in effect, run once undisturbed for all test processes: its file, its folder, the lines
    it said."""
    from charmlib.data.phantom import make_phantoms

    base = tmp_path_factory.getbasetemp()  # with pytest-xdist each process has one, below that of the whole run
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "done"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "said.json").is_file():
            data = make_phantoms(folder / "phantoms", images=320, size=32, seed=1)
            path, said = small_grid(folder, data, momentum=[0.5], k=[1, 2], threshold=[0.1]), []
            run_grid(path, out=folder / "out", say=said.append)
            (folder / "said.json").write_text(json.dumps(said))
    return folder / "grid_small.yaml", folder / "out", json.loads((folder / "said.json").read_text())


@pytest.fixture
def light(phantoms, tmp_path, make_run):
    """Runs a light grid (nothing is trained); ``first`` is what each cell begins with."""
    finished = make_run("finished")

    def go(*more, first="", pace=0.3, background=False, path=None, **axes):
        books = tmp_path / "books"
        if not books.is_dir():
            light_notebooks(books, finished, pace=pace, first=first)
        path = path or small_grid(tmp_path / "grid", phantoms, **(axes or {"k": [1, 2]}))
        return (start if background else run)(path, tmp_path / "out", "--notebooks", str(books), *more)

    go.out, go.base = tmp_path / "out", small_grid(tmp_path / "grid", phantoms, k=[1]).with_name("base.yaml")
    return go


def command(path: Path, out: Path, *more: str) -> list[str]:
    """The command line that runs a grid."""
    return [sys.executable, "-m", "charmlib", "grid", "run", str(path), "--out", str(out), *more]


def start(path: Path, out: Path, *more: str, log: Path | None = None) -> psutil.Popen:
    """Start it in the background."""
    log = log or out.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    return psutil.Popen(command(path, out, *more), cwd=ROOT, stdout=open(log, "a"), stderr=subprocess.STDOUT)


def run(path: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    """Run it to its end."""
    return subprocess.run(command(path, out, *more), cwd=ROOT, capture_output=True, text=True, timeout=240)


def epochs_done(cell: Path) -> int:
    """Finished epochs, by the history; one more when trained, another when scored."""
    return CellFolder(cell).progress


def wait_for(what, seconds: float = 90.0, runner: subprocess.Popen | None = None):
    """What ``what()`` returns once it is true; the runner must not end before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        assert runner is None or runner.poll() is None, "the runner ended before"
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def family(process: psutil.Process, word: str) -> list[psutil.Process]:
    """Its descendants whose command line holds a word."""
    found = []
    for child in process.children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def same_results(ours: Path, theirs: Path) -> None:
    """Both cells have the same bits in ``metrics.json``, apart from times and memory."""
    a, b = RunFolder(ours).metrics, RunFolder(theirs).metrics
    for m in (a, b):
        for key in ("seconds", "peak_memory_mb"):
            m.pop(key)
        for key in ("run_dir", "data_root"):
            m["params"].pop(key)
    assert a == b
