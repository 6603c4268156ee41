"""The time budget: what starts, what ends in time, what is said of the rest."""

import json
import re
import shutil
import time

import pytest
import yaml

from charmlib.evaluation.runs import RunFolder
from charmlib.grid.budget import Budget, hours, next_step, paces, remaining, seconds_of
from charmlib.grid.spec import load_grid
from charmlib.params import ParameterError
from charmlib.training.callbacks import HISTORY
from tests.grid.conftest import CELLS, epochs_done, run, small_grid


@pytest.mark.parametrize("text, seconds", [("11h", 39600), ("1h30m", 5400), ("90m", 5400), ("45s", 45), ("2.5h", 9000),
                                           (30, 30), (30.5, 30.5), ("1d", 86400)])
def test_times_as_people_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["eleven", "", "-1h", "0", "11", "h", "1x", "nan", "inf", -1, float("nan")])
def test_what_is_no_time_is_refused_by_name(text):
    with pytest.raises(ParameterError, match=r"--budget .* is not a time; say 11h"):
        seconds_of(text)


def test_hours_for_reading():
    assert [hours(s) for s in (20, 600, 40000)] == ["20 s", "10 min", "11.1 h"]


def test_the_report_is_inside_the_budget():
    budget = Budget(100.0)
    assert budget.deadline <= budget.end - 5
    budget.saw_report(4.0)
    assert budget.deadline == pytest.approx(budget.end - 12)
    assert Budget().deadline is None and Budget().left() == float("inf")
    assert Budget(39600.0).left() > 39000


@pytest.mark.slow
def test_training_ends_in_time_at_an_epochs_end(done, tmp_path):
    """A real cell of many epochs; in time, exit 0, the report is there, what is left is said."""
    path, _, _ = done
    out = tmp_path / "out"
    long = ("-p", "k=[1]", "-p", "stage1_epochs=300", "-p", "patience=0")
    begin = time.monotonic()
    first = run(path, out, *long, "--budget", "40s")
    took = time.monotonic() - begin
    cell = out / CELLS[0]
    assert first.returncode == 0, first.stdout + first.stderr
    assert took < 40 + 6  # the interpreter's own start is before the clock
    assert not (cell / "metrics.json").exists() and not (cell / "error.txt").exists() and epochs_done(cell) >= 1
    assert "stopped before the next epoch, which takes about" in first.stdout
    assert re.search(r"the budget of 40 s .*: 0 of 1 cells are over, 1 left to run \(at most 0\.\d\d GPU h", first.stdout)
    assert (out / "leaderboard.csv").is_file()
    kept = epochs_done(cell)
    dry = run(path, out, *long, "--dry-run")
    assert dry.returncode == 0 and f"{CELLS[0]}: started, at most" in dry.stdout
    assert re.search(r"at most 0\.\d\d GPU hours are left: .*% of Kaggle's 30 session hours a week", dry.stdout)
    assert epochs_done(cell) == kept  # nothing was run


@pytest.mark.slow
def test_only_what_fits_is_started_longest_first(light, tmp_path):
    """Epochs of a second: the first call finishes the short cell, which is first in the file, and times it; the second starts
    the longest of what is left, and stops it in time; the third has no time for an epoch and starts nothing."""
    path = tmp_path / "grid_three.yaml"
    path.write_text(f"base: {light.base}\ncells: [{{name: short, stage1_epochs: 1}}, {{name: middle, stage1_epochs: 3}}, "
                    "{name: long, stage1_epochs: 40}]\n")
    first = light("--budget", "40s", path=path, pace=1.0)
    assert first.returncode == 0, first.stdout + first.stderr
    started = [line.split()[0] for line in first.stdout.splitlines() if "start pid" in line]
    assert started[:2] == ["short", "long"] and (light.out / "short/metrics.json").is_file()
    assert not (light.out / "long/metrics.json").exists() and epochs_done(light.out / "long") >= 1
    assert "1 of 3 cells are over, 2 left to run (at most 0.0" in first.stdout
    third = light("--budget", "6s", path=path, pace=1.0)  # 1 s for cells, less what the command needs itself
    assert third.returncode == 0 and "start pid" not in third.stdout, third.stdout


def test_an_epoch_of_all_images_is_no_measure_of_one_of_the_findings(tmp_path, phantoms):
    grid = load_grid(small_grid(tmp_path, phantoms, stage1_images=["findings", "all"]))
    for cell, seconds in zip(grid.cells, (2.0, 5.0)):
        (tmp_path / "out" / cell.id).mkdir(parents=True)
        (tmp_path / "out" / cell.id / "history.csv").write_text(f"{','.join(HISTORY)}\n1,1,,,,,,{seconds},,\n")
    pace = paces(tmp_path / "out", grid.cells)
    assert [pace[cell.id].epoch("stage1") for cell in grid.cells] == [2.0, 5.0]


def test_estimates_from_what_has_run(done, tmp_path):
    path, out, _ = done
    grid = load_grid(path)
    mine = tmp_path / "out"
    shutil.copytree(out, mine)
    one, two = grid.cells
    pace = paces(mine, grid.cells)[one.id]
    assert set(pace.epochs) == {"stage1", "stage2"} and 0 < pace.epoch("stage1") < 30 and pace.overhead > 3 and pace.scoring > 0
    assert pace.epoch("stage1_frozen") == max(pace.epochs.values())  # never ran: as slow as the slowest
    assert remaining(one, RunFolder(mine / one.id), pace) == 0
    (mine / two.id / "metrics.json").unlink()
    only_scoring = remaining(two, RunFolder(mine / two.id), pace)
    shutil.rmtree(mine / two.id)
    whole = remaining(two, RunFolder(mine / two.id), pace)
    assert whole == pytest.approx(only_scoring + 2 * pace.epochs["stage1"] + 2 * pace.epochs["stage2"])
    nothing = paces(tmp_path / "none", grid.cells)[one.id]
    assert remaining(one, RunFolder(tmp_path / "none"), nothing) == float("inf")
    assert next_step(one, RunFolder(tmp_path / "none"), nothing) == 0


def test_cells_that_share_a_training_are_not_taken_for_trainings(make_run, tmp_path):
    """Of six cells one trains. Its epochs are the pace of the next training, and a second mean of the weights encodes again."""
    from charmlib.grid.runner import _seconds_left
    from charmlib.grid.spec import load_grid
    from tests.conftest import OURS, TINY

    base = {**TINY, **OURS, "stage1_frozen_epochs": 0, "stage1_epochs": 2, "stage2_epochs": 2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "grid_x.yaml").write_text("base: base.yaml\naxes: {seed: [1, 2], momentum: [0.9, 0.99], k: [1, 2, 3]}\n")
    grid = load_grid(tmp_path / "grid_x.yaml")
    for cell in (cells := [cell for cell in grid.cells if cell.params["seed"] == 1]):
        run = make_run(f"out/{cell.id}", **{**base, "seed": 1, "momentum": cell.params["momentum"], "k": cell.params["k"]})
        lead, encodes = cell is cells[0], cell.params["k"] == 1
        seconds = 100.0 if lead else 7.0 if encodes else 0.5
        text = (run / "history.csv").read_text()
        (run / "history.csv").write_text(text.replace(",1.0,,", f",{seconds},,"))
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["seconds"] = {"train": 4 * seconds, "score": 3.0, "overhead": 0.0}
        (run / "metrics.json").write_text(json.dumps(metrics | ({} if lead else {"shares_training_with": cells[0].id})))
    left = _seconds_left(grid, grid, tmp_path / "out")
    assert left == [0] * 6 + [403, 3, 3, 31, 3, 3]
