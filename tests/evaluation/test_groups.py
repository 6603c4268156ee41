"""Scores by view, sex and age group."""

import numpy as np
import pytest

from charmlib.evaluation.combine import pooled
from charmlib.evaluation.groups import group_table, groups_of
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.runs import Predictions, RunFolder, save_predictions


def predictions(n=400, **about):
    generator = np.random.default_rng(0)
    labels = (generator.random((n, 3)) < 0.3).astype(np.float32)
    return Predictions(np.arange(n).astype(str), (np.arange(n) // 2).astype(str), labels,
                       labels + generator.normal(size=labels.shape), ("A", "B", "Normal"), "", about)


def test_groups_have_their_images_patients_positives_and_mean():
    view = np.where(np.arange(400) < 300, "PA", "AP")
    found = predictions(view=view, sex=np.repeat("", 400), age=np.full(400, np.nan))
    found.labels[view == "AP", 1] = 0
    table = group_table(found, resamples=50).set_index("group")
    assert list(table.index) == ["view AP", "view PA"] and table["images"].tolist() == [100, 300]
    assert table["patients"].tolist() == [50, 150] and table.loc["view AP", "undefined in it"] == "1 of 2: B"
    part = found.take(view == "PA")
    row = table.loc["view PA"]
    assert row["mean AUC"] == pytest.approx(mean_auc(part.labels, part.logits, part.classes))
    assert row["mean AUC low"] < row["mean AUC"] < row["mean AUC high"] and row["positives"] == part.labels[:, :2].sum()


def test_ages_sexes_unknown_and_small_groups():
    age = np.array([17.9, 18, 39.5, 40, 79, 80, 101, np.nan] * 50)
    found = predictions(age=age, sex=np.array(["F", "female", "M", "male", "m", "f", "", "U"] * 50))
    names = dict(groups_of(found))
    assert [int(names[n].sum()) for n in ("age 0 to 17", "age 18 to 39", "age 40 to 59", "age 60 to 79", "age 80 and older",
                                          "age unknown")] == [50, 100, 50, 50, 100, 50]
    assert [int(names[f"sex {n}"].sum()) for n in ("female", "male", "unknown")] == [150, 150, 100]
    assert found.by_group is found.by_group  # drawn once for notebook, terminal and report
    small = group_table(found.take(np.arange(60)), resamples=20)
    assert small["note"].str.startswith("small").all() and len(group_table(predictions())) == 0
    single = group_table(found.take(np.arange(4)), resamples=20).set_index("group").loc["age 0 to 17"]
    assert single["patients"] == 1 and np.isnan(single["mean AUC low"])


def test_they_are_kept_with_predictions(tmp_path):
    p = predictions(view=np.repeat(["PA", "AP"], 200))
    values = {"ids": p.ids, "patients": p.patients, "labels": p.labels, "logits": p.logits, **p.about}
    save_predictions(tmp_path / "predictions.npz", {"valid": values, "test": values}, p.classes, "Normal")
    test = RunFolder(tmp_path).test
    assert test.normal_class == "Normal" and test.about["view"].tolist() == p.about["view"].tolist()
    assert len(pooled([test.take(slice(150)), test.take(slice(150, 400))]).about["view"]) == 400


def test_rare_values_beside_short_names_are_one_group():
    view = np.array([*"ABCDEF" * 60, *"GHIJ" * 10])
    names = dict(groups_of(predictions(view=view)))
    assert list(names) == [*(f"view {v}" for v in "ABCDEF"), "view other"] and names["view other"].sum() == 40
