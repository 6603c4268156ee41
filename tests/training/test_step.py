"""A training step never waits for the device, and what replaces fastai's waiting parts gives fastai's figures."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import AvgLoss, AvgSmoothLoss
from fastai.metrics import AccumMetric
from fastai.optimizer import Adam
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from charmlib import Run, charm_learner
from charmlib.evaluation.metrics import ap_by_class, mean_auc, mean_over_classes
from charmlib.param_sources import load_params
from charmlib.training.device import compile_backbone, place
from charmlib.training.no_wait import AdamW, HalfPrecision
from tests.conftest import TINY
from tests.training.conftest import NET


class Waits(TorchDispatchMode):
    """Notes every operation whose result the CPU reads, or whose shape depends on the data: a GPU would be waited for."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.is_nonzero,
                                       torch.ops.aten.masked_select, torch.ops.aten.unique_dim, torch.ops.aten.equal):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes copies to the CPU, which the CPU's own tensors hide from the mode above."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item):
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class Watch(Callback):
    """The two modes around each batch, from its first callback to its last."""

    order = -1000

    def __init__(self):
        self.found, self.batches = [], 0

    def before_batch(self):
        self.modes = [Waits(self.found), Reads(self.found)]
        for mode in self.modes:
            mode.__enter__()

    def leave(self):
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)
        self.batches += 1


class Leave(Callback):
    order = 1000

    def after_batch(self):
        self.learn.watch.leave()


def watched(learn):
    watch = Watch()
    with learn.no_logging():  # without a schedule: fastai's reads small tensors of its own, which are always the CPU's
        learn.fit(2, 1e-3, cbs=[watch, Leave()])
    assert watch.batches == 2 * (len(learn.dls.train) + len(learn.dls.valid))
    return watch.found


@pytest.fixture
def published(phantoms, tmp_path):
    """A Learner with all the switches of ``params/published.yaml``."""
    params = load_params(Path(__file__).parents[2] / "params/published.yaml")
    run = Run.open(params, **TINY, data_root=str(phantoms), run_dir=str(tmp_path / "published"))
    return run.learner(run.phase("stage2"))


@pytest.mark.parametrize("half", [False, True])
def test_no_published_batch_waits_for_the_device(published, half):
    if half:
        published.add_cb(HalfPrecision())
    with published.no_bar():
        assert watched(published) == []
    assert all(torch.isfinite(p).all() for p in published.model.parameters())


@pytest.mark.parametrize("half, again", [(False, False), (True, False), (True, True)])
def test_no_batch_waits_for_the_device(learn, half, again):
    learn.model.grad_checkpointing = again
    if half:
        learn.add_cb(HalfPrecision())
    with learn.no_bar():
        assert watched(learn) == []


def test_the_watch_sees_what_fastais_own_parts_do(learn):
    learn.recorder.smooth_loss, learn.recorder.loss = AvgSmoothLoss(), AvgLoss()
    with learn.no_bar():
        assert "cpu" in watched(learn)


def test_bars_read_the_loss_once_a_second_not_once_a_batch(learn):
    assert type(learn.progress).__name__ == "Progress"
    assert watched(learn).count("item") <= 2 * (len(learn.dls.train) + len(learn.dls.valid)) / 4


def test_loss_and_auc_are_fastais(learn):
    class Both(Callback):
        order = 51

        def before_fit(self):
            self.smooth = AvgSmoothLoss()
            self.smooth.reset()  # which alone gives it a count in fastai 2.8.7

        def before_epoch(self):
            self.loss = AvgLoss()
            self.auc = AccumMetric(lambda scores, labels: mean_auc(labels, scores), flatten=False, to_np=True)
            self.ap = AccumMetric(lambda scores, labels: mean_over_classes(ap_by_class(labels, scores)), flatten=False,
                                  to_np=True)
            self.loss.reset(), self.auc.reset(), self.ap.reset()

        def after_batch(self):
            for metric in (self.smooth,) if self.training else (self.loss, self.auc, self.ap):
                metric.accumulate(self.learn)

    both = Both()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=both)
    train, valid, auc, ap = learn.recorder.values[-1]
    assert train == pytest.approx(float(both.smooth.value), rel=1e-6)
    assert valid == pytest.approx(float(both.loss.value), rel=1e-6)
    assert auc == pytest.approx(both.auc.value, abs=1e-9) and 0 < auc < 1
    assert ap == pytest.approx(both.ap.value, abs=1e-9) and 0 < ap < 1


