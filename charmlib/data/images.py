"""One grey channel from any image file: PNG, JPEG, TIFF, WebP, BMP or DICOM."""

import io
import struct
import warnings
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from charmlib.data import dicom
from charmlib.data.find import kind_of

try:
    from kornia_rs.io import decode_image_png_u8 as _decode_png
except ImportError:
    try:
        from kornia_rs import decode_image_png_u8 as _decode_png  # before 0.2
    except ImportError:  # an installation without dependencies may lack it
        _decode_png = None

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # open_pillow has a limit of its own
FILTER = "bilinear"
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP")  # of Pillow's; others start foreign programs or have been ways in for attacks
LARGEST = dicom.LARGEST
LONGEST_SIDE, BLANK = 2.5, 4.0
"""How many times longer one side may be than the other; standard deviation of the grey values below which a picture is blank.
All of 11,916 NIH files (17 full-size, the others of 64 pixels) spread by at least 8.4."""
_CHANNELS = {0: ("mono", 1), 2: ("rgb", 3), 6: ("rgba", 4)}  # of the PNG colour types that the fast decoder reads
_TURNED = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")  # marks of a PNG that may say how it is turned
_VALUES = 2**16  # values of a picture that count for a common scale

Scale = tuple[float, float]
"""The values that become black and white in pictures of more than 8 bits."""


def read_grey(source: str | Path | bytes | Image.Image, size: int | None = None, aspect: str = "stretch", *,
              scale: Scale | None = None, contrast: str = "none") -> np.ndarray:
    """An image file, its bytes or a picture as uint8 (size, size), or (height, width) for None; see :func:`open_grey`."""
    grey = open_grey(source, scale)
    return np.asarray(grey) if size is None else fit(grey, size, aspect, contrast)


def open_grey(source: str | Path | bytes | Image.Image, scale: Scale | None = None) -> Image.Image:
    """An image file, its bytes or an open picture as a picture of one 8-bit grey channel, turned as its EXIF orientation says.

    Pictures of 8 bits are taken as they are: L, RGB, RGBA, palette and 1-bit files are converted by Pillow's ``L``; an alpha
    channel is dropped. Deeper ones are scaled by ``scale``, which a data set has in common. Without one, the 0.5th and 99.5th
    percentile of the picture itself become black and white. Raises OSError or ValueError for files that are unreadable or
    truncated, of another format, of values that are not finite, or of more than 10,000 pixels a side.
    """
    picture = open_picture(source)
    return picture if isinstance(picture, Image.Image) else to_grey(picture, scale)


def open_picture(source: str | Path | bytes | Image.Image) -> Image.Image | np.ndarray:
    """Like :func:`open_grey`, but pictures of more than 8 bits as their float32 values (height, width), NaN for padding."""
    if not isinstance(source, bytes | Image.Image):
        source = Path(source).read_bytes()
    if isinstance(source, bytes):
        if dicom.is_dicom(source):
            return dicom.read(source)
        if (picture := _plain_png(source)) is not None:
            return picture
        source = open_pillow(source)
    deep, image = source.mode.startswith(("I", "F")), ImageOps.exif_transpose(source)
    if not deep:
        return image.convert("L")
    values = np.asarray(image).astype(np.float32)
    if not np.isfinite(values).all():
        raise OSError("pixel values that are not finite")
    return values


def to_grey(values: np.ndarray, scale: Scale | None = None) -> Image.Image:
    """Values (height, width) of more than 8 bits as a grey picture; see :func:`open_grey`. NaN becomes black."""
    if scale is None:
        warnings.warn("pictures of more than 8 bits and no common scale: each is shown from its own 0.5th to 99.5th percentile",
                      stacklevel=2)
    low, high = scale or common_scale([values])
    grey = (values - low) * (255 / max(high - low, 1e-6)) + 0.5
    return Image.fromarray(np.clip(np.nan_to_num(grey, nan=0.0), 0, 255).astype(np.uint8))


