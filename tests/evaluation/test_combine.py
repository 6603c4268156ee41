"""Merges of views and members, and normal gating: identities."""

import numpy as np
import pytest
from scipy.special import expit, logit
from scipy.stats import gmean

from charmlib.evaluation.combine import MERGES, gate, merge

Z = np.random.default_rng(0).normal(-1, 3, (4, 50, 6))


@pytest.mark.parametrize("how", MERGES)
def test_a_merge_of_equal_views_is_the_view_and_order_does_not_matter(how):
    np.testing.assert_allclose(merge([Z[0]] * 3, how), Z[0], atol=1e-9)
    assert np.array_equal(merge(Z[:1], how), Z[0])
    np.testing.assert_allclose(merge(Z, how), merge(Z[::-1], how), atol=1e-9)
    assert (merge(Z, how) <= Z.max(0) + 1e-9).all() and (merge(Z, how) >= Z.min(0) - 1e-9).all()
    assert np.isfinite(merge(Z * 1e4, how)).all()


def test_merges_equal_their_formulas_on_probabilities():
    p = expit(Z)
    for how, want in (("mean", p.mean(0)), ("max", p.max(0)), ("gmean", gmean(p, axis=0)), ("logit_mean", expit(Z.mean(0)))):
        np.testing.assert_allclose(expit(merge(Z, how)), want, rtol=1e-9)
    middle = np.sort(Z, axis=0)
    assert ((merge(Z, "median") >= middle[1]) & (merge(Z, "median") <= middle[2])).all()
    assert np.array_equal(merge(Z[:3], "median"), np.sort(Z[:3], axis=0)[1])


def test_weights_are_scaled_and_a_weight_of_0_leaves_a_member_out():
    np.testing.assert_allclose(merge(Z[:2], "mean", [3, 1]), logit(0.75 * expit(Z[0]) + 0.25 * expit(Z[1])))
    for how in ("mean", "gmean", "logit_mean"):
        np.testing.assert_allclose(merge(Z, how, [0, 2, 0, 0]), Z[1], atol=1e-9)
        np.testing.assert_allclose(merge(Z, how, [5] * 4), merge(Z, how), atol=1e-9)
    for how, weights in (("max", [1] * 4), ("mean", [1]), ("mean", [1, 1, 1, -1]), ("mean", [0] * 4)):
        with pytest.raises(ValueError, match="weights .* for 4 members"):
            merge(Z, how, weights)
    with pytest.raises(ValueError, match="merge must be one of"):
        merge(Z, "sum")


def test_gating_is_by_name_and_keeps_the_order_within_an_image():
    z, names = Z[0], ["a", "b", "No Finding", "c", "d", "e"]
    assert gate(z, 0, names) is z
    out = gate(z, 0.5, names)
    assert np.array_equal(out[:, 2], z[:, 2])
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(expit(out[:, others]), expit(z[:, others]) * np.sqrt(1 - expit(z[:, [2]])), rtol=1e-9)
    assert np.array_equal(np.argsort(out[:, others], 1), np.argsort(z[:, others], 1))
    sure = z.copy()
    sure[:, 2] = -800
    np.testing.assert_allclose(gate(sure, 1, names), z * (np.arange(6) != 2) + sure * (np.arange(6) == 2), atol=1e-9)
    sure[:, 2] = 800
    assert (expit(gate(sure, 1, names)[:, others]) < 1e-200).all() and np.isfinite(gate(sure, 1, names)).all()
    assert np.array_equal(gate(z, 0.5, list("abcdef"), "c"), gate(z, 0.5, names))
    with pytest.raises(ValueError, match="no finding"):
        gate(z, 0.5, list("abcdef"))
    with pytest.raises(ValueError, match="0 or more"):
        gate(z, -1, names)
