"""The fast bootstrap against its slow readable twin, and what an interval must be."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from charmlib.evaluation.intervals import (
    BAND_X,
    bootstrap,
    interval,
    intervals_by_class,
    mean_of_defined,
    operating_resamples,
    precision_recall_bands,
    roc_bands,
)
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.operating import called, rates


def slow_weights(patients, resamples, seed):
    names, index = np.unique(patients, return_inverse=True)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    return draws[:, index].astype(float)


def slow_bootstrap(labels, scores, patients, resamples, seed):
    """scikit-learn's weighted metrics, one call a resample and class."""
    auc, ap = np.full((2, resamples, labels.shape[1]), np.nan)
    for r, weight in enumerate(slow_weights(patients, resamples, seed)):
        for c in range(labels.shape[1]):
            there = ~np.isnan(labels[:, c]) & (weight > 0)
            y = labels[there, c]
            if 0 < y.sum() < len(y):
                auc[r, c] = roc_auc_score(y, scores[there, c], sample_weight=weight[there])
                ap[r, c] = average_precision_score(y, scores[there, c], sample_weight=weight[there])
    return auc, ap


@pytest.mark.parametrize("case", ["ties", "nan", "constant", "no ties", "rare", "float32"])
def test_equal_to_scikit_learn(cohort, case):
    labels, scores, patients = cohort
    if case == "nan":
        labels[np.random.default_rng(1).random(labels.shape) < 0.2] = np.nan
    if case == "constant":
        scores[:, 1] = 0.25
    if case == "no ties":
        scores = scores + np.random.default_rng(2).normal(size=scores.shape)
    if case == "rare":
        labels[:, 2] = 0
        labels[[5, 77], 2] = 1
    if case == "float32":
        labels, scores = labels.astype(np.float32), scores.astype(np.float32)
    found = bootstrap(labels, scores, patients, resamples=70, seed=3)
    auc, ap = slow_bootstrap(labels, scores, patients, 70, 3)
    np.testing.assert_allclose(found.auc, auc, rtol=0, atol=1e-12)
    np.testing.assert_allclose(found.ap, ap, rtol=0, atol=1e-12)
    if case == "rare":
        assert 0 < np.isnan(found.auc[:, 2]).mean() < 0.5  # some resamples miss both patients
    if case == "constant":
        assert (found.auc[:, 1] == 0.5).all()


def test_operating_rates_equal_the_slow_way(cohort):
    labels, scores, patients = cohort
    labels[:40, 0] = np.nan
    thresholds = [0.5, 0.6, None]
    found = operating_resamples(labels, scores, patients, thresholds, resamples=30, seed=3)
    for r, weight in enumerate(slow_weights(patients, 30, 3)):
        for c in (0, 1):
            there = ~np.isnan(labels[:, c])
            y, w, call = labels[there, c] == 1, weight[there], called(scores[there, c], thresholds[c])
            want = rates(w[y & call].sum(), w[~y & call].sum(), w[y & ~call].sum(), w[~y & ~call].sum())
            for name, value in want.items():
                np.testing.assert_allclose(found[name][r, c], value, atol=1e-12)
    assert np.isnan(found["sensitivity"][:, 2]).all()


def test_intervals_are_seeded_contain_the_mean_and_know_clusters(cohort):
    labels, scores, patients = cohort

    def mean_interval(labels, scores, patients):
        return interval(mean_of_defined(bootstrap(labels, scores, patients).auc))

    one = mean_interval(labels, scores, patients)
    assert one.low < mean_auc(labels, scores) < one.high and one == mean_interval(labels, scores, patients)
    many = mean_interval(np.tile(labels, (4, 1)), np.tile(scores, (4, 1)), np.tile(patients, 4))
    alone = mean_interval(np.tile(labels, (4, 1)), np.tile(scores, (4, 1)), np.arange(1600))
    assert many.high - many.low > 1.5 * (alone.high - alone.low)  # copies of the same patients bring nothing new
    shuffled = np.random.default_rng(0).permutation(len(labels))
    moved = bootstrap(labels[shuffled], scores[shuffled], patients[shuffled], resamples=20)
    np.testing.assert_allclose(moved.auc, bootstrap(labels, scores, patients, resamples=20).auc, atol=1e-12)


def test_coverage_of_a_known_auc():
    """Independent images of a class whose true AUC is 0.7602 (unit normals one apart): about 95 of 100 intervals hold it."""
    g, held = np.random.default_rng(5), 0
    for _ in range(100):
        y = (np.arange(300) < 60).astype(float)[:, None]
        found = interval(bootstrap(y, g.normal(size=(300, 1)) + y, np.arange(300), resamples=300).auc[:, 0])
        held += found.low <= 0.7602 <= found.high
    assert 88 <= held <= 100


