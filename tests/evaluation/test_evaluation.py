import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import train_test_split

from charmlib.evaluation.metrics import (
    ap_by_class,
    auc_by_class,
    frequency_groups,
    mean_auc,
    micro,
    prevalence,
    summarize,
)
from charmlib.evaluation.published import (
    beside_published,
    per_class_beside,
    published_charm_grid,
    published_per_class,
    published_results,
)
from charmlib.evaluation.runs import RunFolder


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


def test_micro_is_all_pairs_at_once(cohort):
    labels, scores, _ = cohort
    labels[:30, 1] = np.nan
    there = ~np.isnan(labels)
    assert micro(labels, scores) == {"auc": roc_auc_score(labels[there], scores[there]),
                                     "ap": average_precision_score(labels[there], scores[there])}
    assert np.isnan(micro(np.zeros((4, 2)), np.zeros((4, 2)))["auc"])


def test_frequency_groups_have_the_agreed_borders():
    assert frequency_groups({"a": 0.0501, "b": 0.05, "c": 0.02, "d": 0.0199}) == {
        "head": ["a"], "medium": ["b", "c"], "tail": ["d"]}
    assert prevalence([[1, np.nan], [0, np.nan], [np.nan, np.nan]], "ab")["a"] == 0.5


def metrics(split, images=25596, drawn=False, quick=False, classes=14, labels="real"):
    return {"cell": "mine", "split": {"name": split, "patients_from": "", "test": {"images": images, "patients": 9}},
            "normal_class": "", "quick_check": quick, "data": {"drawn": drawn}, "classes": ["x"] * classes,
            "test": {"mean_auc": 0.8}, "params": {"labels": labels}}


def test_published_figures_stand_beside_their_own_kind_of_split_only():
    table, remark = beside_published(metrics("official"))
    assert set(table["split"]) == {"official"} and not table["system"].str.contains("CHARM").any()
    assert "25,596" not in remark and table["mean AUC"].is_monotonic_decreasing
    assert "25,596" in beside_published(metrics("official", images=2009))[1]
    table, remark = beside_published(metrics("patient"))
    others = table[~table["system"].str.startswith("THIS RUN")]
    assert others["split"].str.contains("another draw").all() and "another draw" in remark
    assert others["system"].str.contains("CheXNet").any() and not (others["split"] == "official").any()
    leaking = published_results()[published_results()["split"] == "random, leaking"]
    for name in ("CHARM", "MemAug", "CBAM", "VGG16", "AG-CNN ResNet", "Aug-CNN"):
        assert leaking["system"].str.contains(name).any()
    assert not others["system"].isin(leaking["system"]).any()
    for case in (metrics("official", drawn=True), metrics("mine"), metrics("official", quick=True),
                 metrics("official", classes=15), metrics("official", labels="shuffled")):
        assert beside_published(case)[0] is None and per_class_beside(case)[0] is None
    assert set(per_class_beside(metrics("official"))[0].index) == {"Wang et al. 2017 ResNet-50",
                                                                   "Gündel et al. 2018 DenseNet-121"}
    assert not per_class_beside(metrics("patient"))[0].index.str.contains("Wang").any()


def test_per_class_figures_mean_to_the_published_means():
    """Guards against a figure copied wrongly: complete rows must average to the mean that their paper states."""
    means = published_per_class().set_index("system").drop(columns=["split", "source"]).mean(axis=1, skipna=False)
    assert means["Wang et al. 2017 ResNet-50"] == pytest.approx(0.745, abs=5e-4)
    assert means["Gündel et al. 2018 DenseNet-121"] == pytest.approx(0.807, abs=5e-4)
    assert means["CheXNet"] == pytest.approx(0.841, abs=5e-4) and np.isnan(means["MemAug EfficientNetV2-S rarity"])


def test_the_split_of_charms_authors_trains_on_test_images(shared):
    """Stage 1 drops the images without a finding before it draws patients, the test part is drawn from all patients; both draws
    have the seed 85. The counts are those that the published notebooks print."""
    table = pd.read_csv(shared / "nih_meta/Data_Entry_2017_v2020.csv.gz", usecols=["Finding Labels", "Patient ID"])
    ill = table[table["Finding Labels"] != "No Finding"]
    parts = [train_test_split(rows["Patient ID"].unique(), test_size=0.2, random_state=85) for rows in (ill, table)]
    (stage1, _), (stage2, test) = parts
    assert [len(stage1), len(stage2), ill["Patient ID"].isin(stage1).sum(), table["Patient ID"].isin(test).sum()] == [
        11_521, 24_644, 41_721, 22_356]
    tested = ill[ill["Patient ID"].isin(test)]
    assert (tested["Patient ID"].isin(stage1).sum(), len(tested)) == (8_016, 10_296)
    assert round(100 * 8_016 / 10_296) == 78
    told = published_results().set_index("system")["source"]
    assert told.str.contains("78 % of the test images with a finding").sum() == 4


def test_the_published_tables_ship_with_the_package():
    grid = published_charm_grid()
    assert len(grid) == 26 and grid.loc[grid["auc"].idxmax(), ["momentum", "k", "threshold"]].tolist() == [0.99, 5, 0.2]
    assert {"system", "split", "metric", "value", "source"} <= set(published_results().columns)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="test notebook"):
        _ = RunFolder(tmp_path).test
    with pytest.raises(FileNotFoundError, match="not finished"):
        _ = RunFolder(tmp_path).metrics
    (tmp_path / "predictions.npz").write_text("garbage")
    with pytest.raises(ValueError, match="predictions.npz is damaged"):
        _ = RunFolder(tmp_path).test
    (tmp_path / "metrics.json").write_text('{"format": ')
    with pytest.raises(ValueError, match="damaged"):
        _ = RunFolder(tmp_path).metrics
    (tmp_path / "metrics.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        _ = RunFolder(tmp_path).metrics


def test_json_has_no_nan(tmp_path):
    from charmlib.files import write_json

    write_json(tmp_path / "x.json", {"a": float("nan"), "b": np.float32(0.5), "c": np.arange(2), "d": [np.int64(3)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": 0.5, "c": [0, 1], "d": [3]}
