"""Where a network looks: heat map, largest region, box and crop, all on the device: nothing is read from it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HEATS, CONNECT = ("mean", "max", "cam"), (4, 8)
WHOLE, CENTRE = (0.0, 0.0, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75)
"""Boxes: top, left, bottom and right edges as shares of the image's sides."""


def heat_map(features: Tensor, how: str = "mean", weight: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
    """Maps (B, D, h, w) -> heat (B, h, w), float32, without gradient.

    'max' and 'mean' are over the channels' absolute values (AG-CNN, arXiv 1801.09927, equation 3 and its L1 variant). A ReLU6
    makes 'max' 6 almost everywhere. 'cam' is the sum over the classes of probability times class map, from ``weight`` (C, D)
    and ``logits`` (B, C); it may be negative.
    """
    features = features.detach().float()
    if how != "cam":
        return features.abs().mean(1) if how == "mean" else features.abs().amax(1)
    share = torch.sigmoid(logits.detach().float()) @ weight.detach().float()  # (B, D)
    return (features * share[:, :, None, None]).sum(1)


def above(heat: Tensor, tau: float) -> Tensor:
    """Mask (B, h, w) of the cells above ``tau`` of the range of each map, which equation 4 leaves open; empty if that is 0."""
    low, high = heat.amin((1, 2), keepdim=True), heat.amax((1, 2), keepdim=True)
    return heat - low > tau * (high - low)


def largest_region(mask: Tensor, connect: int = 8) -> Tensor:
    """The largest connected region of each mask (B, h, w); of equals, the one whose first cell comes first row by row.

    Cells touch at sides (``connect`` 4) or also at corners (8). Labels spread by as many max pools as a winding region is long.
    """
    if connect not in CONNECT:
        raise ValueError(f"connect must be 4 or 8, got {connect!r}")
    height, width = mask.shape[1:]
    cells = height * width
    inside = mask.float()[:, None]
    label = torch.arange(cells, 0, -1, device=mask.device, dtype=torch.float32).view(height, width) * inside
    for _ in range(cells - 1):
        label = inside * (F.max_pool2d(label, 3, 1, 1) if connect == 8 else torch.maximum(
            F.max_pool2d(label, (3, 1), 1, (1, 0)), F.max_pool2d(label, (1, 3), 1, (0, 1))))
    label = label[:, 0].long()
    sizes = label.new_zeros(len(mask), cells + 1).scatter_add_(1, label.flatten(1), mask.flatten(1).long())
    rank = sizes * (cells + 1) + torch.arange(cells + 1, device=mask.device)  # no two are equal
    return mask & (label == rank.argmax(1)[:, None, None])


def box_of(region: Tensor) -> Tensor:
    """Region (B, h, w) -> box (B, 4) of shares that holds all of its cells; the whole image for an empty region."""
    edges = []
    for axis in (2, 1):
        there = region.any(axis)  # (B, h), then (B, w)
        at, cells = torch.arange(there.shape[1], device=region.device), there.shape[1]
        edges += [(torch.where(there, at, cells).amin(1) / cells, torch.where(there, at + 1, 0).amax(1) / cells)]
    (top, bottom), (left, right) = edges
    box = torch.stack([top, left, bottom, right], 1)
    return torch.where(region.any((1, 2))[:, None], box, boxes(WHOLE, box))


def boxes(edges: Sequence[float], like: Tensor) -> Tensor:
    """One box for each image of a batch, (B, 4), written on the device of ``like`` (B, ...)."""
    return torch.stack([torch.full((len(like),), edge, device=like.device) for edge in edges], 1)


def crop(images: Tensor, box: Tensor, size: int) -> Tensor:
    """The boxes (B, 4) of images (B, C, H, W), each resized to (B, C, size, size): bilinear, without smoothing."""
    top, left, bottom, right = box.float().unbind(1)
    zero = torch.zeros_like(top)
    theta = torch.stack([torch.stack([right - left, zero, right + left - 1], 1),
                         torch.stack([zero, bottom - top, bottom + top - 1], 1)], 1)
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False)
