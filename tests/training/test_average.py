"""The running mean of weights against slow sums over stored weights, and a run that is killed."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback, CancelStepException

from charmlib import Run, charm_learner
from charmlib.params import effective, missing_need, resolve
from charmlib.training.average import AverageWeights
from charmlib.training.checkpoint import load_model, load_resume
from charmlib.training.no_wait import HalfPrecision
from tests.training.test_run import Killed, killed_after, same_run
from tests.training.test_step import watched


class KeepSteps(Callback):
    """Keeps the weights after each step that was made, and what is validated."""

    order = 96

    def before_fit(self):
        self.weights, self.validated, self.after = [self.now()], [], []

    def now(self):
        return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def after_step(self):
        if not self.network_hooks.cancelled and not getattr(self.opt, "skipped", None):
            self.weights.append(self.now())

    def before_validate(self):
        self.validated.append(self.now())

    def after_epoch(self):
        self.after.append(self.now())


def slow_mean(weights, decay):
    """sum d^(t-i) w_i / sum d^(t-i), in double precision."""
    powers = [decay ** (len(weights) - 1 - i) for i in range(len(weights))]
    return {name: sum(p * w[name].double() for p, w in zip(powers, weights)) / sum(powers) for name in weights[0]}


def slow_warmed(weights, decay):
    """m_t a + (1 - m_t) w_t from the initial weights on."""
    mean = {name: value.double() for name, value in weights[0].items()}
    for t, new in enumerate(weights[1:]):
        m = min(decay, (1 + t) / (10 + t))
        mean = {name: m * mean[name] + (1 - m) * new[name].double() for name in mean}
    return mean


def fitted(learn, mean, *cbs, epochs=2):
    kept = KeepSteps()
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2, cbs=[mean, kept, *cbs])
    return kept


def holds(learn, names, steps, want, epoch=-1):
    assert any("running_mean" in name for name in names if name.startswith("trunk."))
    bank = [name for name in learn.model.state_dict() if name.startswith("bank.")]
    assert any(name.startswith("momentum.") for name in names) and bank
    assert not set(bank) & set(names) and not any(name.endswith(("num_batches_tracked", "updates")) for name in names)
    for name, value in steps.validated[epoch].items():
        if name in names:
            torch.testing.assert_close(value.double(), want[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("decay, warmup, slow", [(0.9, False, slow_mean), (1.0, False, slow_mean), (0.9, True, slow_warmed),
                                                 (0.2, True, slow_warmed)])
def test_it_is_the_mean_of_the_formula_with_norm_statistics(learn, decay, warmup, slow):
    mean = AverageWeights(decay, warmup)
    steps = fitted(learn, mean)
    count = len(learn.dls.train)
    assert len(steps.weights) == 1 + 2 * count
    for epoch, end in enumerate((count, 2 * count)):
        seen = steps.weights[:end + 1] if warmup else steps.weights[1:end + 1]
        holds(learn, mean.mean.names, steps, slow(seen, decay), epoch)
    for name, value in learn.model.named_parameters():  # the mean is left in the network
        assert torch.equal(value, steps.validated[-1][name]), name
    raw, start = steps.after[0], steps.weights[count]  # training goes on from the network's own weights
    assert all(torch.equal(raw[name], start[name]) for name, _ in learn.model.named_parameters())


def test_decay_0_is_the_last_step_to_the_bit(learn, tmp_path):
    plain = charm_learner(learn.dls, net=copy.deepcopy(learn.model), seed=1, path=tmp_path)
    fitted(learn, AverageWeights(0.0))
    fitted(plain, Callback())
    for (name, a), b in zip(learn.model.state_dict().items(), plain.model.state_dict().values()):
        assert torch.equal(a, b), name


def test_what_a_phase_keeps_frozen_stays_to_the_bit(learn):
    from charmlib.training.callbacks import Trains

    Trains(("head",), norms=False).apply(learn)
    before = {name: value.clone() for name, value in learn.model.state_dict().items()}
    fitted(learn, AverageWeights(0.999), Trains(("head",), norms=False))
    for name, value in learn.model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same or name.startswith(("head.", "bank.", "attention.", "momentum.")), name
    assert not torch.equal(learn.model.head[1].weight, before["head.1.weight"])


def test_the_banks_slots_are_those_of_the_averaged_network(learn):
    """They are renewed before validation, when the mean is in."""
    fitted(learn, AverageWeights(0.99))
    net, bank = learn.model.eval(), learn.model.bank
    held = bank.slot_ids[bank.slot_ids >= 0]
    loader = learn.dls.valid.new(learn.dls.test_dl(held.tolist()).dataset, bs=len(held))
    with torch.no_grad():
        want = net.encode(loader.one_batch()[0].as_subclass(torch.Tensor))[-1]
    torch.testing.assert_close(bank.slots[bank.slot_ids >= 0], want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("warmup", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.once])])
def test_steps_that_overflow_or_are_cancelled_do_not_count(learn, warmup):
    class Overflow(Callback):
        order = 11

        def before_backward(self):
            if self.train_iter in (1, 4):
                self.learn.loss_grad = self.loss_grad * float("inf")

    class Cancel(Callback):
        order = 5

        def before_step(self):
            if self.train_iter % 3 == 2:
                raise CancelStepException

    learn.add_cb(HalfPrecision())
    mean = AverageWeights(0.8, warmup)
    steps = fitted(learn, mean, Overflow(), Cancel(), epochs=1)
    made = len([i for i in range(len(learn.dls.train)) if i % 3 != 2 and i not in (1, 4)])
    assert len(steps.weights) == 1 + made
    names = [name for name, _ in learn.model.named_parameters()]
    want = (slow_warmed if warmup else slow_mean)(steps.weights[not warmup:], 0.8)
    for name in names:
        torch.testing.assert_close(steps.validated[-1][name].double(), want[name], rtol=1e-4, atol=1e-6, msg=name)


def test_no_step_waits_for_the_device(learn):
    learn.add_cb(AverageWeights(0.9))
    with learn.no_bar():
        assert watched(learn) == []


def test_the_finder_and_validation_leave_the_weights_alone(learn):
    learn.add_cb(AverageWeights(0.9))
    before = copy.deepcopy(learn.model.state_dict())
    with learn.no_bar():
        learn.lr_find(num_it=5, show_plot=False)
        learn.validate()
    assert all(torch.equal(value, before[name]) for name, value in learn.model.named_parameters())


AVERAGE = {"average": 0.9, "patience": 0}


@pytest.fixture(scope="module")
def quiet(phantoms, tmp_path_factory):
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("average") / "run"
    Run.open({**TINY, **AVERAGE, "data_root": str(phantoms), "run_dir": str(folder)}).train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2, 3, 4, 5])
def test_a_killed_run_ends_in_the_same_bits(quiet, tiny, monkeypatch, saves):
    """Killed after each of the five epochs; the phases have 1, 2 and 2."""
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, saves)
        Run.open(tiny, **AVERAGE).train()
    folder = Path(tiny["run_dir"])
    state = load_resume(folder / "resume.pt")
    assert (state["average"] is None) == state["over"] == (saves in (1, 3, 5))
    if not state["over"]:  # the raw weights and the mean are different, and the best epoch has the mean
        weight, mean = state["model"]["head.1.weight"], state["average"]["averages"]["head.1.weight"]
        assert not torch.equal(weight, mean) and not any(name.startswith("bank.") for name in state["average"]["averages"])
        if state["best"]["waited"] == 0:
            assert torch.equal(state["best"]["state"]["head.1.weight"], mean)
    torch.manual_seed(12345)
    Run.open(tiny, **AVERAGE).train()
    same_run(folder, quiet)


def test_the_saved_network_is_the_mean_that_was_validated(tiny, monkeypatch):
    from charmlib.training.callbacks import KeepProgress

    seen, real = [], KeepProgress.after_epoch

    def keep(self):
        seen.append((self.learn.epoch_record.rows[-1]["valid_loss"], copy.deepcopy(self.model.state_dict())))
        real(self)

    monkeypatch.setattr(KeepProgress, "after_epoch", keep)
    run = Run.open(tiny, average=0.95, stage2_epochs=0, stage1_frozen_epochs=0, stage1_epochs=3)
    run.train()
    _, best = min(seen, key=lambda pair: pair[0])
    net, card = load_model(run.folder)
    assert card["params"]["average"] == 0.95
    assert all(torch.equal(value, best[name]) for name, value in net.state_dict().items() if name != "bank.weight")


def test_a_decay_that_the_warm_up_does_not_reach_is_the_same_run():
    off = {"use_momentum": False}
    for warmup, same in ((True, True), (False, False)):
        a, b = (effective(resolve(off, {"average": d, "average_warmup": warmup}), 600)["average"] for d in (0.999, 0.9999))
        assert (a == b) == same
    assert missing_need("average_warmup", resolve({})) == "average: above 0"
    with pytest.raises(ValueError, match=r"average must be in \[0, 1\], got 1.5"):
        AverageWeights(1.5)
    assert np.isclose(effective(resolve(off, {"average": 0.9}), 5)["average"], 0.9)
