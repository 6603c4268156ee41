import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from charmlib.evaluation.intervals import auc_interval, auc_resamples
from charmlib.evaluation.metrics import ap_by_class, auc_by_class, mean_auc, summarize
from charmlib.evaluation.operating import youden_thresholds
from charmlib.evaluation.published import beside_published, published_charm_grid, published_results
from charmlib.evaluation.results import load_metrics, load_predictions


@pytest.fixture
def cohort():
    g = np.random.default_rng(0)
    patients = g.integers(0, 60, 400)
    labels = (g.random((400, 3)) < (0.4, 0.1, 0.03)).astype(float)
    scores = np.round(labels + g.normal(0, 1.2, labels.shape), 1)  # many ties
    return labels, scores, patients


def test_unknown_labels_are_left_out_class_by_class(cohort):
    labels, scores, _ = cohort
    labels[:50, 0] = np.nan
    assert auc_by_class(labels, scores, "abc")["a"] == roc_auc_score(labels[50:, 0], scores[50:, 0])


def test_a_class_without_positives_is_named_and_left_out(cohort):
    labels, scores, _ = cohort
    labels[:, 1] = 0
    with pytest.warns(UserWarning, match="undefined for b"):
        mean = mean_auc(labels, scores, ["a", "b", "c"])
    assert mean == pytest.approx(np.mean([roc_auc_score(labels[:, i], scores[:, i]) for i in (0, 2)]))
    with pytest.warns(UserWarning):
        assert summarize(labels, scores, ["a", "b", "c"])["undefined"] == ["b"]
    assert np.isnan(ap_by_class(labels, scores)["class 1"])


def test_bad_arrays_are_refused(cohort):
    labels, scores, _ = cohort
    with pytest.raises(ValueError, match="must both be"):
        mean_auc(labels, scores[:, :2])
    with pytest.raises(ValueError, match="2 class names for 3"):
        mean_auc(labels, scores, ["a", "b"])
    scores[3, 1] = np.nan
    with pytest.raises(ValueError, match="1 samples have scores that are not finite"):
        mean_auc(labels, scores)


def test_resamples_equal_scikit_learn_with_weights(cohort):
    labels, scores, patients = cohort
    labels[:20, 2] = np.nan
    got = auc_resamples(labels, scores, patients, resamples=20, seed=3)
    names, index = np.unique(patients, return_inverse=True)
    draws = np.random.default_rng(3).multinomial(len(names), np.full(len(names), 1 / len(names)), size=20)
    for r in range(20):
        weight = draws[r][index]
        for c in range(3):
            known = ~np.isnan(labels[:, c]) & (weight > 0)
            y = labels[known, c]
            want = roc_auc_score(y, scores[known, c], sample_weight=weight[known]) if 0 < y.sum() < len(y) else np.nan
            assert got[r, c] == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_intervals_are_seeded_contain_the_mean_and_know_clusters(cohort):
    labels, scores, patients = cohort
    low, high = auc_interval(labels, scores, patients)
    assert low < mean_auc(labels, scores) < high and (low, high) == auc_interval(labels, scores, patients)
    assert np.isnan(auc_interval(labels, scores, np.zeros(400))).all()
    many = auc_interval(np.tile(labels, (4, 1)), np.tile(scores, (4, 1)), np.tile(patients, 4))
    alone = auc_interval(np.tile(labels, (4, 1)), np.tile(scores, (4, 1)), np.arange(1600))
    assert many[1] - many[0] > 1.5 * (alone[1] - alone[0])  # copies of the same patients bring nothing new


def test_youden_is_the_best_point_of_the_curve(cohort):
    labels, scores, _ = cohort
    got = youden_thresholds(labels, scores, ["a", "b", "c"])
    for i, name in enumerate("abc"):
        def j(t, i=i):
            called = scores[:, i] >= t
            y = labels[:, i] == 1
            return called[y].mean() + (~called[~y]).mean() - 1
        logit = np.log(got[name] / (1 - got[name]))
        assert j(logit - 1e-6) == pytest.approx(max(j(t) for t in np.unique(scores[:, i])))
    assert youden_thresholds(np.zeros((5, 1)), np.zeros((5, 1)), ["x"]) == {"x": None}


def metrics(split, images=25596, drawn=False, quick=False, classes=14):
    return {"cell": "mine", "split": {"name": split, "test": {"images": images, "patients": 9}}, "quick_check": quick,
            "data": {"drawn": drawn}, "classes": ["x"] * classes, "test": {"mean_auc": 0.8}}


def test_published_figures_stand_beside_their_own_kind_of_split_only():
    table, remark = beside_published(metrics("official"))
    assert set(table["split"]) == {"official"} and not table["system"].str.contains("CHARM").any()
    assert "25,596" not in remark and table["mean AUC"].is_monotonic_decreasing
    assert "25,596" in beside_published(metrics("official", images=2009))[1]
    table, remark = beside_published(metrics("patient"))
    others = table[~table["system"].str.startswith("THIS RUN")]
    assert others["split"].str.contains("another draw").all() and "another draw" in remark
    assert others["system"].str.contains("CHARM").any() and not (others["split"] == "official").any()
    for case in (metrics("official", drawn=True), metrics("mine"), metrics("official", quick=True),
                 metrics("official", classes=15)):
        assert beside_published(case)[0] is None


def test_the_published_tables_ship_with_the_package():
    grid = published_charm_grid()
    assert len(grid) == 26 and grid.loc[grid["auc"].idxmax(), ["momentum", "k", "threshold"]].tolist() == [0.99, 5, 0.2]
    assert {"system", "split", "metric", "value", "source"} <= set(published_results().columns)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="test notebook"):
        load_predictions(tmp_path)
    with pytest.raises(FileNotFoundError, match="not finished"):
        load_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="damaged"):
        load_metrics(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_metrics(tmp_path)


def test_json_has_no_nan(tmp_path):
    from charmlib.files import write_json

    write_json(tmp_path / "x.json", {"a": float("nan"), "b": np.float32(0.5), "c": np.arange(2), "d": [np.int64(3)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": 0.5, "c": [0, 1], "d": [3]}
