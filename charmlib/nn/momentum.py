"""The momentum encoder of CHARM-Xray: a slow copy of a block that never sees a gradient."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class MomentumEncoder(nn.Module):
    """An exponential moving average of ``source``, evaluated without gradient and in eval mode.

    After each optimizer step ``p_k <- m_t p_k + (1 - m_t) p_q`` (CHARM-Xray; as MoCo, arXiv 1911.05722, eq. 2) with
    the warm-up ``m_t = min(m, (1 + t) / (10 + t))``, t the number of updates so far, so that early training is
    followed at once. Weights and floating norm statistics are averaged; integer buffers are copied.

    Differs from the published code, which averages the parameters only: its norm layers keep the statistics that
    the copy started with, although the weights before them move.

    Parameters
    ----------
    source : nn.Module
        The block to follow; copied, not held.
    momentum : float
        m in [0, 1]. 0 copies at every update, 1 freezes.
    warmup : bool
        False uses m from the first update on.

    Raises
    ------
    ValueError
        ``momentum`` outside [0, 1].
    """

    def __init__(self, source: nn.Module, momentum: float = 0.99, *, warmup: bool = True):
        super().__init__()
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        self.momentum = momentum
        self.warmup = warmup
        self.encoder = copy.deepcopy(source).requires_grad_(False)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.eval()

    def train(self, mode: bool = True) -> MomentumEncoder:
        """Stay in eval mode: the copy's norm layers use their averaged statistics."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """``encoder(x)``, shape as the source block gives it, without gradient."""
        return self.encoder(x)

    @torch.no_grad()
    def current_momentum(self) -> Tensor:
        """m_t of the next update as a 0-dim tensor on the module's device (reading it would synchronise)."""
        if not self.warmup:
            return torch.full((), self.momentum, device=self.updates.device)
        t = self.updates.to(torch.float32)
        return torch.clamp((1 + t) / (10 + t), max=self.momentum)

    @torch.no_grad()
    def update(self, source: nn.Module, skipped: Tensor | None = None) -> None:
        """Move one step towards ``source``; call it after an optimizer step.

        ``skipped`` is a 0-dim tensor that is not 0 where the step was not made (a gradient scaler's ``found_inf``);
        nothing moves then, and the warm-up does not count it. It and the weight stay on the device, so no update
        waits for the GPU; all tensors move together.
        """
        weight = 1 - self.current_momentum()
        made = torch.ones_like(self.updates) if skipped is None else (skipped == 0).to(self.updates.dtype)
        weight = weight * made  # 0-dim
        slow, fast, mine_whole, whole = [], [], [], []
        theirs = dict(source.named_parameters()) | dict(source.named_buffers())
        for name, mine in (*self.encoder.named_parameters(), *self.encoder.named_buffers()):
            if mine.is_floating_point():
                slow.append(mine)
                fast.append(theirs[name].detach())
            else:
                mine_whole.append(mine)
                whole.append(theirs[name])
        if slow:
            torch._foreach_mul_(slow, 1 - weight)
            torch._foreach_add_(slow, torch._foreach_mul(fast, weight))
        if whole:  # counters of norm layers, which nothing reads
            torch._foreach_copy_(mine_whole, whole)
        self.updates += made

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, warmup={self.warmup}"
