"""What comes from elsewhere, is damaged, or was killed in the middle: nothing outside is touched, nothing false is ranked."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import psutil
import pytest
import yaml
from PIL import Image

from charmlib.data.dataset import LABELS, PICTURES, WEIGHTS, digests, open_dataset
from charmlib.files import write_json
from charmlib.grid import board, bring, leaderboard, lease, merge_grids, run_grid, runner
from charmlib.grid.bring import bring_cell, remove_cell
from charmlib.grid.cell_process import _sockets
from charmlib.grid.cells import CellFolder, GridError
from charmlib.grid.cluster import Means, local_cluster
from charmlib.grid.report import board_text, write_report
from charmlib.param_sources import read_yaml
from charmlib.params import ParameterError, resolve
from kaggle_setup.state import load_state
from tests.conftest import TINY, _finished_run
from tests.grid.conftest import ROOT, light_notebooks, small_grid

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


@pytest.fixture(scope="module")
def made(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for seed in (1, 2):
        cell = _finished_run(folder / f"s{seed}", str(phantoms), seed=seed, skill=seed)
        metrics = json.loads((cell / "metrics.json").read_text())
        write_json(cell / "metrics.json", {**metrics, "code": "c", "hash": "h"})
        shutil.copy(cell / "split.csv", folder)
    record(folder, "s1", "s2")
    return folder


@pytest.fixture
def shard(made, tmp_path):
    """A grid's folder with two finished cells, as another machine leaves it."""
    return Path(shutil.copytree(made, tmp_path / "shard"))


@pytest.fixture
def no_report(monkeypatch):
    """Merges without board and pages, which take a second."""
    for name in ("leaderboard", "write_report"):
        monkeypatch.setattr(bring, name, lambda *args: None)


def record(folder: Path, *ids: str) -> None:
    cells = [{"id": id_, "axes": {"seed": i}, "params": resolve({**TINY, "seed": i})} for i, id_ in enumerate(ids, 1)]
    (folder / "grid.yaml").write_text(yaml.safe_dump({"name": "g", "axes": ["seed"], "cells": cells}))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# -- names and links ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../victim", "..", ".", "/tmp/victim", "s1/../../victim", ".hidden", "leaderboard.csv", "S1"])
def test_names_in_a_foreign_record_never_lead_out_of_the_folder(shard, tmp_path, name):
    victim = tmp_path / "home/victim"
    victim.mkdir(parents=True)
    (victim / "id_rsa").write_text("key")
    shutil.copytree(shard / "s1", tmp_path / "victim")
    record(shard, "s1", name)
    for what in (lambda: merge_grids(tmp_path / "home/merged", [shard]), lambda: leaderboard(shard)):
        with pytest.raises(ParameterError, match="grid.yaml: the cell name"):
            what()
    assert files(tmp_path / "home") == {"victim/id_rsa": b"key"}


@pytest.mark.parametrize("content", ["name: g", "axes: [k]\ncells: [{id: a, params: {k: 1}}]", "axes: []\ncells: [a]",
                                     "axes: []\ncells: [{id: a, params: {k: [1]}}]", "axes: [seed]\ncells: {a: 1}"])
def test_a_record_that_no_grid_wrote_is_refused_by_its_name(tmp_path, content):
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises((GridError, ParameterError), match="grid.yaml"):
        leaderboard(tmp_path)


@pytest.mark.parametrize("link", ["s1", "s1/log.txt", "s1/resume.pt"])
def test_links_in_what_comes_from_elsewhere_are_refused(shard, tmp_path, link):
    """A file that they lead to would be published, or written over."""
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/key").write_text("key")
    if (shard / link).is_dir():
        (shard / link).rename(tmp_path / "elsewhere")
    (shard / link).symlink_to(tmp_path / ("secret" if link == "s1" else "secret/key"))
    with pytest.raises(GridError, match=f"{link} is a symbolic link to .*secret"):
        merge_grids(tmp_path / "merged", [shard])
    assert files(tmp_path / "secret") == {"key": b"key"} and not (tmp_path / "merged/s1").exists()


def test_links_in_the_grids_own_folder_lead_nobody_out_of_it(shard, tmp_path, no_report):
    victim, out = tmp_path / "victim", tmp_path / "out"
    victim.mkdir()
    (victim / "key").write_text("key")
    out.mkdir()
    (out / "s1").symlink_to(victim)
    with pytest.raises(GridError, match="s1 is a symbolic link"):
        bring_cell(shard / "s1", out / "s1")
    remove_cell(out / "s1")  # the link alone
    (out / ".half").symlink_to(victim)
    (out / "split.csv").symlink_to(victim / "key")
    merge_grids(out, [shard])
    assert (out / "s1/metrics.json").is_file() and not (out / "split.csv").is_symlink()
    (out / ".s3.lock").symlink_to(victim / "key")
    with pytest.raises(OSError, match=r"\.s3\.lock"):
        lease.take(out / "s3")
    assert files(victim) == {"key": b"key"}


