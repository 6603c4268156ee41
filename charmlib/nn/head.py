"""Classifiers: of CHARM-Xray and MemAug, of the standard long-tail recipe, and class-specific residual attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FORMS, ATTENDS = ("charm", "standard", "csra", "linear"), ("scores", "own")
TEMPERATURES = {1: (1,), 2: (1, 99), 4: (1, 2, 4, 99), 6: (1, 2, 3, 4, 5, 99), 8: (1, 2, 3, 4, 5, 6, 7, 99)}
"""Of the heads of :class:`CSRAHead`, by their number (Zhu & Wu 2021)."""


class _Layers(nn.Sequential):
    @torch.no_grad()
    def start_at(self, log_odds: Tensor) -> None:
        """Set the last bias (C,), so that training starts at given probabilities (Lin et al., RetinaNet, 2017, section 4.1).

        With one sigmoid a class and no decay of this bias, this is the logit adjustment in training of Menon et al. (2021).
        """
        self[-1].bias.copy_(log_odds)


class ClassifierHead(_Layers):
    """BatchNorm1d, Linear to ``hidden``, ReLU, Dropout, Linear to the classes: (B, D) -> logits (B, C)."""

    def __init__(self, features: int, classes: int, *, hidden: int = 512, dropout: float = 0.3):
        super().__init__(
            nn.BatchNorm1d(features),
            nn.Linear(features, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )


class StandardHead(_Layers):
    """BatchNorm1d, Dropout, Linear to ``hidden``, ReLU, BatchNorm1d, Dropout, Linear to the classes: (B, D) -> logits (B, C).

    The "standard head" of hieuphamha19/CXR_LT, without its last bias of -2: see ``start_at``.
    """

    def __init__(self, features: int, classes: int, *, hidden: int = 512, dropout: float = 0.3):
        super().__init__(
            nn.BatchNorm1d(features),
            nn.Dropout(dropout),
            nn.Linear(features, hidden),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(hidden),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )


class LinearHead(_Layers):
    """Dropout, Linear to the classes: (B, D) -> logits (B, C)."""

    def __init__(self, features: int, classes: int, *, dropout: float = 0.0):
        super().__init__(nn.Dropout(dropout), nn.Linear(features, classes))


class CSRAHead(nn.Module):
    """Class-specific residual attention (Zhu & Wu, ICCV 2021, arXiv 2108.02456): a map (B, D, H, W) -> logits (B, C).

    ::

        s_c(x) = m_c . f(x) / |m_c|                                           the score of class c at position x
        logit_c = b_c + sum over heads of (mean_x s_c + lam * sum_x softmax_x(T s_c) s_c)

    Each head has classifiers m of its own and a temperature T of ``TEMPERATURES``.

    Differs from the authors' code (Kevinz-code/CSRA) in the bias b, which rare classes need, and at T = 99, where that code
    takes the maximum: it lies at most log(H W) / 99 above the softmax's mean. Differs from hieuphamha19/CXR_LT, which has one
    head, attention of its own, classifiers of any length, the bias (1 + lam) times, and a batch norm in front.

    Parameters
    ----------
    lam : float
        Share of the attended score, 0 or more; 0 is average pooling before a linear layer.
    heads : int
        1, 2, 4, 6 or 8.
    attention : {'scores', 'own'}
        What the softmax over positions is of: the scores s_c, or a 1 x 1 convolution of its own.

    Raises
    ------
    ValueError
        A parameter outside its range.
    """

    def __init__(self, features: int, classes: int, *, lam: float = 0.1, heads: int = 1, attention: str = "scores"):
        super().__init__()
        if heads not in TEMPERATURES or attention not in ATTENDS or lam < 0:
            raise ValueError(f"expected csra_heads of {', '.join(map(str, TEMPERATURES))}, csra_attention of "
                             f"{', '.join(ATTENDS)} and csra_lambda of 0 or more, got {heads!r}, {attention!r} and {lam!r}")
        self.lam, self.heads, self.classes = lam, heads, classes
        self.scores = nn.Conv2d(features, heads * classes, 1, bias=False)
        self.own = nn.Conv2d(features, heads * classes, 1) if attention == "own" else None
        self.bias = nn.Parameter(torch.zeros(classes))
        temperatures = torch.tensor(TEMPERATURES[heads], dtype=torch.float32).repeat_interleave(classes)
        self.register_buffer("temperatures", temperatures[:, None], persistent=False)  # (heads * C, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, C)."""
        scores = F.conv2d(features, F.normalize(self.scores.weight, dim=1)).flatten(2)  # (B, heads * C, H * W)
        attend = scores if self.own is None else self.own(features).flatten(2)
        share = torch.softmax(self.temperatures * attend, 2)
        logits = scores.mean(2) + self.lam * (share * scores).sum(2)
        return logits.unflatten(1, (self.heads, self.classes)).sum(1) + self.bias

    @torch.no_grad()
    def start_at(self, log_odds: Tensor) -> None:
        """Set the bias (C,); see :meth:`ClassifierHead.start_at`."""
        self.bias.copy_(log_odds)


def make_head(form: str, features: int, classes: int, *, hidden: int = 512, dropout: float = 0.3, csra_lambda: float = 0.1,
              csra_heads: int = 1, csra_attention: str = "scores") -> nn.Module:
    """:class:`ClassifierHead` for the form 'charm', :class:`StandardHead` for 'standard', :class:`CSRAHead` for 'csra', and
    :class:`LinearHead` for 'linear'.

    Raises
    ------
    ValueError
        Unknown form, or a parameter outside its range.
    """
    if form not in FORMS:
        raise ValueError(f"head must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "csra":
        return CSRAHead(features, classes, lam=csra_lambda, heads=csra_heads, attention=csra_attention)
    if form == "linear":
        return LinearHead(features, classes, dropout=dropout)
    return (ClassifierHead if form == "charm" else StandardHead)(features, classes, hidden=hidden, dropout=dropout)
