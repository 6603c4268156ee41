"""``params/published.yaml`` trains as CHARM's published code: twelve steps beside the formulas, written down slowly here."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback, CancelFitException

from charmlib import Run
from charmlib.param_sources import load_params
from charmlib.training.callbacks import SeedEpoch, Trains
from tests.training.test_run import Killed, killed_after

PARAMS = Path(__file__).parents[2] / "params"
# A small backbone without kinks, where rounding would decide; no dropout, whose draws no formula gives; a ring that is full,
# and cut at its end, within twelve batches.
SMALL = {"image_size": 32, "arch": "timm:test_efficientnet", "weights": "none", "norm": "half", "valid_fraction": 0.2,
         "hidden": 16, "bank_size": 37, "dropout": 0.0, "stage2_batch": 16}
STEPS = 12


class Published:
    """The formulas of the published code in double precision, one sample and one slot at a time.

    Trunk and final block are torch's layers, copied; all else is written here.
    """

    def __init__(self, net, params):
        net = copy.deepcopy(net).double()
        self.trunk, self.final, self.branch = net.trunk, net.final, net.momentum.encoder
        self.attention, self.head = net.attention, net.head  # their weights only
        self.m, self.k, self.threshold = params["momentum"], params["k"], params["threshold"]
        self.slots, self.pointer = torch.zeros(params["bank_size"], net.features, dtype=torch.float64), 0
        self.parts = self.trunk, self.final, self.attention, self.head
        self.trained = [p for part in self.parts for p in part.parameters()]
        self.average, self.square = ([torch.zeros_like(p) for p in self.trained] for _ in range(2))
        self.no_decay = [i for i, p in enumerate(self.trained) if p.dim() == 1]  # biases and norms
        self.steps = 0

    def attend(self, q):
        each = [F.conv2d(q, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2) for conv in self.attention.scales]
        return torch.sigmoid(F.conv2d(torch.cat(each, 1), self.attention.fuse.weight, self.attention.fuse.bias))

    def retrieve(self, z):
        out = []
        for query in z:
            cosines = torch.stack([query @ slot / (query.norm() * slot.norm().clamp(min=1e-12)) for slot in self.slots])
            best = sorted(range(len(cosines)), key=lambda j: -cosines[j].item())[:self.k]
            out.append(sum(cosines[j] * self.slots[j] for j in best))
        return torch.stack(out)

    def store(self, z):
        lengths = z.norm(dim=1)
        common = [row for row, length in zip(z, lengths) if abs(length - lengths.mean()) / lengths.mean() < self.threshold]
        stored = common[:len(self.slots) - self.pointer]  # what passes the last slot is dropped
        for i, row in enumerate(stored):
            self.slots[self.pointer + i] = row
        self.pointer = (self.pointer + len(stored)) % len(self.slots)
        return len(common) - len(stored)

    def forward(self, x, train):
        for part in (self.trunk, self.final, self.branch):
            part.train(train)  # the branch, too, normalises by the batch
        shared = self.trunk(x)
        q = self.final(shared)
        with torch.no_grad():
            branch = self.branch(shared)
        z = (q * self.attend(q)).mean((2, 3)) + branch.mean((2, 3))
        self.dropped = self.store(z.detach()) if train else 0  # first, so that an image meets itself
        z = z + self.retrieve(z)
        norm, first, last = self.head[0], self.head[1], self.head[4]
        if train:
            mean, var = z.mean(0), z.var(0, unbiased=False)
            with torch.no_grad():
                norm.running_mean.lerp_(mean, 0.1), norm.running_var.lerp_(z.var(0), 0.1)
        else:
            mean, var = norm.running_mean, norm.running_var
        hidden = F.relu(((z - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias) @ first.weight.T + first.bias)
        if train:
            for mine, theirs in zip(self.branch.parameters(), self.final.parameters()):  # before the optimizer's step
                mine.data = self.m * mine.data + (1 - self.m) * theirs.data
        return hidden @ last.weight.T + last.bias

    @staticmethod
    def asymmetric(logits, y):
        p = torch.sigmoid(logits)
        return -(y * (1 - p) * p.log() + (1 - y) * p**4 * (1 - p).log()).mean()

    def step(self, x, y, lr, mom, wd):
        """One step; the loss. The gradients stay at the parameters."""
        loss = self.asymmetric(self.forward(x.double(), True), y.double())
        for p, g in zip(self.trained, torch.autograd.grad(loss, self.trained)):
            p.grad = g
        self.steps += 1
        for i, (p, average, square) in enumerate(zip(self.trained, self.average, self.square)):
            average.mul_(mom).add_((1 - mom) * p.grad)
            square.mul_(0.99).add_(0.01 * p.grad * p.grad)
            with torch.no_grad():
                p.mul_(1 if i in self.no_decay else 1 - lr * wd)
                p.sub_(lr * average / (1 - mom**self.steps) / ((square / (1 - 0.99**self.steps)).sqrt() + 1e-5))
        return loss


class Beside(Callback):
    """Takes each step of the learner in the formulas, too, and compares: loss, gradients and bank before the optimizer's step,
    all weights, the momentum branch and its norm statistics after it."""

    order = 5

    def __init__(self, net, params):
        self.reference, self.rates, self.dropped = Published(net, params), [], 0
        net.double().bank.float()  # bank and loss are of float32 always; the rest must not add to their rounding
        net.head.float()

    def before_batch(self):
        self.learn.xb = (self.xb[0].double(),)

    def before_step(self):
        (hyper,) = self.opt.hypers  # of the one group
        x, y = (t.as_subclass(torch.Tensor) for t in (self.xb[0], self.yb[0]))
        reference, net = self.reference, self.model
        close([self.loss], [reference.step(x, y, hyper["lr"], hyper["mom"], hyper["wd"])])
        self.rates.append(hyper["lr"])
        self.dropped += reference.dropped
        for mine, theirs in zip((net.trunk, net.final, net.attention, net.head), reference.parts):
            close([p.grad for p in mine.parameters()], [p.grad for p in theirs.parameters()])
        close([net.bank.slots], [reference.slots])
        assert net.bank.pointer == reference.pointer

    def after_step(self):
        net, reference = self.model, self.reference
        for mine, theirs in zip((net.trunk, net.final, net.attention, net.head, net.momentum.encoder),
                                (*reference.parts, reference.branch)):
            mine, theirs = mine.state_dict(), theirs.state_dict()
            names = [name for name in theirs if not name.endswith("num_batches_tracked")]
            close([mine[name] for name in names], [theirs[name] for name in names])
        if len(self.rates) == STEPS:
            raise CancelFitException


def close(mine, theirs):
    """Equal to 1e-5, in length."""
    mine, theirs = (torch.cat([t.detach().double().flatten() for t in some]) for some in (mine, theirs))
    assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_twelve_steps_and_the_scores_after_them_are_those_of_the_formulas(phantoms, tmp_path):
    run = Run.open(load_params(PARAMS / "published.yaml"), **SMALL, data_root=str(phantoms), run_dir=str(tmp_path))
    phase = run.phase("stage2")
    learn = run.learner(phase)
    Trains(phase.trains, phase.train_norms).apply(learn)
    beside = Beside(run.net, run.params)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, phase.lr, cbs=[SeedEpoch(85, phase.name), beside], **phase.cycle)
    assert len(beside.rates) == STEPS and max(beside.rates) == pytest.approx(8e-5, rel=0.05)
    assert beside.dropped > 0 and run.net.bank.filled == 37
    x = learn.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad():
        close([run.net.eval()(x.double())], [beside.reference.forward(x.double(), False)])


@pytest.mark.slow
def test_a_killed_published_run_ends_in_the_same_bits_also_with_checkpointed_gradients(phantoms, tmp_path, monkeypatch):
    params = {**load_params(PARAMS / "published.yaml"), **SMALL, "data_root": str(phantoms), "stage1_frozen_epochs": 1,
              "stage1_epochs": 0, "stage2_epochs": 2, "stage1_batch": 16}
    quiet = Run.open(params, run_dir=str(tmp_path / "quiet"))
    quiet.train()
    again = {"run_dir": str(tmp_path / "killed"), "grad_checkpointing": True}
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 2)
        Run.open(params, **again).train()
    run = Run.open(params, **again)
    run.train()
    for name, value in quiet.net.state_dict().items():
        assert torch.equal(run.net.state_dict()[name], value), name
