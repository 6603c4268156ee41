"""Optimizers, clipping and schedules of a run: rates at each step, and runs that are killed."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.tracker import ReduceLROnPlateau
from fastai.callback.training import GradientClip
from fastai.optimizer import Adam

from charmlib import Run, charm_learner
from charmlib.params import ParameterError, missing_need, resolve
from charmlib.training.callbacks import FallingRate
from charmlib.training.no_wait import SGD, HalfPrecision
from tests.training.test_run import Killed, killed_after, same_run
from tests.training.test_step import watched


def test_sgd_is_torchs_with_momentum_and_decay():
    torch.manual_seed(0)
    start = [torch.nn.Parameter(torch.randn(5, 4)), torch.nn.Parameter(torch.randn(7))]
    mine, plain = copy.deepcopy(start), copy.deepcopy(start)
    opt = SGD([[mine[0]], [mine[1]]], lr=1e-2)
    opt.set_hypers(wd=0.1, lr=[1e-2, 1e-3])
    state = [torch.zeros_like(p) for p in plain]
    for _ in range(10):
        for group in (mine, plain):
            (group[0].square().sum() + group[1].sin().sum()).backward()
        opt.step(), opt.zero_grad()
        for i, (p, rate) in enumerate(zip(plain, (1e-2, 1e-3))):  # v <- 0.9 v + g + wd p, p <- p - rate v
            state[i] = 0.9 * state[i] + p.grad + 0.1 * p.detach()
            p.data -= rate * state[i]
            p.grad = None
    for a, b in zip(mine, plain):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert opt.skipped is None and {group["mom"] for group in opt.hypers} == {0.9}


def test_a_skipped_first_step_of_sgd_leaves_no_trace():
    """torch's fused kernel leaves the momentum of a skipped first step as it lay in memory."""
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(300, 40))]
    start, opt = mine[0].detach().clone(), SGD([mine], lr=0.1)
    opt.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for grad in (torch.full((300, 40), float("inf")), torch.ones(300, 40)):
        opt.scaler.scale(torch.ones(()))  # the scaler starts with the first loss
        mine[0].grad = grad * 4
        opt.step()
        skipped = bool(opt.skipped)
        opt.scaler.update(4.0)
        assert skipped == bool(grad.isinf().any())
        if skipped:
            assert torch.equal(mine[0], start)
    torch.testing.assert_close(mine[0].detach(), start - 0.1)


@pytest.mark.parametrize("settings", [{"optimizer": "sgd"}, {"clip_norm": 0.1}, {"optimizer": "sgd", "clip_norm": 0.1}])
def test_no_step_waits_for_the_device(learn, tmp_path, settings):
    other = charm_learner(learn.dls, net=learn.model, seed=1, path=tmp_path, **settings)
    with other.no_bar():
        assert watched(other) == []


def test_the_parameters_reach_the_learner(tiny):
    run = Run.open(tiny, optimizer="sgd", clip_norm=0.25, average=0.9, average_warmup=True)
    learn = run.learner()
    learn.create_opt()
    assert type(learn.opt) is SGD and learn.gradient_clip.max_norm == 0.25
    assert (learn.average_weights.mean.decay, learn.average_weights.mean.warmup) == (0.9, True)
    plain = Run.open(tiny).learner()
    assert not hasattr(plain, "gradient_clip") and not hasattr(plain, "average_weights")


def test_the_gradients_that_the_optimizer_sees_are_clipped_after_the_scale_is_taken_out(learn, tmp_path):
    class Norm(Callback):
        order = GradientClip.order + 1

        def before_step(self):
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item())

    for half in (False, True):
        norms = []
        other = charm_learner(learn.dls, net=copy.deepcopy(learn.model), clip_norm=0.01, seed=1, path=tmp_path,
                              cbs=[HalfPrecision()] * half)
        with other.no_bar(), other.no_logging():
            other.fit(1, 1e-4, cbs=Norm())
        finite = [n for n in norms if np.isfinite(n)]
        assert len(finite) > 3 and finite == pytest.approx([0.01] * len(finite), rel=1e-3)


@pytest.fixture
def rates(monkeypatch):
    """The head's rate and momentum at the end of each epoch."""
    from charmlib.training.callbacks import EpochRecord

    seen, real = [], EpochRecord.after_epoch

    def after_epoch(self):
        if self.epoch >= self.start:
            seen.append((self.opt.hypers[0]["lr"], self.opt.hypers[-1]["lr"], self.opt.hypers[-1]["mom"]))
        real(self)

    monkeypatch.setattr(EpochRecord, "after_epoch", after_epoch)
    return seen


