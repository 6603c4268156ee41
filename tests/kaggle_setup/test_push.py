"""The flow against a stand-in that behaves as the official client's package does, refusals included."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kaggle_setup.state import locked
from tests.kaggle_setup.conftest import TOKEN

ROOT = Path(__file__).parents[2]
CELLS = {"1of2": ["k1", "k3"], "2of2": ["k2", "k4"]}
pytestmark = pytest.mark.usefixtures("quick_wheel")


@pytest.fixture
def push(charm, small, tmp_path, merged):
    """``kaggle_setup push`` of the small grid."""
    return lambda *args: charm("push", small, "--user", "anna", "--out", tmp_path / "out", *args)


def state_of(tmp_path):
    return json.loads((tmp_path / "out/kaggle/state.json").read_text())


def test_a_dry_run_writes_everything_and_asks_nothing(push, server, tmp_path):
    status, text = push("--shards", 2, "--dry-run")
    assert status == 0 and "nothing was sent" in text and server.calls() == []
    there = {str(path.relative_to(tmp_path / "out/kaggle")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    kernels = {f"s{i}-r1/kernel/{name}" for i in (1, 2) for name in ("notebook.ipynb", "kernel-metadata.json")}
    wheel = {f"wheel/{name}" for name in ("charmlib-0.0.0-py3-none-any.whl", "dataset-metadata.json", "check_gpu.py")}
    assert there - {"state.lock"} == kernels | wheel | {"state.json"}


def test_a_dry_run_needs_no_client(charm, small, tmp_path, monkeypatch):
    (tmp_path / "kaggle").mkdir()
    (tmp_path / "kaggle/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'kaggle'\")")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, text = charm("push", small, "--user", "anna", "--out", tmp_path / "out", "--dry-run")
    assert status == 0, text
    status, text = charm("push", small, "--user", "anna", "--out", tmp_path / "out")
    assert status == 2 and "pip install -U kaggle" in text


def test_two_shards_are_pushed_after_their_wheel_fetched_and_merged(push, charm, server, tmp_path, merged):
    server.plan(done={f"{shard}-r1": cells for shard, cells in CELLS.items()})
    status, text = push("--shards", 2)
    assert status == 0, text
    assert [name for name, _ in server.calls()] == [
        "dataset_status", "dataset_create_new", "dataset_status", "dataset_status", "kernels_push", "kernels_push"]
    assert all(call["timeout"] == 11 * 3600 + 1800 for call in server.calls("kernels_push"))
    pushed = server.kernels()
    assert set(pushed) == {"1of2-r1", "2of2-r1"} and all(meta["is_private"] for meta in pushed.values())
    status, text = charm("status", tmp_path / "out")
    assert status == 0 and text.count("running") == 2 and "kaggle.com/code/anna/charmlib-small-" in text
    charm("status", tmp_path / "out")
    assert merged == []
    status, text = charm("fetch", tmp_path / "out")
    assert status == 0 and "2 of 2 cells done" in text and "not done" not in text
    places = [tmp_path / f"out/kaggle/s{i}-r1/output/runs/small" for i in (1, 2)]
    assert merged == [(tmp_path / "out", places)] and (places[0] / "k1/metrics.json").is_file()
    before = len(server.calls())
    status, text = push("--shards", 2)
    assert status == 0 and len(server.calls()) == before and len(merged) == 1  # done: nothing more is asked or pushed


def test_a_merge_that_failed_is_made_by_the_next_fetch(push, charm, server, tmp_path, merged, monkeypatch):
    from charmlib.grid.cells import GridError

    server.plan(sessions={"1of1-r1": ["COMPLETE"]}, done={"1of1-r1": ["k1", "k2", "k3", "k4"]})
    push()

    def broken(out, folders, say=print):
        raise GridError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("kaggle_setup.rounds.merge_grids", broken)
        status, text = charm("fetch", tmp_path / "out")
        assert status == 2 and "the disk is full" in text
    status, text = charm("fetch", tmp_path / "out")
    assert status == 0 and len(merged) == 1 and len(server.calls("kernels_output")) == 1, text


def test_status_disturbs_nothing_and_a_second_push_is_refused(push, charm, server, tmp_path):
    server.plan(sessions={"1of1-r1": ["COMPLETE"]})
    push()
    before = (tmp_path / "out/kaggle/state.json").read_bytes()
    with locked(tmp_path / "out"):
        status, text = charm("status", tmp_path / "out")
        assert status == 0 and "ended, complete" in text and (tmp_path / "out/kaggle/state.json").read_bytes() == before
        for status, text in (push(), charm("fetch", tmp_path / "out")):
            assert status == 2 and "another `kaggle_setup push` or `fetch` works" in text


def test_a_wait_fetches_what_runs_before_it_gives_up_on_a_refusal(push, server, merged):
    server.plan(done={"1of2-r1": ["k1", "k3"]}, steps={"kernels_push": ["", "maximum", "quota", "quota", "quota", "quota"]})
    status, text = push("--shards", 2, "--wait", "--poll", 0)
    assert status == 2 and "1of2-r1: fetched, 2 of 2 cells done" in text and "kaggle quota" in text and len(merged) == 1


def test_a_kernel_that_was_deleted_there_is_named(push, charm, server, tmp_path):
    push()
    shutil.rmtree(tmp_path / "server/kernels")
    status, text = charm("fetch", tmp_path / "out")
    assert status == 2 and "logged in as anna" in text and "another --out" in text


def test_the_wheels_dataset_alone(charm, server, tmp_path):
    status, text = charm("wheel", "--user", "anna", "--out", tmp_path / "wheel", "--dry-run")
    assert status == 0 and "check_gpu.py" in text and server.calls() == []
    status, text = charm("wheel", "--user", "anna", "--out", tmp_path / "wheel")
    assert status == 0 and "anna/charmlib-wheel: the wheel is there, version 1" in text


def test_the_cache_is_prepared_by_a_cpu_session_whose_output_grids_attach(charm, server, tmp_path):
    out = tmp_path / "prepare"
    status, text = charm("prepare", "--user", "anna", "-p", "image_size=512", "--out", out, "--dry-run")
    assert status == 0 and "nothing was sent" in text and server.calls() == []
    book, meta = (json.loads((out / "kernel" / name).read_text()) for name in ("notebook.ipynb", "kernel-metadata.json"))
    source = "\n".join("".join(cell["source"]) for cell in book["cells"])
    assert "image_size = 512" in source and 'cache_dir = "/kaggle/working/cache"' in source and "required=False" in source
    assert meta["enable_gpu"] is False and meta["dataset_sources"] == ["anna/charmlib-wheel", "nih-chest-xrays/data"]
    status, text = charm("prepare", "--user", "anna", "--out", out)
    assert status == 0 and "--notebook-outputs anna/charmlib-prepare" in text, text
    assert [name for name, _ in server.calls()][-1] == "kernels_push"
    status, text = charm("prepare", "--user", "anna", "-p", "stage1_epochs=3", "--out", out, "--dry-run")
    assert status == 2 and "declares no parameter 'stage1_epochs'" in text


def test_the_third_shard_waits_for_a_session_and_says_so(push, server, tmp_path):
    status, text = push("--shards", 3)
    assert status == 1 and "waiting, 2 sessions run" in text and "1 shards wait" in text
    assert [kernel["state"] for kernel in state_of(tmp_path)["kernels"]] == ["running", "running", "waiting"]


def test_with_wait_it_pushes_the_rest_goes_on_in_rounds_and_ends_when_all_is_done(push, server, tmp_path, merged):
    server.plan(done={"1of3-r1": ["k1"], "2of3-r1": ["k2"], "3of3-r1": ["k3"], "1of3-r2": ["k4"]})
    status, text = push("--shards", 3, "--wait", "--poll", 0)
    assert status == 0, text
    ids = [kernel["id"] for kernel in state_of(tmp_path)["kernels"]]
    assert server.kernels()["1of3-r2"]["kernel_sources"] == [one for one in ids if one.endswith("s1of3-r1")]
    assert merged[-1][1] == [tmp_path / f"out/kaggle/{place}/output/runs/small" for place in ("s1-r2", "s2-r1", "s3-r1")]
    assert len(server.calls("kernels_push")) == 4


def test_with_wait_failed_cells_and_rounds_that_get_nowhere_cost_no_more_hours(push, server):
    server.plan(done={"1of2-r1": ["k1", "k3:Traceback"], "2of2-r1": []}, log="ImportError: no torch\n")
    status, text = push("--shards", 2, "--wait", "--poll", 0)
    assert status == 1 and "3 cells are not done: k3, k2, k4" in text and "failed: k3" in text
    assert "no grid in its output; ImportError: no torch" in text
    assert len(server.calls("kernels_push")) == 2


def test_push_again_after_fetch_goes_on_with_what_is_left(push, charm, server, tmp_path):
    server.plan(sessions={"1of1-r1": ["ERROR"]}, done={"1of1-r1": ["k1", "k2"], "1of1-r2": ["k3", "k4"]})
    push()
    status, text = charm("fetch", tmp_path / "out")
    assert status == 0 and "2 cells are not done" in text and "exceeded the max allowed execution duration" in text
    status, text = push()
    assert status == 0 and "round 2 for 2 cells" in text
    assert server.kernels()["1of1-r2"]["kernel_sources"] == [state_of(tmp_path)["kernels"][0]["id"]]
    for _ in range(3):
        charm("fetch", tmp_path / "out")
    status, text = charm("fetch", tmp_path / "out")
    assert status == 0 and "not done" not in text and {path.parent.name for path in (tmp_path / "out/kaggle/s1-r2").rglob(
        "metrics.json")} == {"k1", "k2", "k3", "k4"}


@pytest.mark.parametrize(("step", "words"), [
    ("quota", ("kaggle quota", "exceeded the number of hours")), ("leak", ("bad credentials",))])
def test_a_refusal_names_its_remedy_and_nothing_counts_as_pushed(push, server, tmp_path, step, words):
    server.plan(steps={"kernels_push": [step]})
    status, text = push("--shards", 2)
    assert status == 2 and all(word in text for word in words), text
    assert [kernel["state"] for kernel in state_of(tmp_path)["kernels"]] == ["waiting", "waiting"]
    assert len(server.calls("kernels_push")) == 1
    status, text = push("--shards", 2)
    assert status == 0 and len(server.calls("dataset_create_new")) == 1, text


def test_the_session_limit_makes_a_shard_wait(push, server, tmp_path):
    """Sessions that were started elsewhere count too, so the server may say no before there are two from here."""
    server.plan(steps={"kernels_push": ["", "maximum"]})
    status, text = push("--shards", 2)
    assert status == 1 and "Maximum batch GPU session count of 2 reached" in text and "View Active Events" in text
    assert [kernel["state"] for kernel in state_of(tmp_path)["kernels"]] == ["running", "waiting"]


def test_a_dataset_that_kaggle_does_not_have_is_an_error_and_the_next_push_has_another_name(push, server, tmp_path):
    status, text = push("--data", "nih-chest-xrays/dta")
    assert status == 2 and "nih-chest-xrays/dta" in text and "Correct --data" in text and "stop it there" in text
    (kernel,) = state_of(tmp_path)["kernels"]
    assert kernel["state"] == "void"
    status, text = push("--data", "nih-chest-xrays/data")
    assert status == 0, text
    (again,) = state_of(tmp_path)["kernels"]
    assert again["state"] == "running" and again["id"] != kernel["id"]


def test_a_push_that_was_killed_goes_on_and_pushes_nothing_twice(small, server, tmp_path, push):
    server.plan(steps={"kernels_push": ["die"]})
    path = f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}"
    done = subprocess.run([sys.executable, "-m", "kaggle_setup", "push", str(small), "--user", "anna", "--shards", "2",
                           "--out", str(tmp_path / "out")], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert [kernel["state"] for kernel in state_of(tmp_path)["kernels"]] == ["pushing", "waiting"]
    status, text = push("--shards", 2)
    assert status == 0, text
    assert {key: meta["version"] for key, meta in server.kernels().items()} == {"1of2-r1": 1, "2of2-r1": 1}
    assert len(server.calls("kernels_push")) == 2


def test_a_push_whose_client_lost_its_connection_is_asked_for_and_then_made(push, server, tmp_path):
    server.plan(steps={"kernels_push": ["crash"]})
    status, text = push()
    assert status == 2 and "Connection aborted" in text and state_of(tmp_path)["kernels"][0]["state"] == "pushing"
    status, text = push()
    assert status == 0 and server.kernels()["1of1-r1"]["version"] == 1, text


def test_a_client_that_hangs_is_stopped(push, server, tmp_path, monkeypatch):
    server.plan(steps={"kernels_push": ["hang"]})
    monkeypatch.setattr("kaggle_setup.client._ANSWER_SECONDS", 3)
    status, text = push()
    assert status == 2 and "kernels_push" in text and "no answer" in text and TOKEN not in text
    assert state_of(tmp_path)["kernels"][0]["state"] == "pushing"


def test_a_broken_download_goes_on_and_hides_signed_addresses(push, charm, server, tmp_path, merged):
    server.plan(sessions={"1of1-r1": ["COMPLETE"]}, done={"1of1-r1": ["k1", "k2", "k3", "k4"]},
                steps={"kernels_output": ["half"]})
    push()
    status, text = charm("fetch", tmp_path / "out")
    assert status == 2 and "0a1b2c3d" not in text and merged == []
    status, text = charm("fetch", tmp_path / "out")
    assert status == 0 and "4 of 4 cells done" in text and len(merged) == 1


def test_a_wait_outlives_moments_without_network(push, server):
    server.plan(done={"1of1-r1": ["k1", "k2", "k3", "k4"]}, steps={"kernels_status": ["crash", "crash"]})
    status, text = push("--wait", "--poll", 0)
    assert status == 0 and text.count("trying again") == 2, text


def test_other_settings_or_another_grid_do_not_go_on_in_the_same_folder(push, server, small):
    push("--shards", 2)
    status, text = push("--shards", 3)
    assert status == 2 and "shards was 2 and is 3 now" in text and "--out" in text
    small.write_text(small.read_text().replace("- 4", "- 5"))
    status, text = push("--shards", 2)
    assert status == 2 and "has changed since" in text


def test_a_new_wheel_becomes_a_new_version_of_its_dataset(push, charm, small, server, tmp_path):
    push()
    status, text = charm("push", small, "--user", "anna", "--out", tmp_path / "other")
    assert status == 0 and len(server.calls("dataset_create_new")) == 1, text
    (call,) = server.calls("dataset_create_version")
    assert call["folder"] == str(tmp_path / "other/kaggle/wheel") and "charmlib wheel" in call["version_notes"]
    there = list((tmp_path / "server/kernels/anna").iterdir())
    assert len(there) == 2  # the second push of this grid has names of its own


@pytest.mark.parametrize("where", ["env", "kaggle.json"])
def test_a_token_appears_nowhere(push, charm, server, tmp_path, monkeypatch, where):
    token = TOKEN if where == "env" else "0123456789abcdef0123456789abcdef"
    if where != "env":
        monkeypatch.delenv("KAGGLE_API_TOKEN")
        monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "config"))
        (tmp_path / "config").mkdir()
        (tmp_path / "config/kaggle.json").write_text(json.dumps({"username": "anna", "key": token}))
    server.plan(steps={"kernels_push": ["leak"], "kernels_status": ["leak"], "dataset_status": ["leak"]})
    texts = [push()[1], push()[1], push()[1], charm("status", tmp_path / "out")[1], charm("fetch", tmp_path / "out")[1]]
    assert sum("[token hidden]" in text for text in texts) >= 3
    assert not any(token in text for text in texts)
    written = [path for place in ("out", "server") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert len(written) > 5 and not any(token.encode() in path.read_bytes() for path in written)


def test_without_a_token_it_says_how_to_get_one(push, monkeypatch, server):
    monkeypatch.delenv("KAGGLE_API_TOKEN")
    status, text = push()
    assert status == 2 and "kaggle auth login" in text


def test_an_old_client_is_refused(push, server):
    server.plan(version="1.7.4")
    status, text = push()
    assert status == 2 and "1.7.4" in text and "2.2.5" in text


def test_status_of_a_folder_that_was_not_pushed(charm, tmp_path):
    status, text = charm("status", tmp_path)
    assert status == 2 and "nothing was pushed" in text
