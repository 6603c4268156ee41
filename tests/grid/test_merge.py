"""Folders put together: shards, sessions, an earlier session's read-only output; and what may not be mixed."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import yaml

from charmlib.grid import Grid, lease, merge_grids
from charmlib.grid.bring import bring_cell, bring_earlier, remove_cell
from charmlib.grid.budget import computed_sizes, free_bytes, refuse_without_space
from charmlib.grid.cells import CellFolder, GridError
from charmlib.grid.spec import load_grid, parse_shard
from charmlib.params import ParameterError
from tests.grid.conftest import CELLS, run, same_results

pytestmark = pytest.mark.slow
NIH_PLAN = {"arch": "efficientnet_v2_s"}


@pytest.fixture
def shards(done, tmp_path):
    """The finished grid as two machines would have left it, each with one cell."""
    _, out, _ = done
    folders = []
    for i in range(2):
        folder = tmp_path / f"shard{i + 1}"
        shutil.copytree(out, folder)
        shutil.rmtree(folder / CELLS[1 - i])
        folders.append(folder)
    return folders


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_merged_shards_are_the_grid_of_one_machine(done, shards, tmp_path):
    _, whole, _ = done
    said = []
    board = merge_grids(tmp_path / "all", shards, say=said.append)
    assert (tmp_path / "all/leaderboard.csv").read_text() == (whole / "leaderboard.csv").read_text()
    for cell in CELLS:
        same_results(tmp_path / "all" / cell, whole / cell)
    assert (tmp_path / "all/report.html").is_file() and (tmp_path / "all/split.csv").is_file()
    assert [line.split()[0] for line in said] == ["1", "1"]
    again = merge_grids(tmp_path / "all", shards, say=said.append)  # once more changes nothing
    pd.testing.assert_frame_equal(again, board)
    assert [line.split()[0] for line in said[2:]] == ["0", "0"]


@pytest.mark.parametrize("change, words", [
    (lambda m: m["split"].update(hash="0" * 16), r"the split differs: .*shard1.* 0000000000000000 of m0\.5_k2_t0\.1"),
    (lambda m: m.update(code="f" * 16), r"the notebooks' code differs: .* ffffffffffffffff of m0\.5_k2_t0\.1"),
    (lambda m: m["versions"].update(charmlib="0.0.9"), r"the version of charmlib differs: .*, 0\.0\.9 of"),
    (lambda m: m["versions"].update(torch="2.0"), r"the version of torch differs"),
])
def test_other_splits_notebooks_and_versions_are_refused(shards, tmp_path, change, words):
    edit(shards[1] / CELLS[1] / "metrics.json", change)
    with pytest.raises(GridError, match=words):
        merge_grids(tmp_path / "all", shards)
    assert not (tmp_path / "all").exists()


def test_an_unfinished_first_cell_hides_no_versions(shards, tmp_path):
    """It knows charmlib's only; the others are still held against each other."""
    for shard in shards:
        shutil.copytree(shard / next(c for c in CELLS if (shard / c).is_dir()), shard / "extra")
    first = shards[0] / CELLS[0]
    known = json.loads((first / "metrics.json").read_text())
    (first / "metrics.json").unlink()
    (first / "cell.json").write_text(json.dumps({"id": CELLS[0], "hash": known["hash"], "split": known["split"]["hash"],
                                                 "code": known["code"], "charmlib": known["versions"]["charmlib"]}))
    record = yaml.safe_load((shards[0] / "grid.yaml").read_text())
    record["cells"].append({**record["cells"][0], "id": "extra"})
    (shards[0] / "grid.yaml").write_text(yaml.safe_dump(record))
    edit(shards[1] / CELLS[1] / "metrics.json", lambda m: m["versions"].update(torch="2.0"))
    with pytest.raises(GridError, match="the version of torch differs"):
        merge_grids(tmp_path / "all", shards)


def test_a_cell_that_is_being_worked_on_is_neither_replaced_nor_merged(shards, tmp_path):
    """A copy over it took its lease along, and it was trained twice at once."""
    target = tmp_path / "out" / CELLS[0]
    held = lease.take(target)
    with pytest.raises(GridError, match="is being worked on by process"):
        bring_cell(shards[0] / CELLS[0], target)
    with pytest.raises(GridError, match="is being worked on by process"):
        remove_cell(target)
    assert (target / ".lease").is_file() and not list((tmp_path / "out").glob("*.half"))
    held.release()
    assert bring_cell(shards[0] / CELLS[0], target)
    theirs = lease.take(shards[1] / CELLS[1])
    with pytest.raises(GridError, match="is being worked on by process"):
        merge_grids(tmp_path / "all", shards)
    theirs.release()


