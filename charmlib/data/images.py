"""One grey channel from any image file."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    from kornia_rs.io import decode_image_png_u8 as _decode_png
except ImportError:
    try:
        from kornia_rs import decode_image_png_u8 as _decode_png  # before 0.2
    except ImportError:  # Kaggle has it with kornia, but --no-deps may leave it out elsewhere
        _decode_png = None

ASPECTS = ("stretch", "pad", "crop")
FILTER = "bilinear"

_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")


def read_grey(source: str | Path | bytes, size: int | None = None, aspect: str = "stretch") -> np.ndarray:
    """An image file (or its bytes) as uint8 (size, size), or as it is with ``size=None``; see :func:`fit`.

    Raises
    ------
    OSError
        Unreadable or truncated; Pillow's message.
    """
    grey = open_grey(source)
    return np.asarray(grey) if size is None else fit(grey, size, aspect)


def open_grey(source: str | Path | bytes) -> Image.Image:
    """An image file (or its bytes) as a picture of one 8-bit grey channel.

    L, RGB, RGBA, palette and 1-bit files go through Pillow's ``L`` conversion (an alpha channel is dropped, not
    blended: in the NIH's RGBA files it is opaque). Files of more than 8 bits are scaled by
    the bits that their largest value needs: 8, 12 (as detectors give) or 16; floats within [0, 1] by 255.

    Raises
    ------
    OSError
        Unreadable or truncated; Pillow's message.
    """
    if isinstance(source, bytes) and (picture := _plain_png(source)) is not None:
        return picture
    with _opened(source) as image:
        if image.mode in _SIXTEEN_BIT:
            grey = _eight_bits(image)
        else:
            if image.format == "JPEG":  # may be stored lying, with a note which way is up
                image = ImageOps.exif_transpose(image)
            grey = image.convert("L") if image.mode != "L" else image
            grey.load()
        return grey


def _opened(source: str | Path | bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError as error:
        raise UnidentifiedImageError("not a picture of any kind that Pillow knows") from error


def _plain_png(source: bytes) -> Image.Image | None:
    """The grey picture of an 8-bit grey, RGB or RGBA PNG by a decoder that takes a third of Pillow's time, if installed.

    PNG is lossless, so the pixels are Pillow's. None for anything else, and for what it refuses, which Pillow then may read.
    """
    if _decode_png is None or len(source) < 33 or source[:8] + source[12:16] != b"\x89PNG\r\n\x1a\nIHDR":
        return None
    if b"tRNS" in source[33:4096]:
        return None
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", source[16:29])
    mode, channels = {0: ("mono", 1), 2: ("rgb", 3), 6: ("rgba", 4)}.get(colour, ("", 0))
    if depth != 8 or not channels or interlaced or width * height > Image.MAX_IMAGE_PIXELS:
        return None
    try:
        pixels = _decode_png(source, (height, width), mode)
    except Exception:
        return None
    if pixels.shape != (height, width, channels):
        return None
    return Image.fromarray(pixels[:, :, 0]) if channels == 1 else Image.fromarray(pixels).convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise OSError("pixel values that are not finite")
    top = values.max(initial=0)
    if image.mode == "F" and top <= 1:
        values = values * 255
    elif top > 255:
        values = values * (255 / (4095 if top <= 4095 else 65535))
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def fit(grey: Image.Image, size: int, aspect: str = "stretch") -> np.ndarray:
    """A grey picture as uint8 (size, size), by Pillow's bilinear filter (with antialiasing when shrinking).

    ``aspect`` says what becomes of pictures that are not square: 'stretch' them, 'pad' the shorter side with black, or
    'crop' the longer one about its middle.

    Raises
    ------
    ValueError
        Another aspect rule.
    """
    bilinear = Image.Resampling.BILINEAR
    if aspect == "pad":
        grey = ImageOps.pad(grey, (size, size), method=bilinear, color=0)
    elif aspect == "crop":
        grey = ImageOps.fit(grey, (size, size), method=bilinear)
    elif aspect == "stretch":
        grey = grey.resize((size, size), bilinear) if grey.size != (size, size) else grey
    else:
        raise ValueError(f"aspect must be one of {', '.join(ASPECTS)}, got {aspect!r}")
    return np.asarray(grey)
