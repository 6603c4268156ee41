"""What a leaderboard says of its cells, on finished runs."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from charmlib.evaluation.compare import MEAN, compare
from charmlib.evaluation.intervals import interval, mean_of_defined
from charmlib.evaluation.intervals import over_seeds as over_the_seeds
from charmlib.evaluation.leaks import LeakError
from charmlib.evaluation.runs import RunFolder
from charmlib.grid import leaderboard, run_grid
from charmlib.grid.board import KEPT, _acting, _values_that_act, over_seeds
from charmlib.grid.cells import GridError
from charmlib.grid.controls import run_controls
from charmlib.grid.report import board_notes, board_text, shown_board, write_report
from charmlib.params import ParameterError, resolve
from tests.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


def as_grid(folder, axes=()):
    """Write the grid.yaml of finished cells."""
    cells = sorted(p.parent.name for p in folder.glob("*/metrics.json"))
    (folder / "grid.yaml").write_text(yaml.safe_dump({"name": "g", "axes": list(axes),
                                                      "cells": [{"id": c, "params": {}} for c in cells]}))
    return folder


def test_cells_that_cannot_be_told_from_the_first_are_marked(make_run):
    runs = {"best": make_run("g/best", skill=2.0), "near": make_run("g/near", skill=1.95, seed=1),
            "far": make_run("g/far", skill=0.0, seed=2)}
    folder = as_grid(runs["best"].parent)
    board = leaderboard(folder).set_index("cell")
    first = board.index[board["rank"] == 1][0]
    for cell in set(runs) - {first}:
        want = compare(RunFolder(runs[first]).test, RunFolder(runs[cell]).test).set_index(["figure", "class"])
        want = want.loc[("AUC", MEAN)]
        row = board.loc[cell]
        assert (row["diff_first"], row["diff_low"], row["diff_high"]) == pytest.approx(
            (want["difference"], want["low"], want["high"]), abs=1e-12)
        if want["low"] <= 0 <= want["high"]:  # also without a correction for two cells
            assert row["same_as_first"] is True
    assert board.loc["far", "same_as_first"] is False and board["same_as_first"].map(lambda v: v is True).any()
    shown = shown_board(board.reset_index())
    assert not shown["cell"].str.fullmatch("far =").any() and shown["cell"].str.endswith(" =").sum() == 1
    page = write_report(folder, board.reset_index()).read_text()
    assert "corrected for the number of cells" in page and "with a finding" in page


def test_cells_are_ranked_by_validation_where_the_test_part_ranks_them_the_other_way(make_run):
    for cell, skill, valid in (("chosen", 0.5, 0.9), ("other", 2.0, 0.6)):
        path = make_run(f"g/{cell}", skill=skill) / "metrics.json"
        metrics = json.loads(path.read_text())
        metrics["valid"]["mean_auc"] = valid
        path.write_text(json.dumps(metrics))
    board = leaderboard(as_grid(path.parents[1]))
    assert board["cell"].tolist() == ["chosen", "other"] and board["rank"].tolist() == [1, 2]
    assert board["test_mean_auc"][0] < board["test_mean_auc"][1] and board["diff_first"][1] > 0


def test_seeds_are_summed_up(make_run):
    for k in (1, 2):
        for seed in (0, 1, 2):
            make_run(f"g/k{k}_seed={seed}", answer="features", seed=seed, k=k, skill=2.0 if k == 2 else 0.5)
    folder = as_grid(make_run("g/k2_seed=3", answer="features", seed=3, k=2, skill=2.0).parent, ("k", "seed"))
    board = leaderboard(folder)
    table = over_seeds(board)
    assert table["configuration"].tolist() == ["k2", "k1"]
    assert table["k"].tolist() == [2, 1] and table["seeds"].tolist() == [4, 3]
    two = board[board["k"] == 2]["test_mean_auc"]
    assert table.loc[0, "test_mean"] == pytest.approx(two.mean()) and table.loc[0, "test_sd"] == pytest.approx(two.std())
    assert over_seeds(board.drop(columns="seed")) is None
    assert "Over seeds" in write_report(folder, board).read_text() and (folder / "seeds.csv").is_file()


def three_configurations(make_run):
    """Plain, CHARM and published cells of three seeds each, of which a grid file names the seed alone."""
    systems = {"plain": {"use_momentum": False, "use_attention": False, "use_bank": False, "skill": 0.4},
               "charm": {"skill": 2.0}, "published": {"answer": "features", "skill": 1.9}}
    for name, settings in systems.items():
        for seed in (0, 1, 2):
            run = make_run(f"g/{name}_seed={seed}", seed=seed, **settings)
    return as_grid(run.parent, ("seed",))


def test_a_cell_of_another_head_is_not_taken_for_the_plain_network(make_run):
    off = {"use_momentum": False, "use_attention": False, "use_bank": False}
    make_run("h/csra", **off, head="csra", skill=2.0)
    folder = as_grid(make_run("h/plain", **off, skill=0.5).parent, ("head",))
    lead = write_report(folder, leaderboard(folder)).read_text().split("class='lead'>")[1].split("</p>")[0]
    assert "Ranked first: csra" in lead and "Less the plain network (plain): +" in lead


def test_configurations_that_the_grids_axes_do_not_name_are_kept_apart(make_run):
    """Nine cells of three systems once made one line, because seed was the only axis."""
    folder = three_configurations(make_run)
    board = leaderboard(folder)
    table = over_seeds(board).set_index("configuration")
    assert set(table.index) == {"plain", "charm", "published"} and table["seeds"].tolist() == [3, 3, 3]
    first = table.index[0]
    assert pd.isna(table.loc[first, "seeds_diff"]) and table.loc["plain", "survives"] is True
    rows = board.set_index("cell")
    by_seed = [rows.loc[f"plain_seed={s}", "test_mean_auc"] - rows.loc[f"{first}_seed={s}", "test_mean_auc"] for s in range(3)]
    assert table.loc["plain", "seeds_diff"] == pytest.approx(np.mean(by_seed))
    # the slow twin: the protocol's resamples, which no class is rare enough to widen here or which widening only lengthens
    runs = [[RunFolder(folder / f"{name}_seed={s}") for s in range(3)] for name in ("plain", first)]
    drawn = [np.stack([mean_of_defined(run.resamples.auc[:, run.test.findings]) for run in side]) for side in runs]
    low, high, _ = interval(over_the_seeds(drawn[0] - drawn[1]))
    assert table.loc["plain", "seeds_low"] <= low + 1e-12 and table.loc["plain", "seeds_high"] >= high - 1e-12 and high < 0
    page = write_report(folder, board).read_text()
    lead = page.split("class='lead'>")[1].split("</p>")[0]
    assert f"Over 3 seeds, {first} is first" in lead and "Less the plain network (plain): +" in lead and "can be told" in lead


def test_a_difference_of_changing_sign_does_not_survive(make_run):
    for seed, (one, two) in enumerate([(3.0, 0.3), (3.0, 0.3), (0.3, 3.0)]):
        make_run(f"g/a_seed={seed}", seed=seed, skill=one, answer="features", k=1)
        run = make_run(f"g/b_seed={seed}", seed=seed + 10, skill=two, answer="features", k=2)
        metrics = json.loads((run / "metrics.json").read_text())
        metrics["params"]["seed"] = seed
        (run / "metrics.json").write_text(json.dumps(metrics))
    board = leaderboard(as_grid(run.parent, ("k", "seed")))
    assert over_seeds(board)["survives"].dropna().tolist() == [False]


def test_a_board_is_made_from_what_changed_and_is_the_same(make_run, monkeypatch):
    folder = three_configurations(make_run)
    whole, read = leaderboard(folder), []
    test = RunFolder._predictions
    monkeypatch.setattr(RunFolder, "_predictions", lambda run, part: read.append(run.name) or test(run, part))
    pd.testing.assert_frame_equal(leaderboard(folder), whole)
    assert not read
    path = folder / "plain_seed=1/metrics.json"
    path.write_text(path.read_text().replace('"cell"', ' "cell"'))
    pd.testing.assert_frame_equal(leaderboard(folder), whole)
    assert "plain_seed=1" in read and "published_seed=1" not in read
    (folder / "plain_seed=0/predictions.npz").write_bytes(b"")
    assert leaderboard(folder).set_index("cell").loc["plain_seed=0", "status"] == "damaged"
    for content in ("", "[]", '{"code": 1, "found": {}}'):
        (folder / KEPT).write_text(content)
        assert len(leaderboard(folder)) == len(whole)


def test_a_report_is_written_when_something_changed(make_run):
    folder = as_grid(make_run("g/one", skill=2.0).parent)
    page = write_report(folder, leaderboard(folder))
    before = page.stat().st_mtime_ns
    assert write_report(folder, leaderboard(folder)).stat().st_mtime_ns == before
    make_run("g/two", seed=1)
    assert write_report(folder, leaderboard(as_grid(folder))).stat().st_mtime_ns > before
    (folder / "roc.png").unlink()
    write_report(folder, leaderboard(folder))
    assert (folder / "roc.png").is_file()


def test_controls_quick_checks_and_other_splits_are_no_contestants(make_run):
    make_run("g/real")
    make_run("g/shuffled", labels="shuffled", skill=9.0)
    make_run("g/quick", limit=40, skill=9.0)
    board = leaderboard(as_grid(make_run("g/wide", valid_fraction=0.3).parent)).set_index("cell")
    assert board["status"].to_dict() == {"real": "done", "shuffled": "control", "quick": "quick check", "wide": "done"}
    assert board["rank"].dropna().to_dict() == {"real": 1, "wide": 1} and board["same_as_first"].isna().all()


@pytest.mark.parametrize("skill", [0.2, 3.0], ids=["worse", "better"])
def test_a_cell_without_validation_is_listed_apart_and_never_ranked(make_run, skill):
    for seed in (0, 1):
        make_run(f"g/best_seed={seed}", answer="features", skill=2.0, seed=seed)
        make_run(f"g/near_seed={seed}", answer="features", skill=1.0, seed=seed, k=1)
    folder = as_grid(make_run("g/apart", skill=skill, valid_fraction=0, patience=0, seed=7).parent, ("k", "seed"))
    board = leaderboard(folder)
    assert board["cell"].iloc[-1] == "apart" and board["rank"].tolist()[:4] == [1, 2, 3, 4]
    row = board.iloc[-1]
    assert row["status"] == "no validation" and pd.isna(row["rank"]) and np.isnan(row["valid_mean_auc"])
    assert row["ci_low"] < row["test_mean_auc"] < row["ci_high"] and row[["diff_first", "same_as_first"]].isna().all()
    assert (row["test_mean_auc"] > board["test_mean_auc"][:4].max()) == (skill > 2)
    pd.testing.assert_frame_equal(board[:4], leaderboard(as_grid_without(folder, "apart"))[:4], check_dtype=False)
    assert over_seeds(board)["seeds"].sum() == 4  # of the four ranked cells
    notes = board_notes(board)
    assert notes[-1].startswith("no validation: apart trained on the validation patients") and notes[-1].endswith("so no rank")
    shown = shown_board(board).iloc[-1]
    assert shown["rank"] == "" and shown["valid AUC"] == "" and shown["status"] == "no validation"
    page = write_report(folder, board).read_text()
    assert "Classes of best" in page and "Classes of apart" not in page
    ranking, apart = page.split("Without a validation part")
    assert "<td>apart" not in ranking and "<td>apart</td>" in apart and "no validation: apart" in apart
    said = board_text(board)
    assert said.index("best_seed=0") < said.index("no validation: apart") < said.rindex("apart") and "NaN" not in said


def as_grid_without(folder, cell):
    """The same grid in another folder, without a cell."""
    other = folder.parent / "without"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns(cell), dirs_exist_ok=True)
    return as_grid(other, ("k", "seed"))


def test_a_board_of_nothing_but_cells_without_validation_has_no_first(make_run):
    make_run("g/one", valid_fraction=0, patience=0)
    folder = as_grid(make_run("g/two", valid_fraction=0, patience=0, seed=1).parent)
    board = leaderboard(folder)
    assert board["rank"].isna().all() and board["same_as_first"].isna().all() and over_seeds(board) is None
    page = write_report(folder, board).read_text()
    assert "No cell is ranked." in page and "Classes of one" in page and "ranked first" not in page
    assert page.count("class='scroll board'") == 1 and "class='scroll first board'" not in page
    assert "one, two trained on the validation patients" in board_text(board)


def test_an_unfinished_cell_of_another_call_is_listed_without_its_values(make_run):
    """It has no parameters yet; with an axis that no part of the network switches, the board could not be made."""
    folder = as_grid(make_run("g/one").parent, ("seed", "k"))
    (folder / "other").mkdir()
    (folder / "other/cell.json").write_text("{}")
    row = leaderboard(folder).set_index("cell").loc["other"]
    assert row["status"] == "pending" and row[["seed", "k"]].isna().all()


def test_quick_checks_and_controls_without_validation_stay_what_they_are(make_run):
    make_run("g/quick", limit=40, valid_fraction=0, patience=0)
    board = leaderboard(as_grid(make_run("g/shuffled", labels="shuffled", valid_fraction=0, patience=0).parent))
    assert dict(zip(board["cell"], board["status"])) == {"quick": "quick check", "shuffled": "control"}
    assert board["rank"].isna().all()


def test_a_board_never_mixes_runs_that_saw_one_anothers_test_images(make_run):
    make_run("g/official")
    folder = as_grid(make_run("g/patient", split="patient").parent)
    with pytest.raises(LeakError, match="cannot stand in one table"):
        leaderboard(folder)


def test_a_grid_over_leaking_splits_is_refused_before_training(phantoms, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**TINY, "data_root": str(phantoms)}))
    (tmp_path / "grid_x.yaml").write_text("base: base.yaml\naxes: {split: [official, patient]}\n")
    with pytest.raises(GridError, match="test images of split .* Make|Make a grid|such as .*make|leaderboard"):
        run_grid(tmp_path / "grid_x.yaml", out=tmp_path / "out", say=lambda line: None)
    assert not list((tmp_path / "out").glob("*/*"))


@pytest.mark.slow
def test_controls_in_one_call(phantoms, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({
        **TINY, "data_root": str(phantoms), "stage1_frozen_epochs": 0, "stage1_epochs": 1, "stage2_epochs": 1}))
    table, held, remarks = run_controls(tmp_path / "mine.yaml", out=tmp_path / "out", say=lambda line: None)
    assert "contains 0.5" in remarks[0] and "network minus plain" in remarks[1]
    table = table.set_index("control")
    assert list(table.index) == ["network", "plain network", "shuffled labels (must be 0.5)", "view position alone"]
    row = table.loc["shuffled labels (must be 0.5)"]
    assert held and row["test AUC low"] < 0.5 < row["test AUC high"] and table["images"].nunique() == 1
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out/controls.csv").set_index("control"), table, check_dtype=False)
    said = []
    run_controls(tmp_path / "mine.yaml", out=tmp_path / "out", say=said.append)
    assert any("3 done, 0 to run" in line for line in said)
    of_run, held, _ = run_controls(tmp_path / "out/plain", out=tmp_path / "of_run", say=said.append)  # trains one cell only
    assert held and len(of_run) == 3 and of_run["test AUC"][0] == table.loc["plain network", "test AUC"]
    assert {p.parent.name for p in (tmp_path / "of_run").glob("*/metrics.json")} == {"shuffled"}
    with pytest.raises(ParameterError, match="-p changes k"):
        run_controls(tmp_path / "out/plain", ["k=1"], out=tmp_path / "x")
    with pytest.raises(ParameterError, match="make the shuffled run themselves"):
        run_controls(tmp_path / "mine.yaml", ["labels=shuffled"], out=tmp_path / "x")


def test_shuffled_labels_keep_everything_but_the_match(phantoms):
    from charmlib.data.dataset import open_dataset

    real, shuffled = (open_dataset(data_root=str(phantoms), image_size=32, labels=which) for which in ("real", "shuffled"))
    assert real.split.hash == shuffled.split.hash and not np.array_equal(real.labels, shuffled.labels)
    for part in ("train", "valid", "test"):
        rows = real.rows(part)
        assert sorted(map(tuple, real.labels[rows])) == sorted(map(tuple, shuffled.labels[rows]))
        assert len(real.rows(part, findings_only=True)) == len(shuffled.rows(part, findings_only=True))
    again = open_dataset(data_root=str(phantoms), image_size=32, labels="shuffled")
    assert np.array_equal(again.labels, shuffled.labels)


def test_an_axis_acts_by_the_images_of_each_cell_not_by_those_of_the_first():
    """In few steps both momenta amount to the same, in many they differ."""
    params = {cell: resolve({"momentum_form": "branch", "momentum": value}) for cell, value in (("a", 0.999), ("b", 0.9999))}
    few, many = {"all": 640, "findings": 640}, {"all": 10**7, "findings": 10**7}

    def values(images):
        return _values_that_act(params, ["momentum"], {cell: _acting(params[cell], images[cell]) for cell in params})

    assert None in [row["momentum"] for row in values({"a": few, "b": few}).values()]
    own = values({"a": few, "b": many})
    assert own == {"a": {"momentum": 0.999}, "b": {"momentum": 0.9999}}
