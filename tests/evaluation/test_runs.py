"""Comparisons, ensembles, leaks, tables and the walk along a curve, on finished runs."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from charmlib.evaluation.combine import mean_ensemble
from charmlib.evaluation.compare import MEAN, aligned, compare, verdict
from charmlib.evaluation.groups import column_scores
from charmlib.evaluation.intervals import bootstrap
from charmlib.evaluation.leaks import LeakError, refuse_leaks, split_of
from charmlib.evaluation.operating import choose_thresholds
from charmlib.evaluation.runs import Predictions, RunFolder, chosen_on_validation, run_folders
from charmlib.evaluation.score import evaluate_ensemble, evaluate_run, thresholds_at
from charmlib.evaluation.tables import class_table, operating_table, point_note, run_table, split_note, with_intervals
from charmlib.files import write_json
from charmlib.viz.walk import Walk

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


def predictions(cohort, names="abc"):
    labels, scores, patients = cohort
    return Predictions(np.array([f"i{i:03}" for i in range(len(labels))]), patients, labels, scores, tuple(names))


def test_a_paired_difference_is_sharper_than_two_intervals(cohort):
    first = predictions(cohort)
    noise = np.random.default_rng(3).normal(0, 0.25, first.logits.shape)
    second = Predictions(first.ids, first.patients, first.labels, first.logits + noise, first.classes)
    table = compare(first, second, resamples=200).set_index(["figure", "class"])
    a, b = (bootstrap(p.labels, p.logits, p.patients, resamples=200).auc[:, 0] for p in (first, second))
    row = table.loc["AUC", "a"]
    assert row["difference"] == pytest.approx(roc_auc_score(first.labels[:, 0], second.logits[:, 0])
                                              - roc_auc_score(first.labels[:, 0], first.logits[:, 0]))
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(b - a, [0.025, 0.975])), abs=1e-12)
    assert row["agree"] == np.mean(np.sign(b - a) == np.sign(row["difference"]))
    assert row["high"] - row["low"] < 0.6 * (np.quantile(a, 0.975) - np.quantile(a, 0.025))
    assert table.loc["AP", MEAN]["positives"] == first.labels.sum()
    both = [{"a": 0.5, "b": 0.6, "c": None}, {"a": 0.55, "b": 0.6, "c": 0.5}]
    calls = compare(first, second, thresholds=both, resamples=60).set_index(["figure", "class"])
    for i, name in enumerate("ab"):
        y, there = first.labels[:, i] == 1, [expit(p.logits[:, i]) >= t[name] for p, t in zip((first, second), both)]
        assert calls.loc[("sensitivity", name), "difference"] == pytest.approx(there[1][y].mean() - there[0][y].mean())
        assert calls.loc[("specificity", name), "difference"] == pytest.approx(there[0][~y].mean() - there[1][~y].mean())
    assert np.isnan(calls.loc[("F1", "c"), "difference"]) and calls.loc[("F1", "c"), "undefined"] == 1
    assert calls.loc[("sensitivity", "a"), "low"] <= calls.loc[("sensitivity", "a"), "high"]
    same = compare(first, first, resamples=20)
    assert (same["difference"] == 0).all() and "cannot be told apart" in verdict(same, "x", "y")
    worse = Predictions(first.ids, first.patients, first.labels, -first.logits, first.classes)
    assert "differ; x is better" in verdict(compare(first, worse, resamples=50), "x", "y")


def test_images_are_matched_by_name_not_by_place(cohort):
    first = predictions(cohort)
    order = np.random.default_rng(1).permutation(400)
    moved = Predictions(first.ids[order], first.patients[order], first.labels[order], first.logits[order], first.classes)
    assert (compare(first, moved, resamples=10)["difference"] == 0).all()
    assert np.array_equal(aligned(first, moved)[1].logits, first.logits)


def test_what_cannot_be_paired_is_refused(cohort):
    first = predictions(cohort)
    with pytest.raises(ValueError, match="other classes or another order"):
        compare(first, predictions(cohort, "acb"))
    fewer = Predictions(first.ids[1:], first.patients[1:], first.labels[1:], first.logits[1:], first.classes)
    with pytest.raises(ValueError, match="other images \\(400 and 399, 399 in both\\)"):
        compare(first, fewer)
    flipped = first.labels.copy()
    flipped[7, 1] = 1 - flipped[7, 1]
    with pytest.raises(ValueError, match="other labels for 1 of the same images \\(first of class b"):
        compare(first, Predictions(first.ids, first.patients, flipped, first.logits, first.classes))


def test_an_ensemble_is_the_mean_probability(cohort):
    first = predictions(cohort)
    second = Predictions(first.ids, first.patients, first.labels, first.logits[::-1].copy(), first.classes)
    mean = mean_ensemble([first, second])
    np.testing.assert_allclose(expit(mean.logits), (expit(first.logits) + expit(second.logits)) / 2)
    extreme = Predictions(first.ids, first.patients, first.labels, first.logits * 1000, first.classes)
    assert np.isfinite(mean_ensemble([extreme, extreme]).logits).all()
    with pytest.raises(ValueError, match="at least two"):
        mean_ensemble([first])


def test_a_run_that_saw_anothers_test_images_is_refused_by_name(make_run):
    official, other = make_run("g/official"), make_run("g/other", seed=1)
    patient = make_run("h/patient", split="patient")
    refuse_leaks([official, other])
    with pytest.raises(LeakError, match="test images of .*official were in the training or validation part of .*patient"):
        refuse_leaks([official, other, patient])
    with pytest.raises(LeakError):
        evaluate_ensemble([official, patient])
    (patient / "split.csv").unlink()
    with pytest.raises(LeakError, match="no split.csv.*cannot be checked"):
        refuse_leaks([official, patient])
    real = make_run("r/real", real=True)
    with pytest.raises(LeakError, match="drawn phantoms.*cannot stand in one table"):
        refuse_leaks([official, real])


def test_a_split_is_found_in_the_grids_folder_and_only_if_it_is_the_runs(make_run):
    run = make_run("g/cell")
    frame = split_of(run)
    (run / "split.csv").rename(run.parent / "split.csv")
    pd.testing.assert_frame_equal(split_of(run), frame)
    another = make_run("h/cell", split="patient")
    (another / "split.csv").replace(run.parent / "split.csv")  # a later call of the grid with another split
    assert split_of(run) is None


def test_splits_of_the_same_test_part_may_meet(make_run):
    """Another share of validation patients is another split hash and the same test part."""
    refuse_leaks([make_run("g/a"), make_run("g/b", valid_fraction=0.3)])


def test_a_run_without_validation_is_compared_and_averaged_and_chooses_nothing(make_run):
    run, other = make_run("g/apart", valid_fraction=0, patience=0), make_run("g/usual", seed=1)
    refuse_leaks([run, other])
    table = compare(RunFolder(run).test, RunFolder(other).test, resamples=20)
    assert table[table["figure"] == "AUC"]["difference"].notna().any()
    metrics, _ = evaluate_run(run, points=["youden"])
    assert metrics["test"]["operating"] == {} and list(metrics["test"]["calibration"]) == ["as_trained"]
    assert operating_table(metrics["test"], "youden").empty and "no operating point" in point_note(metrics["test"], "youden")
    assert split_note(metrics).endswith("trained without a validation part")
    assert "without" not in split_note(RunFolder(other).metrics)
    usual, _ = evaluate_run(other)
    runs = run_table([{**metrics, "cell": "apart"}, {**usual, "cell": "usual"}])
    assert np.isnan(runs["valid AUC"][0]) and with_intervals(runs)["valid AUC"][0] == "" and runs["valid AUC"][1] > 0.5
    for members in ([run, other], [other, run]):
        mean, test = evaluate_ensemble(members, points=["sensitivity_0.80"])
        assert mean["valid"] is None and mean["test"]["operating"] == {} and mean["test"]["mean_auc"] > 0.5
        assert set(test.ids) == set(RunFolder(run).test.ids)


def test_evaluate_gives_what_training_stored(make_run):
    run = make_run("g/a")
    metrics, test = evaluate_run(run, points=["sensitivity_0.70"])
    stored = RunFolder(run).metrics["test"]
    assert metrics["test"]["auc"] == stored["auc"] and metrics["test"]["mean_auc_low"] == stored["mean_auc_low"]
    write_json(run / "anew.json", metrics["test"]["operating"])
    assert json.loads((run / "anew.json").read_text())["f1"] == stored["operating"]["f1"]
    assert {"youden", "f1", "sensitivity_0.90", "sensitivity_0.70"} == set(metrics["test"]["operating"])
    (run / "resamples.npz").unlink()
    again, _ = evaluate_run(run)
    write_json(run / "again.json", again["test"]["operating"])
    assert json.loads((run / "again.json").read_text())["f1"] == stored["operating"]["f1"]
    assert np.array_equal(RunFolder(run).resamples.auc, bootstrap(test.labels, test.logits, test.patients).auc, equal_nan=True)
    (run / "model.json").unlink()
    assert evaluate_run(run)[0]["test"]["auc"] == again["test"]["auc"]
    mean, both = evaluate_ensemble([run, make_run("g/b", seed=4)])
    assert mean["cell"] == "mean of 2 runs" and mean["test"]["mean_auc"] > max(stored["mean_auc"] - 0.02, 0.5)
    assert len(both.ids) == len(test.ids)


def test_an_ensembles_thresholds_and_temperature_are_those_of_its_validation_part(make_run):
    runs = [RunFolder(make_run(f"g/{name}", seed=seed)) for name, seed in (("a", 1), ("b", 4))]
    metrics, _ = evaluate_ensemble(runs)
    valid, test = (mean_ensemble([getattr(run, part) for run in runs]) for part in ("valid", "test"))
    chosen, wrong = (chosen_on_validation(p.labels, p.logits, p.classes) for p in (valid, test))
    assert metrics["test"]["calibration"]["scaled"]["temperature"] == chosen["temperature"] != wrong["temperature"]
    for point, rows in metrics["test"]["operating"].items():
        assert {name: row["threshold"] for name, row in rows.items()} == {
            name: value for name, value in chosen["thresholds"][point].items() if value is not None}


def test_a_run_given_as_a_value_is_read_once(make_run):
    run = RunFolder(make_run("g/a"))
    assert RunFolder.of(run) is run and RunFolder.of(run.path).path == run.path
    first, _ = evaluate_run(run)
    for file in (run.metrics_file, run.predictions_file, run.card_file):
        file.unlink()
    assert evaluate_run(run)[0]["test"]["mean_auc"] == first["test"]["mean_auc"]


def test_further_operating_points_are_chosen_on_validation(make_run):
    run, point = make_run("g/a"), "sensitivity_0.70"
    wanted, of_test = (choose_thresholds(p.labels, p.logits, p.classes, [point])[point]
                       for p in (RunFolder(run).valid, RunFolder(run).test))
    rows = evaluate_run(run, points=[point])[0]["test"]["operating"][point]
    assert {name: row["threshold"] for name, row in rows.items()} == {k: v for k, v in wanted.items() if v is not None}
    assert thresholds_at(run, point) == wanted != of_test


def test_folders_of_runs_are_found(make_run, tmp_path):
    a, b = make_run("g/a"), make_run("g/b")
    for given in ([tmp_path], [tmp_path / "g"], [a, b, a]):
        assert [run.path for run in run_folders(given)] == [a, b]
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty is neither a finished run"):
        run_folders([tmp_path / "empty"])


def test_tables_fold_intervals_and_say_what_is_undefined(make_run):
    run = make_run("g/a")
    part = RunFolder(run).metrics["test"]  # as read from JSON: no NaN, but null
    test = RunFolder(run).test
    table = class_table(part, dict(zip(test.classes, (test.labels == 1).sum(0).tolist())))
    mean = table["class"].iloc[0]
    assert mean == (f"mean of {14 - len(part['undefined'])} of 14 classes" if part["undefined"] else MEAN)
    assert set(test.classes) <= set(table["class"])
    assert {"mean of head", "mean of tail"} & set(table["class"]) and "all pairs (micro)" in set(table["class"])
    text = with_intervals(table).set_index("class")
    assert text.loc[mean, "AUC"] == f"{part['mean_auc']:.3f} ({part['mean_auc_low']:.3f} to {part['mean_auc_high']:.3f})"
    for name in part["undefined"]:
        assert text.loc[name, "AUC"] == "undefined"
    calls = operating_table(part, "youden")
    assert (calls[["TP", "FP", "FN", "TN"]].sum(axis=1) == len(test.ids)).all()
    row = run_table([RunFolder(run).metrics]).iloc[0]
    assert row["images"] == len(test.ids) and row["patients"] == len(set(test.patients)) and 0 < row["positive share"] < 1


def test_walking_along_the_curve_equals_counting(cohort):
    labels, logits, _ = cohort
    labels[3, 0] = np.nan
    walk = Walk(labels, logits, 0)
    there = ~np.isnan(labels[:, 0])
    y, p = labels[there, 0] == 1, expit(logits[there, 0])

    def counts(row):
        return tuple(row[k] for k in ("tp", "fp", "fn", "tn"))

    assert counts(walk.point(0))[:2] == (0, 0) and counts(walk.point(walk.last))[2:] == (0, 0)
    for point in (1, walk.last // 2, walk.last):
        here = walk.point(point)
        call = p >= here["threshold"]
        assert counts(here) == ((call & y).sum(), (call & ~y).sum(), (~call & y).sum(), (~call & ~y).sum())
        assert walk.at_threshold(here["threshold"]) == point
    stations = walk.stations(20)
    assert stations[0] == 0 and stations[-1] == walk.last and (np.diff(stations) > 0).all()
    moved = walk.between(3, 6)
    change = (p >= walk.point(6)["threshold"]) & (p < walk.point(3)["threshold"])
    assert set(walk.rows[moved]) == set(np.flatnonzero(there)[change])
    assert list(walk.between(6, 3)) == list(moved[::-1])
    point = walk.last // 3
    here, missed, alarms = walk.point(point), walk.by_error("false negatives", point), walk.by_error("false positives", point)
    assert (len(missed), len(alarms)) == (here["fn"], here["fp"]) and len(walk.by_error()) == there.sum()
    assert walk.y[missed].all() and (walk.probability[missed] < here["threshold"]).all()
    assert not walk.y[alarms].any() and (np.diff(walk.probability[alarms]) <= 0).all()
    assert walk.probability[missed[0]] == walk.probability[walk.y].min()


def test_one_column_learns_its_direction_on_training_data():
    train = ["PA", "PA", "AP", "AP", "AP"]
    labels = [[0, 1], [0, 1], [1, 0], [1, np.nan], [0, 0]]
    scores = column_scores(train, labels, ["AP", "PA", "LL"])
    np.testing.assert_allclose(scores, [[2 / 3, 0], [0, 1], [0.4, 0.5]])
