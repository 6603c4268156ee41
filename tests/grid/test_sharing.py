"""Cells that share a training: which they are, that each ends as it would alone, and that kills and failures lose nothing."""

import json
import signal

import nbformat
import psutil
import pytest

from charmlib.evaluation.runs import finish
from charmlib.grid import run_grid
from charmlib.grid.cells import CellFolder, code_hash, find_notebooks, notebook_code
from charmlib.grid.cluster import Means
from charmlib.grid.runner import _look_at_first
from charmlib.grid.sharing import NOTEBOOKS, shared_jobs, training_of
from charmlib.grid.spec import load_grid
from charmlib.params import PARAMS, resolve
from tests.conftest import OURS, TINY
from tests.grid.conftest import family, same_results, small_grid, start, wait_for

VOTES = {"answer": "votes", "use_momentum": False, "use_attention": False, "vote_weight": 0.5}
CHARM = {**OURS, "answer": "votes", "vote_weight": 0.5, "momentum": 0.5, "bank_size": 24}
AXES = {"use_bank": [True, False], "momentum": [0.5, 0.0]}


def test_the_notebooks_are_those_that_shared_cells_do_without():
    assert code_hash(notebook_code(find_notebooks())) == NOTEBOOKS, "put this hash into charmlib/grid/sharing.py"


def test_trainings_differ_in_what_acts_in_training():
    base = resolve({**TINY, **VOTES})
    same = training_of(base)
    for changes in ({"vote_temperature": 0.2}, {"vote_weight": -1}, {"average": 0.9}, {"tta": "flip"},
                    {"patience": 2}, {"monitor": "valid_auc"}, {"run_dir": "elsewhere"}):
        assert training_of(base | changes) == same, changes
    ours = resolve({**TINY, **CHARM})
    for changes in ({"k": 3}, {"threshold": 0.01}, {"bank_size": 8}, {"momentum": 0.9}, {"use_momentum": False},
                    {"use_bank": False}, {"keys": "features"}):
        assert training_of(ours | changes) == training_of(ours), changes
    for changes in ({"use_attention": False}, {"momentum_form": "branch"}, {"answer": "features"}):
        assert training_of(ours | changes) != training_of(ours), changes
    features = ours | {"answer": "features"}
    for changes in ({"k": 3}, {"threshold": 0.01}, {"bank_size": 8}, {"strategy": "fifo"}):
        assert training_of(features | changes) != training_of(features), changes
    assert training_of(features | {"momentum": 0.9}) == training_of(features)
    branch = ours | {"momentum_form": "branch", "momentum_warmup": False}
    assert training_of(branch | {"momentum": 0.9}) != training_of(branch)
    for changes in ({"seed": 1}, {"stage1_lr": 1e-4}, {"answer": "features"}, {"weight_decay": 0.1}, {"stage2_loss": "asl"}):
        assert training_of(base | changes) != same, changes
    plateau = base | {"schedule": "plateau"}
    assert training_of(plateau | {"vote_temperature": 0.2}) != training_of(plateau)


def test_no_parameter_of_a_learner_or_a_phase_but_the_mean_is_marked_as_scoring():
    assert {name for name, p in PARAMS.items() if p.scores is True} == {
        "vote_weight", "vote_temperature", "average", "average_warmup", "tta", "tta_merge", "patience", "min_delta",
        "save_delta", "monitor"}
    assert {name for name, p in PARAMS.items() if callable(p.scores)} == {
        "use_momentum", "momentum", "momentum_form", "use_bank", "k", "threshold", "bank_size", "answer", "keys"}


