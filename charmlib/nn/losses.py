"""Multi-label losses of logits (B, C) and targets (B, C) of 0, 1, or NaN for unknown; computed in float32.

Each loss is a mean over the known entries. ``FocalLoss(gamma=0)`` and ``AsymmetricLoss(0, 0, clip=0)`` therefore equal
:class:`BCELoss`. All losses have the attributes that fastai uses: ``activation`` (sigmoid), ``decodes``, ``reduction``.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiLabelLoss(nn.Module):
    """Base class, which masks unknown targets and reduces in float32. Subclasses define ``terms``.

    The ``reduction`` 'mean' or 'sum' gives a scalar, 'none' gives (B, C). ``forward`` raises ValueError if the shapes of logits
    and targets differ.
    """

    def __init__(self, *, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry (B, C)."""
        raise TypeError("MultiLabelLoss is a base class; use BCELoss, FocalLoss or AsymmetricLoss")

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape != targets.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
        # as_subclass: fastai's TensorBase dispatches every operation through Python
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
        """Labels at probability 0.5, for ``show_results``. Operating points are chosen on validation data instead."""
        return probabilities > 0.5


class BCELoss(MultiLabelLoss):
    """Binary cross-entropy over all entries."""

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


class FocalLoss(MultiLabelLoss):
    """Focal loss ``-(1 - p_t)^gamma log p_t``, p_t the probability of the true label (Lin et al., arXiv 1708.02002, eq. 4).

    Parameters
    ----------
    gamma : float
        Focusing parameter, 0 or more; 0 gives BCE, the paper uses 2.
    alpha : float or None
        Weight of positives in [0, 1]; negatives have 1 - alpha (the paper's eq. 5). None gives both the weight 1.
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
    """Asymmetric loss (ASL): separate focusing of positives and negatives, and a probability margin for negatives.

    ``L+ = -(1 - p)^gamma_pos log p`` and ``L- = -p_m^gamma_neg log(1 - p_m)`` with ``p_m = max(p - clip, 0)`` (Ridnik et al.,
    arXiv 2009.14119, eq. 7). By default no gradient flows through the focusing weights, as in the authors' code. Differs from
    that code in two points: entries are averaged instead of summed, and log-sigmoid replaces the clamped log where ``clip``
    does not apply, which keeps float32 exact for large logits.

    Parameters
    ----------
    gamma_neg, gamma_pos : float
        Focusing parameters, 0 or more (4 and 1 as published); both 0 with clip 0 gives BCE.
    clip : float
        Margin in [0, 1) subtracted from the probability of negatives (0.05 as published).
    focus_gradient : bool
        Let gradient flow through the focusing weights, as CHARM's code does.

    Raises
    ------
    ValueError
        ``clip`` outside [0, 1).
    """

    def __init__(self, gamma_neg: float = 4.0, gamma_pos: float = 1.0, clip: float = 0.05, *, focus_gradient: bool = False,
                 reduction: str = "mean"):
        super().__init__(reduction=reduction)
        if not 0.0 <= clip < 1.0:
            raise ValueError(f"clip must be in [0, 1), got {clip}")
        self.gamma_neg, self.gamma_pos, self.clip, self.focus_gradient = gamma_neg, gamma_pos, clip, focus_gradient

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        p = torch.sigmoid(logits)
        if self.clip > 0:
            q = (1 - p + self.clip).clamp(max=1)  # 1 - p_m
            log_q = q.clamp(min=1e-8).log()
        else:
            q, log_q = 1 - p, F.logsigmoid(-logits)
        loss = -(targets * F.logsigmoid(logits) + (1 - targets) * log_q)
        if self.gamma_neg > 0 or self.gamma_pos > 0:
            with torch.set_grad_enabled(self.focus_gradient and torch.is_grad_enabled()):
                weight = targets * (1 - p).pow(self.gamma_pos) + (1 - targets) * (1 - q).pow(self.gamma_neg)
            loss = loss * weight
        return loss


def make_loss(name: str) -> MultiLabelLoss:
    """A loss by name: 'bce', 'focal' (gamma 2), 'asl' (gamma_neg 4, gamma_pos 1, clip 0.05), or 'asl_published', the asymmetric
    loss of CHARM's code (the same gammas, no clip, gradient through the focusing weights).

    Raises
    ------
    ValueError
        Unknown name.
    """
    losses = {"bce": BCELoss, "focal": FocalLoss, "asl": AsymmetricLoss,
              "asl_published": partial(AsymmetricLoss, clip=0.0, focus_gradient=True)}
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}; available are {', '.join(losses)}")
    return losses[name]()
