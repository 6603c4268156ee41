"""torch's fused AdamW behind fastai's interface."""

from __future__ import annotations

import torch
from fastai.optimizer import OptimWrapper
from torch import Tensor


class _Fused(torch.optim.AdamW):
    """Keeps what a gradient scaler hands to the fused step: ``skipped``, a tensor that is 1 where gradients overflowed."""

    skipped: Tensor | None = None

    def step(self, closure=None):
        found = getattr(self, "found_inf", None)  # there during a scaler's step only
        self.skipped = None if found is None else found.clone()
        return super().step(closure)


class AdamW(OptimWrapper):
    """torch's AdamW, all tensors in one kernel, with fastai's learning rates by group and freezing.

    Differs from fastai's own Adam in decaying norm layers and biases too. With a ``scaler`` (a ``torch.amp.GradScaler``),
    the step's kernel does nothing where gradients overflowed; the CPU never learns of it and so never waits. ``skipped`` is
    then a 0-dim tensor on the device that is 1 for such a step.
    """

    scaler: torch.amp.GradScaler | None = None

    def __init__(self, params, lr: float = 1e-3, **kwargs):
        super().__init__(params, _Fused, lr=lr, fused=True, **kwargs)

    @property
    def skipped(self) -> Tensor | None:
        return self.opt.skipped

    def step(self) -> None:
        if self.scaler is None:
            self.opt.step()
        else:
            self.scaler.step(self.opt)
