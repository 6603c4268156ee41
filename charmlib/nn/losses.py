"""Multi-label losses of logits (B, C) and targets (B, C) of 0, 1, or NaN for unknown; computed in float32.

Each loss is a mean over the known entries. ``FocalLoss(gamma=0)`` and ``AsymmetricLoss(0, 0, clip=0)`` therefore equal
:class:`BCELoss`. All losses have the attributes that fastai uses: ``activation`` (sigmoid), ``decodes``, ``reduction``.

Class weights and the prior of a sample act in training mode (``loss.train()``) only. In eval mode a loss is that of the
images as they are, so that epochs compare.
"""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiLabelLoss(nn.Module):
    """Base class, which masks unknown targets and reduces in float32. Subclasses define ``terms``.

    The ``reduction`` 'mean' or 'sum' gives a scalar, 'none' gives (B, C). ``forward`` raises ValueError if the shapes of logits
    and targets differ. The mean divides by the number of known entries, with class weights too.

    Attributes, which act in training mode only: ``weights`` (2, C), those of positives and of negatives, or None
    (:func:`class_weights`); ``weighted``, whether they act; ``shift`` (C,), added to the logits, or None: the log-odds of a
    sample less those of the images (:func:`charmlib.data.sampling.prior_shift`).
    """

    weighted = True

    def __init__(self, *, reduction: str = "mean"):
        super().__init__()
        self.reduction = reduction
        self.register_buffer("weights", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Loss of each entry (B, C)."""
        raise TypeError("MultiLabelLoss is a base class; use one of its subclasses, such as BCELoss")

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        if logits.shape != targets.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} differ in shape")
        # as_subclass: fastai's TensorBase dispatches every operation through Python
        logits, targets = logits.as_subclass(Tensor), targets.as_subclass(Tensor)
        with torch.autocast(device_type=logits.device.type, enabled=False):
            logits, targets = logits.float(), targets.float()
            known = ~torch.isnan(targets)
            targets = torch.where(known, targets, 0.0)
            loss = self.terms(logits if self.shift is None or not self.training else logits + self.shift, targets) * known
            if self.weights is not None and self.weighted and self.training:
                loss = loss * torch.lerp(self.weights[1], self.weights[0], targets)
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
        loss = bce if self.gamma == 0 else bce * _power(miss, self.gamma)
        if self.alpha is not None:
            loss = loss * (self.alpha * targets + (1 - self.alpha) * (1 - targets))
        return loss


def _power(miss: Tensor, gamma: float) -> Tensor:
    return miss.clamp(min=torch.finfo(miss.dtype).tiny).pow(gamma)  # the slope of 0^gamma is infinite for gamma below 1


class AsymmetricLoss(MultiLabelLoss):
    """Asymmetric loss (ASL): separate focusing of positives and negatives, and a probability margin for negatives.

    ``L+ = -(1 - p)^gamma_pos log p`` and ``L- = -p_m^gamma_neg log(1 - p_m)`` with ``p_m = max(p - clip, 0)`` (Ridnik et al.,
    arXiv 2009.14119, eq. 7). By default no gradient flows through the focusing weights, as in the authors' code. Differs from
    that code in two points: entries are averaged instead of summed, and log-sigmoid replaces the clamped log where ``clip``
    does not apply, which keeps float32 exact for large logits. hieuphamha19/CXR_LT has a loss of this name whose gradient has
    the wrong sign.

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
                power = _power if self.focus_gradient else torch.pow
                weight = targets * power(1 - p, self.gamma_pos) + (1 - targets) * power(1 - q, self.gamma_neg)
            loss = loss * weight
        return loss


def _positive(counts: Tensor) -> Tensor:
    counts = torch.as_tensor(counts, dtype=torch.float64)
    if (counts < 1).any():
        raise ValueError(f"expected counts of 1 or more, got {counts.tolist()}")
    return counts


class LDAMLoss(MultiLabelLoss):
    """Label-distribution-aware margin: ``BCE(logits - scale * margin_c y, y)`` with ``logits = scale z``, thus
    ``BCE(scale (z - margin_c y), y)`` (Cao et al., NeurIPS 2019, arXiv 1906.07413, with a sigmoid for its softmax).

    ``margin_c`` is proportional to ``n_c^(-1/4)``; the rarest class has ``margin``. Negatives have none. Differs from the
    paper: z is not normalised. Differs from public code for radiographs (hieuphamha19/CXR_LT): there the loss multiplies by 30
    and scoring does not. Here the network multiplies (``ldam_scale`` of :class:`charmlib.models.CharmNet`), so training,
    validation and scoring see the same logits.

    Parameters
    ----------
    counts : tensor (C,)
        Positives of each class, 1 or more.
    margin : float
        The largest margin, in units of z, 0 or more; 0.5 as published. 0 is BCE.
    scale : float
        What the network multiplied z by, above 0; 30 as published.

    Raises
    ------
    ValueError
        A count below 1.
    """

    def __init__(self, counts: Tensor, margin: float = 0.5, scale: float = 1.0, *, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        rarity = _positive(counts) ** -0.25
        self.margin, self.scale = margin, scale
        self.register_buffer("margins", (margin * rarity / rarity.max()).float(), persistent=False)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits - self.scale * self.margins * targets, targets, reduction="none")


class DistributionBalancedLoss(MultiLabelLoss):
    """Distribution-balanced loss (Wu et al., ECCV 2020, arXiv 2007.09654) in the form of the authors' code::

        w  = alpha + sigmoid(beta (r - mu)),   r = (1 / n_c) / sum of 1 / n_j over the image's positives j
        u  = logits + nu_c,                    nu_c = kappa / scale * log-odds of class c
        L+ = w softplus(-u),                   L- = w softplus(scale u) / scale
        and with focal gamma                   times balance (1 - p_t)^gamma, p_t = sigmoid(u) or sigmoid(-scale u)

    The defaults are those for COCO; ``alpha=0.5, beta=0, scale=1, kappa=0, gamma=0`` is BCE. The authors' code adds nu to the
    logits in place, which changes the network's output. hieuphamha19/CXR_LT has another loss of this name: neither r nor
    negative tolerance, and the largest margin for common classes. An image without a positive has w = 1 + alpha; in the NIH set
    58 % are such, so that without ``class_aware`` draws this is nearly the focal loss.

    Parameters
    ----------
    counts, images : tensor (C,)
        Positives of each class, and known labels; 1 <= counts < images.

    Raises
    ------
    ValueError
        A count below 1.
    """

    def __init__(self, counts: Tensor, images: Tensor, *, alpha: float = 0.1, beta: float = 10.0, mu: float = 0.2,
                 scale: float = 2.0, kappa: float = 0.05, gamma: float = 2.0, balance: float = 2.0, reduction: str = "mean"):
        super().__init__(reduction=reduction)
        self.alpha, self.beta, self.mu, self.scale, self.gamma, self.balance = alpha, beta, mu, scale, gamma, balance
        counts = _positive(counts)
        self.register_buffer("rarity", (1 / counts).float(), persistent=False)
        self.register_buffer("nu", (kappa / scale * torch.logit(counts / images)).float(), persistent=False)

    def terms(self, logits: Tensor, targets: Tensor) -> Tensor:
        r = self.rarity / (targets * self.rarity).sum(1, keepdim=True).clamp(min=1e-30)
        weight = self.alpha + torch.sigmoid(self.beta * (r - self.mu))
        u = logits + self.nu
        positive, negative = F.softplus(-u), F.softplus(self.scale * u) / self.scale
        if self.gamma > 0:
            positive = positive * self.balance * _power(torch.sigmoid(-u), self.gamma)
            negative = negative * self.balance * _power(torch.sigmoid(self.scale * u), self.gamma)
        return weight * torch.lerp(negative, positive, targets)


def class_weights(counts, images, how: str, names: Sequence[str] = (), *, beta: float = 0.9999) -> tuple[Tensor, Tensor]:
    """Weights (C,) of positives and of negatives, float32, from the positives of each class and its known labels, both (C,).

    With n positives among N known labels:

    - 'none': 1 and 1;
    - 'inverse': (N - n) / n and 1, as torch's ``pos_weight``; 'sqrt': its square root and 1;
    - 'effective': (1 - beta) / (1 - beta^n), scaled to the sum C, and 1 (Cui et al., CVPR 2019). Their code weights whole
      images of one class each; timm weights positives and negatives alike;
    - 'exp': e^(1 - n / N) and e^(n / N) (CheXFusion, Kim, 2023, arXiv 2308.03968).

    A weight above 100 gives a warning.

    Raises
    ------
    ValueError
        An unknown ``how``; or a class without positives or without negatives, which is named.
    """
    n, known = (torch.as_tensor(values, dtype=torch.float64) for values in (counts, images))
    if how != "none":
        _refuse_one_sided(n, known, names, f"class_weight {how}")
    share, ones = n / known, torch.ones_like(n)
    effective = (1 - beta) / (1 - beta**n) if beta else ones
    ways = {"none": (ones, ones), "inverse": ((known - n) / n, ones), "sqrt": (((known - n) / n).sqrt(), ones),
            "effective": (effective / effective.mean(), ones), "exp": ((1 - share).exp(), share.exp())}
    if how not in ways:
        raise ValueError(f"unknown class_weight {how!r}; available are {', '.join(ways)}")
    if (large := ways[how][0] > 100).any():
        heavy = ", ".join(f"{_name(c, names)} {ways[how][0][c]:.0f}" for c in large.nonzero().flatten().tolist())
        warnings.warn(f"class_weight {how} gives positives a weight above 100 ({heavy}), with which training may learn "
                      "nothing: sqrt, effective and exp are milder", stacklevel=2)
    return ways[how][0].float(), ways[how][1].float()


def _name(c: int, names: Sequence[str]) -> str:
    return names[c] if len(names) else f"class {c}"


def _refuse_one_sided(counts: Tensor, images: Tensor, names: Sequence[str], what: str) -> None:
    for wrong, side in ((counts <= 0, "positive"), (counts >= images, "negative")):
        if wrong.any():
            who = ", ".join(_name(c, names) for c in wrong.nonzero().flatten().tolist())
            raise ValueError(f"{what} needs positives and negatives of each class; the training images have no {side} of "
                             f"{who}: say stage1_images: all, train on more data, leave the class out of the table, or choose "
                             "loss bce, focal or asl with class_weight none")


def make_loss(name: str, counts=None, images=None, *, names: Sequence[str] = (), class_weight: str = "none",
              asl_gamma_neg: float = 4.0, asl_gamma_pos: float = 1.0, asl_clip: float = 0.05, ldam_margin: float = 0.5,
              ldam_scale: float = 1.0) -> MultiLabelLoss:
    """A loss by name.

    - 'bce'; 'focal' (gamma 2), which is class-balanced focal with ``class_weight`` effective;
    - 'asl' with the ``asl_`` values; 'asl_published', the asymmetric loss of CHARM's code (gammas 4 and 1, no clip, gradient
      through the focusing weights);
    - 'ldam', 'db': :class:`LDAMLoss`, :class:`DistributionBalancedLoss`.

    ``counts`` are the positives of each class among the training images and ``images`` its known labels, both (C,). Class
    weights, ldam and db need them; ``names`` (C,) are the classes for messages. ``class_weight`` is that of
    :func:`class_weights`; it acts in training mode and while the loss's ``weighted`` is True.

    Raises
    ------
    ValueError
        Unknown name, counts missing, or as :func:`class_weights`.
    """
    losses = {"bce": BCELoss, "focal": FocalLoss, "asl": lambda: AsymmetricLoss(asl_gamma_neg, asl_gamma_pos, asl_clip),
              "asl_published": lambda: AsymmetricLoss(clip=0.0, focus_gradient=True),
              "ldam": lambda: LDAMLoss(n, ldam_margin, ldam_scale), "db": lambda: DistributionBalancedLoss(n, known)}
    if name not in losses:
        raise ValueError(f"unknown loss {name!r}; available are {', '.join(losses)}")
    counted = name in ("ldam", "db")
    if (counted or class_weight != "none") and (counts is None or images is None):
        raise ValueError(f"loss {name} with class_weight {class_weight} needs counts and images, the positives and the known "
                         "labels of each class")
    if counts is not None:
        n, known = (torch.as_tensor(values, dtype=torch.float64) for values in (counts, images))
        if counted:
            _refuse_one_sided(n, known, names, f"loss {name}")
    loss = losses[name]()
    if class_weight != "none":
        loss.weights = torch.stack(class_weights(n, known, class_weight, names))
    return loss
