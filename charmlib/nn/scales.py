"""A trunk's maps at several scales: what memory keys, and a reading beside the head, are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDES = (4, 8, 16)
"""In pixels of the input. Finer maps are little more than the image; the coarsest is the final block's matter."""
GRID = 2
"""Maps are averaged over so many cells a side: chest radiographs lie alike, so where something shows counts."""
_PROBE = 224


def find_scales(trunk: nn.Module, strides: tuple[int, ...] = STRIDES) -> tuple[list[int], list[int]]:
    """Behind which blocks of a trunk its last maps at some strides lie: how many blocks each is made by, and its channels.

    A trunk that is no plain ``nn.Sequential``, that has none of the strides, or whose blocks do not give maps (B, C, H, W) is
    taken as one block with its own channels.
    """
    blocks = list(trunk.children()) if type(trunk) is nn.Sequential else [trunk]
    last: dict[int, tuple[int, int]] = {}  # stride -> blocks, channels
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
    found = [last[stride] for stride in strides if stride in last] or [(len(blocks), x.shape[1])]
    return [end for end, _ in found], [channels for _, channels in found]


def maps_of(trunk: nn.Module, ends: list[int], x: Tensor,
            run: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A trunk's output for ``x`` and its maps behind blocks number ``ends``, as :func:`find_scales` counts them.

    ``run(part, x)`` is asked for the output of each part of the trunk in turn.
    """
    if type(trunk) is not nn.Sequential:
        out = run(trunk, x)
        return out, [out]
    blocks, maps, start = list(trunk.children()), [], 0
    for end in ends:
        x = run(nn.Sequential(*blocks[start:end]), x)
        maps.append(x)
        start = end
    return run(nn.Sequential(*blocks[start:]), x) if start < len(blocks) else x, maps


def cells(maps: list[Tensor], grid: int = GRID) -> Tensor:
    """Maps (B, C_i, H_i, W_i) -> means over a grid of cells, one map after another (B, grid * grid * sum C_i), float32."""
    return torch.cat([F.adaptive_avg_pool2d(m, grid).flatten(1).float() for m in maps], 1)
