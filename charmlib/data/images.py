"""One grey channel from any image file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def read_grey(path: str | Path, size: int | None = None) -> np.ndarray:
    """An image file as uint8 (size, size), or as it is with ``size=None``.

    L, RGB, RGBA, palette and 1-bit files go through Pillow's ``L`` conversion (an alpha channel is dropped, not
    blended: in the NIH's RGBA files it is opaque). Files of more than 8 bits are scaled by
    the bits that their largest value needs: 8, 12 (as detectors give) or 16; floats within [0, 1] by 255.
    The resize is Pillow's bilinear filter, with antialiasing when shrinking; the aspect is not kept.

    Raises
    ------
    OSError
        Unreadable or truncated; Pillow's message.
    """
    with Image.open(path) as image:
        if image.mode in _SIXTEEN_BIT:
            values = np.asarray(image).astype(np.float32)
            if not np.isfinite(values).all():
                raise OSError(f"{path}: pixel values that are not finite")
            top = values.max(initial=0)
            if image.mode == "F" and top <= 1:
                values = values * 255
            elif top > 255:
                values = values * (255 / (4095 if top <= 4095 else 65535))
            grey = Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))
        else:
            if image.format == "JPEG":  # may be stored lying, with a note which way is up
                image = ImageOps.exif_transpose(image)
            grey = image.convert("L")
        if size is not None and grey.size != (size, size):
            grey = grey.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(grey)