def test_names_in_a_foreign_state_of_kaggle_make_no_folder(tmp_path):
    kernel = {"shard": 1, "round": 1, "cells": ["a"], "id": "me/a", "title": "a"}
    for wrong in ({"cells": ["../a"]}, {"shard": "../../a"}):
        write_json(tmp_path / "kaggle/state.json" if (tmp_path / "kaggle").is_dir() else _made(tmp_path / "kaggle"), {
            "format": 2, "settings": {"name": "g", "shards": 1}, "tag": "ab", "kernels": [{**kernel, **wrong}]})
        with pytest.raises(GridError, match="state.json is damaged"):
            load_state(tmp_path)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder / "state.json"


# -- copies and removals that are killed --------------------------------------------------------------------------------

_KILLED = """import os, signal, sys
import charmlib.files, charmlib.grid.bring as bring
left = int(sys.argv[3])
def count(real):
    def call(*args, **how):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **how)
    return call
for module, name in ((bring, "sync"), (bring.shutil, "rmtree"), (charmlib.files, "sync"), (charmlib.files.os, "replace")):
    setattr(module, name, count(getattr(module, name)))
bring.leaderboard = bring.write_report = lambda *a, **k: None
bring.merge_grids(sys.argv[1], [sys.argv[2]])
"""


def test_a_merge_that_is_killed_anywhere_leaves_no_ghost_and_ends_right_when_it_is_given_again(shard, tmp_path, no_report):
    """Half a copy was listed, ranked, and counted as a seed."""
    out, died = tmp_path / "out", 0
    whole = {name: content for name, content in files(shard).items() if name != "grid.yaml"}
    for step in (1, 5, 12, 17):
        died += subprocess.run([sys.executable, "-c", _KILLED, out, shard, str(step)], cwd=ROOT).returncode == -signal.SIGKILL
        if (out / "grid.yaml").is_file():
            seen = leaderboard(out, write=False)
            assert set(seen["cell"]) == {"s1", "s2"} and set(seen["status"]) <= {"done", "pending"}
        merge_grids(out, [shard], say=lambda line: None)
        there = files(out)
        assert {name: there[name] for name in whole} == whole
        assert not [name for name in there if name.endswith(".tmp") or ".half/" in name] and not (out / ".half").exists()
        shutil.rmtree(out)
    assert died == 4


def test_a_cell_whose_removal_is_killed_is_gone(shard, monkeypatch):
    def killed(*args, **how):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove_cell(shard / "s1")
    assert set(leaderboard(shard)["status"]) == {"done", "pending"}
    remove_cell(shard / "s2")
    assert not (shard / ".half").exists()


def test_a_hidden_folder_is_no_cell(shard):
    shutil.copytree(shard / "s1", shard / ".s3.0123.half")
    assert set(leaderboard(shard)["cell"]) == {"s1", "s2"}


# -- damage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file, content", [("metrics.json", b""), ("metrics.json", b"[]"), ("predictions.npz", b"\x00\xff{"),
                                           ("history.csv", b"")])
def test_a_damaged_cell_is_named_with_file_and_reason_and_the_others_are_shown(shard, file, content):
    (shard / "s1" / file).write_bytes(content)
    found = leaderboard(shard).set_index("cell")
    assert found.loc["s1", "status"] == board.DAMAGED and str(shard / "s1") in found.loc["s1", "reason"]
    assert found.loc["s2", "status"] == "done" and found.loc["s2", "rank"] == 1 and pd.isna(found.loc["s1", "rank"])
    assert "s1 damaged: " + found.loc["s1", "reason"] in board_text(found.reset_index())


def test_a_report_is_written_beside_a_damaged_cell_and_names_it(shard):
    (shard / "s1/predictions.npz").write_bytes(b"")
    assert "s1 damaged: " in write_report(shard, leaderboard(shard)).read_text()


@pytest.mark.parametrize("key", ["data", "valid", "test", "images", "params", "split", "seconds", "bank"])
def test_metrics_that_lack_something_are_damaged(shard, key):
    path = shard / "s1/metrics.json"
    write_json(path, {name: value for name, value in json.loads(path.read_text()).items() if name != key})
    found = leaderboard(shard).set_index("cell")
    reason = found.loc["s1", "reason"]
    assert found.loc["s1", "status"] == board.DAMAGED and f"{path} is damaged" in reason and key in reason


def test_why_a_cell_failed_is_on_the_board(shard):
    (shard / "s1/metrics.json").unlink()
    (shard / "s1/error.txt").write_text("Traceback (most recent call last):\n  ...\nValueError: no such column\n")
    assert "s1 failed: ValueError: no such column" in board_text(leaderboard(shard))
    (shard / "s1/error.txt").write_text("was stopped from outside (SIGTERM), twice without getting further\n\nits log:")
    assert "s1 failed: was stopped from outside (SIGTERM), twice" in board_text(leaderboard(shard))


