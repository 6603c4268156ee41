"""Uneven draws against slow formulas, and the prior of a sample."""

import numpy as np
import pytest
import torch

from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import chest_dataloaders
from charmlib.data.sampling import draw, expected_draws, prior_shift, shares


@pytest.fixture(scope="module")
def labels():
    """2,000 images of five classes, from common to rare, some unknown; most images have none."""
    generator = np.random.default_rng(0)
    out = (generator.random((2000, 5)) < [0.2, 0.1, 0.03, 0.01, 0.004]).astype(np.float32)
    out[generator.random(out.shape) < 0.02] = np.nan
    return out


def uniform(seed):
    return np.random.default_rng(seed).random


def slow(labels, sampler, threshold):
    """Mean draws, one image and one class at a time."""
    classes = [[i for i, row in enumerate(labels) if row[c] == 1] for c in range(labels.shape[1])]
    classes.append([i for i, row in enumerate(labels) if not (row == 1).any()])
    known = [sum(row[c] == row[c] for row in labels) for c in range(labels.shape[1])] + [len(labels)]
    out = np.zeros(len(labels))
    for members, n in zip(classes, known):
        for i in members:
            if sampler == "class_aware":
                out[i] += 1 / len(members)
            else:
                out[i] = max(out[i], 1, (threshold / (len(members) / n)) ** 0.5)
    return out / out.sum() * len(labels)


@pytest.mark.parametrize("sampler, threshold", [("class_aware", 0), ("repeat", 0.01), ("repeat", 0.15), ("repeat", 0.0)])
def test_mean_draws_against_the_formula(labels, sampler, threshold):
    got = expected_draws(labels, sampler, threshold=threshold)
    np.testing.assert_allclose(got, slow(labels, sampler, threshold), rtol=1e-10)
    assert (got == 1).all() == (threshold == 0 and sampler == "repeat")


@pytest.mark.parametrize("sampler", ["class_aware", "repeat"])
def test_shares_of_200000_draws(labels, sampler):
    """Within 1 % of the formula; images without a class are drawn as a class of their own."""
    expected = expected_draws(labels, sampler, threshold=0.05)
    drawn = np.concatenate([draw(expected, uniform(i)) for i in range(100)])
    assert len(drawn) == 200_000
    np.testing.assert_allclose(shares(labels[drawn]), shares(labels, expected), rtol=0.01, atol=5e-4)
    none = ~(labels == 1).any(1)
    assert none[drawn].mean() == pytest.approx(expected[none].sum() / 2000, rel=0.01)
    if sampler == "class_aware":
        each = [(1 / (labels == 1).sum(0)[c] * (2000 / 6)) for c in range(5)]
        alone = [expected[(labels[:, c] == 1) & (np.nansum(labels, 1) == 1)] for c in range(5)]
        assert all(np.allclose(a, e) for a, e in zip(alone, each)) and expected[none].sum() == pytest.approx(2000 / 6)


def test_an_epoch_rounds_each_image_up_or_down_and_its_mean_is_right(labels):
    expected = expected_draws(labels, "repeat", threshold=0.15)
    times = np.stack([np.bincount(draw(expected, uniform(i)), minlength=2000) for i in range(300)])
    assert (times.sum(1) == 2000).all()
    assert ((times == np.floor(expected)) | (times == np.ceil(expected))).all()
    error = (times.mean(0) - expected) / np.sqrt(np.maximum(expected % 1 * (1 - expected % 1), 1e-9) / 300)
    assert np.abs(error).max() < 5  # standard errors
    even = [np.bincount(draw(np.ones(50), uniform(i)), minlength=50) for i in range(3)]
    assert (np.stack(even) == 1).all()


def test_copies_do_not_stand_side_by_side(labels):
    expected = expected_draws(labels, "class_aware")
    order = draw(expected, uniform(5))
    most = np.bincount(order).argmax()
    times, places = (order == most).sum(), np.flatnonzero(order == most)
    assert times > 20 and np.diff(places).min() > 0.5 * 2000 / times


def test_the_order_of_an_epoch_is_random(labels):
    """Images of the first draw of the epoch are no others than those of the last."""
    expected = expected_draws(labels, "class_aware")
    halves = np.stack([shares(labels[half]) for i in range(40) for half in np.split(draw(expected, uniform(i)), 2)])
    assert np.abs(halves[::2].mean(0) - halves[1::2].mean(0)).max() < 0.01
    assert (draw(expected, uniform(1)) != draw(expected, uniform(2))).mean() > 0.9
    assert (draw(expected, uniform(1)) == draw(expected, uniform(1))).all()


def test_the_shift_is_the_change_of_the_log_odds(labels):
    expected = expected_draws(labels, "class_aware")
    for c, shift in enumerate(prior_shift(labels, expected)):
        drawn = [sum(e for e, row in zip(expected, labels) if row[c] == y) for y in (1, 0)]
        there = [sum(1 for row in labels if row[c] == y) for y in (1, 0)]
        assert shift == pytest.approx(np.log(drawn[0] / drawn[1]) - np.log(there[0] / there[1]))
    assert np.allclose(prior_shift(labels, np.ones(2000)), 0)


def test_a_class_without_images_is_named():
    labels = np.array([[1, 0, 1], [0, 0, 1], [0, 0, 1]], np.float32)
    with pytest.warns(UserWarning, match="no training image has Hernia: none"):
        expected = expected_draws(labels, "class_aware", names=["Mass", "Hernia", "Edema"])
    assert (prior_shift(labels, expected)[1:] == 0).all() and prior_shift(labels, expected)[0] > 0
    with pytest.raises(ValueError, match="unknown sampler 'fair'"):
        expected_draws(labels, "fair")


@pytest.fixture(scope="module")
def data(phantoms):
    return open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)


def order(data, seed, **changes):
    dls = chest_dataloaders(data, bs=16, **changes)
    torch.manual_seed(seed)
    return [row for _ in dls.train for row in dls.train.ids.tolist()], dls


def test_natural_draws_are_torchs_permutation(data):
    rows = data.rows("train")
    torch.manual_seed(3)
    want = rows[torch.randperm(len(rows)).numpy()]
    got, dls = order(data, 3)
    assert got == want[:len(got)].tolist() and dls.train.expected is None


@pytest.mark.parametrize("preload", [False, True])
def test_loaders_draw_from_torchs_generator_and_score_every_image(data, preload):
    first, dls = order(data, 3, sampler="class_aware", preload=preload)
    assert first == order(data, 3, sampler="class_aware")[0] != order(data, 4, sampler="class_aware")[0]
    assert set(first) < set(data.rows("train").tolist()) and len(first) == 16 * (len(data.rows("train")) // 16)
    for part, dl in (("valid", dls.valid), ("test", dls.test)):
        assert [row for _ in dl for row in dl.ids.tolist()] == data.rows(part).tolist()
    rare = np.argmin((data.labels[data.rows("train")] == 1).sum(0))
    assert (data.labels[first] == 1).mean(0)[rare] > 2 * (data.labels[data.rows("train")] == 1).mean(0)[rare]
