"""The running mean of the weights that ``average`` asks for."""

import torch
from fastai.callback.core import Callback
from torch import Tensor

from charmlib.nn.momentum import follow, warm_up


class AverageWeights(Callback):
    """Keeps a mean of the weights over the optimizer steps of a fit; validation, and what comes after, sees the mean.

    After step t the mean is ``sum_i d^(t-i) w_i / sum_i d^(t-i)`` over the weights w_1 to w_t (Adam's bias correction, arXiv
    1412.6980, section 3, applied to weights). So no initial weight counts: at d = 1 it is the plain mean over steps, as in
    stochastic weight averaging (arXiv 1803.05407), and d = 0 is the last step. With ``warmup`` it is ``m_t a + (1 - m_t) w_t``
    from the initial weights on, with the momentum encoder's ``m_t = min(d, (1 + t) / (10 + t))``. The public code
    (hieuphamha19/CXR_LT) has neither: d = 0.9999 from the first step leaves 94 % of the initial weights after 625 steps.

    Floating-point parameters and buffers are averaged, and so are norm statistics. Integers, what the phase keeps frozen, and
    the buffers of a memory bank (slots, labels, counts) stay those of the network: a mean of slots is no slot. A step that a
    gradient scaler skipped or a callback cancelled changes nothing. No step waits for the device. In float32 each step rounds:
    a weight that stays drifts by up to 2e-4 of itself in 20,000 steps.

    The mean is in the network from the end of an epoch's training to the end of the epoch, and after the fit. A run's next
    phase goes on from the network's own weights (:meth:`put_back`): the mean never acts on training.

    Parameters
    ----------
    decay : float
        d in [0, 1].
    warmup : bool
        Whether the mean starts from the initial weights, with the warm-up of m_t.

    Raises
    ------
    ValueError
        ``decay`` outside [0, 1].
    """

    order = 95  # after the network's hooks, and after KeepProgress, which keeps the mean and saves both

    def __init__(self, decay: float, warmup: bool = False):
        self.mean, self.resumed, self.raw, self.started = RunningMean(decay, warmup), None, None, False

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")  # as fastai's trackers
        self.raw, self.started = None, False

    def before_train(self):
        if not self.started:
            self.mean.begin(self.model, self.resumed)
            self.resumed, self.started = None, True

    def after_step(self):
        if not self.network_hooks.cancelled:
            self.mean.step(self.model, getattr(self.opt, "skipped", None))

    def after_train(self):
        self.raw = {name: value.detach().clone() for name, value in self.mean.weights(self.model).items()}
        self.mean.fill(self.model)

    def after_epoch(self):
        if self.raw is not None:
            self.put_back()

    def after_fit(self):
        if self.started:
            self.mean.fill(self.model)
        self.run = True

    @torch.no_grad()
    def put_back(self) -> None:
        """The network's own weights, as the last epoch left them, in place of the mean."""
        weights = self.mean.weights(self.model)
        torch._foreach_copy_([weights[name] for name in self.raw], list(self.raw.values()))


class RunningMean:
    """The mean itself: of the weights of a network after each :meth:`step` since :meth:`begin`; arguments as above."""

    def __init__(self, decay: float, warmup: bool = False):
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"average must be in [0, 1], got {decay}")
        self.decay, self.warmup = decay, warmup

    def begin(self, net: torch.nn.Module, state: dict | None = None) -> None:
        """Start anew, or go on from a :meth:`state`."""
        self.names = averaged(net)
        self.averages = {name: value.detach().clone() for name, value in self.weights(net).items()}
        self.count = torch.zeros((), device=next(iter(self.averages.values())).device)  # or the sum of their weights
        if state:
            self.count.copy_(state["count"])
            for name, value in state["averages"].items():
                self.averages[name].copy_(value)

    def step(self, net: torch.nn.Module, skipped: Tensor | None = None) -> None:
        """After an optimizer step; ``skipped`` () is above 0 for one that a gradient scaler left out."""
        made = torch.ones_like(self.count) if skipped is None else (skipped == 0).to(self.count)
        if self.warmup:
            weight = (1 - warm_up(self.decay, self.count)) * made
            self.count += made
        else:  # the sum of d^(t-i), of which the newest weights have 1
            self.count = torch.where(made > 0, self.count * self.decay + 1, self.count)
            weight = made / self.count.clamp(min=1)
        follow(self.averages, self.weights(net), weight)

    def state(self) -> dict:
        """What :meth:`begin` takes."""
        return {"averages": self.averages, "count": self.count}

    def weights(self, net: torch.nn.Module) -> dict[str, Tensor]:
        """The network's weights of the averaged names, which share its memory."""
        state = net.state_dict()
        return {name: state[name] for name in self.names}

    @torch.no_grad()
    def fill(self, net: torch.nn.Module) -> None:
        """Write the mean into the network."""
        weights = self.weights(net)
        torch._foreach_copy_([weights[name] for name in self.averages], list(self.averages.values()))


def averaged(net: torch.nn.Module) -> list[str]:
    """The names in a network's ``state_dict`` of what a phase averages, in the state in which it trains.

    What stays as it is would only gather rounding errors.
    """
    still = set()
    for part in net.parts().values():
        still |= {id(p) for p in part.parameters() if not p.requires_grad}
        still |= {id(b) for module in part.modules() if not module.training for b in module.buffers(recurse=False)}
    if getattr(net, "bank", None) is not None:
        still |= {id(b) for b in net.bank.buffers()}
    return [name for name, value in net.state_dict(keep_vars=True).items()
            if value.is_floating_point() and id(value) not in still]
