"""What only a GPU can show. Skipped, by name, where there is none; nothing here is needed for the rest to be right."""

import math

import pytest
import torch
from fastai.callback.core import Callback

from charmlib import charm_learner
from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import chest_dataloaders
from charmlib.training.device import compile_backbone, place
from tests.training.conftest import HALF, NET

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: fp16, pinned loading and waits on a real device")


def learner(phantoms, tmp_path, precision="fp16", training=None, **options):
    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)
    dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF, device="cuda", path=tmp_path, **options)
    torch.manual_seed(0)
    return charm_learner(dls, seed=1, path=tmp_path, precision=precision, **NET, **training or {})


class NoWaits(Callback):
    """CUDA raises at whatever would make the CPU wait, from the first training batch of an epoch to its last."""

    order = 999

    def after_batch(self):
        torch.cuda.set_sync_debug_mode("error" if self.training and self.iter < self.n_iter - 1 else "default")


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_training_never_waits(phantoms, tmp_path, precision, preload):
    learn = learner(phantoms, tmp_path, precision, preload=preload)
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=NoWaits())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learn.model.momentum.updates.item() > 0 and learn.model.bank.filled.item() == 16


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_uneven_draws_margins_and_class_weights_never_wait(phantoms, tmp_path, precision):
    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)
    dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF, device="cuda", path=tmp_path, sampler="class_aware")
    with pytest.warns(UserWarning, match="multiply"):
        learn = charm_learner(dls, seed=1, path=tmp_path, precision=precision, loss="ldam", ldam_scale=30.0,
                              class_weight="effective", weight_from=0.5, **NET)
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=NoWaits())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("training", [{"average": 0.9}, {"average": 0.9, "average_warmup": True, "optimizer": "sgd",
                                                         "clip_norm": 1}])
def test_training_with_an_average_sgd_clipping_and_strong_augmentation_never_waits(phantoms, tmp_path, precision, training):
    learn = learner(phantoms, tmp_path, precision, training, augment="strong")
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3, cbs=NoWaits())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_batches_and_scores_are_the_cpus(phantoms, tmp_path):
    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)
    seen = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(3)
        dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF, device=device)
        seen.append([(x.cpu(), y.cpu(), dls.train.ids.cpu()) for x, y in dls.train])
    for (x, y, ids), (x_, y_, ids_) in zip(*seen, strict=True):
        assert torch.equal(ids, ids_) and torch.equal(y, y_)
        torch.testing.assert_close(x.as_subclass(torch.Tensor), x_.as_subclass(torch.Tensor), rtol=1e-4, atol=1e-4)


def test_the_finder_draws_and_a_new_learner_validates(phantoms, tmp_path):
    learn = learner(phantoms, tmp_path)
    with learn.no_bar(), learn.no_logging():
        assert 0 < learn.validate()[1] < 1
        assert learn.lr_find(num_it=20, show_plot=True).valley > 0
        learn.fit(1, 1e-3)
        learn.recorder.plot_loss()


def test_a_step_whose_gradients_overflow_is_skipped_without_a_wait(phantoms, tmp_path):
    class Overflow(Callback):
        order = 11

        def before_backward(self):
            if self.train_iter == 2:
                self.learn.loss_grad = self.loss_grad * float("inf")

    learn = learner(phantoms, tmp_path)
    try:
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-3, cbs=[Overflow(), NoWaits()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert learn.model.momentum.updates.item() == len(learn.dls.train) - 1


def test_fp16_trains_as_fp32_does(phantoms, tmp_path):
    losses = []
    for precision in ("fp16", "fp32"):
        learn = learner(phantoms, tmp_path, precision)
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, 1e-3)
        losses.append(learn.recorder.values[-1][1])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_a_compiled_backbone_trains(phantoms, tmp_path):
    if torch.cuda.get_device_capability() < (7, 0):
        pytest.skip("this card is older than sm_70")
    learn = learner(phantoms, tmp_path)
    compile_backbone(place(learn.model, torch.device("cuda")), torch.device("cuda"))
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert math.isfinite(learn.recorder.values[-1][1])
