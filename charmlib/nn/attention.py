"""Multi-scale spatial attention of CHARM-Xray."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MultiScaleAttention(nn.Module):
    """One attention map from 1x1, 3x3 and 5x5 views of a feature map (CHARM-Xray, region attention).

    Each convolution goes to ``max(channels // 8, 8)`` channels; their concatenation goes through a 1x1 convolution
    to one channel and a sigmoid. There is no nonlinearity between, as in the published code.

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
        self.scales = nn.ModuleList(nn.Conv2d(channels, inner, size, padding=size // 2) for size in (1, 3, 5))
        self.fuse = nn.Conv2d(3 * inner, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 1, H, W) in (0, 1)."""
        views = torch.cat([conv(features) for conv in self.scales], dim=1)  # (B, 3 * inner, H, W)
        return torch.sigmoid(self.fuse(views))