# -- other data under the same names ------------------------------------------------------------------------------------


def other_labels(data: Path) -> None:
    table = data / "Data_Entry_2017.csv"
    frame = pd.read_csv(table)
    frame["Finding Labels"] = frame["Finding Labels"].sample(frac=1, random_state=0).to_numpy()
    frame.to_csv(table, index=False)


def other_pictures(data: Path) -> None:
    for path in data.rglob("*.png"):
        Image.new("L", (32, 32), 7).save(path)


@pytest.mark.parametrize("change, differs", [(None, set()), (other_labels, {LABELS}), (other_pictures, {PICTURES})])
def test_digests_tell_labels_and_pictures_apart_and_are_the_same_wherever_they_lie(phantoms, tmp_path, change, differs):
    shutil.copytree(phantoms, tmp_path / "moved")
    if change:
        change(tmp_path / "moved")
    one, other = (digests(open_dataset({**TINY, "data_root": str(root)})) for root in (phantoms, tmp_path / "moved"))
    assert {name for name in one if one[name] != other[name]} == differs and set(one) == {LABELS, PICTURES}


def test_a_grid_goes_on_over_the_same_labels_pictures_and_weights_only(phantoms, tmp_path, make_run, monkeypatch):
    """Under the same file names it went on over others without a word."""
    jobs = []
    monkeypatch.setattr(runner, "local_cluster", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(runner, "Schedule", lambda cells, todo, *a, **k: SimpleNamespace(run=lambda: jobs.extend(todo)))
    weights, out = tmp_path / "weights.pt", tmp_path / "out"
    weights.write_bytes(b"one")
    path = small_grid(tmp_path / "grid", phantoms, base={"weights": str(weights)}, k=[1, 2])
    run_grid(path, out=out, say=lambda line: None)
    done, started = make_run("out/k1"), out / "k2"
    metrics = json.loads((done / "metrics.json").read_text())
    versions = {**metrics["versions"], "charmlib": runner.charmlib.__version__}
    write_json(done / "metrics.json", {**metrics, "hash": jobs[0]["hash"], "code": jobs[0]["code"], "params": jobs[0]["params"],
                                       "data": {**metrics["data"], "digests": jobs[0]["digests"]}, "versions": versions})
    started.mkdir()
    (started / "resume.pt").touch()
    (started / "params.yaml").write_text(yaml.safe_dump(jobs[1]["params"]))
    write_json(started / "cell.json", {**{key: jobs[1][key] for key in ("hash", "split", "code", "digests")},
                                       "charmlib": versions["charmlib"]})
    run_grid(path, out=out, say=lambda line: None)
    assert [job["id"] for job in jobs[2:]] == ["k2"]
    shutil.copytree(phantoms, tmp_path / "other")
    other_labels(tmp_path / "other")
    other_pictures(tmp_path / "other")
    for more, words in ((["seed=3"], r"parameters \(seed\)"), ([f"data_root={tmp_path / 'other'}"], f"{LABELS}, {PICTURES}")):
        with pytest.raises(GridError, match=f"2 finished or started cells in .* made with other {words}: k1, k2. Go back to"):
            run_grid(path, more, out=out, say=lambda line: None)
    weights.write_bytes(b"two")
    with pytest.raises(GridError, match=f"with other {WEIGHTS}: k1, k2"):
        run_grid(path, out=out, say=lambda line: None)


def test_shards_over_other_labels_are_not_merged(shard, tmp_path):
    for cell, digest in (("s1", "a"), ("s2", "b")):
        path = shard / cell / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["data"]["digests"] = {LABELS: digest}
        write_json(path, metrics)
    with pytest.raises(GridError, match="the labels as read differs: a of s1 in .*, b of s2"):
        merge_grids(tmp_path / "out", [shard])


# -- folders and locks --------------------------------------------------------------------------------------------------


def test_a_single_run_and_a_grid_never_share_a_folder(shard, make_run, phantoms, tmp_path):
    """They have one default folder where their files have one name, and the run hid the grid's cells."""
    path = small_grid(tmp_path, phantoms, k=[1])
    before = files(shard)
    with pytest.raises(GridError, match="shard is the folder of a grid.*another --out"):
        runner.run_single(path.with_name("base.yaml"), out=shard)
    alone = make_run("alone")
    (alone / "params.yaml").write_text("k: 1")
    with pytest.raises(GridError, match="alone is the folder of a single run.*another --out"):
        run_grid(path, out=alone)
    assert files(shard) == before and not (alone / "grid.yaml").exists()


def test_nothing_of_the_local_cluster_listens(monkeypatch):
    """Dask runs the code of whoever connects, as the user whose grid it is."""
    me = psutil.Process()
    before = {c.laddr for c in me.net_connections("all") if c.status == "LISTEN"}
    with local_cluster(Means(workers=2), 2) as cluster:
        assert cluster.seats() == 2 and cluster.client.submit(os.getpid).result() == os.getpid()
        listening = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections("all") if c.status == "LISTEN"]
        assert {c.laddr for c in listening} == before


