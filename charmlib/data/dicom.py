"""Grey radiographs from DICOM files: what the VOI window shows, padding in black, MONOCHROME1 inverted."""

import io
from typing import Any

import numpy as np
from PIL import Image

LARGEST = 10_000  # pixels a side; a detector has up to 5,000
MODALITIES = ("", "CR", "DX", "DR", "RG", "XC", "OT", "XA", "RF")  # DR is outside the standard, and common


class NotGrey(ValueError):
    """A DICOM file without a single grey radiograph in it."""


def is_dicom(source: bytes) -> bool:
    """By the mark behind the preamble; a file without preamble by its first element, of group 2 or 8 in little endian."""
    return source[128:132] == b"DICM" or (len(source) > 132 and source[:2] in (b"\x02\x00", b"\x08\x00"))


def read(source: bytes) -> Image.Image | np.ndarray:
    """The picture in a DICOM file: 8-bit grey, or float32 values (height, width) with NaN for padding.

    A file with a VOI window or table (PS3.3 C.11.2) gives the grey picture that the first one shows, whatever values the
    picture has. One of at most 8 stored bits without rescaling is taken as it is. Others give their values, with MONOCHROME1
    mirrored in the range of its stored bits. Elements that are empty count as absent.

    Raises NotGrey for another modality, several frames, colour, or more than 10,000 pixels a side;
    and ImportError if pydicom or the decoder of a compressed
    file is missing, with what to install.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi
    except ImportError as error:
        raise ImportError("reading DICOM needs pydicom: pip install 'charmlib[dicom]'") from error
    file = pydicom.dcmread(io.BytesIO(source), force=True)
    if "Rows" not in file or "Columns" not in file:
        raise NotGrey("DICOM with no picture in it, or damaged")
    modality, kind = str(file.get("Modality") or "").strip().upper(), str(file.get("PhotometricInterpretation") or "").strip()
    if modality not in MODALITIES:
        raise NotGrey(f"modality {modality}, wanted a radiograph (CR or DX)")
    if (frames := int(file.get("NumberOfFrames") or 1)) > 1:
        raise NotGrey(f"{kind} with {frames} frames, wanted one grey picture")
    if max(file.Rows, file.Columns) > LARGEST:
        raise NotGrey(f"{file.Columns} x {file.Rows} pixels, more than {LARGEST:,} a side")
    stored = _stored(file)
    if stored.ndim == 3:
        return _grey_of_colour(stored, file)
    padding, inverted, bits = _padding(file, stored), kind == "MONOCHROME1", int(file.BitsStored)
    lowest = -(2 ** (bits - 1)) if stored.dtype.kind == "i" else 0
    ends, shown = np.array([lowest, lowest + 2**bits - 1]), None
    if _filled(file, "ModalityLUTSequence"):
        values = apply_modality_lut(stored, file).astype(np.float32)
        ends = np.array([0, 2 ** int(file.ModalityLUTSequence[0].LUTDescriptor[2]) - 1])
    else:
        (slope, *_), (intercept, *_) = _numbers(file, "RescaleSlope"), _numbers(file, "RescaleIntercept")
        slope, intercept = slope if np.isfinite(slope) and slope else 1, np.nan_to_num(intercept)
        values, ends = stored * np.float32(slope) + np.float32(intercept), ends * slope + intercept
    if _filled(file, "VOILUTSequence"):
        shown = apply_voi(np.rint(values).astype(np.int32), file) / (2 ** int(file.VOILUTSequence[0].LUTDescriptor[2]) - 1.0)
    elif window := _window(file):
        shown = _through(values, *window)
    elif ends.tolist() == [0, 2**bits - 1] and bits <= 8:
        shown = values / ends[1]
    if shown is None:
        return np.where(padding, np.float32(np.nan), np.float32(ends.sum()) - values if inverted else values)
    shown = np.clip(1 - shown if inverted else shown, 0, 1)
    return Image.fromarray(np.where(padding, 0, np.rint(255 * shown)).astype(np.uint8))


def _stored(file: Any) -> np.ndarray:
    """The stored values, without the bits beside them."""
    from pydicom.pixels import pixel_array
    from pydicom.uid import ImplicitVRLittleEndian

    if "TransferSyntaxUID" not in file.file_meta:
        file.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    shift = int(file.get("HighBit") or file.BitsStored - 1) + 1 - int(file.BitsStored)
    try:
        return pixel_array(file) if shift <= 0 else pixel_array(file, correct_unused_bits=False) >> shift
    except RuntimeError as error:
        if "missing dependencies" not in str(error):
            raise
        raise ImportError(f"compressed as {file.file_meta.TransferSyntaxUID.name}, which needs a decoder: "
                          "pip install 'charmlib[dicom]' (python-gdcm)") from error


def _grey_of_colour(stored: np.ndarray, file: Any) -> Image.Image:
    """A grey picture that was stored in three channels."""
    levels = (stored.astype(np.float32) * (255 / (2 ** int(file.BitsStored) - 1)) + 0.5).astype(np.uint8)
    refuse_colour(levels)
    return Image.fromarray(levels).convert("L")


def refuse_colour(levels: np.ndarray) -> None:
    """Raises NotGrey for pixels (height, width, 3) uint8 of which more than 2 per cent are coloured."""
    coloured = float((np.ptp(levels, axis=2) > 24).mean())
    if coloured > 0.02:  # channels lie more than 24 apart; no NIH file has any
        raise NotGrey(f"a colour picture ({coloured:.0%} of its pixels), not a grey radiograph")


def _padding(file: Any, stored: np.ndarray) -> np.ndarray:
    """Where the picture is filled up: PixelPaddingValue, or the range up to PixelPaddingRangeLimit."""
    ends = np.concatenate([_numbers(file, name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")])
    ends = ends[np.isfinite(ends)].astype(np.int64).astype(stored.dtype)  # some files write a signed value unsigned
    padding = (stored >= ends.min()) & (stored <= ends.max()) if len(ends) else np.zeros(stored.shape, bool)
    return padding if not padding.all() else ~padding


def _window(file: Any) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window that is one; None without."""
    function = str(file.get("VOILUTFunction") or "LINEAR").strip().upper()
    narrowest = 0 if function in ("LINEAR_EXACT", "SIGMOID") else 1
    pairs = zip(_numbers(file, "WindowCenter"), _numbers(file, "WindowWidth"))
    return next(((center, width, function) for center, width in pairs if np.isfinite(center) and width > narrowest), None)


def _through(values: np.ndarray, center: float, width: float, function: str) -> np.ndarray:
    """Values through a window, 0 to 1: the functions of PS3.3 C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - center) / width))
    return (values - center) / width + 0.5 if function == "LINEAR_EXACT" else (values - (center - 0.5)) / (width - 1) + 0.5


def _filled(file: Any, sequence: str) -> bool:
    """Whether a table is there and has data."""
    return bool(file.get(sequence)) and all(file[sequence][0].get(key) for key in ("LUTData", "LUTDescriptor"))


def _numbers(file: Any, name: str) -> np.ndarray:
    """The numbers of an element, (n,) float64; NaN if it is empty or absent."""
    return np.array([file.get(name)], np.float64).ravel()