def test_other_parameters_are_refused(shards, tmp_path):
    record = yaml.safe_load((shards[1] / "grid.yaml").read_text())
    record["cells"][0]["params"]["seed"] = 7
    (shards[1] / "grid.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(GridError, match=r"cell m0\.5_k1_t0\.1 has seed 7 in .*shard2 and 85 in .*shard1"):
        merge_grids(tmp_path / "all", shards)
    record["axes"] = ["k"]
    (shards[1] / "grid.yaml").write_text(yaml.safe_dump(record))
    with pytest.raises(GridError, match="not parts of one grid"):
        merge_grids(tmp_path / "all", shards)
    with pytest.raises(GridError, match="holds no grid"):
        merge_grids(tmp_path / "all", [tmp_path])


def test_the_cell_that_got_further_is_taken(shards, tmp_path):
    """A half-done copy never replaces a finished one, nor one with fewer epochs one with more."""
    half = shards[0] / CELLS[1]
    shutil.copytree(shards[1] / CELLS[1], half)
    (half / "metrics.json").unlink()
    (half / "model.json").unlink()
    (half / "resume.pt").write_bytes(b"x")
    assert not bring_cell(half, shards[1] / CELLS[1]) and bring_cell(shards[1] / CELLS[1], half)
    assert CellFolder(half).status == "done" and not (half / "resume.pt").exists()


def test_a_copy_that_was_killed_is_made_again(shards, tmp_path):
    target = tmp_path / "cell"
    (tmp_path / ".cell.half").mkdir()
    (tmp_path / ".cell.half/junk").touch()
    assert bring_cell(shards[0] / CELLS[0], target) and not (target / "junk").exists()


@pytest.mark.parametrize("mount", ["notebooks/me/charm-s1", "charm-s1", "datasets/me/charm-s1"])
@pytest.mark.parametrize("inside", ["", "small", "runs/small"])
def test_an_earlier_sessions_output_is_copied_first(shards, tmp_path, mount, inside):
    """From both mount forms of Kaggle, read-only, wherever in the output the grid lies; no grid of another name."""
    inputs = tmp_path / "input"
    there = inputs / mount / inside
    shutil.copytree(shards[0], there)
    record = yaml.safe_load((there / "grid.yaml").read_text())
    grid = Grid("small", there, tuple(load_cells(shards[0])), ("k",))
    assert record["name"] == "small"
    for file in (there / CELLS[0]).iterdir():
        file.chmod(0o444)
    (there / CELLS[0]).chmod(0o555)
    said = []
    assert bring_earlier(grid, tmp_path / "out", inputs=inputs, say=said.append) == 1
    assert CellFolder(tmp_path / "out" / CELLS[0]).done and os.access(tmp_path / "out" / CELLS[0] / "log.txt", os.W_OK)
    assert "1 cells of an earlier session copied from" in said[0]
    assert bring_earlier(grid, tmp_path / "out", inputs=inputs, say=said.append) == 0
    assert bring_earlier(Grid("other", there, grid.cells, ()), tmp_path / "other", inputs=inputs) == 0
    (there / CELLS[0]).chmod(0o755)


def load_cells(folder):
    return [type("Cell", (), {"id": c["id"]}) for c in yaml.safe_load((folder / "grid.yaml").read_text())["cells"]]


def test_a_half_done_cell_of_a_read_only_output_goes_on(done, shards, tmp_path):
    """By --continue-from: a trained, unscored cell is only scored, and the output it came from stays as it is."""
    path, whole, _ = done
    cell = shards[0] / CELLS[0]
    known = json.loads((cell / "metrics.json").read_text())
    (cell / "metrics.json").unlink()
    (cell / "cell.json").write_text(json.dumps({"id": CELLS[0], "hash": known["hash"], "spent": 0.0}))
    before = {p: p.stat().st_mtime_ns for p in shards[0].rglob("*")}
    result = run(path, tmp_path / "out", "-p", "k=1", "--continue-from", str(shards[0]))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 cells of an earlier session copied" in result.stdout and "trained already" in \
        (tmp_path / "out" / CELLS[0] / "log.txt").read_text()
    same_results(tmp_path / "out" / CELLS[0], whole / CELLS[0])
    assert before == {p: p.stat().st_mtime_ns for p in shards[0].rglob("*")}
    wrong = run(path, tmp_path / "out", "--continue-from", str(tmp_path))
    assert wrong.returncode == 2 and "holds no grid to continue from" in wrong.stderr


def test_what_a_killed_end_left_in_a_finished_cell_is_dropped(shards):
    """Killed between metrics.json and the removal of the resume file: 36 of those would fill Kaggle's 20 GB."""
    cell = shards[0] / CELLS[0]
    for name in ("resume.pt", "scored.json", "cell.json", ".alive", ".resume.pt.0123.tmp"):
        (cell / name).write_text("{}")
    kept = {p.name for p in cell.iterdir()}
    CellFolder(cell).tidy()
    assert kept - {p.name for p in cell.iterdir()} == {"resume.pt", "scored.json", "cell.json", ".alive", ".resume.pt.0123.tmp"}


def test_the_space_is_what_the_files_really_take(done):
    """The computed checkpoint is the file's size but for its header; Kaggle's 36 cells of CHARM fit 20 GB."""
    path, out, _ = done
    cells = load_grid(path).cells
    model, _ = computed_sizes([c.params for c in cells])
    real = (out / CELLS[0] / "model.safetensors").stat().st_size
    assert abs(real - model) < 0.02 * real
    from charmlib.params import resolve

    model, resume = computed_sizes([resolve(NIH_PLAN)])
    assert 36 * (model + 12e6) + 2 * 2 * resume < 20e9


def test_kaggles_limit_counts_what_is_there(tmp_path):
    working = tmp_path / "working"
    (working / "runs").mkdir(parents=True)
    (working / "runs/big").write_bytes(b"0" * 5000)
    assert free_bytes(working / "runs/grid", working=working, limit=12000) == 7000
    assert free_bytes(tmp_path, working=working, limit=12000) == shutil.disk_usage(tmp_path).free


def test_a_grid_that_will_not_fit_is_told_so_beforehand(done, tmp_path, monkeypatch):
    from charmlib.grid import budget

    path, _, _ = done
    cells, said = load_grid(path).cells, []
    one = sum(computed_sizes([c.params for c in cells]))
    monkeypatch.setattr(budget, "free_bytes", lambda folder: 2.5 * one + 12e6)
    refuse_without_space(cells, tmp_path, 1, say=said.append)
    assert said and said[0].startswith("WARNING: 2 cells need about") and "--shard" in said[0]
    monkeypatch.setattr(budget, "free_bytes", lambda folder: 0.9 * one)
    with pytest.raises(GridError, match="not even one fits"):
        refuse_without_space(cells, tmp_path, 1)


def test_the_epochs_that_cells_share_need_room(tmp_path, monkeypatch):
    """Two momenta of one training of 3 + 2 epochs: the network and two means of it after each."""
    from charmlib.grid import budget
    from charmlib.grid.spec import Cell
    from charmlib.params import resolve

    short = {"stage1_frozen_epochs": 1, "stage1_epochs": 2, "stage2_epochs": 2, "patience": 0}
    cells, said = [Cell(f"m{m}", resolve({**short, "momentum": m}), {"momentum": m}) for m in (0.9, 0.99)], []
    model, resume = computed_sizes([cell.params for cell in cells])
    monkeypatch.setattr(budget, "free_bytes", lambda folder: 12e6 + model + 2 * resume + 15 * model - 1e3)
    with pytest.raises(GridError, match="not even one fits"):
        refuse_without_space(cells, tmp_path, 1)
    monkeypatch.setattr(budget, "free_bytes", lambda folder: 2 * (12e6 + model) + 2 * resume + 15 * model + 1e3)
    refuse_without_space(cells, tmp_path, 1, say=said.append)
    assert not said[0].startswith("WARNING")


@pytest.mark.parametrize("text", ["3/2", "0/2", "2", "a/b", "1/2/3"])
def test_a_wrong_shard_is_refused(text):
    with pytest.raises(ParameterError, match=r"--shard .*wanted I/N such as 2/3"):
        parse_shard(text)


def test_shards_together_are_all_cells(done):
    path, _, _ = done
    grid = load_grid(path, ["k=[1,2,3]", "threshold=[0.1,0.2,0.3]"])
    ids = [c.id for i in (1, 2, 3, 4) for c in grid.shard(i, 4).cells]
    assert sorted(ids) == sorted(c.id for c in grid.cells) and len(ids) == 9


def test_merge_on_the_command_line(shards, tmp_path):
    import sys

    words = [sys.executable, "-m", "charmlib", "grid", "merge", str(tmp_path / "all"), *map(str, shards)]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0 and "1 cells from" in result.stdout and CELLS[1] in result.stdout, result.stderr
