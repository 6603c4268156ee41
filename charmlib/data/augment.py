"""Augmentation on the device, a whole batch at once: horizontal flip and rotation."""

import math

import torch
import torch.nn.functional as F
from fastai.data.transforms import Transform
from fastai.torch_core import TensorImage
from torch import Tensor


class FlipRotate(Transform):
    """Training only: a flip with probability ``flip`` and a rotation by up to ``degrees``, drawn for each image.

    Rotated-in corners repeat the border. It runs before the expansion to three channels, so that one channel is rotated.
    Angles are drawn on the CPU, so that a run is the same on every device.
    """

    order, split_idx = 0, 0

    def __init__(self, degrees: float = 10.0, flip: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.degrees, self.flip = degrees, flip

    def encodes(self, x: TensorImage):
        flip = (torch.rand(len(x)) < self.flip).float() * -2 + 1
        angle = (torch.rand(len(x)) * 2 - 1) * math.radians(self.degrees)
        return TensorImage(flip_rotate(x.as_subclass(Tensor).float(), flip, angle))


def flip_rotate(x: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
    """Images (B, C, S, S), mirrored where ``flip`` (B,) is -1 and rotated by ``angle`` (B,) radians, bilinear."""
    size = x.shape[-1]
    c, s = torch.cos(angle), torch.sin(angle)
    turns = torch.stack([c * flip, -s, s * flip, c])  # (4, B)
    turns = (turns.pin_memory() if x.is_cuda else turns).to(x.device, x.dtype, non_blocking=True)[:, :, None, None]
    at = (torch.arange(size, device=x.device, dtype=x.dtype) * 2 + 1) / size - 1  # pixel centres in [-1, 1]
    along, down = turns * at, turns * at[:, None]  # (4, B, 1, S) and (4, B, S, 1)
    grid = torch.empty((len(x), size, size, 2), device=x.device, dtype=x.dtype)
    torch.add(along[0], down[1], out=grid[..., 0])
    torch.add(along[2], down[3], out=grid[..., 1])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