def test_fused_adamw_is_adamw():
    torch.manual_seed(0)
    start = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(7))]
    mine, plain = copy.deepcopy(start), copy.deepcopy(start)
    opt = AdamW([[mine[0]], [mine[1]]], lr=1e-2)
    opt.set_hypers(wd=0.1, lr=[1e-2, 1e-3])
    reference = torch.optim.AdamW([{"params": plain[:1], "lr": 1e-2}, {"params": plain[1:], "lr": 1e-3}], weight_decay=0.1,
                                  foreach=False)
    for _ in range(10):
        for group in (mine, plain):
            (group[0].square().sum() + group[1].sin().sum()).backward()
        opt.step(), reference.step()
        opt.zero_grad(), reference.zero_grad()
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert opt.skipped is None


def test_the_optimizer_fastai_is_fastais_adam_without_decay_of_norms_and_biases(learn, tmp_path):
    mine = charm_learner(learn.dls, net=copy.deepcopy(learn.model), optimizer="fastai", weight_decay=0.5, seed=1, path=tmp_path)
    theirs = charm_learner(learn.dls, net=copy.deepcopy(learn.model), weight_decay=0.5, seed=1, path=tmp_path)
    theirs.opt_func, theirs.wd_bn_bias = Adam, False
    for one in (mine, theirs):
        with one.no_bar(), one.no_logging():
            one.fit_one_cycle(1, slice(1e-4, 1e-2))
    assert type(mine.opt) is AdamW and type(theirs.opt) is not AdamW
    for (name, a), b in zip(mine.model.named_parameters(), theirs.model.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    with pytest.raises(ValueError, match="optimizer must be one of adamw, sgd, fastai, got 'adam'"):
        charm_learner(learn.dls, net=learn.model, optimizer="adam")


def test_a_step_whose_gradients_overflow_changes_neither_weights_nor_branch_and_halves_the_scale(learn):
    class Overflow(Callback):
        order = 11  # after the scaler scaled the loss

        def before_backward(self):
            if self.train_iter in (1, 4):
                self.learn.loss_grad = self.loss_grad * float("inf")

        def before_step(self):
            self.before = {k: v.clone() for k, v in self.model.state_dict().items()}

        def after_cancel_step(self):
            raise AssertionError("the step is decided on the device, not cancelled by the CPU")

    class Compare(Callback):
        order = 30

        def after_step(self):
            moved = [k for k, v in self.model.state_dict().items() if not torch.equal(v, self.learn.overflow.before[k])]
            seen.append((self.train_iter, moved, self.learn.scaler.get_scale()))

    seen = []
    learn.add_cb(HalfPrecision())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=[Overflow(), Compare()])
    steps = len(learn.dls.train)
    assert [i for i, moved, _ in seen if not [k for k in moved if "num_batches" not in k]] == [1, 4]
    assert seen[-1][2] == seen[0][2] / 4
    assert learn.model.momentum.updates.item() == steps - 2
    assert learn.opt.scaler is None  # nothing of the phase is left in the optimizer


def test_half_precision_before_the_first_fit(learn):
    """A new Learner has no optimizer yet."""
    learn.add_cb(HalfPrecision())
    with learn.no_bar(), learn.no_logging():
        loss, auc, _ = learn.validate()
        scores, labels = learn.get_preds()
    assert np.isfinite(loss) and 0 < auc < 1 and scores.shape == labels.shape


