"""Finding the image files of a table, by name or the end of the path; and what a file is that should have been a picture."""

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
DICOM_SUFFIXES = (".dcm", ".dicom")
_DEPTH = 15  # folders below the data folder that are searched
_STARTS = ((b"version https://git-lfs", "a Git LFS pointer: fetch the files with `git lfs pull`"),
           (b"<", "a web page or a server's error: download the files again, logged in where the site asks for it"),
           (b"\0\5\x16\7", "a Mac's AppleDouble file: delete it"),
           (b"pk\3\4", "a zip archive: unpack it"), (b"\x1f\x8b", "a gzip archive: unpack it"),
           (b"rar!", "a RAR archive: unpack it"), (b"%pdf", "a PDF"))


def find_files(root: Path) -> tuple[list[str], Counter]:
    """Image files below ``root``, folder by folder and DICOM files last, and the number of other files by suffix.

    Links to folders are followed, each folder once. Hidden files and folders and what a Mac adds to archives (``._x.png``,
    ``__MACOSX``) are left out.
    """
    files, dicom, others, seen = [], [], Counter(), set()
    # a folder's identity is its inode and device
    top, above = len(os.path.join(root, "")), {os.stat(p)[1:3] for p in (root.resolve(), *root.resolve().parents)}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here, level = os.stat(folder)[1:3], folder[top:].count(os.sep) + (len(folder) >= top)
        if here in seen or (level and here in above):
            subfolders.clear()
            continue
        seen.add(here)
        subfolders[:] = sorted(s for s in subfolders if s[0] != "." and s != "__MACOSX") if level < _DEPTH else []
        within = folder[top:] + os.sep if level else ""
        for name in sorted(names):
            if name[0] == ".":
                continue
            if (picture := name.lower().endswith(SUFFIXES)) or is_dicom(os.path.join(folder, name)):
                (files if picture else dicom).append((within + name).replace(os.sep, "/"))
            else:
                others[os.path.splitext(name)[1].lower()] += 1
    return files + dicom, others


def is_dicom(path: str | Path) -> bool:
    """Whether a file is DICOM: by its suffix, or without one by the mark in every DICOM file."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix and not suffix[1:].isdigit():  # '1.2.840.113' is a name without suffix
        return suffix in DICOM_SUFFIXES
    with suppress(OSError), open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"
    return False


def has_suffix(name: str) -> bool:
    """Whether a name ends like a picture or DICOM file."""
    return name.lower().endswith(SUFFIXES + DICOM_SUFFIXES)


def kind_of(source: bytes) -> str:
    """What a file is by its first bytes: 'a Git LFS pointer ...', 'a web page ...', 'an empty file'; '' for anything else."""
    if not source.strip(b"\0 \r\n\t"):
        return "an empty file: copy or download it again"
    start = source[:256].removeprefix(b"\xef\xbb\xbf").lstrip(b" \r\n\t").lower()
    return next((what for mark, what in _STARTS if start.startswith(mark)), "")


def plain(name: str) -> str:
    """A name without suffix, in small letters, accents composed (NFC); Latin-1 bytes in a file's name read as such."""
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError:
            name = os.fsencode(name).decode("cp1252", "replace")
        name = unicodedata.normalize("NFC", name)
    return (os.path.splitext(name)[0] if has_suffix(name) else name).lower()


def match(names: Sequence[str], files: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Name -> file, and the further files that fit a name as well. A file goes to one name at most.

    The longest common end of the two paths decides, first as written and then by :func:`plain` names. A name whose folders
    differ from the file's is matched by its last part only if that part is unique on both sides.
    """
    by_name = {file.rpartition("/")[2]: file for file in files}
    unique = len(by_name) == len(files)
    found = {name: by_name[name] for name in names if name in by_name} if unique else {}  # the usual case, at once
    taken, further, left = set(found.values()), [], {name: None for name in names if name not in found}
    deepest = max((name.count("/") for name in left), default=0) + 1
    for spell, length in [(s, n) for s in (str, plain) for n in range(deepest, 1, -1)] + [(str, 1), (plain, 1)]:
        left, free = {name: None for name in left if name not in found}, [file for file in files if file not in taken]
        if not left or not free:
            break
        there = _by_end(free, spell, length)
        for end, fitting in _by_end(left, spell, length).items():
            several, whole = there.get(end), [name for name in fitting if name.count("/") < length]
            if not several or len(whole or fitting) > 1 or (length == 1 and not whole and len(several) > 1):
                continue
            found[(whole or fitting)[0]] = several[0]
            taken.update(several)
            further += several[1:]
    return found, further


def _by_end(paths, spell: Callable[[str], str], length: int) -> dict[str, list[str]]:
    """Paths by their last ``length`` parts; shorter paths are left out."""
    out: dict[str, list[str]] = {}
    for path in paths:
        if len(parts := path.replace("\\", "/").rsplit("/", length)[-length:]) == length:
            out.setdefault(spell("/".join(parts)), []).append(path)
    return out
