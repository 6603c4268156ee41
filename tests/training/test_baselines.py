"""Baselines without training beside a finished run: closed forms against slow twins, and what they are chosen on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import roc_auc_score

from charmlib import Run
from charmlib.cli import cli
from charmlib.evaluation.runs import Predictions, RunFolder, finish
from charmlib.training.baselines import FLOOR, LAMBDAS, RIDGES, averaged, choose, kernel_ridge, ridge, run_baselines
from tests.conftest import TINY
from tests.test_systems import TOY, toy  # noqa: F401

SHORT = {**TINY, "use_momentum": False, "use_attention": False, "stage1_epochs": 0, "stage2_epochs": 1}
pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning", "ignore:invalid value:RuntimeWarning")


def trained(folder, **params) -> Path:
    run = Run.open({**SHORT, **params, "run_dir": str(folder)})
    run.train()
    run.score()
    finish(folder)
    return Path(folder)


@pytest.fixture(scope="module")
def runs(phantoms, tmp_path_factory) -> Path:
    """Two finished runs that differ in their seed, with a voting bank, and one of another depth of training."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, epochs in (("a", 1, 1), ("b", 2, 1), ("aa", 3, 2)):
        trained(folder / name, data_root=str(phantoms), seed=seed, stage2_epochs=epochs)
    return folder


@pytest.fixture(scope="module")
def record(runs) -> dict:
    return run_baselines(runs / "a")


def drawn(seed: int = 0, n: int = 60, width: int = 12, classes: int = 3):
    generator = np.random.default_rng(seed)
    keys = generator.normal(2, 3, (n, width)).astype(np.float32)
    labels = (keys[:, :classes] + generator.normal(0, 2, (n, classes)) > 3).astype(np.float32)
    labels[generator.random(labels.shape) < 0.1] = np.nan
    return keys, labels


def test_ridge_solves_the_normal_equations():
    (keys, labels), (new, _) = drawn(), drawn(1)
    x, at = keys.astype(float), new.astype(float)
    mean, std = x.mean(0), x.std(0)
    x, at = (x - mean) / std, (at - mean) / std
    expected = np.empty((len(at), 3))
    for c in range(3):
        y = labels[:, c].astype(float)
        y[np.isnan(y)] = base = y[~np.isnan(y)].mean()
        expected[:, c] = base + at @ np.linalg.solve(x.T @ x + 0.3 * len(x) * np.eye(x.shape[1]), x.T @ (y - base))
    np.testing.assert_allclose(ridge(keys, labels)(0.3)(new), expected, atol=1e-9)
    assert np.isclose(np.linalg.eigvalsh(x.T @ x).mean(), len(x))  # so that lambda counts in mean eigenvalues
    (keys, labels), (new, truth) = drawn(n=600), drawn(1, n=600)
    known, order = ~np.isnan(truth), np.random.default_rng(0).permutation(600)
    right, wrong = (np.mean([roc_auc_score(truth[k, c], ridge(keys, y)(1.0)(new)[k, c]) for c, k in enumerate(known.T)])
                    for y in (labels, labels[order]))
    assert right > 0.85 and abs(wrong - 0.5) < 0.1


def test_kernel_ridge_is_scikit_learns_with_the_kernel_written_down():
    (keys, labels), (new, _) = drawn(), drawn(1)

    def kernel(a, b):
        centre, out = keys.astype(float).mean(0), np.empty((len(a), len(b)))
        for i, one in enumerate(a - centre):
            for j, two in enumerate(b - centre):
                cosines = [one[s] @ two[s] / np.linalg.norm(one[s]) / np.linalg.norm(two[s]) for s in (slice(8), slice(8, 12))]
                out[i, j] = np.exp((np.mean(cosines) - 1) / 0.8)
        return out

    known, base = ~np.isnan(labels), np.nanmean(labels, 0)
    targets = np.where(known, labels - base, 0) / (base * (1 - base) + FLOOR)
    for penalty in (3.0, 0.3):
        slow = KernelRidge(kernel="precomputed", alpha=penalty).fit(kernel(keys, keys), targets).predict(kernel(new, keys))
        np.testing.assert_allclose(kernel_ridge(keys, labels, [8, 4])(penalty)(new), slow, atol=2e-3 * np.abs(slow).max())


