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
    gradient scaler skipped or a callback cancelled changes nothing. No step waits for the device.

    The mean is in the network from the end of an epoch's training to the end of the epoch, and after the fit: a phase begins
    with what the phase before scored.

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
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"average must be in [0, 1], got {decay}")
        self.decay, self.warmup, self.resumed = decay, warmup, None
        self.averages = self.raw = None

    def before_fit(self):
        self.run = not hasattr(self.learn, "lr_finder") and not hasattr(self.learn, "gather_preds")  # as fastai's trackers
        self.averages, self.raw = None, None

    def before_train(self):
        if self.averages is not None:
            return
        self.names = averaged(self.model)
        weights = self._weights()
        self.averages = {name: value.detach().clone() for name, value in weights.items()}
        self.count = torch.zeros((), device=next(iter(weights.values())).device)  # their number, or the sum of their weights
        if self.resumed:
            self.count.copy_(self.resumed["count"])
            for name, value in self.resumed["averages"].items():
                self.averages[name].copy_(value)
            self.resumed = None

    def after_step(self):
        if self.network_hooks.cancelled:
            return
        skipped = getattr(self.opt, "skipped", None)
        made = torch.ones_like(self.count) if skipped is None else (skipped == 0).to(self.count)
        if self.warmup:
            weight = (1 - warm_up(self.decay, self.count)) * made
            self.count += made
        else:  # the sum of d^(t-i), of which the newest weights have 1
            self.count = torch.where(made > 0, self.count * self.decay + 1, self.count)
            weight = made / self.count.clamp(min=1)
        follow(self.averages, self._weights(), weight)

    def after_train(self):
        self.raw = {name: value.detach().clone() for name, value in self._weights().items()}
        self._fill(self.averages)

    def after_epoch(self):
        if self.raw is not None:
            self._fill(self.raw)
            self.raw = None

    def after_fit(self):
        if self.averages is not None:
            self._fill(self.averages)
        self.averages = self.raw = None
        self.run = True

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """Within ``after_epoch``: the network's own weights, and what ``resumed`` takes before a fit that goes on."""
        return self.raw, {"averages": self.averages, "count": self.count}

    def _weights(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: state[name] for name in self.names}

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        weights = self._weights()
        torch._foreach_copy_([weights[name] for name in values], list(values.values()))


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
