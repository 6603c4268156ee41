"""The momentum encoder of CHARM-Xray, and the running mean of weights that it shares with ``average``."""

import copy
from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor, nn


@torch.no_grad()
def follow(slow: Mapping[str, Tensor], fast: Mapping[str, Tensor], weight: Tensor) -> None:
    """``slow <- (1 - weight) slow + weight fast`` in place for each name of ``slow``; integers are copied.

    ``weight`` is a 0-dim tensor on the device in [0, 1]. No value is read from the device.
    """
    if floats := [name for name, value in slow.items() if value.is_floating_point()]:
        averages = [slow[name] for name in floats]
        torch._foreach_mul_(averages, 1 - weight)
        torch._foreach_add_(averages, torch._foreach_mul([fast[name].detach() for name in floats], weight))
    if whole := list(slow.keys() - set(floats)):  # batch counters of norm layers, unused in eval mode
        torch._foreach_copy_([slow[name] for name in whole], [fast[name] for name in whole])


def warm_up(momentum: float, updates: Tensor) -> Tensor:
    """``min(momentum, (1 + t) / (10 + t))`` with t, the 0-dim number of earlier ``updates``."""
    t = updates.to(torch.float32)
    return torch.clamp((1 + t) / (10 + t), max=momentum)


class MomentumEncoder(nn.Module):
    """An exponential moving average of the weights of ``source``, evaluated without gradient.

    Each update computes ``p_k <- m_t p_k + (1 - m_t) p_q`` (CHARM-Xray; MoCo, arXiv 1911.05722, eq. 2). The warm-up
    ``m_t = min(m, (1 + t) / (10 + t))``, with t the number of earlier updates, lets the average follow early training
    quickly.

    The published code is ``warmup=False, batch_norms=True``, updated by each forward pass of training.

    Parameters
    ----------
    source : nn.Module
        The block to follow. A copy is stored.
    momentum : float
        m in [0, 1]. 0 copies at every update, 1 freezes (without warm-up).
    warmup : bool
        False uses m from the first update.
    batch_norms : bool
        False averages floating-point buffers too, copies integer buffers, and stays in eval mode, in which norm layers use
        these statistics. True averages the parameters alone: in training mode norm layers use the statistics of the batch and
        update running statistics of their own, which eval mode uses.

    Raises
    ------
    ValueError
        ``momentum`` outside [0, 1].
    """

    def __init__(self, source: nn.Module, momentum: float = 0.99, *, warmup: bool = True, batch_norms: bool = False):
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum, self.warmup, self.batch_norms = momentum, warmup, batch_norms
        self.encoder = copy.deepcopy(source).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode without ``batch_norms``."""
        return super().train(mode and self.batch_norms)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``encoder(x)`` without gradient, of the shape of ``source(x)``."""
        return self.encoder(x)

    @torch.no_grad()
    def current_momentum(self) -> Tensor:
        """m_t of the next update, a 0-dim tensor on the module's device."""
        if not self.warmup:
            return torch.full((), self.momentum, device=self.updates.device)
        return warm_up(self.momentum, self.updates)

    @torch.no_grad()
    def update(self, source: nn.Module, skipped: Tensor | None = None) -> None:
        """Average the weights of ``source`` into the copy.

        ``skipped`` is a 0-dim tensor, such as the ``found_inf`` of a gradient scaler. Any value but 0 means a skipped step,
        which changes neither the averages nor the count of updates. No value is read from the device, so an update never
        waits for the GPU.
        """
        made = torch.ones_like(self.updates) if skipped is None else (skipped == 0).to(self.updates.dtype)
        weight = (1 - self.current_momentum()) * made  # 0-dim
        mine, theirs = (dict((*net.named_parameters(), *(() if self.batch_norms else net.named_buffers())))
                        for net in (self.encoder, source))
        follow(mine, theirs, weight)
        self.updates += made

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, warmup={self.warmup}, batch_norms={self.batch_norms}"
