"""Multi-scale spatial attention of CHARM-Xray."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1, 3, 5)
FORMS = ("layers", "filter")


class MultiScaleAttention(nn.Module):
    """One attention map from 1x1, 3x3 and 5x5 views of a feature map (CHARM-Xray, region attention).

    Each convolution goes to ``max(channels // 8, 8)`` channels; their concatenation goes through a 1x1 convolution
    to one channel and a sigmoid. There is no nonlinearity between, as in the published code.

    So all four convolutions together are one linear filter, and that is how they are computed: the weights are
    multiplied out to a single 5x5 filter with one output, and the feature map is filtered once. Parameters, gradients
    and results are those of the four layers (to rounding); the published code, which runs them one after another,
    spends more multiplications on them than the rest of a MobileNetV2 has.

    Parameters
    ----------
    channels : int
        D of the feature map.
    reduction : int
        Divisor of the inner width (8 as published).
    """

    def __init__(self, channels: int, *, reduction: int = 8):
        super().__init__()
        inner = max(channels // reduction, 8)
        self.scales = nn.ModuleList(nn.Conv2d(channels, inner, size, padding=size // 2) for size in SCALES)
        self.fuse = nn.Conv2d(len(SCALES) * inner, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 1, H, W) in (0, 1)."""
        with torch.autocast(features.device.type, enabled=False):  # the product of the weights stays in float32
            weight, bias = self.filter()
        return torch.sigmoid(F.conv2d(features, weight, bias, padding=max(SCALES) // 2))

    def filter(self) -> tuple[Tensor, Tensor]:
        """The one filter that the four convolutions are: weight (1, D, 5, 5) and bias (1,)."""
        shares = self.fuse.weight.flatten().split([conv.out_channels for conv in self.scales])
        total, bias = 0, self.fuse.bias
        for conv, share in zip(self.scales, shares):
            size = conv.kernel_size[0]
            taps = conv.weight.permute(0, 2, 3, 1)  # (inner, k, k, D): rows are views of channels-last weights
            taps = (share @ taps.flatten(1)).view(1, size, size, -1).permute(0, 3, 1, 2)  # (1, D, k, k)
            total = total + F.pad(taps, [(max(SCALES) - size) // 2] * 4)
            bias = bias + share @ conv.bias
        return total, bias


class FilterAttention(nn.Module):
    """The attention map of :class:`MultiScaleAttention` with its one 5x5 filter as the parameters.

    ``sigmoid(conv(features, weight) + bias)``: any attention of four layers is one of these, and this is one of four layers
    (its 5x5 convolution can be any filter as soon as it has one channel). What differs is what is trained: 25 D + 1 weights
    instead of some 4.4 D^2 (7.2 million for D = 1280), which AdamW, checkpoints and memory pay for, and so the path
    that the optimizer takes; weight decay pulls at the filter itself, not at its factors.

    The filter starts as the product of freshly drawn layers. From one seed both forms therefore start as the same
    function, and leave the random numbers after them where they were.

    Parameters
    ----------
    channels : int
        D of the feature map.
    reduction : int
        Of the layers that are drawn.
    """

    def __init__(self, channels: int, *, reduction: int = 8):
        super().__init__()
        with torch.no_grad():
            weight, bias = MultiScaleAttention(channels, reduction=reduction).filter()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)  # (1, D, 5, 5) and (1,)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 1, H, W) in (0, 1)."""
        return torch.sigmoid(F.conv2d(features, self.weight, self.bias, padding=max(SCALES) // 2))


def make_attention(form: str, channels: int) -> nn.Module:
    """The attention in one of its two forms, 'layers' or 'filter'.

    Raises
    ------
    ValueError
        Another form.
    """
    if form not in FORMS:
        raise ValueError(f"attention must be one of {', '.join(FORMS)}, got {form!r}")
    return MultiScaleAttention(channels) if form == "layers" else FilterAttention(channels)
