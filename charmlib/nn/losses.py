"""Multi-label losses: logits (B, C) and targets (B, C) of 0, 1, or NaN for unknown; computed in float32.

Each is the mean over the known entries, so that ``FocalLoss(gamma=0)`` and ``AsymmetricLoss(0, 0, clip=0)`` equal
:class:`BCELoss`. All carry what fastai asks of a loss: ``activation`` (sigmoid), ``decodes``, ``reduction``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiLabelLoss(nn.Module):
    """Base: masks unknown targets, keeps float32, reduces. Subclasses give ``terms``.

    Parameters
    ----------
    reduction : {'mean', 'sum', 'none'}

    Raises
    ------
    ValueError
        Shapes of logits and targets differ (from ``forward``).
    """

    def __init__(self, *, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry, (B, C)."""
        raise TypeError("MultiLabelLoss is a base class; use BCELoss, FocalLoss or AsymmetricLoss")

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape != targets.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
        # as_subclass: fastai's TensorBase would otherwise dispatch every operation through Python
        logits, targets = logits.as_subclass(Tensor), targets.as_subclass(Tensor)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            logits, targets = logits.float(), targets.float()
            known = ~torch.isnan(targets)
            loss = self.terms(logits, torch.where(known, targets, 0.0)) * known
            if self.reduction == "none":
                return loss
            total = loss.sum()
            return total if self.reduction == "sum" else total / known.sum().clamp(min=1)

    @staticmethod
    def activation(logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)

    @staticmethod
    def decodes(probabilities: Tensor) -> Tensor:
        """Calls at probability 0.5, which is for pictures: a real threshold is chosen on validation data."""
        return probabilities > 0.5


class BCELoss(MultiLabelLoss):
    """Binary cross-entropy over all entries."""

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class FocalLoss(MultiLabelLoss):
    """``-(1 - p_t)^gamma log p_t`` for each entry (Lin et al., arXiv 1708.02002, eq. 4), p_t the probability of the truth.

    Parameters
    ----------
    gamma : float
        Focusing; 0 is BCE, 2 the paper's choice.
    alpha : float or None
        Weight of positives, 1 - alpha of negatives (the paper's eq. 5); None weighs both as 1.
    """

    def __init__(self, gamma: float = 2.0, alpha: float | None = None, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        self.gamma, self.alpha = gamma, alpha

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        p = torch.sigmoid(logits)
        miss = p * (1 - targets) + (1 - p) * targets  # 1 - p_t
        loss = bce if self.gamma == 0 else bce * miss.pow(self.gamma)
        if self.alpha is not None:
            loss = loss * (self.alpha * targets + (1 - self.alpha) * (1 - targets))
        return loss


class AsymmetricLoss(MultiLabelLoss):
    """ASL (Ridnik et al., arXiv 2009.14119, eq. 7): focusing apart for positives and negatives, and a clip.

    ``L+ = (1 - p)^gamma_pos log p`` and ``L- = p_m^gamma_neg log(1 - p_m)`` with ``p_m = max(p - clip, 0)``.
    As in the authors' code no gradient flows through the focusing weights. Differs from it in the mean for the sum,
    and in log-sigmoid for the clamped log where nothing is clipped, which keeps float32 exact for confident logits.

    Parameters
    ----------
    gamma_neg, gamma_pos : float
        4 and 1 as published; both 0 with clip 0 is BCE.
    clip : float
        Probability margin in [0, 1) by which negatives are eased (0.05 as published).
    """

    def __init__(self, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        if not 0.0 <= clip < 1.0:
            raise ValueError(f"clip must be in [0, 1), got {clip}")
        self.gamma_neg, self.gamma_pos, self.clip = gamma_neg, gamma_pos, clip

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        if self.clip > 0:
            q = (1 - p + self.clip).clamp(max=1)  # 1 - p_m
            log_q = q.clamp(min=1e-8).log()
        else:
            q, log_q = 1 - p, F.logsigmoid(-logits)
        loss = -(targets * F.logsigmoid(logits) + (1 - targets) * log_q)
        if self.gamma_neg > 0 or self.gamma_pos > 0:
            with torch.no_grad():
                weight = targets * (1 - p).pow(self.gamma_pos) + (1 - targets) * (1 - q).pow(self.gamma_neg)
            loss = loss * weight
        return loss


def make_loss(name: str) -> MultiLabelLoss:
    """The loss that a parameter names: 'bce', 'focal' (gamma 2) or 'asl' (4, 1, 0.05).

    Raises
    ------
    ValueError
        An unknown name.
    """
    losses = {"bce": BCELoss, "focal": FocalLoss, "asl": AsymmetricLoss}
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}; there are {', '.join(losses)}")
    return losses[name]()