def test_one_patient_and_a_class_without_positives(cohort):
    labels, scores, patients = cohort
    labels[:, 1] = 0
    found = bootstrap(labels, scores, patients, resamples=50)
    by_class = intervals_by_class(found.auc, "abc")
    assert by_class["b"].undefined == 1 and np.isnan(by_class["b"].low) and by_class["a"].undefined == 0
    means = mean_of_defined(found.auc)
    np.testing.assert_allclose(means[~np.isnan(found.auc[:, 2])],
                               found.auc[~np.isnan(found.auc[:, 2])][:, [0, 2]].mean(1))  # over the defined ones
    same = bootstrap(labels, scores, np.zeros(400), resamples=5)
    assert np.allclose(same.auc[:, 0], same.auc[0, 0])  # one patient is always drawn
    from charmlib.evaluation.score import score_part

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        part, samples = score_part({"labels": labels, "logits": scores, "patients": np.zeros(400)}, "abc",
                                   thresholds={"youden": {"a": 0.5, "b": None, "c": 0.5}}, temperature=1.5)
    assert samples is None and np.isnan(part["mean_auc_low"]) and part["intervals"]["auc"]["a"].undefined == 1
    assert np.isnan(part["operating"]["youden"]["a"]["sensitivity_interval"].low) and "b" not in part["operating"]["youden"]


@pytest.mark.parametrize("c", [0, 2], ids=["common", "rare"])
@pytest.mark.parametrize("ties", [True, False])
def test_bands_equal_the_slow_way(cohort, c, ties):
    """Straight lines between the positives' points once lifted the band of a rare finding by up to 0.4."""
    labels, scores, patients = cohort
    labels, scores = labels[:, [c]], scores[:, [c]]
    if not ties:
        scores = scores + np.random.default_rng(2).normal(size=scores.shape)
    roc, pr = (f(labels, scores, patients, resamples=40, seed=3)[0] for f in (roc_bands, precision_recall_bands))
    curves, precisions = [], []
    for weight in slow_weights(patients, 40, 3):
        there = weight > 0
        y, s, w = labels[there, 0], scores[there, 0], weight[there]
        if not 0 < y.sum() < len(y):
            continue
        false, true, _ = roc_curve(y, s, sample_weight=w, drop_intermediate=False)
        curves.append(np.interp(BAND_X, false, true))
        precision, recall, _ = precision_recall_curve(y, s, sample_weight=w)
        precisions.append([precision[:-1][recall[:-1] >= max(at, 1e-9) - 1e-12][-1] for at in BAND_X])
    np.testing.assert_allclose(roc.low, np.quantile(curves, 0.025, axis=0), atol=1e-9)
    np.testing.assert_allclose(roc.high, np.quantile(curves, 0.975, axis=0), atol=1e-9)
    np.testing.assert_allclose(pr.low, np.quantile(precisions, 0.025, axis=0), atol=1e-9)
    np.testing.assert_allclose(pr.high, np.quantile(precisions, 0.975, axis=0), atol=1e-9)
    assert np.isnan(roc_bands(labels, scores, np.zeros(400))[0].low).all()


MILLION = """
import resource, numpy as np
from charmlib.evaluation.intervals import bootstrap, interval, mean_of_defined
g = np.random.default_rng(0)
n = 1_000_000
labels = (g.random((n, 14), dtype=np.float32) < 0.05).astype(np.float32)
scores = g.standard_normal((n, 14), dtype=np.float32) + labels
patients = g.integers(0, 250_000, n)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = bootstrap(labels, scores, patients, resamples=16)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
low, high, undefined = interval(mean_of_defined(found.auc))
assert 0.755 < low < high < 0.765 and undefined == 0
from charmlib.evaluation.intervals import roc_bands
from charmlib.evaluation.score import score_part
classes = [f"c{i}" for i in range(14)]
roc_bands(labels[:, :2], scores[:, :2], patients, resamples=4)
score_part({"labels": labels, "logits": scores, "patients": patients}, classes, temperature=1.1, resamples=8,
           prevalence=dict.fromkeys(classes, 0.05), thresholds={"youden": dict.fromkeys(classes, 0.5)})
everything = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) / 2**20, (everything - before) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.once
def test_a_million_images_stay_within_memory():
    """1e6 x 14: the input is 0.1 GB; the bootstrap may take 1.5 GB more, everything that is said of a part 3 GB."""
    done = subprocess.run([sys.executable, "-c", MILLION], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, everything = map(float, done.stdout.split())
    assert alone < 1.5 and everything < 3
