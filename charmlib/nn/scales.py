"""Feature maps of a trunk at several strides, pooled to the keys of a :class:`charmlib.nn.VotingBank`."""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16)
"""In input pixels. Stride 32 belongs to the final block."""
GRID = 2
"""Pooling cells per side. Chest radiographs are aligned, so the position of a finding is informative."""
_PROBE = 224


def find_scales(trunk: nn.Module) -> tuple[list[int], list[int]]:
    """Index (from 1) and channels of the last block at each stride of ``STRIDES``, measured on an image of zeros.

    A trunk without maps (B, C, H, W) at these strides, or other than a plain ``nn.Sequential``, counts as a whole. The result
    is then the index of its last block and its output channels.
    """
    last, whole = ends_of(trunk)
    found = [last[stride] for stride in STRIDES if stride in last] or [whole]
    return [end for end, _ in found], [channels for _, channels in found]


def ends_of(trunk: nn.Module) -> tuple[dict[int, tuple[int, int]], tuple[int, int]]:
    """Index (from 1) and channels of the last block at each stride, by stride; and of the last block of all."""
    blocks = list(trunk.children()) if type(trunk) is nn.Sequential else [trunk]
    last: dict[int, tuple[int, int]] = {}
    was = {module: module.training for module in trunk.modules()}
    trunk.eval()
    with torch.no_grad():
        like = next(trunk.parameters())
        x = torch.zeros(1, 3, _PROBE, _PROBE, device=like.device, dtype=like.dtype)
        for i, block in enumerate(blocks, start=1):
            x = block(x)
            if x.dim() == 4:
                last[round(_PROBE / x.shape[-1])] = i, x.shape[1]
    for module, mode in was.items():
        module.training = mode
    return last, (len(blocks), x.shape[1])


def maps_of(trunk: nn.Module, ends: list[int], x: Tensor,
            run: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Output of a trunk for images (B, 3, H, W), and the maps (B, C_i, H_i, W_i) after the blocks of index ``ends``.

    ``ends`` comes from :func:`find_scales`. ``run(part, x)`` computes the output of each part of the trunk.
    """
    if type(trunk) is not nn.Sequential:
        out = run(trunk, x)
        return out, [out]
    maps = []
    for start, end in pairwise((0, *ends)):
        x = run(trunk[start:end], x)
        maps.append(x)
    return run(trunk[ends[-1]:], x) if ends[-1] < len(trunk) else x, maps


def cells(maps: list[Tensor]) -> Tensor:
    """Maps (B, C_i, H_i, W_i), each pooled to a GRID x GRID average and concatenated: (B, GRID^2 * sum C_i), float32."""
    return torch.cat([F.adaptive_avg_pool2d(m, GRID).flatten(1).float() for m in maps], 1)