def common_scale(pictures: Sequence[np.ndarray]) -> Scale:
    """The 0.5th and 99.5th percentile of the values of some pictures, each with equal weight; (0, 1) without any value.

    Markers and dead pixels thereby do not set the scale.
    """
    values = [v[np.linspace(0, len(v) - 1, min(len(v), _VALUES)).astype(int)] for p in pictures if len(v := p[~np.isnan(p)])]
    return tuple(np.percentile(np.concatenate(values), (0.5, 99.5)).tolist()) if values else (0.0, 1.0)


def open_pillow(source: bytes) -> Image.Image:
    """A file of one of :data:`FORMATS`, not decoded yet; raises OSError for others and for pictures that are too large."""
    try:
        image = Image.open(io.BytesIO(source), formats=FORMATS)
    except UnidentifiedImageError:
        raise OSError(kind_of(source[:512]) or f"neither {', '.join(FORMATS)} nor DICOM") from None
    if max(image.size) > LARGEST:
        raise OSError(f"{image.width} x {image.height} pixels, more than {LARGEST:,} a side")
    return image


def spread(grey: Image.Image) -> float:
    """Standard deviation of the grey values."""
    share, levels = np.array(grey.histogram()) / (grey.width * grey.height), np.arange(256)
    return float(np.sqrt(share @ (levels - share @ levels) ** 2))


def _plain_png(source: bytes) -> Image.Image | None:
    """The grey picture of an 8-bit grey, RGB or RGBA PNG, by a decoder that takes a third of Pillow's time.

    PNG is lossless, so the pixels equal Pillow's. None for other files, for files that it refuses, and without the decoder.
    """
    if _decode_png is None or len(source) < 33 or source[:8] + source[12:16] != b"\x89PNG\r\n\x1a\nIHDR":
        return None
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", source[16:29])
    if depth != 8 or colour not in _CHANNELS or interlaced or b"tRNS" in source[33:4096] or max(width, height) > LARGEST \
            or any(mark in source for mark in _TURNED):
        return None
    with suppress(Exception):
        mode, channels = _CHANNELS[colour]
        pixels = _decode_png(source, (height, width), mode)
        if pixels.shape == (height, width, channels):
            return Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).convert("L")
    return None


def fit(grey: Image.Image, size: int, aspect: str = "stretch", contrast: str = "none") -> np.ndarray:
    """A grey picture as uint8 (size, size), by Pillow's bilinear filter (with antialiasing when shrinking).

    ``aspect`` is for pictures that are not square: 'stretch' them, 'pad' the shorter side with black, or 'crop' the longer one
    about its middle. ``contrast`` is 'none', or 'clahe' for contrast-limited adaptive histogram equalisation (Zuiderveld 1994)
    with a clip limit of 2 and 8 x 8 tiles, OpenCV's defaults for the grid. Raises ValueError for another rule, and ImportError
    for 'clahe' without kornia_rs 0.2 and OpenCV.
    """
    rules = {"stretch": Image.Image.resize, "crop": ImageOps.fit, "pad": partial(ImageOps.pad, color=0)}
    if aspect not in rules or contrast not in ("none", "clahe"):
        raise ValueError(f"aspect must be one of {', '.join(rules)}, and contrast none or clahe; got {aspect!r}, {contrast!r}")
    fitted = np.asarray(rules[aspect](grey, (size, size), Image.Resampling.BILINEAR))
    return fitted if contrast == "none" else _clahe(fitted)


def _clahe(grey: np.ndarray) -> np.ndarray:
    try:
        from kornia_rs.imgproc import clahe  # byte for byte as OpenCV's
    except ImportError:
        try:
            import cv2
        except ImportError as error:
            raise ImportError("contrast: clahe needs kornia_rs 0.2 or newer, or OpenCV (pip install opencv-python-headless)"
                              ) from error
        return cv2.createCLAHE(2.0, (8, 8)).apply(grey)
    return clahe(grey[..., None], 2.0, (8, 8))[..., 0]
