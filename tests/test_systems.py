"""A system that charmlib does not know goes through all of it: notebooks, grid, kill and resume, predict, leaderboard."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
import yaml

from charmlib.evaluation.runs import RunFolder
from charmlib.params import DEFAULTS, PARAMS, Param, ParameterError, missing_need, resolve
from charmlib.systems import SYSTEMS, System, register

ROOT = Path(__file__).parents[1]
ENV = {**{k: v for k, v in os.environ.items() if not k.startswith("CHARM_CELL")}, "CHARM_SYSTEMS": "tests.toy",
       "PYTHONPATH": str(ROOT)}
TOY = {"system": "toy", "weights": "none", "image_size": 32, "stage1_epochs": 2, "stage1_lr": 0.01, "stage1_batch": 16,
       "stage2_epochs": 2}


def command(*args, cwd, good=True, **env):
    done = subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, cwd=cwd, env={**ENV, **env})
    assert (done.returncode == 0) == good, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def toy_file(folder: Path, phantoms: Path) -> Path:
    (folder / "toy.yaml").write_text(yaml.safe_dump({**TOY, "data_root": str(phantoms), "valid_fraction": 0.2}))
    return folder / "toy.yaml"


@pytest.fixture
def toy():
    """The toy system in this process, which is forgotten afterwards."""
    before = [(kept, dict(kept)) for kept in (SYSTEMS, PARAMS, DEFAULTS)]
    sys.modules.pop("tests.toy", None)
    import tests.toy  # noqa: F401

    yield
    for kept, rows in before:
        kept.clear()
        kept.update(rows)


@pytest.mark.slow
def test_the_notebooks_train_and_test_a_system_of_ones_own(phantoms, tmp_path):
    given = {**TOY, "data_root": phantoms, "run_dir": tmp_path / "run"}
    args = [x for name, value in given.items() for x in ("-p", name, value)]
    command("papermill", ROOT / "notebooks/train.ipynb", tmp_path / "train.ipynb", "--no-progress-bar", *args, "-p", "options",
            "{toy_width: 4, valid_fraction: 0.2}", cwd=tmp_path)
    command("papermill", ROOT / "notebooks/test.ipynb", tmp_path / "test.ipynb", "--no-progress-bar", "-p", "run_dir",
            tmp_path / "run", cwd=tmp_path)
    run = RunFolder(tmp_path / "run")
    assert run.status == "done" and run.metrics["bank"] is None and run.card["params"]["toy_width"] == 4
    assert [row["stage"] for row in run.history] == ["head", "head", "all", "all"]
    assert not any(o.get("name") == "stderr" for c in nbformat.read(tmp_path / "test.ipynb", 4).cells
                   for o in c.get("outputs", []) if "Error" in str(o))


@pytest.mark.slow
def test_a_grid_of_a_system_of_ones_own_then_predict(phantoms, tmp_path):
    toy_file(tmp_path, phantoms)
    (tmp_path / "grid_toy.yaml").write_text("base: toy.yaml\naxes: {toy_width: [2, 6]}\n")
    told = command("charmlib", "grid", "run", "grid_toy.yaml", "--out", "out", cwd=tmp_path)
    board = pd.read_csv(tmp_path / "out/leaderboard.csv")
    assert sorted(board["toy_width"]) == [2, 6] and set(board["status"]) == {"done"} and set(board["rank"]) == {1, 2}, told
    assert {RunFolder(tmp_path / "out" / cell).card["params"]["toy_width"] for cell in board["cell"]} == {2, 6}
    image = next(phantoms.rglob("*.png"))
    command("charmlib", "predict", f"out/{board['cell'][0]}", image, "--out", "p.csv", cwd=tmp_path)
    assert pd.read_csv(tmp_path / "p.csv").filter(like="p_").notna().all(axis=None)
    dead = command("charmlib", "grid", "run", "grid_toy.yaml", "-p", "k=[1,2]", "--out", "dead", cwd=tmp_path, good=False)
    assert "axis 'k'" in dead and "system: charm" in dead
    unknown = command("charmlib", "run", "toy.yaml", cwd=tmp_path, good=False, CHARM_SYSTEMS="")
    assert "'toy' is none of charm" in unknown and "CHARM_SYSTEMS" in unknown


def test_a_killed_run_of_a_system_of_ones_own_ends_in_the_same_bits(toy, phantoms, tmp_path, monkeypatch):
    from charmlib.training.run import Run
    from tests.training.test_run import Killed, bits, killed_after

    params = {**TOY, "data_root": str(phantoms), "valid_fraction": 0.2}
    quiet = Run.open(params, run_dir=str(tmp_path / "quiet"))
    start = {k: v.clone() for k, v in quiet.net.state_dict().items()}
    quiet.train()
    for saves in (1, 2):  # in the first phase, and in the second
        with monkeypatch.context() as m, pytest.raises(Killed):
            killed_after(m, saves)
            Run.open(params, run_dir=str(tmp_path / "run")).train()
        torch.manual_seed(saves)
    Run.open(params, run_dir=str(tmp_path / "run")).train()
    (state, thresholds, history), (want, want_thresholds, want_history) = bits(tmp_path / "run"), bits(tmp_path / "quiet")
    assert state.keys() == want.keys() and all(torch.equal(state[name], value) for name, value in want.items())
    assert thresholds == want_thresholds and len(history) == 4
    pd.testing.assert_frame_equal(history, want_history)
    assert not torch.equal(start["body.0.weight"], quiet.net.body[0].weight)


def test_a_phase_may_freeze_a_part_with_its_norms(toy, phantoms, tmp_path):
    """Unlike fastai's freeze, after which batch norms go on learning."""
    from charmlib.training.run import Run

    run = Run.open({**TOY, "data_root": str(phantoms), "valid_fraction": 0.2, "stage2_epochs": 0, "run_dir": str(tmp_path)})
    before = {k: v.clone() for k, v in run.net.state_dict().items()}
    run.train()
    changed = {name for name, value in run.net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}


def test_parameters_belong_to_systems(toy):
    p = resolve({"system": "toy"})
    assert missing_need("k", p) == "system: charm" and not missing_need("toy_width", p)
    assert missing_need("toy_width", resolve()) == "system: toy"
    with pytest.raises(ParameterError, match="none of charm, two_path, toy. Did you mean 'toy'"):
        resolve({"system": "toyy"})
    with pytest.raises(ParameterError, match="registered twice"):
        register(System("toy", "a:b", "c:d"))
    with pytest.raises(ParameterError, match="'k' is declared twice"):
        register(System("other", "a:b", "c:d", (Param("network", "k", int, 1, "", of=("other",)),)))
