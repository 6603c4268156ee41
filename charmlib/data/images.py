"""One grey channel from any image file."""

import io
import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from charmlib.data.junk import kind_of

try:
    from kornia_rs.io import decode_image_png_u8 as _decode_png
except ImportError:
    try:
        from kornia_rs import decode_image_png_u8 as _decode_png  # before 0.2
    except ImportError:  # an installation without dependencies may lack it
        _decode_png = None

FILTER = "bilinear"
_CHANNELS = {0: ("mono", 1), 2: ("rgb", 3), 6: ("rgba", 4)}  # of the PNG colour types that the fast decoder reads


def read_grey(source: str | Path | bytes, size: int | None = None, aspect: str = "stretch") -> np.ndarray:
    """An image file (or its bytes) as uint8 (size, size), or (height, width) for ``size=None``; see :func:`fit`.

    Raises
    ------
    OSError
        Unreadable or truncated; Pillow's message.
    """
    grey = open_grey(source)
    return np.asarray(grey) if size is None else fit(grey, size, aspect)


def open_grey(source: str | Path | bytes) -> Image.Image:
    """An image file (or its bytes) as a picture of one 8-bit grey channel.

    L, RGB, RGBA, palette and 1-bit files are converted by Pillow's ``L``; an alpha channel is dropped. Files of more than 8
    bits are scaled by the bits that their largest value needs: 8, 12 (as from detectors) or 16. Floats in [0, 1] are scaled by
    255.

    Raises
    ------
    OSError
        Unreadable or truncated; Pillow's message.
    """
    if isinstance(source, bytes):
        if (picture := _plain_png(source)) is not None:
            return picture
        source = io.BytesIO(source)
    try:
        image = Image.open(source)
    except UnidentifiedImageError as error:
        start = source.getvalue()[:512] if isinstance(source, io.BytesIO) else Path(source).read_bytes()[:512]
        raise UnidentifiedImageError(kind_of(start) or "not a picture of any kind that Pillow knows") from error
    with image:
        if image.mode.startswith("I") or image.mode == "F":
            return _eight_bits(image)
        if image.format == "JPEG":  # may be stored rotated, with a note of its orientation
            image = ImageOps.exif_transpose(image)
        return image.convert("L")


def _plain_png(source: bytes) -> Image.Image | None:
    """The grey picture of an 8-bit grey, RGB or RGBA PNG, by a decoder that takes a third of Pillow's time.

    PNG is lossless, so the pixels equal Pillow's. None for other files, for files that it refuses, and without the decoder.
    """
    if _decode_png is None or len(source) < 33 or source[:8] + source[12:16] != b"\x89PNG\r\n\x1a\nIHDR":
        return None
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", source[16:29])
    mode, channels = _CHANNELS.get(colour, ("", 0))
    if depth != 8 or not channels or interlaced or b"tRNS" in source[33:4096] or width * height > Image.MAX_IMAGE_PIXELS:
        return None
    try:
        pixels = _decode_png(source, (height, width), mode)
    except Exception:
        return None
    if pixels.shape != (height, width, channels):
        return None
    return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise OSError("pixel values that are not finite")
    top = values.max(initial=0)
    if image.mode == "F" and top <= 1:
        values *= 255
    elif top > 255:
        values *= 255 / (4095 if top <= 4095 else 65535)
    return Image.fromarray(np.clip(values + 0.5, 0, 255).astype(np.uint8))


def fit(grey: Image.Image, size: int, aspect: str = "stretch") -> np.ndarray:
    """A grey picture as uint8 (size, size), by Pillow's bilinear filter (with antialiasing when shrinking).

    ``aspect`` says what to do with pictures that are not square: 'stretch' them, 'pad' the shorter side with black, or 'crop'
    the longer one about its middle.

    Raises
    ------
    ValueError
        Another aspect rule.
    """
    bilinear = Image.Resampling.BILINEAR
    rules = {"stretch": lambda: grey.resize((size, size), bilinear), "crop": lambda: ImageOps.fit(grey, (size, size), bilinear),
             "pad": lambda: ImageOps.pad(grey, (size, size), bilinear, color=0)}
    if aspect not in rules:
        raise ValueError(f"aspect must be one of {', '.join(rules)}, got {aspect!r}")
    return np.asarray(rules[aspect]())
