import numpy as np
import pytest
from scipy.stats import norm

from charmlib.evaluation.compare import compare, holm, p_of
from charmlib.evaluation.few import FEW, auc, patients_with, values_of_positives, widened, widened_difference
from charmlib.evaluation.intervals import Interval, bootstrap, interval
from charmlib.evaluation.metrics import ap_by_class, auc_by_class
from charmlib.evaluation.operating import at_thresholds
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.score import score_part

A, B = "Effusion", "Hernia"


def part(generator, rare: int, shift: float = 1.5, patients: int = 400, images: int = 2):
    """Two classes: one of every third patient, one of ``rare`` patients; logits rounded, so that some are tied."""
    who = np.repeat(np.arange(patients), images)
    labels = np.stack([who % 3 == 0, who < rare], 1).astype(np.float32)
    logits = generator.normal(size=labels.shape) + shift * labels
    return labels, np.round(logits, 2).astype(np.float32), np.char.add("p", who.astype(str))


def test_figures_are_means_over_positives():
    labels, logits, _ = part(np.random.default_rng(0), 5)
    labels[3, 1] = np.nan
    for c, name in enumerate((A, B)):
        assert values_of_positives("auc", labels, logits, c).mean() == pytest.approx(auc_by_class(labels, logits, (A, B))[name])
        assert values_of_positives("ap", labels, logits, c).mean() == pytest.approx(ap_by_class(labels, logits, (A, B))[name])
        assert values_of_positives("sensitivity", labels, logits, c, 0.6).mean() == pytest.approx(
            at_thresholds(labels, logits, (A, B), {A: 0.6, B: 0.6})[name]["sensitivity"])


def test_one_positive_image_says_little():
    labels, logits, patients = part(np.random.default_rng(0), 1, images=1)
    logits[0, 1] = np.sort(logits[1:, 1])[-6] + 0.001  # a few negatives score higher
    found, samples = score_part({"labels": labels, "logits": logits, "patients": patients}, (A, B),
                                thresholds={"youden": {A: 0.5, B: 0.5}})
    low, high, undefined = found["intervals"]["auc"][B]
    narrow = np.nanquantile(samples.auc[:, 1], (0.025, 0.975))
    assert narrow[1] - narrow[0] < 0.03 and found["auc"][B] > 0.98  # what the bootstrap says
    assert low < 0.2 and high > 0.99 and 0.3 < undefined < 0.45
    assert found["operating"]["youden"][B]["sensitivity_interval"][:2] == pytest.approx((0.025, 1.0), abs=1e-3)
    mean = found["intervals"]["mean_auc"]
    assert mean[0] < found["mean_auc"] - 0.3 and mean[0] < mean[1] <= 1.0
    assert found["intervals"]["patients"] == {A: 134, B: 1}


def test_nothing_changes_from_fifteen_patients_on():
    labels, logits, patients = part(np.random.default_rng(0), FEW)
    found, samples = score_part({"labels": labels, "logits": logits, "patients": patients}, (A, B))
    assert found["intervals"]["auc"][B][:2] == pytest.approx(np.nanquantile(samples.auc[:, 1], (0.025, 0.975)))
    assert found["intervals"]["mean_auc"][:2] == pytest.approx(np.nanquantile(samples.auc.mean(1), (0.025, 0.975)))
    bound = Interval(0.6, 0.9, 0.0)
    assert widened(bound, "auc", 0.8, FEW) == bound and widened(bound, "auc", 0.8, FEW - 1) != bound
    assert patients_with(labels, patients, (A, B)) == {A: 134, B: FEW}


@pytest.mark.parametrize("rare, shift", [(1, 1.0), (4, 2.5), (14, 2.5)])
def test_widened_intervals_cover_the_truth(rare, shift):
    generator, hits, narrow, truth, rounds = np.random.default_rng(85), 0, 0, norm.cdf(shift / np.sqrt(2)), 100
    for _ in range(rounds):
        labels, logits, patients = (values[..., 1:] if values.ndim > 1 else values
                                    for values in part(generator, rare, shift, patients=150, images=1))
        own = interval(bootstrap(labels, logits, patients, resamples=100).auc[:, 0])
        wide = widened(own, "auc", auc_by_class(labels, logits, [B])[B], rare)
        hits, narrow = hits + (wide.low <= truth <= wide.high), narrow + (own.low <= truth <= own.high)
    assert hits / rounds > 0.93 and narrow < hits


@pytest.mark.parametrize("rare", [1, 2, 5, 12])
def test_equal_runs_are_seldom_told_apart(rare):
    generator, wrong, rounds = np.random.default_rng(85), 0, 200
    for _ in range(rounds):
        labels, logits, patients = part(generator, rare, patients=150, images=2)
        values = [values_of_positives("auc", labels, logits + generator.normal(size=logits.shape), 1) for _ in range(2)]
        own = Interval(1.0, -1.0, 0.0)  # so that the limits are those of the patients alone
        low, high, _ = widened_difference(own, "auc", *values, patients[labels[:, 1] == 1])
        wrong += low > 1e-12 or high < -1e-12
    assert wrong / rounds < 0.08 and low < 0 < high


def test_a_mean_difference_knows_that_one_of_its_classes_is_rare():
    generator = np.random.default_rng(0)
    labels, logits, patients = part(generator, 1, images=1)
    better = logits.copy()
    better[0, 1] += 3
    runs = [Predictions(np.arange(len(labels)), patients, labels, p, (A, B)) for p in (logits, better)]
    table = compare(*runs).set_index(["class", "figure"])
    mean, common = table.loc[("mean of classes", "AUC")], table.loc[(A, "AUC")]
    assert mean["difference"] > 0 and mean["low"] < 0 < mean["high"]  # one patient decides nothing
    assert common["difference"] == common["low"] == common["high"] == 0


def test_differences_of_a_board_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03, 0.5]).tolist() == pytest.approx([0.04, 0.09, 0.09, 0.5])  # Holm 1979; R's p.adjust
    assert p_of(0.2, (0.0, 0.3)) == pytest.approx(0.05) == p_of(-0.2, (-0.4, 0.0))
    assert p_of(0.2, (0.1, 0.3)) < 0.001 and p_of(0.0, (0.0, 0.0)) == 1 and p_of(0.1, (0.1, 0.1)) == 0


def test_the_auc_by_ranks_is_scikit_learns():
    generator = np.random.default_rng(0)
    labels = (generator.random((300, 3)) < [0.4, 0.05, 0.0]).astype(np.float32)
    labels[generator.random(labels.shape) < 0.1] = np.nan
    logits = generator.normal(size=labels.shape).round(1)  # with ties
    want = auc_by_class(labels, logits, list("abc"))
    np.testing.assert_allclose([auc(labels, logits, c) for c in range(3)], list(want.values()), rtol=1e-12)
    assert np.isnan(auc(labels, logits, 2))


def test_a_difference_of_two_shares_stays_between_minus_one_and_one():
    patients = np.array(["a", "b"])
    found = widened_difference(Interval(0.0, 0.5, 0), "auc", np.array([0.1, 0.9]), np.array([0.9, 0.2]), patients)
    assert (found.low, found.high) == (-1.0, 1.0)
