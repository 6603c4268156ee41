"""Where a trunk's maps change their size: the scales that memory keys are made of."""

from __future__ import annotations

import torch
from torch import nn

STRIDES = (4, 8, 16)
"""In pixels of the input. Finer maps are little more than the image; the coarsest is the final block's matter."""
_PROBE = 64


def split_scales(trunk: nn.Module, strides: tuple[int, ...] = STRIDES) -> tuple[list[nn.Module], list[int]]:
    """A trunk as pieces, one after another what the trunk does, cut behind its last map at each of some strides.

    The pieces share the trunk's blocks. Beside each stands how many channels the map behind it has, 0 where it is at none of
    the strides (what is left of the trunk). A trunk that is no ``nn.Sequential``, or has none of the strides, is one piece
    with its own channels.
    """
    blocks = list(trunk.children()) if isinstance(trunk, nn.Sequential) else [trunk]
    last: dict[int, tuple[int, int]] = {}  # stride -> block, channels
    was = trunk.training
    trunk.eval()
    with torch.no_grad():
        like = next(trunk.parameters())
        x = torch.zeros(1, 3, _PROBE, _PROBE, device=like.device, dtype=like.dtype)
        for i, block in enumerate(blocks):
            x = block(x)
            last[round(_PROBE / x.shape[-1])] = i, x.shape[1]
    trunk.train(was)
    cuts = [last[stride] for stride in strides if stride in last]
    if not cuts:
        return [trunk], [x.shape[1]]
    pieces, start = [], 0
    for end, _ in cuts:
        pieces.append(nn.Sequential(*blocks[start:end + 1]))
        start = end + 1
    channels = [c for _, c in cuts]
    if start < len(blocks):
        pieces.append(nn.Sequential(*blocks[start:]))
        channels.append(0)
    return pieces, channels