def test_steps_divide_all_rates_by_10_after_half_and_three_quarters(tiny, rates):
    run = Run.open(tiny, schedule="steps", optimizer="sgd", patience=0, stage1_frozen_epochs=0, stage1_epochs=2,
                   stage2_epochs=8, stage2_lr_min=1e-4, stage2_lr_max=1e-2)
    run.train()
    first, stage2 = rates[:2], np.array(rates[2:])
    assert [lr for _, lr, _ in first] == pytest.approx([1e-3, 1e-4])  # without pretrained weights at the full rate
    want = [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose(stage2[:, 1], 1e-2 * np.array(want))
    np.testing.assert_allclose(stage2[:, 0], 1e-4 * np.array(want))
    assert set(stage2[:, 2]) == {0.9}
    assert [row["lr"] for row in run.history[2:]] == pytest.approx(list(stage2[:, 1]))


def test_a_plateau_falls_where_fastais_callback_would(learn, tmp_path):
    """fastai's own needs its own optimizer: it changes copies of OptimWrapper's settings, and nothing happens."""
    values = [3.0, 2.0, 2.5, 1.0, 1.0, float("nan"), 0.5]  # the last one changes no rate

    class Given(Callback):
        order = 55

        def after_epoch(self):
            self.recorder.values[-1][1] = values[self.epoch]
            known.append(values[self.epoch])

    class Rates(Callback):
        def before_batch(self):
            if self.training:
                seen[-1][self.epoch] = self.opt.hypers[-1]["lr"]

    seen = []
    for theirs, opt in ((False, None), (True, Adam), (True, None)):
        known = []
        other = charm_learner(learn.dls, net=copy.deepcopy(learn.model), seed=1, path=tmp_path)
        other.opt_func = opt or other.opt_func
        seen.append([None] * len(values))
        with other.no_bar(), other.no_logging():
            falls = ReduceLROnPlateau() if theirs else FallingRate("plateau", known)
            other.fit(len(values), 1e-2, cbs=[Given(), Rates(), falls])
    assert seen[0] == pytest.approx(seen[1])
    assert seen[0] == pytest.approx([1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-5])
    assert seen[2] == [1e-2] * len(values)


@pytest.fixture
def worse(monkeypatch):
    """Validation losses that rise, so that plateaus come."""
    from charmlib.training.callbacks import EpochRecord

    real = EpochRecord.after_epoch

    def after_epoch(self):
        real(self)
        if self.epoch >= self.start:
            self.rows[-1]["valid_loss"] = 1.0 + self.epoch

    monkeypatch.setattr(EpochRecord, "after_epoch", after_epoch)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"schedule": "steps", "optimizer": "sgd"}, {"schedule": "plateau"}],
                         ids=["steps", "plateau"])
def test_a_killed_run_ends_in_the_same_bits(tiny, tmp_path, monkeypatch, worse, rates, settings):
    """Killed after each of five epochs, of phases of 1, 2 and 2 epochs."""
    mine = {**tiny, **settings, "patience": 0, "clip_norm": 1.0, "stage1_epochs": 1, "stage2_epochs": 3}
    quiet = tmp_path / "quiet"
    Run.open(mine, run_dir=str(quiet)).train()
    want = list(rates)
    assert want[-2][1] == pytest.approx(8e-5) and want[-1][1] == pytest.approx(8e-6)
    for saves in (1, 2, 3, 4):
        rates.clear()
        run_dir = str(tmp_path / f"killed{saves}")
        with monkeypatch.context() as m, pytest.raises(Killed):
            killed_after(m, saves)
            Run.open(mine, run_dir=run_dir).train()
        torch.manual_seed(12345)
        Run.open(mine, run_dir=run_dir).train()
        assert rates == want
        same_run(Path(run_dir), quiet)


def test_stage2_frozen_trains_the_head_alone(tiny):
    run = Run.open(tiny, stage2_frozen=True, average=0.9, optimizer="sgd", schedule="steps", stage2_lr_max=1e-2)
    kept, real = {}, run.net.enter

    def enter(bank_momentum):
        kept.update({name: value.clone() for name, value in run.net.state_dict().items()})
        real(bank_momentum=bank_momentum)

    run.net.enter = enter  # what each phase begins with; the last is stage 2
    run.train()
    same = {name.split(".")[0] for name, value in run.net.state_dict().items() if torch.equal(value, kept[name])}
    moved = {name.split(".")[0] for name, value in run.net.state_dict().items() if not torch.equal(value, kept[name])}
    assert {"trunk", "final"} <= same and not {"trunk", "final"} & moved and "head" in moved
    assert any("running_mean" in name for name in kept if name.startswith("trunk."))


def test_contradictions_and_what_has_no_effect():
    with pytest.raises(ParameterError, match="'stage2_frozen' and 'one_group' contradict"):
        resolve({"stage2_frozen": True, "one_group": True})
    with pytest.raises(ParameterError, match="plateau looks at the validation part.*say schedule: steps"):
        resolve({"schedule": "plateau", "valid_fraction": 0, "patience": 0, "vote_weight": 0.5})
    assert missing_need("stage2_lr_min", resolve({"stage2_frozen": True})) == "stage2_frozen: false"
    assert missing_need("stage2_frozen", resolve({"stage2_epochs": 0})) == "stage2_epochs: above 0"
