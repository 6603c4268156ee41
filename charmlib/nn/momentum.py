"""The momentum encoder of CHARM-Xray."""

import copy
from typing import Self

import torch
from torch import Tensor, nn


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
        t = self.updates.to(torch.float32)
        return torch.clamp((1 + t) / (10 + t), max=self.momentum)

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
        slow = [name for name, value in mine.items() if value.is_floating_point()]
        if slow:
            averages = [mine[name] for name in slow]
            torch._foreach_mul_(averages, 1 - weight)
            torch._foreach_add_(averages, torch._foreach_mul([theirs[name].detach() for name in slow], weight))
        if whole := list(mine.keys() - set(slow)):  # batch counters of norm layers, unused in eval mode
            torch._foreach_copy_([mine[name] for name in whole], [theirs[name] for name in whole])
        self.updates += made

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, warmup={self.warmup}, batch_norms={self.batch_norms}"
