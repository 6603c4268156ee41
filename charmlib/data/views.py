"""Views of test-time augmentation: whole batches of grey images, each changed in the same way."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from charmlib.data.augment import warp


class View(NamedTuple):
    """A change of grey images: mirrored, rotated by ``degrees``, enlarged by ``zoom``, grey levels times ``brightness``."""

    flip: bool = False
    degrees: float = 0.0
    zoom: float = 1.0
    brightness: float = 1.0

    def of(self, grey: Tensor) -> Tensor:
        """Grey (B, 1, S, S) of 0 to 255 -> float32 of the same shape; a view without a change returns its input."""
        if self[:3] != View()[:3]:
            sign, angle, zoom = (torch.full((len(grey),), float(value)) for value in (
                -1 if self.flip else 1, math.radians(self.degrees), self.zoom))
            grey = warp(grey.float(), sign, angle, zoom)
        return grey if self.brightness == 1 else (grey.float() * self.brightness).clamp(0, 255)


VIEWS = {"id": View(), "flip": View(flip=True), "left": View(degrees=5), "right": View(degrees=-5),
         "zoom_1.1": View(zoom=1.1), "zoom_0.9": View(zoom=0.9), "bright_1.1": View(brightness=1.1),
         "bright_0.9": View(brightness=0.9), "zoom_1.05": View(zoom=1.05), "zoom_0.95": View(zoom=0.95),
         "flip_zoom_1.05": View(True, zoom=1.05), "flip_zoom_0.95": View(True, zoom=0.95)}
_LIGHT = ("id", "flip", "left", "right")
_MEDIUM = (*_LIGHT, "zoom_1.1", "zoom_0.9")
MENUS = {"none": ("id",), "flip": ("id", "flip"), "light": _LIGHT, "medium": _MEDIUM,
         "heavy": (*_MEDIUM, "bright_1.1", "bright_0.9"),
         "flip_scale": ("id", "flip", "zoom_1.05", "zoom_0.95", "flip_zoom_1.05", "flip_zoom_0.95")}
"""The menus of hieuphamha19/CXR_LT. There, rotated and shrunk images have mirrored borders; here borders repeat, as in training
(:func:`charmlib.data.augment.warp`)."""
