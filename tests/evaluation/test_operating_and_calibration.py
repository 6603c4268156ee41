import numpy as np
import pytest
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score

from charmlib.evaluation.calibration import (
    calibration,
    calibration_error,
    fit_temperature,
    reliability_curve,
)
from charmlib.evaluation.operating import at_thresholds, called, choose_thresholds


def test_each_point_is_the_best_of_all_thresholds(cohort):
    labels, logits, _ = cohort
    got = choose_thresholds(labels, logits, "abc", ["youden", "f1", "sensitivity_0.90", "sensitivity_1"])
    for i, name in enumerate("abc"):
        y = labels[:, i] == 1

        def rates(t, i=i, y=y):
            call = called(logits[:, i], t)
            return call[y].mean(), (~call[~y]).mean(), f1_score(y, call)

        every = expit(np.unique(logits[:, i]))
        assert sum(rates(got["youden"][name])[:2]) == pytest.approx(max(sum(rates(t)[:2]) for t in every))
        assert rates(got["f1"][name])[2] == pytest.approx(max(rates(t)[2] for t in every))
        for point, share in (("sensitivity_0.90", 0.9), ("sensitivity_1", 1.0)):
            chosen = got[point][name]
            assert rates(chosen)[0] >= share
            assert all(rates(t)[0] < share for t in every if t > chosen)  # the highest that still does


def test_undefined_classes_and_unknown_points(cohort):
    labels, logits, _ = cohort
    labels[:, 1] = np.nan
    labels[:, 2] = 1
    got = choose_thresholds(labels, logits, "abc")
    assert got["youden"]["b"] is None and got["f1"]["c"] is None and got["youden"]["a"] is not None
    assert set(at_thresholds(labels, logits, "abc", got["youden"])) == {"a"}
    for wrong in ("yuden", "sensitivity_2", "sensitivity_x", "specificity_0.9"):
        with pytest.raises(ValueError, match=f"unknown operating point '{wrong}'.*youden, f1"):
            choose_thresholds(labels, logits, "abc", [wrong])


def test_a_threshold_survives_json_and_float32(cohort):
    """Once a threshold, stored as a probability and read back, no longer called the very image that had set it."""
    import json

    labels, logits, _ = cohort
    logits = (logits * np.pi).astype(np.float32)
    chosen = json.loads(json.dumps(choose_thresholds(labels, logits, "abc")))["sensitivity_0.90"]
    for i, name in enumerate("abc"):
        row = at_thresholds(labels, logits, "abc", chosen)[name]
        assert row["sensitivity"] >= 0.9 and row["tp"] + row["fn"] == (labels[:, i] == 1).sum()
        assert row["tp"] + row["fp"] + row["fn"] + row["tn"] == 400


def test_temperature_is_found_again():
    g = np.random.default_rng(0)
    logits = g.normal(-1, 1.5, (20000, 3))
    labels = (g.random(logits.shape) < expit(logits)).astype(float)
    assert fit_temperature(labels, logits) == pytest.approx(1, abs=0.05)
    assert fit_temperature(labels, logits * 2.5) == pytest.approx(2.5, rel=0.05)
    labels[:5000] = np.nan
    assert fit_temperature(labels, logits / 3) == pytest.approx(1 / 3, rel=0.05)
    assert fit_temperature(np.full((4, 2), np.nan), np.zeros((4, 2))) == 1.0
    before, after = (calibration(labels, logits * 2.5, "abc", t) for t in (1.0, 2.5))
    assert after["mean_ece"] < 0.3 * before["mean_ece"] and after["mean_brier"] < before["mean_brier"]


@pytest.mark.parametrize("strategy", ["uniform", "quantile"])
def test_reliability_is_scikit_learns(cohort, strategy):
    labels, logits, _ = cohort
    probability = expit(logits[:, 0])
    mean, share, count = reliability_curve(labels[:, 0], probability, bins=8, strategy=strategy)
    true, predicted = calibration_curve(labels[:, 0], probability, n_bins=8, strategy=strategy)
    np.testing.assert_allclose(share, true)
    np.testing.assert_allclose(mean, predicted)
    assert count.sum() == 400
    slow = sum(n * abs(m - s) for m, s, n in zip(mean, share, count)) / 400
    assert calibration_error(labels[:, 0], probability, bins=8, strategy=strategy) == pytest.approx(slow)
    assert np.isnan(calibration_error([], []))
    with pytest.raises(ValueError, match="uniform"):
        reliability_curve([1], [0.5], strategy="width")