def test_a_job_for_each_training(tmp_path):
    def job(name, code=NOTEBOOKS, split="s", **changes):
        (tmp_path / name).mkdir(exist_ok=True)
        return {"id": name, "folder": str(tmp_path / name), "params": resolve({**TINY, **VOTES}, changes), "split": split,
                "code": code, "digests": {}}

    cells = [job("a"), job("b", average=0.9), job("c", seed=3), job("d", vote_temperature=1),
             job("e", vote_temperature=2, split="other")]
    first, *others = shared_jobs(cells)
    assert [one["id"] for one in first["members"]] == ["b", "d"] and others == [cells[2], cells[4]]
    assert first["tape"]["folder"] == str(tmp_path / "a") and first["tape"]["means"] == [[0.0, False], [0.9, False]]
    (tmp_path / "d" / "resume.pt").touch()  # went on alone
    assert [one["id"] for one in shared_jobs(cells)] == ["a", "c", "d", "e"]
    assert shared_jobs([{**one, "code": "a user's"} for one in cells]) == [{**one, "code": "a user's"} for one in cells]
    (tmp_path / "d" / "resume.pt").unlink()
    (tmp_path / "a" / "metrics.json").touch()
    (tmp_path / "a" / "tape_1.pt").touch()
    assert shared_jobs(cells)[0]["id"] == "b" and shared_jobs(cells)[0]["tape"]["folder"] == str(tmp_path / "a")
    for name in "bd":
        (tmp_path / name / "metrics.json").touch()
    assert [one["id"] for one in shared_jobs(cells)] == ["c", "e"] and not (tmp_path / "a" / "tape_1.pt").exists()


@pytest.fixture(scope="module")
def both(phantoms, tmp_path_factory):
    """A grid of shared trainings, and two of its cells alone: its file, the folder of both, the lines it said, its board."""
    folder, said = tmp_path_factory.mktemp("sharing"), []
    path = small_grid(folder, phantoms, base=CHARM, **AXES)
    board = run_grid(path, out=folder / "shared", workers=1, say=said.append)
    for use_bank, momentum in ((True, 0.0), (False, 0.5)):
        run_grid(path, [f"use_bank={use_bank}", f"momentum={momentum}"], out=folder / "alone", workers=1)
    return path, folder, said, board


@pytest.mark.slow
def test_each_cell_ends_as_it_would_alone(both):
    _, folder, said, board = both
    cells = sorted(path for path in (folder / "shared").iterdir() if CellFolder(path).done)
    assert len(cells) == len(board) == 4 and any("1 trainings" in line for line in said)
    assert [line[:5] for line in said if line.startswith("[")] == [f"[{i}/4]" for i in range(1, 5)]
    lead, first = folder / "shared" / "m0.5_use_bank=True", board["cell"][board["rank"] == 1].item()
    assert (first == lead.name) != (f"{first} is ranked first: its test notebook and report" in said)
    for cell in cells:
        metrics = json.loads((cell / "metrics.json").read_text())
        assert metrics.pop("shares_training_with", None) == (None if cell == lead else lead.name)
        assert (cell / "train.ipynb").exists() == (cell == lead)
        assert (cell / "test.ipynb").exists() == (cell / "report.html").exists() == (cell.name in (lead.name, first))
        assert not [*cell.glob("tape_*")] and not [*cell.glob(".running*")] and not (cell / "cell.json").exists()
        if not (alone := folder / "alone" / cell.name).is_dir():
            continue
        (cell / "metrics.json").write_text(json.dumps(metrics))
        same_results(cell, alone)
        assert CellFolder(cell).card["sha256"] == CellFolder(alone).card["sha256"]
        assert CellFolder(cell).card["thresholds"] == CellFolder(alone).card["thresholds"]


@pytest.mark.slow
def test_a_killed_training_goes_on(both, tmp_path):
    """Killed in the training, and again when one cell is finished."""
    path, folder, *_ = both
    out = tmp_path / "out"
    for moment in ("*/tape_*.pt", "*/metrics.json"):
        runner = start(path, out, "--workers", "1")
        wait_for(lambda pattern=moment: [*out.glob(pattern)], runner=runner)
        victims = [runner, *family(runner, "python")]
        for process in victims:
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        psutil.wait_procs(victims, timeout=10)
    again = start(path, out, "--workers", "1")
    assert again.wait(180) == 0, out.with_suffix(".log").read_text()
    for alone in (folder / "alone").iterdir():
        if CellFolder(alone).done:
            assert CellFolder(out / alone.name).card["sha256"] == CellFolder(alone).card["sha256"]
    assert not [*out.glob("*/tape_*")]