def test_penalties_are_chosen_on_validation_and_the_middle_one_without():
    keys, labels = drawn(n=80)
    ids = np.arange(40).astype(str)
    valid = Predictions(ids, ids, labels[40:], labels[40:], ("p", "q", "r"))
    fit = ridge(keys[:40], labels[:40])
    found, words = choose(fit, LAMBDAS, keys[40:], valid)
    scores = {}
    for penalty in LAMBDAS:
        known = ~np.isnan(valid.labels)
        scores[penalty] = np.mean([roc_auc_score(valid.labels[k, c], fit(penalty)(keys[40:])[k, c])
                                   for c, k in enumerate(known.T)])
    assert scores[found] == max(scores.values()) > min(scores.values()) and words == f"{found:g}, by validation"
    assert choose(fit, LAMBDAS, keys[:0], valid.take(slice(0))) == (1.0, "1, the middle: no validation part")


def test_averages_are_of_scores_standardised_over_one_part():
    generator = np.random.default_rng(0)
    first, second = ({part: generator.normal(shift, 2, (9, 3)) for part in ("valid", "test")} for shift in (1, 7))
    first["valid"][:, 2] = 5.0  # a constant score
    found = averaged(first, second, "valid")
    for c in range(3):
        parts = []
        for scores in (first, second):
            std = scores["valid"][:, c].std()
            parts.append((scores["test"][:, c] - scores["valid"][:, c].mean()) / (std if std > 0 else 1))
        np.testing.assert_allclose(found["test"][:, c], (parts[0] + parts[1]) / 2)
    changed = averaged({**first, "test": first["test"] + 9}, second, "valid")
    np.testing.assert_array_equal(changed["valid"], found["valid"])


def test_a_run_with_a_voting_bank_gets_all_of_them(runs, record):
    rows = {row["baseline"]: row for row in record["rows"]}
    assert list(rows) == ["run", "head", "frozen_ridge", "frozen_ridge+head", "shuffled", "own_ridge", "own_ridge+head",
                          "own_kernel_ridge", "own_kernel_ridge+head", "view", "two_seeds"]
    a, b = RunFolder(runs / "a"), RunFolder(runs / "b")
    assert rows["run"]["test_auc"] == a.metrics["test"]["mean_auc"] and rows["run"]["difference"] == 0
    assert rows["run"]["valid_auc"] == pytest.approx(a.metrics["valid"]["mean_auc"])
    assert rows["head"]["test_auc"] != rows["run"]["test_auc"] and "random" in rows["frozen_ridge"]["what"]
    assert "b, seed 2" in rows["two_seeds"]["what"] and not record["left_out"]
    assert abs(rows["shuffled"]["test_auc"] - 0.5) < 0.1
    for row in record["rows"]:
        assert (row["seed"], row["images"], row["patients"]) == (1, len(a.test.ids), len({*a.test.patients}))
        assert row["test_auc_low"] <= row["test_auc"] <= row["test_auc_high"]
        assert row["baseline"] == "run" or row["difference_low"] <= row["difference"] <= row["difference_high"]
    assert float(rows["own_kernel_ridge"]["lambda"].split(",")[0]) in RIDGES
    written = json.loads((runs / "a/baselines.json").read_text())
    for one, two in zip(written["rows"], record["rows"], strict=True):
        assert (one["lambda"], one["test_auc"]) == (two["lambda"], two["test_auc"])
    with np.load(runs / "a/baselines.npz", allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["test_ids"], a.test.ids)
        np.testing.assert_array_equal(arrays["valid_labels"], a.valid.labels)
        np.testing.assert_allclose(arrays["test_two_seeds"], (a.test.logits + b.test.logits) / 2)
        run = Run.load(runs / "a")
        run.net.bank.weight.zero_()
        np.testing.assert_allclose(arrays["valid_head"], run.logits("valid")[0], atol=1e-5)
        views, labels = run.data.index.frame["view"].to_numpy(), run.data.labels
        train, test = run.data.rows("train"), run.data.rows("test")
        for row, scores in zip(test, arrays["test_view"]):
            np.testing.assert_allclose(scores, labels[[i for i in train if views[i] == views[row]]].mean(0), rtol=1e-6)
        assert {arrays[f"{part}_{name}"].dtype for part in ("valid", "test") for name in rows} == {np.dtype("float32")}


