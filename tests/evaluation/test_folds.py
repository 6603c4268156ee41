"""A cross-validation read as one run, and the table of CHARM's parts that is made of several."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from benchmarks.keep_parts import by_view, differences, main, measure, read
from charmlib.evaluation.combine import auc_within_folds, out_of_fold
from charmlib.evaluation.compare import holm
from charmlib.evaluation.intervals import over_seeds
from charmlib.evaluation.leaks import LeakError, refuse_leaks
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import RunFolder

KERNEL = "own_kernel_ridge+head"


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


def test_the_table_of_parts_pairs_within_folds_over_seeds(make_run, phantoms, tmp_path, capsys):
    """Means over folds, findings and seeds beside scikit-learn's; a seed that lacks a fold is left out; comparisons by Holm."""
    from sklearn.metrics import average_precision_score, log_loss, roc_auc_score

    grid, target = tmp_path, tmp_path / "kept/parts"
    for name, skill, own in (("charm", 1.2, {}), ("plain", 0.6, {"use_bank": False}), ("plain_0.5", 0.5, {"use_bank": False})):
        for seed in (1, 2):
            for i in (1, 2, 3):
                make_run(f"{name}_split=fold-{i}-3_seed={seed}", split=f"fold:{i}/3", seed=seed, skill=skill, **own)
    run = RunFolder(grid / "plain_split=fold-1-3_seed=1")
    own = {f"{name}_{key}": value[::-1] for name, part in (("valid", run.valid), ("test", run.test)) for key, value in (
        ("ids", part.ids), ("view", part.logits), (KERNEL, part.logits + 3 * part.labels),
        ("run", part.logits + 9 * part.labels))}
    np.savez(run.path / "baselines.npz", **own)
    for i in (2, 3):  # whose baseline is below the mean of two seeds
        run = RunFolder(grid / f"plain_split=fold-{i}-3_seed=1")
        np.savez(run.path / "baselines.npz", **{f"{name}_{key}": value for name, part in (("valid", run.valid), (
            "test", run.test)) for key, value in (("ids", part.ids), ("view", -part.logits), ("two_seeds", 9 * part.labels))})
    skills = {(1, 2): 0.2, (1, 3): 2.0, (2, 2): 2.0, (2, 3): 0.2, (3, 2): 0.2, (3, 3): 2.0}  # by fold and k
    cells = {at: make_run(f"charm_grid_k{at[1]}_split=fold-{at[0]}-3_seed=1", split=f"fold:{at[0]}/3", seed=1, skill=skill,
                          k=at[1]) for at, skill in skills.items()}
    (grid / "charm_split=fold-3-3_seed=2/metrics.json").unlink()
    main(grid, target)
    said = capsys.readouterr().out
    assert "charm, seed 2: 2 of 3 folds, left out" in said and f"plain, {KERNEL}, seed 1: 1 of 3 folds" in said
    rows = pd.read_csv(f"{target}.csv").set_index("configuration")
    assert list(rows.index) == ["plain_0.5", "plain", "charm", "charm, picked by its grid", "plain, best baseline",
                                "plain, two seeds", "plain, view"]
    assert rows["seeds"].tolist() == [2, 2, 1, 1, 1, 2, 1]
    parts = {s: [RunFolder(grid / f"plain_split=fold-{i}-3_seed={s}").test for i in (1, 2, 3)] for s in (1, 2)}
    halves = {s: [p.logits.astype(np.float16).astype(float) for p in found] for s, found in parts.items()}

    def mean(score):
        return np.mean([np.nanmean([[score(p.labels[:, c], z[:, c]) if 0 < p.labels[:, c].sum() < len(z) else np.nan
                                     for c in range(14)] for p, z in zip(parts[s], halves[s])], axis=0).mean() for s in parts])

    assert rows.loc["plain", "mean_auc"] == pytest.approx(mean(roc_auc_score), abs=1e-4)
    assert rows.loc["plain", "mean_ap"] == pytest.approx(mean(average_precision_score), abs=1e-4)
    losses = [log_loss(p.labels.ravel(), 1 / (1 + np.exp(-z.ravel()))) for s in parts for p, z in zip(parts[s], halves[s])]
    assert rows.loc["plain", "log_loss"] == pytest.approx(np.mean(losses), abs=1e-4)
    assert rows.loc["plain, two seeds", "mean_auc"] > rows.loc["plain", "mean_auc"]

    configurations, cards = read(target)
    best, pair = (configurations[name][1] for name in ("plain, best baseline", "plain, two seeds"))
    assert [np.array_equal(best[f"fold:{i}/3"].logits, pair[f"fold:{i}/3"].logits) for i in (1, 2, 3)] == [False, True, True]
    assert cards["plain_split=fold-1-3_seed=1"]["baseline"] == KERNEL
    picked = configurations["charm, picked by its grid"][1]
    for (fold, k), path in cells.items():
        own = RunFolder(path).test
        own = own.logits[np.argsort(own.ids)].astype(np.float16)
        assert np.array_equal(picked[f"fold:{fold}/3"].logits, own) == (skills[fold, k] == 2.0)
    with np.load(target / "plain_split=fold-1-3_seed=1.npz") as kept:
        assert kept["names"].tolist()[-1] == "plain, best baseline"
        np.testing.assert_array_equal(kept["logits"][-1], kept["logits"][kept["names"].tolist().index(f"plain, {KERNEL}")])
    moved = pd.read_csv(f"{target}_axes.csv").set_index(["axis", "value"])
    auc = {at: RunFolder(path).metrics["valid"]["mean_auc"] for at, path in cells.items()}
    want = np.mean([auc[i, 3] - auc[i, 2] for i in (1, 2, 3)])
    assert moved.loc[("k", 3), "effect"] == pytest.approx(want / 2, abs=1e-4)
    assert moved.loc[("k", 2), "range"] == pytest.approx(abs(want), abs=1e-4) and moved.loc[("momentum", 0.99), "range"] == 0
    one, other = (measure(configurations[name], 200) for name in ("plain", "plain_0.5"))
    found = differences(one, other)
    by_seed = one.values["mean_auc"] - other.values["mean_auc"]
    assert found["mean_auc"] == pytest.approx(by_seed.mean()) and found["one_sign"] == (len(set(np.sign(by_seed))) == 1)
    assert found["mean_auc_low"] < found["mean_auc"] < found["mean_auc_high"]
    rare = one.values["rare_auc"] - other.values["rare_auc"]
    assert differences(one, other, "rare_auc")["seeds"] == " ".join(f"{v:+.4f}" for v in rare) != found["seeds"]
    drawn = over_seeds(np.stack([np.zeros((4000, 1)), np.ones((4000, 1))]))  # of two seeds: 0, a half, a half, or 1
    assert np.bincount((2 * drawn[:, 0]).astype(int)) / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    compared = pd.read_csv(f"{target}_comparisons.csv")
    assert compared[["part", "configuration", "less"]].values.tolist() == [
        [2, "plain", "plain_0.5"], [6, "charm", "plain"], [6, "charm", "plain, best baseline"]]
    for _, some in compared.groupby("part"):
        np.testing.assert_allclose(some["p_holm"], holm(some["p"]), atol=1e-5)
    seen = {n: {s: {f: replace(p, about={"view": np.where(p.patients > p.patients[0], "AP", "PA")}) for f, p in folds.items()}
                for s, folds in seeds.items()} for n, seeds in configurations.items()}
    views = by_view(seen)
    assert views.groupby("view")["images"].first().sum() == sum(len(p.ids) for p in parts[1])
    assert (views.loc[views["configuration"] == "charm", "less_plain_mean_auc"] > 0).all()
    ours = pd.read_csv(f"{target}_per_class.csv").set_index(["configuration", "class"])
    assert ours.loc[("plain", "Effusion"), "less_plain"] == 0 and ours.loc[("charm", "Effusion"), "less_plain"] > 0

    main(tmp_path / "gone", target)  # of what is kept alone
    assert pd.read_csv(f"{target}_axes.csv").set_index(["axis", "value"]).equals(moved)
    assert pd.read_csv(f"{target}.csv").equals(rows.reset_index())
