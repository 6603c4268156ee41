"""Format of the image cache: every image decoded and resized once, in one uint8 array that all runs of a machine share.

A cache is a folder of four files:

- ``pixels.npy``: uint8 (n, size, size);
- ``ids.txt``: the n image ids, one a line, in the order of the rows;
- ``rows.npy``: for each row the bytes of its source file, width and height of the source picture, and CRC-32 checksums of
  the source file and of the pixels (:data:`ROW`);
- ``charm_cache.json``: the manifest: count, size, aspect and contrast rules, filter, hash of the ids, hash of all rows,
  unreadable files, pictures that are no radiographs, and the common scale of pictures of more than 8 bits.

A cache holds no absolute path and no file time. It may be copied, mounted elsewhere, or attached read-only on Kaggle.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from charmlib.data.images import FILTER, LONGEST_SIDE
from charmlib.files import read_json, reading

FORMAT = 3
MANIFEST, IDS, PIXELS, ROWS = "charm_cache.json", "ids.txt", "pixels.npy", "rows.npy"
SCALE = "scale.json"  # of a build that is not finished
ROW = np.dtype([("state", "u1"), ("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("source_crc", "<u4"),
                ("pixel_crc", "<u4")])
DONE, BAD, STARTED, DEEP, BLANK = range(1, 6)
"""States of a row; 0: not decoded yet. DEEP waits for the common scale, BLANK is a picture of hardly any contrast. A finished
cache has DONE, BLANK and BAD rows only."""
SAMPLE = 16  # rows that are compared with their source files whenever a cache is opened


DAMAGE = (OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, ArithmeticError, MemoryError)
"""Errors that reading damaged files ends in; ValueError where files of a cache contradict one another."""


@dataclass(frozen=True)
class Request:
    """The images that are asked for, and their rules; ``train`` is called for the training positions if a scale is needed."""

    ids: Sequence[str]
    paths: Sequence[str]
    size: int
    aspect: str
    contrast: str = "none"
    train: Callable[[], Sequence[int]] | None = None

    def __post_init__(self):
        if len(self.ids) != len(self.paths) or not self.ids:
            raise ValueError(f"{len(self.ids)} ids and {len(self.paths)} files: wanted one file for each of at least one id")

    @cached_property
    def listing(self) -> bytes:
        """Content of ``ids.txt``; file names may be no valid text."""
        return "\n".join(self.ids).encode("utf-8", "surrogateescape")

    @cached_property
    def ids_hash(self) -> str:
        return hashlib.sha256(self.listing).hexdigest()

    @cached_property
    def sample(self) -> list[int]:
        """Positions of up to 16 images, evenly spaced."""
        return np.unique(np.linspace(0, len(self.ids) - 1, SAMPLE).astype(int)).tolist()

    @cached_property
    def name(self) -> str:
        """Folder name of a cache of exactly these images.

        Sizes of sampled files tell apart data sets with the same ids, such as the NIH set and a resized copy of it.
        """
        sizes = [file_size(self.paths[i]) for i in self.sample]
        digest = hashlib.sha256(f"{FORMAT} {self.ids_hash} {sizes}".encode()).hexdigest()[:10]
        rules = self.aspect if self.contrast == "none" else f"{self.aspect}-{self.contrast}"
        return f"grey{self.size}-{rules}-{len(self.ids)}-{digest}"


@dataclass(frozen=True)
class ImageCache:
    """An open cache, indexed in the order of the requested ids, whatever the order in the file."""

    folder: Path
    manifest: dict
    pixels: np.ndarray  # (n in the file, size, size), a read-only memory map
    rows: np.ndarray  # (n requested,) row in the file of each image
    bad: dict[str, str]  # requested ids of unreadable files -> reason; their pixels are black
    odd: dict[str, str]  # requested ids of pictures that are no radiographs -> reason

    @property
    def scale(self) -> tuple[float, float] | None:
        """The values that became black and white in pictures of more than 8 bits; None if there are none."""
        return self.manifest["scale"] and tuple(self.manifest["scale"])

    shape = property(lambda self: (len(self), *self.pixels.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return np.asarray(self.pixels[self.rows[index]])

    def take(self, index: np.ndarray, axis: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """Like ``numpy.ndarray.take`` along the images: one indexed read into ``out`` (B, size, size) without a copy."""
        index = np.asarray(index)
        if len(index) and not 0 <= index.min() <= index.max() < len(self):
            raise IndexError(f"rows {index.min()} to {index.max()} of a cache of {len(self)} images")
        return self.pixels.take(self.rows[index], axis=axis, out=out, mode="clip")  # 'raise' would buffer the output

    def only(self, kept: np.ndarray) -> "ImageCache":
        """The same cache restricted to some of its images: ``kept`` is a mask or holds positions."""
        return replace(self, rows=self.rows[kept], bad={})


def file_size(path: str | Path) -> int:
    """Bytes of a file; -1 if it is missing."""
    with suppress(OSError):
        return os.stat(path).st_size
    return -1


def manifest_of(request: Request, rows: np.ndarray, bad: dict[int, str], scale: Sequence[float] | None = None) -> dict:
    """The manifest of a cache of exactly these images; ``bad`` gives the reason of each unreadable row."""
    sides, odd = np.stack([rows["width"], rows["height"]]), {i: "nearly blank" for i in np.flatnonzero(rows["state"] == BLANK)}
    odd |= {i: f"{' x '.join(map(str, sides[:, i]))} pixels is no chest radiograph's shape"
            for i in np.flatnonzero(sides.max(0) > LONGEST_SIDE * sides.min(0))}
    return {"format": FORMAT, "images": len(request.ids), "size": request.size, "aspect": request.aspect,
            "contrast": request.contrast, "filter": FILTER, "scale": scale, "ids_hash": request.ids_hash,
            "hash": hashlib.sha256(rows.tobytes()).hexdigest(),
            "bad": {request.ids[i]: bad[i] for i in sorted(bad)}, "odd": {request.ids[i]: odd[i] for i in sorted(odd)}}


def read_manifest(folder: Path) -> dict:
    """The manifest of a cache; raises ValueError for a damaged one or another format."""
    manifest = read_json(folder / MANIFEST, "manifest of a cache", "delete its folder; the next run makes the cache again")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"its format is {manifest.get('format')}, wanted {FORMAT}")
    return manifest


def open_cache(folder: Path, request: Request) -> ImageCache | None:
    """The cache in a folder; None if it lacks requested images or has another size or rule.

    Raises ValueError if files contradict the manifest.
    """
    manifest = read_manifest(folder)
    if [manifest[key] for key in ("size", "aspect", "contrast", "filter")] != \
            [request.size, request.aspect, request.contrast, FILTER] or manifest["images"] < len(request.ids):
        return None
    listing = (folder / IDS).read_bytes()
    if hashlib.sha256(listing).hexdigest() != manifest["ids_hash"]:
        raise ValueError(f"{IDS} is not what its manifest says")
    rows = np.arange(len(request.ids))
    if listing != request.listing:
        positions = {name: i for i, name in enumerate(listing.decode("utf-8", "surrogateescape").split("\n"))}
        rows = np.array([positions.get(name, -1) for name in request.ids])
        if rows.min() < 0:
            return None
    pixels = np.load(folder / PIXELS, mmap_mode="r", allow_pickle=False)
    if pixels.shape != (manifest["images"], request.size, request.size) or pixels.dtype != np.uint8:
        raise ValueError(f"{PIXELS} is {pixels.dtype} {pixels.shape}, its manifest says {manifest['images']} images of "
                         f"{request.size} pixels")
    notes = [{name: manifest[kind][name] for name in request.ids if name in manifest[kind]} for kind in ("bad", "odd")]
    return ImageCache(folder, manifest, pixels, rows, *notes)


def read_rows(folder: Path, manifest: dict) -> np.ndarray:
    """The record of each image of a cache, (n in the file,) of :data:`ROW`; raises ValueError if the manifest contradicts."""
    with reading(folder / ROWS, "record of a cache's images", "delete its folder; the next run makes the cache again"):
        rows = np.load(folder / ROWS, allow_pickle=False)
        if hashlib.sha256(rows.tobytes()).hexdigest() != manifest["hash"]:
            raise ValueError(f"{ROWS} is not what its manifest says")
        return rows


def changed(cache: ImageCache, rows: np.ndarray, request: Request, some: Sequence[int]) -> list[int]:
    """Those of some images whose pixels or source file lack their checksums; unreadable sources count as unchanged."""

    def differs(i: int) -> bool:
        row = rows[cache.rows[i]]
        if zlib.crc32(cache[i]) != row["pixel_crc"]:
            return True
        with suppress(OSError):
            source = Path(request.paths[i]).read_bytes()
            return (len(source), zlib.crc32(source)) != (row["bytes"], row["source_crc"])
        return False

    return [i for i in some if differs(i)]


def changes(cache: ImageCache, request: Request) -> tuple[list[int], list[int]]:
    """Positions of the requested images that changed: among the sample, and among the unreadable ones."""
    rows, unreadable = read_rows(cache.folder, cache.manifest), [i for i, name in enumerate(request.ids) if name in cache.bad]
    return tuple(changed(cache, rows, request, some) for some in (request.sample, unreadable))
