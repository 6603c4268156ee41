import numpy as np
import pytest
import torch

from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import FlipRotate, chest_dataloaders, flip_rotate

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def data(phantoms):
    return open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)


def loaders(data, **changes):
    return chest_dataloaders(data, **{"bs": 16, "mean": MEAN, "std": STD, **changes})


def test_batches_equal_the_slow_path(data):
    dls, seen = loaders(data), 0
    for x, y in dls.valid:
        ids = dls.valid.ids
        for i, row in enumerate(ids.tolist()):
            grey = data.images[row].astype(np.float64) / 255
            want = np.stack([(grey - m) / s for m, s in zip(MEAN, STD)])
            np.testing.assert_allclose(x[i].numpy(), want, atol=1e-5)
            assert y[i].tolist() == data.labels[row].tolist()
        seen += len(x)
    assert seen == data.split.counts["valid"]["images"]


def test_order_and_augmentation_follow_the_seed(data):
    dls = loaders(data)

    def epoch(seed):
        torch.manual_seed(seed)
        return [(dls.train.ids.tolist(), x.clone()) for x, _ in dls.train]

    a, b, c = epoch(1), epoch(1), epoch(2)
    assert all(i == j and torch.equal(x, y) for (i, x), (j, y) in zip(a, b))
    assert [i for i, _ in a] != [i for i, _ in c]
    assert sorted(sum((i for i, _ in a), [])) != sum((i for i, _ in a), [])


def test_stage_1_takes_only_images_with_a_finding_but_tests_on_all(data):
    dls = loaders(data, findings_only=True)
    finding = data.index.has_finding()
    assert finding[dls.train.dataset.rows].all() and finding[dls.valid.dataset.rows].all()
    assert len(dls.test.dataset) == data.split.counts["test"]["images"]
    assert len(dls.train.dataset) == finding[data.rows("train")].sum()


def test_flip_and_rotation_against_torchvision():
    from torchvision.transforms.functional import InterpolationMode, hflip, rotate

    x = torch.nn.functional.interpolate(torch.rand(3, 1, 8, 8), 64, mode="bicubic")
    flips, angles = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([0.0, 0.0, 0.15])
    got = flip_rotate(x, flips, angles)
    torch.testing.assert_close(got[0], x[0], atol=1e-5, rtol=0)  # no flip, no angle: the identity
    torch.testing.assert_close(got[1], hflip(x[1]), atol=1e-5, rtol=0)
    want = rotate(hflip(x[2]), np.degrees(0.15), InterpolationMode.BILINEAR)
    middle = slice(16, 48)
    error = (got[2][:, middle, middle] - want[:, middle, middle]).abs().mean()
    other = (got[2][:, middle, middle] - rotate(hflip(x[2]), -np.degrees(0.15), InterpolationMode.BILINEAR)
             [:, middle, middle]).abs().mean()
    assert min(error, other) < 0.01
    twice = flip_rotate(flip_rotate(x, -torch.ones(3), torch.zeros(3)), -torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(twice, x, atol=1e-4, rtol=0)


def test_validation_is_not_augmented(data):
    dls = loaders(data)
    assert not any(isinstance(t, FlipRotate) for t in dls.valid.after_batch.fs)
    a, b = dls.valid.one_batch()[0], dls.valid.one_batch()[0]
    assert torch.equal(a, b)
    assert not torch.equal(dls.train.one_batch()[0], dls.train.one_batch()[0])


def test_fastais_surface(data, phantoms, tmp_path):
    import matplotlib.pyplot as plt

    dls = loaders(data)
    assert dls.vocab == data.classes and dls.c == 14 and len(dls.loaders) == 3
    figure = dls.show_batch(max_n=4)
    assert sum(bool(a.images) for a in figure.axes) == 4 and all(a.get_title() for a in figure.axes[:4])
    plt.close(figure)
    files = data.index.frame["path"][data.rows("valid")[:3]].tolist()
    x, y = dls.test_dl(files).one_batch()
    assert torch.equal(x, dls.valid.one_batch()[0][:3]) and torch.isnan(y).all()


def test_drawn_images_are_labelled_in_every_picture(data):
    import matplotlib.pyplot as plt

    figure = loaders(data).show_batch(max_n=2)
    assert "drawn" in figure.get_suptitle()
    plt.close(figure)


def test_a_part_without_images_is_refused(data):
    from dataclasses import replace

    empty = replace(data, split=replace(data.split, part=np.where(data.split.part == "valid", "", data.split.part)))
    with pytest.raises(ValueError, match="valid part has 0 images"):
        loaders(empty)
