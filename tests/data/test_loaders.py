import numpy as np
import pytest
import torch

from charmlib.data.augment import Augment
from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import GreyToNetwork, chest_dataloaders

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


def test_training_batches_equal_turning_three_channels_after_scaling(data):
    """The slow twin expands and scales first, then turns each channel."""
    from fastai.torch_core import TensorImage

    scale, turn = GreyToNetwork(MEAN, STD), Augment()
    grey = TensorImage(torch.from_numpy(data.images[np.arange(8)][:, None]))
    torch.manual_seed(3)
    fast = scale.encodes(turn.encodes(grey))
    torch.manual_seed(3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    slow = turn.encodes(TensorImage(((grey.float() / 255).expand(-1, 3, -1, -1) - mean) / std))
    assert fast.shape == slow.shape == (8, 3, 32, 32) and fast.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-5)
    order = [type(t) for t in loaders(data).train.after_batch.fs]
    assert order == [Augment, GreyToNetwork]  # one channel is turned, not three


def test_preloaded_batches_are_the_same(data):
    read, held = loaders(data), loaders(data, preload=True)

    def epoch(dls):
        torch.manual_seed(5)
        return [(dls.train.ids.tolist(), x, y) for x, y in dls.train]

    for (ids, x, y), (ids_, x_, y_) in zip(epoch(read), epoch(held), strict=True):
        assert ids == ids_ and torch.equal(x, x_) and torch.equal(y, y_)
    assert torch.equal(read.train.dataset[3][0], held.train.dataset[3][0])


def test_preload_is_refused_where_the_card_is_too_small(data, monkeypatch):
    dataset = loaders(data).train.dataset
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    with pytest.raises(MemoryError, match="say preload=False"):
        dataset.preload("cuda")


def test_reading_ahead_changes_neither_order_nor_content(data, monkeypatch):
    import charmlib.data.loaders as module

    def epoch():
        torch.manual_seed(1)
        dls = loaders(data)
        return [(dls.train.ids.clone(), x) for x, _ in dls.train]

    ahead = epoch()
    monkeypatch.setattr(module, "READ_AHEAD", 0)
    for (ids, x), (ids_, x_) in zip(ahead, epoch(), strict=True):
        assert torch.equal(ids, ids_) and torch.equal(x, x_)


def test_leaving_a_loader_early_ends_its_reader(data):
    import threading

    before = threading.active_count()
    for _ in range(20):
        next(iter(loaders(data).train))
    assert threading.active_count() <= before + 1


def test_an_error_while_reading_ahead_reaches_the_training_loop(data, monkeypatch):
    dls = loaders(data)
    monkeypatch.setattr(dls.train.dataset, "rows", np.full(len(dls.train.dataset), 10**6))
    with pytest.raises(IndexError, match="1000000"):
        dls.train.one_batch()


def test_later_epochs_open_no_file(data):
    """Also not the cache's: it is mapped once."""
    import sys

    opened, watching = [], [False]

    def hook(event, args):
        if watching[0] and event == "open":
            opened.append(args[0])

    sys.addaudithook(hook)
    dls = loaders(data)
    for _ in dls.train:
        pass
    watching[0] = True
    for part in (dls.train, dls.valid):
        for _ in part:
            pass
    watching[0] = False
    assert opened == []


def test_stage_1_takes_only_images_with_a_finding_but_tests_on_all(data):
    dls = loaders(data, findings_only=True)
    finding = data.index.has_finding()
    assert finding[dls.train.dataset.rows].all() and finding[dls.valid.dataset.rows].all()
    assert len(dls.test.dataset) == data.split.counts["test"]["images"]
    assert len(dls.train.dataset) == finding[data.rows("train")].sum()


def test_validation_is_not_augmented(data):
    dls = loaders(data)
    a, b = dls.valid.one_batch()[0], dls.valid.one_batch()[0]
    assert torch.equal(a, b)
    plain = loaders(data, degrees=0.0, flip=0.0)
    for part in (1, 2):
        assert all(torch.equal(x, y) for (x, _), (y, _) in zip(dls[part], plain[part]))
    with dls.valid.dataset.set_split_idx(0):  # fastai's tta
        assert not torch.equal(dls.valid.one_batch()[0], a)
    assert torch.equal(dls.valid.one_batch()[0], a)
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
