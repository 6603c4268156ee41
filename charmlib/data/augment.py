"""Augmentation of whole batches on the device, before they are expanded to three channels."""

import math

import torch
import torch.nn.functional as F
from fastai.data.transforms import Transform
from fastai.torch_core import TensorImage
from torch import Tensor

MENUS = ("light", "standard", "strong")
SIDES, TILES, HOLES = 21, 8, 6  # holes have 1/21 of an image's side; CLAHE has 8 x 8 tiles


class Augment(Transform):
    """Training (and fastai's ``tta``) only: grey images (B, 1, S, S) of 0 to 255, each with draws of its own.

    - ``light``: a flip with probability ``flip``, and a rotation by up to ``degrees``.
    - ``standard``: also with probability 0.5 a shift by up to 5 % of the side along each axis and a zoom of 0.95 to 1.05; with
      probability 0.2 a contrast factor of 0.9 to 1.1 and a brightness of up to 10 % of the range.
    - ``strong``: also CLAHE with probability 0.2; with probability 0.15 noise with a standard deviation of 1 to 2.24 grey
      levels; and with probability 0.15 six square holes of 1/21 of the side, filled with the image's mean.

    The menus follow the two recipes of hieuphamha19/CXR_LT in the meaning that its arguments had in older albumentations;
    release 2.0.8 ignores those of noise and holes. 'strong' moves and brightens as 'standard' does; there it is a shift of 3
    %, a turn of 7 degrees, a brightness of 8 %, and a CLAHE whose clip limit is drawn. There, zoomed and rotated images have
    black borders and holes are black; here borders repeat. Draws for each image are made on the CPU, so that a run is the
    same on every device; noise for each pixel is drawn on the device. All come from torch's generators.

    Raises
    ------
    ValueError
        An unknown menu.
    """

    order = split_idx = 0

    def __init__(self, menu: str = "light", degrees: float = 10.0, flip: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        if menu not in MENUS:
            raise ValueError(f"augment must be one of {', '.join(MENUS)}, got {menu!r}")
        self.menu, self.degrees, self.flip = menu, degrees, flip
        self.p = {"move": 0.5, "clahe": 0.2, "brightness": 0.2, "noise": 0.15, "holes": 0.15}

    def encodes(self, x: TensorImage):
        x = x.as_subclass(Tensor).float()
        flip = (torch.rand(len(x)) < self.flip).float() * -2 + 1
        angle = (torch.rand(len(x)) * 2 - 1) * math.radians(self.degrees)
        if self.menu == "light":
            return TensorImage(warp(x, flip, angle))

        def within(limit: float, name: str, rows: int) -> Tensor:
            """(rows, B) in [-limit, limit], 0 for images that are not drawn."""
            return (torch.rand(len(x)) < self.p[name]) * (torch.rand(rows, len(x)) * 2 - 1) * limit

        move = within(0.05, "move", 3)
        x = warp(x, flip, angle, 1 + move[0], move[1:])
        if self.menu == "strong":
            x = torch.where(_sent(torch.rand(len(x)) < self.p["clahe"], x), clahe(x), x)
        gain, bias = _sent(within(0.1, "brightness", 2), x)
        x = (x * (1 + gain) + 255 * bias).clamp(0, 255)
        if self.menu == "strong":
            sd = (torch.rand(len(x)) < self.p["noise"]) * (1 + 1.24 * torch.rand(len(x)))
            x = (x + _sent(sd, x) * torch.randn_like(x)).clamp(0, 255)
            side = max(1, x.shape[-1] // SIDES)
            corners = (torch.rand(2, HOLES, len(x)) * (x.shape[-1] - side + 1)).long()
            x = punch(x, corners.masked_fill(torch.rand(len(x)) >= self.p["holes"], x.shape[-1]), side)
        return TensorImage(x)


def _sent(values: Tensor, like: Tensor) -> Tensor:
    """Numbers of each image (..., B) on the device of a batch (B, 1, S, S), as (..., B, 1, 1, 1), without waiting."""
    return (values.pin_memory() if like.is_cuda else values).to(like.device, non_blocking=True)[..., None, None, None]


def warp(x: Tensor, flip: Tensor, angle: Tensor, zoom: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Images (B, C, S, S), moved right and down by ``shift`` (2, B) sides, then enlarged by ``zoom`` (B,), rotated by ``angle``
    (B,) radians and mirrored where ``flip`` (B,) is -1: bilinear, all at once. Pixels from outside repeat the border."""
    size = x.shape[-1]
    c, s = torch.cos(angle), torch.sin(angle)
    turns = torch.stack([c * flip, -s, s * flip, c])  # (4, B)
    turns = turns if zoom is None else turns / zoom
    turns = _sent(turns.to(x.dtype), x)[..., 0]  # (4, B, 1, 1)
    at = (torch.arange(size, device=x.device, dtype=x.dtype) * 2 + 1) / size - 1  # pixel centres in [-1, 1]
    along, down = turns * at, turns * at[:, None]  # (4, B, 1, S) and (4, B, S, 1)
    grid = torch.empty((len(x), size, size, 2), device=x.device, dtype=x.dtype)
    torch.add(along[0], down[1], out=grid[..., 0])
    torch.add(along[2], down[3], out=grid[..., 1])
    if shift is not None:
        grid -= 2 * _sent(shift.T.contiguous().to(x.dtype), x).reshape(-1, 1, 1, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def clahe(x: Tensor) -> Tensor:
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994) of images (B, 1, S, S) in whole grey levels.

    Clip limit 2 and 8 x 8 tiles, as OpenCV and the parameter ``contrast`` compute it, within one grey level.
    """
    size, tile = x.shape[-1], -(-x.shape[-1] // TILES)
    more = tile * TILES - size  # OpenCV mirrors up to whole tiles
    levels = F.pad(x, (0, more, 0, more), mode="reflect").round().long().clamp(0, 255)
    tiles = levels.reshape(len(x), TILES, tile, TILES, tile).transpose(2, 3).reshape(len(x), TILES**2, -1)
    counts = tiles.new_zeros(*tiles.shape[:2], 256).scatter_add_(2, tiles, torch.ones_like(tiles))
    limit = max(1, 2 * tile**2 // 256)
    left = (counts - limit).clamp(min=0).sum(2, keepdim=True)  # what lies above is spread evenly, the rest over every nth bin
    bins, rest = torch.arange(256, device=x.device), left % 256
    step = (256 // rest.clamp(min=1)).clamp(min=1)
    counts = counts.clamp(max=limit) + left // 256 + ((bins % step == 0) & (bins // step < rest))
    curves = (counts.cumsum(2).float() * (255 / tile**2)).round().clamp(0, 255)  # (B, 64, 256): each tile's new levels

    at = torch.arange(size, device=x.device) / tile - 0.5  # in tiles, from the middle of the first
    share, low = at - at.floor(), at.floor().long()
    near = torch.stack([low.clamp(min=0), (low + 1).clamp(max=TILES - 1)])  # (2, S): the tiles around a pixel
    weights = torch.stack([1 - share, share])
    new, flat = torch.zeros_like(x), curves.flatten(1)
    for i in range(2):
        for j in range(2):
            index = (near[i][:, None] * TILES + near[j]) * 256 + levels[:, 0, :size, :size]  # (B, S, S)
            new += (weights[i][:, None] * weights[j]) * flat.gather(1, index.flatten(1)).reshape_as(x)
    return new.round()


def punch(x: Tensor, corners: Tensor, side: int) -> Tensor:
    """Images (B, 1, S, S) with square holes of ``side`` pixels at ``corners`` (2, holes, B), filled with the image's mean.

    Corners are the holes' first rows and columns; a hole at S is outside."""
    at = torch.arange(x.shape[-1], device=x.device)
    start = _sent(corners, x)[..., 0, 0]  # (2, holes, B, 1)
    rows, columns = (at >= start) & (at < start + side)  # (holes, B, S) each
    inside = (rows[..., None] & columns[..., None, :]).any(0)[:, None]
    return torch.where(inside, x.mean((1, 2, 3), keepdim=True), x)