@pytest.mark.slow
def test_a_cell_runs_in_a_folder_of_any_name_and_shows_its_outputs_on_no_port(phantoms, tmp_path, make_run, monkeypatch):
    """Whoever connects to a kernel's port reads all that it prints; a folder keeps other users out."""
    look = ("import stat; from ipykernel.connect import get_connection_file\n"
            "file = Path(get_connection_file())\n"
            "write_json(Path(run_dir) / 'kernel.json', {'mode': stat.S_IMODE(file.parent.stat().st_mode), 'file': str(file), "
            "**json.loads(file.read_text())})\n")
    # another user was quicker
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / f"charmlib-{os.getuid()}").write_text("")
    books, out = tmp_path / "books {x}", tmp_path / "a {b} $c 'd' \"e\" \n f"
    light_notebooks(books, make_run("finished"), pace=0.1, first="import json; from pathlib import Path\n"
                    f"from charmlib.files import write_json\n{look}")
    found = run_grid(small_grid(tmp_path / "grid", phantoms, k=[1]), out=out, notebooks=books, say=lambda line: None)
    assert found["status"].tolist() == ["done"] and (out / "k1/train.ipynb").is_file()
    kernel = json.loads((out / "k1/kernel.json").read_text())
    assert kernel["transport"] == "ipc" and kernel["ip"] == kernel["file"].replace(".json", "-ipc")
    assert kernel["mode"] & 0o077 == 0 and not Path(kernel["file"]).parent.exists()


def test_sockets_of_a_killed_cell_go_with_its_next_start(tmp_path, monkeypatch):
    short = Path(tempfile.mkdtemp(dir="/tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(short))
    try:
        place, other = _sockets(CellFolder(tmp_path / "a")), _sockets(CellFolder(tmp_path / "b"))
        assert place != other and short in place.parents and place.stat().st_mode & 0o777 == 0o700
        (place / "kernel-ipc-1").touch()
        assert _sockets(CellFolder(tmp_path / "a")) == place and not list(place.iterdir())
        long = short / ("x" * 60)
        long.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(long))
        place = _sockets(CellFolder(tmp_path / "a"))
        assert len(os.fsencode(place)) < 80 and place.stat().st_mode & 0o777 == 0o700
        place.rmdir()
    finally:
        shutil.rmtree(short)


@pytest.mark.parametrize("made", [run_grid, runner.run_single])
def test_a_folder_that_cannot_be_written_is_refused_before_any_image_is_read(phantoms, tmp_path, monkeypatch, made):
    path = small_grid(tmp_path, phantoms, k=[1])
    path = path if made is run_grid else path.with_name("base.yaml")
    monkeypatch.setattr(runner, "open_dataset", lambda params: pytest.fail("images were read"))
    (tmp_path / "file").touch()
    with pytest.raises(GridError, match="file is a file: name another --out"):
        made(path, out=tmp_path / "file/run")
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(GridError, match=f"{tmp_path} cannot be written to: name another --out"):
        made(path, out=tmp_path / "new/run")


def test_a_lease_outlives_steps_of_the_clock(tmp_path, monkeypatch):
    held = lease.take(tmp_path)
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 60)  # as /proc/stat has it after a step
    assert lease.holder(tmp_path)
    content = read_yaml(tmp_path / ".lease")
    write_json(tmp_path / ".lease", {**content, "place": "another"})
    for step in (-3600, 3600):
        os.utime(tmp_path / ".lease", (lease.time.time() + step,) * 2)
        assert not lease.holder(tmp_path, patience=0.5)
        os.utime(tmp_path / ".lease", (lease.time.time() + step,) * 2)
        renewal = threading.Timer(0.3, os.utime, [tmp_path / ".lease"])
        renewal.start()
        assert lease.holder(tmp_path, patience=1.0)
        renewal.join()
    held.release()


def test_a_wait_for_a_lock_is_said(tmp_path, monkeypatch, capsys):
    taken, free = threading.Event(), threading.Event()

    def other():
        with lease.alone(tmp_path / "cell"):
            taken.set()
            free.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    taken.wait(10)
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: None)
    threading.Timer(0.5, free.set).start()
    with lease.alone(tmp_path / "cell"):
        assert f"waiting for {tmp_path}/.cell.lock, which another process holds" in capsys.readouterr().err
    thread.join()
    assert not CellFolder(tmp_path / "cell").path.exists()
