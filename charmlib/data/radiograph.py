"""New images of unknown origin: read them, DICOM too, and refuse what is not a radiograph-like grey picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from charmlib.data.images import fit, read_grey
from charmlib.data.index import SUFFIXES

DICOM_SUFFIXES = (".dcm", ".dicom")
SMALLEST, LONGEST_SIDE = 32, 2.5
"""Pixels a side; and how many times longer one side may be than the other."""

_COLOURED, _GREY_LEVELS, _SPREAD, _BRIGHT, _SMOOTH = 0.02, 24, 4.0, 0.4, 0.5
"""Share of pixels whose channels lie more than 24 apart; distinct grey values; standard deviation of the grey values; share
of one value from 128 up, as paper has; correlation of pixels with their right neighbours. Of 11,916 NIH files (17 full-size,
the others of 64 pixels) all pass with room: no colour, at least 66 levels, a spread of at least 8.4, at most 0.08 of one
bright value, a correlation of at least 0.82."""


class NotARadiograph(ValueError):
    """A file that cannot be a grey radiograph; names it and says why."""


def find_radiographs(paths) -> list[Path]:
    """The given files, and all PNG, JPEG and DICOM files (also without a suffix) under the given folders, sorted.

    Raises
    ------
    FileNotFoundError
        A path that is not there, or a folder without such files.
    """
    out: list[Path] = []
    for path in map(Path, paths):
        if path.is_file():
            out.append(path)
            continue
        found = sorted(p for p in path.rglob("*") if p.is_file() and (p.suffix.lower() in SUFFIXES or _is_dicom(p))) \
            if path.is_dir() else []
        if not found:
            raise FileNotFoundError(f"{path}: no such file, or a folder without {', '.join(SUFFIXES + DICOM_SUFFIXES)} files")
        out += found
    return list(dict.fromkeys(out))


def read_radiograph(path: str | Path, size: int, aspect: str = "stretch") -> np.ndarray:
    """A radiograph as uint8 (size, size), dark background and bright bone; ``aspect`` as in training.

    PNG, JPEG and what else Pillow reads as :func:`charmlib.data.images.read_grey` does; DICOM through pydicom with its VOI
    window, or without one from the 0.5th to the 99.5th percentile, MONOCHROME1 inverted. (The NIH's PNGs were made by their
    DICOM windows, so a DICOM without one is a little different from what a network was trained on.)

    Raises
    ------
    NotARadiograph
        Unreadable, coloured, blank, nearly black and white, too small, too long, several frames, or a DICOM of another
        kind of picture.
    """
    path = Path(path)
    try:
        return (_dicom if _is_dicom(path) else _picture)(path, size, aspect)
    except NotARadiograph:
        raise
    except Exception as error:
        raise NotARadiograph(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def _is_dicom(path: Path) -> bool:
    """By its suffix, or without one by the mark that every DICOM file bears."""
    if path.suffix and not path.suffix[1:].isdigit():  # '1.2.840.113' is a name, not a suffix
        return path.suffix.lower() in DICOM_SUFFIXES
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _picture(path: Path, size: int, aspect: str) -> np.ndarray:
    with Image.open(path) as image:
        _check_size(path, image.width, image.height)
        if getattr(image, "n_frames", 1) > 1:
            raise NotARadiograph(f"{path}: {image.n_frames} frames, wanted one picture")
        if image.mode not in ("1", "L", "LA", "I", "F") and not image.mode.startswith("I;"):
            rgb = np.asarray(image.convert("RGB"))
            coloured = float((np.ptp(rgb, axis=2) > 24).mean())
            if coloured > _COLOURED:
                raise NotARadiograph(f"{path}: a colour picture ({coloured:.0%} of its pixels), not a grey radiograph")
    grey = read_grey(path)
    _check_grey(path, grey)
    return fit(Image.fromarray(grey), size, aspect)


def _dicom(path: Path, size: int, aspect: str) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError as error:
        raise NotARadiograph(f"{path}: reading DICOM needs pydicom (pip install pydicom)") from error
    file = pydicom.dcmread(path)
    modality = str(file.get("Modality", ""))
    if modality and modality not in ("CR", "DX", "RG", "XC", "OT", "XA", "RF"):
        raise NotARadiograph(f"{path}: modality {modality}, wanted a radiograph (CR or DX)")
    kind = str(file.PhotometricInterpretation)
    if int(file.get("NumberOfFrames", 1) or 1) > 1 or not kind.startswith("MONOCHROME"):
        raise NotARadiograph(f"{path}: {kind} with {file.get('NumberOfFrames', 1)} frames, wanted one grey picture")
    _check_size(path, int(file.Columns), int(file.Rows))
    values = apply_voi_lut(apply_modality_lut(file.pixel_array, file), file).astype(np.float32)
    windowed = "VOILUTSequence" in file or "WindowWidth" in file
    # without a window, markers and dead pixels must not set the scale
    low, high = (values.min(), values.max()) if windowed else np.percentile(values, (0.5, 99.5))
    values = (values - low) * (255 / max(high - low, 1e-6))
    if kind == "MONOCHROME1":
        values = 255 - values
    grey = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    _check_grey(path, grey, paper=False)  # a narrow window may well burn out half of a radiograph
    return fit(Image.fromarray(grey), size, aspect)


def _check_size(path: Path, width: int, height: int) -> None:
    if min(width, height) < SMALLEST:
        raise NotARadiograph(f"{path}: {width} x {height} pixels, too small to be read (at least {SMALLEST} a side)")
    if max(width, height) > LONGEST_SIDE * min(width, height):
        raise NotARadiograph(f"{path}: {width} x {height} pixels is no chest radiograph's shape")


def _check_grey(path: Path, grey: np.ndarray, *, paper: bool = True) -> None:
    spread, levels = float(grey.std()), len(np.unique(grey))
    if spread < _SPREAD:
        raise NotARadiograph(f"{path}: nearly blank (grey values spread by {spread:.1f} only)")
    bright = np.bincount(grey.ravel(), minlength=256)[128:].max() / grey.size
    if paper and bright > _BRIGHT:
        raise NotARadiograph(f"{path}: {bright:.0%} of it is one bright grey value, as of a page, a chart or a screenshot")
    across = np.corrcoef(grey[:, 1:].ravel().astype(np.float32), grey[:, :-1].ravel().astype(np.float32))[0, 1]
    if across < _SMOOTH:
        raise NotARadiograph(f"{path}: neighbouring pixels have little in common (correlation {across:.2f}), as in noise")
    if levels < _GREY_LEVELS:
        raise NotARadiograph(f"{path}: only {levels} grey values, a drawing or a scan of text rather than a radiograph")
