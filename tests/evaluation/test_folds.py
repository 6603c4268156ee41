"""A cross-validation read as one run, and the table of CHARM's parts that is made of several."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.keep_parts import RAREST, by_view, configurations, table
from charmlib.data.index import read_index
from charmlib.evaluation.combine import auc_within_folds, out_of_fold
from charmlib.evaluation.compare import compare
from charmlib.evaluation.leaks import LeakError, refuse_leaks
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.tables import MEAN


def folds(make_run, name, count=3, **settings):
    return [make_run(f"{name}_split=fold-{i}-{count}", split=f"fold:{i}/{count}", **settings) for i in range(1, count + 1)]


def test_every_image_is_scored_once(make_run, phantoms):
    runs = folds(make_run, "plain")
    whole = out_of_fold(reversed(runs))
    listed = pd.read_csv(phantoms / "Data_Entry_2017.csv")["Image Index"]
    assert sorted(whole.ids) == sorted(listed)
    for run in runs:
        part = RunFolder(run).test
        at = [int(np.flatnonzero(whole.ids == i)[0]) for i in part.ids]
        np.testing.assert_array_equal(whole.logits[at], part.logits)
        assert (whole.patients[at] == part.patients).all()
    within = auc_within_folds([RunFolder(run).test for run in runs])
    one = [auc_by_class(p.labels, p.logits, p.classes)["Effusion"] for p in (RunFolder(run).test for run in runs)]
    assert within["Effusion"] == pytest.approx(np.nanmean(one))


def test_what_is_no_cross_validation_is_refused(make_run):
    runs = folds(make_run, "a")
    for wrong, says in ((runs[:2], "each fold; there are fold:1/3, fold:2/3"), ([*runs, runs[0]], "are both fold:1/3"),
                        ([], "there are none"),
                        ([*runs[:2], make_run("k3", split="fold:3/3", k=3)], "differs from .* in k"),
                        ([*runs[:2], make_run("of4", split="fold:3/4")], "number of folds"),
                        ([make_run("official")], "of split 'official', wanted fold:I/N")):
        with pytest.raises(ValueError, match=says):
            out_of_fold(wrong)


def test_folds_stand_in_one_leaderboard_and_nowhere_else(make_run):
    runs = folds(make_run, "a")
    refuse_leaks(runs, folds=True)
    with pytest.raises(LeakError, match="were in the training"):
        refuse_leaks(runs)
    with pytest.raises(LeakError, match="were in the training"):
        refuse_leaks([*runs, make_run("official")], folds=True)
    with pytest.raises(LeakError, match="were in the training"):
        refuse_leaks([runs[0], make_run("other", split="fold:2/4")], folds=True)


def test_the_table_of_parts_pairs_out_of_fold(make_run, phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("charmlib.evaluation.few.FEW", 0)  # the table widens nothing: its data has 20 patients of each class
    cells = {name: folds(make_run, name, skill=skill, seed=seed, **own)
             for name, skill, seed, own in (("published", 0.3, 1, {"rule": "published"}), ("charm", 1.0, 2, {}),
                                            ("plain", 0.6, 3, {"use_bank": False}))}
    runs = configurations(tmp_path)
    assert list(runs) == ["plain", "charm", "published"] and {n: sorted(c) for n, c in runs.items()} == cells
    parts = {name: [RunFolder(run).test for run in found] for name, found in runs.items()}
    rows, by_class = table(parts)
    rows = rows.set_index("configuration")
    paired = compare(out_of_fold(cells["plain"]), out_of_fold(cells["charm"]))
    auc = paired[paired["figure"] == "AUC"].set_index("class")
    for column, wanted in (("", "difference"), ("_low", "low"), ("_high", "high")):
        assert rows.loc["charm", f"mean_less_plain{column}"] == pytest.approx(auc.loc[MEAN, wanted])
    assert rows.loc["charm", "rare_less_plain"] == pytest.approx(auc.loc[list(RAREST), "difference"].mean())
    assert rows.loc["charm", "mean_less_published"] == pytest.approx(rows.loc["charm", "mean_auc"]
                                                                     - rows.loc["published", "mean_auc"])
    assert rows.loc["published", "mean_less_plain"] < 0 and pd.isna(rows.loc["plain", "mean_less_plain"])
    ours = by_class[by_class["configuration"] == "charm"].set_index("class")
    assert ours.loc["Effusion", "less_plain"] == pytest.approx(auc.loc["Effusion", "difference"])
    assert ours.loc["Effusion", "low"] == pytest.approx(auc.loc["Effusion", "low"])

    frame = read_index(phantoms).frame
    views = by_view(parts, frame.set_index("id")["view"]).set_index(["view", "configuration"])
    assert set(views.index.get_level_values(0)) == set(frame["view"])
    assert views["images"].groupby("view").first().sum() == len(frame)
    assert (views.xs("charm", level=1)["less_plain"] > 0).all() and (views.xs("plain", level=1)["less_plain"] == 0).all()

    (tmp_path / "charm_split=fold-2-3/metrics.json").unlink()
    with pytest.raises(SystemExit, match="fold-2-3 is not done"):
        configurations(tmp_path)