@pytest.mark.slow
@pytest.mark.once
def test_two_shards_at_once_end_as_their_cells_alone(both, tmp_path):
    """Two trainings of two cells in one folder, one a shard, by two runners with two workers each."""
    path, folder, *_ = both
    out, asked = tmp_path / "out", ("-p", "use_bank=[True]", "-p", f"seed=[{PARAMS['seed'].default},1]", "--workers", "2")
    halves = [start(path, out, *asked, "--shard", f"{i}/2", log=tmp_path / f"{i}.log") for i in (1, 2)]
    assert [half.wait(180) for half in halves] == [0, 0]
    cells = [CellFolder(cell) for cell in out.iterdir() if cell.is_dir()]
    assert len(cells) == 4 and all(cell.done for cell in cells) and not [*out.glob("*/tape_*")]
    assert all("1 trainings" in (tmp_path / f"{i}.log").read_text() for i in (1, 2))
    first = {cell.metrics.get("shares_training_with", cell.name) for cell in cells}
    assert len(first) == 2 and len({CellFolder(out / name).metrics["params"]["seed"] for name in first}) == 2
    alone = CellFolder(folder / "alone" / "m0.0_use_bank=True")
    ours = next(cell for cell in cells if cell.metrics["params"]["momentum"] == 0
                and cell.metrics["params"]["seed"] == PARAMS["seed"].default)
    assert ours.card["sha256"] == alone.card["sha256"]
    assert (ours.path / "predictions.npz").read_bytes() == (alone.path / "predictions.npz").read_bytes()


@pytest.mark.slow
def test_a_cell_that_fails_keeps_its_error_and_the_others_go_on(both, phantoms, tmp_path):
    path, *_ = both
    out = tmp_path / "out"
    second = out / "m0.0_use_bank=True"
    second.mkdir(parents=True)
    (second / "history.csv").mkdir()  # cannot be written
    said = []
    run_grid(path, out=out, workers=1, say=said.append)
    assert [line.split()[1] for line in said if "FAILED" in line] == [second.name]
    assert "history.csv" in second.joinpath("error.txt").read_text()
    assert sum(CellFolder(cell).done for cell in out.iterdir() if cell.is_dir()) == 3
    (second / "history.csv").rmdir()
    run_grid(path, out=out, workers=1)
    assert CellFolder(second).done and not [*out.glob("*/tape_*")]


@pytest.mark.slow
@pytest.mark.once
def test_the_cell_ranked_first_has_a_test_notebook_and_nothing_else_changes(both):
    path, folder, _, board = both
    cell, said = CellFolder(folder / "shared" / "m0.0_use_bank=False"), []
    before, predictions = cell.metrics, (cell.path / "predictions.npz").read_bytes()
    ranked = board.assign(rank=board["cell"].eq(cell.name).map({True: 1, False: 2}))
    asked = ranked, load_grid(path), folder / "shared", find_notebooks(), Means(), said.append
    assert _look_at_first(*asked) and said == [f"{cell.name} is ranked first: its test notebook and report"]
    book = nbformat.read(cell.path / "test.ipynb", as_version=4)
    assert book.cells[-1].execution_count and not any(c.metadata.get("tags") == ["between"] for c in book.cells)
    assert "AUC" in (cell.path / "report.html").read_text()
    after = CellFolder(cell.path).metrics
    for name in ("seconds", "peak_memory_mb"):
        assert after.pop(name) != before.pop(name)
    assert after == before and before["shares_training_with"] and predictions == (cell.path / "predictions.npz").read_bytes()
    assert not [*cell.path.glob(".*")] and not cell.scored_file.exists() and not _look_at_first(*asked)


def test_a_finished_cell_that_is_scored_again_by_hand_stays_one(both):
    _, folder, *_ = both
    cell = next(path for path in (folder / "shared").iterdir() if CellFolder(path).done)
    before = CellFolder(cell).metrics
    kept = {name: before.pop(name) for name in ("cell", "hash", "code")}
    CellFolder(cell).scored_file.write_text(json.dumps(before))
    finish(cell)
    assert kept.items() <= CellFolder(cell).metrics.items()
