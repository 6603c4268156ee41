"""New images of unknown origin: read, also from DICOM, and refused unless they are grey pictures like a radiograph."""

from pathlib import Path

import numpy as np

from charmlib.data import dicom
from charmlib.data.find import DICOM_SUFFIXES, SUFFIXES, find_files
from charmlib.data.images import BLANK, LONGEST_SIDE, Scale, fit, open_grey, open_pillow, spread

SMALLEST = 32  # pixels a side
_GREY_LEVELS, _BRIGHT, _SMOOTH = 24, 0.4, 0.5
"""Distinct grey values; share of one value from 128 up, as of paper; correlation of pixels with their right neighbours. All of
11,916 NIH files (17 full-size, the others of 64 pixels) pass with room: at least 66 levels, at most 0.08 of one bright value, a
correlation of at least 0.82."""


class NotARadiograph(ValueError):
    """A file that cannot be a grey radiograph; names it and says why."""


def find_radiographs(paths) -> list[Path]:
    """The given files, and all pictures and DICOM files (also without a suffix) under the given folders, sorted.

    What systems leave in folders (``._x.png``, ``__MACOSX``, ``Thumbs.db``, ``desktop.ini``) is skipped, hidden files as well.
    Raises FileNotFoundError for a path that is missing, or a folder without such files.
    """
    out, paths = [], [Path(path) for path in paths]
    for path in [path for path in paths if not _is_junk(path.name)] or paths:
        found = [path] if path.is_file() else sorted(path / name for name in find_files(path)[0]) if path.is_dir() else []
        if not found:
            raise FileNotFoundError(f"{path}: no such file, or a folder without {', '.join(SUFFIXES + DICOM_SUFFIXES)} files")
        out += found
    return list(dict.fromkeys(out))


def read_radiograph(path: str | Path, size: int, aspect: str = "stretch", *, scale: Scale | None = None,
                    contrast: str = "none") -> np.ndarray:
    """A radiograph as uint8 (size, size), dark background and bright bone; ``aspect``, ``scale``, ``contrast`` as in training.

    See :func:`charmlib.data.images.open_grey` and :func:`charmlib.data.dicom.read`. The NIH's PNGs were made with their DICOM
    windows, so a DICOM without a window differs slightly from the training images. Raises NotARadiograph for a file that is
    unreadable, coloured, blank, nearly black and white, too small, too long, of several frames, or of another kind of picture.
    """
    path = Path(path)
    try:
        source = path.read_bytes()
        if not (is_file := dicom.is_dicom(source)):
            _check_colour(source)
        grey = open_grey(source, scale)
        _check_size(*grey.size)
        _refuse(spread(grey) < BLANK, f"nearly blank (grey values spread by {spread(grey):.1f} only)")
        _check_grey(np.asarray(grey), paper=not is_file)  # a narrow DICOM window may well saturate half of a radiograph
        return fit(grey, size, aspect, contrast)
    except (NotARadiograph, dicom.NotGrey) as error:
        raise NotARadiograph(f"{path}: {error}") from error.__cause__
    except Exception as error:
        raise NotARadiograph(f"{path}: cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error


def _is_junk(name: str) -> bool:
    return name.startswith("._") or name.lower() in ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store")


def _check_colour(source: bytes) -> None:
    with open_pillow(source) as image:
        _check_size(image.width, image.height)
        frames = getattr(image, "n_frames", 1)
        _refuse(frames > 1 and image.format != "MPO", f"{frames} frames, wanted one picture")  # a phone's second view
        if image.mode not in ("1", "L", "LA", "F") and not image.mode.startswith("I"):
            dicom.refuse_colour(np.asarray(image.convert("RGB")))


def _check_size(width: int, height: int) -> None:
    _refuse(min(width, height) < SMALLEST, f"{width} x {height} pixels, too small to be read (at least {SMALLEST} a side)")
    _refuse(max(width, height) > LONGEST_SIDE * min(width, height), f"{width} x {height} pixels is no chest radiograph's shape")


def _check_grey(grey: np.ndarray, *, paper: bool) -> None:
    counts = np.bincount(grey.ravel(), minlength=256)
    bright, levels = counts[128:].max() / grey.size, np.count_nonzero(counts)
    _refuse(paper and bright > _BRIGHT, f"{bright:.0%} of it is one bright grey value, as of a page, a chart or a screenshot")
    across = np.corrcoef(grey[:, 1:].ravel().astype(np.float32), grey[:, :-1].ravel().astype(np.float32))[0, 1]
    _refuse(across < _SMOOTH, f"neighbouring pixels have little in common (correlation {across:.2f}), as in noise")
    _refuse(levels < _GREY_LEVELS, f"only {levels} grey values, a drawing or a scan of text rather than a radiograph")


def _refuse(when: bool, why: str) -> None:
    if when:
        raise NotARadiograph(why)