def test_a_callback_may_cancel_a_half_precision_step(learn):
    from fastai.callback.core import CancelStepException

    class Cancel(Callback):
        order = 5

        def before_step(self):
            if self.train_iter % 2:
                raise CancelStepException

    learn.add_cb(HalfPrecision())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Cancel())
    steps = len(learn.dls.train)
    assert learn.model.momentum.updates.item() == len([i for i in range(steps) if i % 2 == 0])


def test_clipping_sees_gradients_without_the_scale(learn):
    from fastai.callback.training import GradientClip

    class Norm(Callback):
        order = GradientClip.order + 1

        def before_step(self):
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(torch.nn.utils.get_total_norm(grads).item())

    norms = []
    learn.add_cb(HalfPrecision())
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3, cbs=Norm())
        free = [n for n in norms if np.isfinite(n)]
        norms.clear()
        learn.fit(1, 1e-3, cbs=[GradientClip(min(free) / 2), Norm()])
    assert max(free) < 100  # of the loss itself, not of 65,536 times it
    assert max(n for n in norms if np.isfinite(n)) == pytest.approx(min(free) / 2, rel=1e-3)


def test_recorded_losses_are_plain_numbers_that_can_be_drawn(learn):
    import matplotlib.pyplot as plt

    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3)
        assert len(learn.recorder.losses) == 2 * len(learn.dls.train)
        assert all(type(v) is float for v in learn.recorder.losses)
        learn.recorder.plot_loss()
        learn.lr_find(num_it=20, show_plot=True)
        assert all(type(v) is float for v in learn.recorder.losses)
    plt.close("all")


def test_half_precision_trains_as_float32_does(learn, phantoms, tmp_path):
    other = copy.deepcopy(learn.model)
    single = charm_learner(learn.dls, net=other, seed=1, path=tmp_path)
    learn.add_cb(HalfPrecision())
    for one in (learn, single):
        with one.no_bar(), one.no_logging():
            one.fit(1, 1e-3)
    assert all(p.dtype == torch.float32 for p in learn.model.parameters())
    assert learn.recorder.values[-1][1] == pytest.approx(single.recorder.values[-1][1], rel=0.05)


def test_weights_lie_channels_last_and_files_do_not_notice(learn, tmp_path):
    from safetensors.torch import load_file

    from charmlib.params import resolve
    from charmlib.training.checkpoint import load_model, save_model

    net = learn.model
    weights = [p for p in net.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    params = {**resolve(NET), "split_hash": ""}
    path = save_model(net, tmp_path, classes=learn.dls.vocab, params=params,
                      data={"name": "drawn", "drawn": True, "scale": None})
    assert all(v.is_contiguous() for v in load_file(path).values())
    again, _ = load_model(tmp_path)
    x = torch.rand(4, 3, 32, 32)
    assert torch.equal(again(x), net.eval()(x))
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(plain(x), net(x), rtol=1e-4, atol=1e-5)


def test_old_cards_keep_torchs_layout_and_are_not_compiled_for(monkeypatch):
    class Net(torch.nn.Conv2d):
        def to(self, device, memory_format):
            self.format = memory_format
            return self

    net = Net(2, 2, 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100")
    for capability, wanted in (((6, 0), torch.contiguous_format), ((7, 5), torch.channels_last)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert place(net, torch.device("cuda")).format is wanted
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    with pytest.raises(RuntimeError, match="Tesla P100 is older than sm_70.*compile=False"):
        compile_backbone(net, torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.once
def test_a_compiled_backbone_trains_to_the_same_scores_and_the_same_files(learn, tmp_path):
    other = copy.deepcopy(learn.model)
    compile_backbone(other, torch.device("cpu"))
    compiled = charm_learner(learn.dls, net=other, seed=1, path=tmp_path)
    for one in (learn, compiled):
        with one.no_bar(), one.no_logging():
            one.fit(1, 1e-3)
    assert list(other.state_dict()) == list(learn.model.state_dict())
    np.testing.assert_allclose(compiled.recorder.values[-1][1], learn.recorder.values[-1][1], rtol=1e-3)
