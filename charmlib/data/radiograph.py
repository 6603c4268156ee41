"""New images of unknown origin: read, also from DICOM, and refused unless they are grey pictures like a radiograph."""

from pathlib import Path

import numpy as np
from PIL import Image

from charmlib.data.images import fit, read_grey
from charmlib.data.index import SUFFIXES

DICOM_SUFFIXES = (".dcm", ".dicom")
_MODALITIES = ("", "CR", "DX", "RG", "XC", "OT", "XA", "RF")
SMALLEST, LONGEST_SIDE = 32, 2.5
"""Pixels a side; and how many times longer one side may be than the other."""

_COLOURED, _GREY_LEVELS, _SPREAD, _BRIGHT, _SMOOTH = 0.02, 24, 4.0, 0.4, 0.5
"""Share of pixels whose channels lie more than 24 apart; distinct grey values; standard deviation of the grey values; share
of one value from 128 up, as of paper; correlation of pixels with their right neighbours. All of 11,916 NIH files (17 full-size,
the others of 64 pixels) pass with room: no colour, at least 66 levels, a spread of at least 8.4, at most 0.08 of one bright
value, a correlation of at least 0.82."""


class NotARadiograph(ValueError):
    """A file that cannot be a grey radiograph; names it and says why."""


def find_radiographs(paths) -> list[Path]:
    """The given files, and all PNG, JPEG and DICOM files (also without a suffix) under the given folders, sorted.

    What systems leave in folders (``._x.png``, ``__MACOSX``, ``Thumbs.db``, ``desktop.ini``) is skipped, hidden files as well.

    Raises
    ------
    FileNotFoundError
        A path that is missing, or a folder without such files.
    """
    out: list[Path] = []
    paths = [Path(path) for path in paths]
    for path in [path for path in paths if not _is_junk(path.name)] or paths:
        found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not any(
            part[0] == "." or _is_junk(part) for part in p.relative_to(path).parts) and (
            p.suffix.lower() in SUFFIXES or _is_dicom(p)))
        if not found:
            raise FileNotFoundError(f"{path}: no such file, or a folder without {', '.join(SUFFIXES + DICOM_SUFFIXES)} files")
        out += found
    return list(dict.fromkeys(out))


def read_radiograph(path: str | Path, size: int, aspect: str = "stretch") -> np.ndarray:
    """A radiograph as uint8 (size, size), dark background and bright bone; ``aspect`` as in training.

    PNG, JPEG and other files of Pillow's are read by :func:`charmlib.data.images.read_grey`; DICOM by pydicom with its VOI
    window, or without one from the 0.5th to the 99.5th percentile, MONOCHROME1 inverted. (The NIH's PNGs were made with their
    DICOM windows, so a DICOM without one differs slightly from the training images.)

    Raises
    ------
    NotARadiograph
        Unreadable, coloured, blank, nearly black and white, too small, too long, several frames, or a DICOM of another
        kind of picture.
    """
    path = Path(path)
    try:
        dicom = _is_dicom(path)
        grey = _read_dicom(path) if dicom else _read_picture(path)
        _check_grey(grey, paper=not dicom)  # a narrow DICOM window may well saturate half of a radiograph
        return fit(Image.fromarray(grey), size, aspect)
    except NotARadiograph as error:
        raise NotARadiograph(f"{path}: {error}") from error.__cause__
    except Exception as error:
        raise NotARadiograph(f"{path}: cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error


def _is_junk(name: str) -> bool:
    return name.startswith("._") or name.lower() in ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")


def _is_dicom(path: Path) -> bool:
    """By the suffix, or without one by the mark in every DICOM file."""
    if path.suffix and not path.suffix[1:].isdigit():  # '1.2.840.113' is a name without suffix
        return path.suffix.lower() in DICOM_SUFFIXES
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_picture(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        _check_size(image.width, image.height)
        frames = getattr(image, "n_frames", 1)
        _refuse(frames > 1, f"{frames} frames, wanted one picture")
        if image.mode not in ("1", "L", "LA", "F") and not image.mode.startswith("I"):
            coloured = float((np.ptp(np.asarray(image.convert("RGB")), axis=2) > 24).mean())
            _refuse(coloured > _COLOURED, f"a colour picture ({coloured:.0%} of its pixels), not a grey radiograph")
    return read_grey(path)


def _read_dicom(path: Path) -> np.ndarray:
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut
    except ImportError as error:
        raise NotARadiograph("reading DICOM needs pydicom (pip install pydicom)") from error
    file = pydicom.dcmread(path)
    modality, kind, frames = str(file.get("Modality", "")), str(file.PhotometricInterpretation), file.get("NumberOfFrames", 1)
    _refuse(modality not in _MODALITIES, f"modality {modality}, wanted a radiograph (CR or DX)")
    _refuse(int(frames or 1) > 1 or not kind.startswith("MONOCHROME"), f"{kind} with {frames} frames, wanted one grey picture")
    _check_size(int(file.Columns), int(file.Rows))
    values = apply_voi_lut(apply_modality_lut(file.pixel_array, file), file).astype(np.float32)
    windowed = "VOILUTSequence" in file or "WindowWidth" in file
    # without a window, markers and dead pixels must not set the scale
    low, high = (values.min(), values.max()) if windowed else np.percentile(values, (0.5, 99.5))
    values = (values - low) * (255 / max(high - low, 1e-6))
    if kind == "MONOCHROME1":
        values = 255 - values
    return np.clip(values + 0.5, 0, 255).astype(np.uint8)


def _check_size(width: int, height: int) -> None:
    _refuse(min(width, height) < SMALLEST, f"{width} x {height} pixels, too small to be read (at least {SMALLEST} a side)")
    _refuse(max(width, height) > LONGEST_SIDE * min(width, height), f"{width} x {height} pixels is no chest radiograph's shape")


def _check_grey(grey: np.ndarray, *, paper: bool) -> None:
    spread, counts = float(grey.std()), np.bincount(grey.ravel(), minlength=256)
    _refuse(spread < _SPREAD, f"nearly blank (grey values spread by {spread:.1f} only)")
    bright, levels = counts[128:].max() / grey.size, np.count_nonzero(counts)
    _refuse(paper and bright > _BRIGHT, f"{bright:.0%} of it is one bright grey value, as of a page, a chart or a screenshot")
    across = np.corrcoef(grey[:, 1:].ravel().astype(np.float32), grey[:, :-1].ravel().astype(np.float32))[0, 1]
    _refuse(across < _SMOOTH, f"neighbouring pixels have little in common (correlation {across:.2f}), as in noise")
    _refuse(levels < _GREY_LEVELS, f"only {levels} grey values, a drawing or a scan of text rather than a radiograph")


def _refuse(when: bool, why: str) -> None:
    if when:
        raise NotARadiograph(why)