def test_the_test_part_chooses_nothing(runs, record, phantoms, tmp_path):
    other, folder = tmp_path / "phantoms", tmp_path / "runs/a"
    shutil.copytree(phantoms, other)
    shutil.copytree(runs / "a", folder)
    table = pd.read_csv(other / "Data_Entry_2017.csv")
    test = table["Image Index"].isin((other / "test_list.txt").read_text().split())
    table.loc[test, "Finding Labels"] = table.loc[test, "Finding Labels"].to_numpy()[::-1]
    table.to_csv(other / "Data_Entry_2017.csv", index=False)
    run = Run.load(folder, data_root=str(other))
    with np.load(folder / "predictions.npz") as file:
        arrays = {**file, "test_labels": run.data.labels[run.data.rows("test")], "test_logits": -file["test_logits"]}
    np.savez(folder / "predictions.npz", **arrays)
    (folder / "resamples.npz").unlink()
    found = run_baselines(folder, data_root=str(other))
    before = {row["baseline"]: row for row in record["rows"]}
    with np.load(folder / "baselines.npz") as one, np.load(runs / "a/baselines.npz") as two:
        for row in found["rows"][1:]:
            name = row["baseline"]
            assert (row["lambda"], row["valid_auc"]) == (before[name]["lambda"], before[name]["valid_auc"])
            np.testing.assert_array_equal(one[f"test_{name}"], two[f"test_{name}"])
            assert row["auc"] != before[name]["auc"]
    assert found["left_out"] == {"two_seeds": f"no finished run in {tmp_path}/runs differs in its seed alone"}


def test_unknown_labels_no_views_and_no_validation_part(phantoms, tmp_path):
    table = pd.read_csv(phantoms / "Data_Entry_2017.csv")
    mine = pd.DataFrame({"image": table["Image Index"], "patient": table["Patient ID"],
                         **{name: table["Finding Labels"].str.contains(name).astype(float) for name in ("Effusion", "Mass")}})
    mine.loc[::7, "Mass"] = np.nan
    mine.to_csv(tmp_path / "mine.csv", index=False)
    folder = trained(tmp_path / "run", data_root=str(phantoms), csv=str(tmp_path / "mine.csv"), classes="own", blank="unknown",
                     split="patient", valid_fraction=0.0, patience=0)
    found = run_baselines(folder)
    rows = {row["baseline"]: row for row in found["rows"]}
    assert found["standardised_over"] == "train" and "no view positions" in found["left_out"]["view"]
    assert rows["own_kernel_ridge+head"]["lambda"] == "3, the middle: no validation part"
    assert all(row["valid_auc"] is None and np.isfinite(row["test_auc"]) for row in found["rows"])
    with np.load(folder / "baselines.npz") as arrays:
        assert np.isnan(arrays["test_labels"]).any() and arrays["valid_own_ridge"].shape == (0, 2)


def test_the_command_writes_both_files_and_refuses_an_unfinished_run_by_name(runs, tmp_path):
    for file in ("baselines.json", "baselines.npz"):
        (runs / "b" / file).unlink(missing_ok=True)
    done = CliRunner().invoke(cli, ["baselines", str(runs / "b"), "--device", "cpu"], catch_exceptions=False)
    assert done.exit_code == 0 and "own_kernel_ridge+head" in done.output and "drawn phantoms, split" in done.output
    assert (runs / "b/baselines.json").is_file() and (runs / "b/baselines.npz").is_file()
    shutil.copytree(runs / "a", tmp_path / "a")
    for file in ("metrics.json", "baselines.json"):
        (tmp_path / "a" / file).unlink(missing_ok=True)
    (runs / "b/baselines.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"no {tmp_path}/a/metrics.json: the run is not finished"):
        CliRunner().invoke(cli, ["baselines", str(runs / "b"), str(tmp_path / "a")], catch_exceptions=False)
    assert not (runs / "b/baselines.json").exists()


def test_shuffled_labels_and_another_system(phantoms, tmp_path, toy):  # noqa: F811
    folder = trained(tmp_path / "shuffled", data_root=str(phantoms), labels="shuffled", use_bank=False)
    done = CliRunner().invoke(cli, ["baselines", str(folder)], catch_exceptions=False)
    assert "SHUFFLED LABELS, a control" in done.output and "own_ridge+head" in done.output
    assert "without votes" not in done.output
    run = Run.open({**TOY, "data_root": str(phantoms), "valid_fraction": 0.2, "run_dir": str(tmp_path / "toy")})
    run.train()
    run.score()
    finish(tmp_path / "toy")
    found = run_baselines(tmp_path / "toy")
    assert [row["baseline"] for row in found["rows"]] == ["run", "view"]
    assert found["left_out"]["ridges"] == "the network of system 'toy' has no trunk"
