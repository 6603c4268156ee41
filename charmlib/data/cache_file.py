"""Format of the image cache: every image decoded and resized once, in one uint8 array that all runs of a machine share.

A cache is a folder of four files:

- ``pixels.npy``: uint8 (n, size, size);
- ``ids.txt``: the n image ids, one a line, in the order of the rows;
- ``rows.npy``: for each row the bytes of its source file, width and height of the source picture, and CRC-32 checksums of
  the source file and of the pixels (:data:`ROW`);
- ``charm_cache.json``: the manifest: count, size, aspect rule, filter, hash of the ids, hash of all rows, unreadable files.

A cache holds no absolute path and no file time. It may be copied, mounted elsewhere, or attached read-only on Kaggle.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from charmlib.data.images import FILTER

FORMAT = 2
MANIFEST, IDS, PIXELS, ROWS = "charm_cache.json", "ids.txt", "pixels.npy", "rows.npy"
ROW = np.dtype([("state", "u1"), ("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("source_crc", "<u4"),
                ("pixel_crc", "<u4")])
DONE, BAD, STARTED = 1, 2, 3  # states of a row; 0: not decoded yet. A finished cache has DONE and BAD rows only.
SAMPLE = 16  # rows that are compared with their source files whenever a cache is opened


class DamagedCache(ValueError):
    """Files of a cache that contradict one another."""


DAMAGE = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError)
"""Errors that reading damaged files ends in."""


@dataclass(frozen=True)
class Request:
    """The images that are asked for: an id and a source file each, pixels a side, and the aspect rule."""

    ids: Sequence[str]
    paths: Sequence[str]
    size: int
    aspect: str

    def __post_init__(self):
        if len(self.ids) != len(self.paths) or not self.ids:
            raise ValueError(f"{len(self.ids)} ids and {len(self.paths)} files: wanted one file for each of at least one id")

    @cached_property
    def listing(self) -> bytes:
        """Content of ``ids.txt``; file names may be no valid text."""
        return "\n".join(self.ids).encode("utf-8", "surrogateescape")

    @cached_property
    def ids_hash(self) -> str:
        """SHA-256 of the listing."""
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
        return f"grey{self.size}-{self.aspect}-{len(self.ids)}-{digest}"


@dataclass(frozen=True)
class ImageCache:
    """An open cache, indexed in the order of the requested ids, whatever the order in the file."""

    folder: Path
    manifest: dict
    pixels: np.ndarray  # (n in the file, size, size), a read-only memory map
    rows: np.ndarray  # (n requested,) row in the file of each image
    bad: dict[str, str]  # requested ids of unreadable files -> reason; their pixels are black

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self), *self.pixels.shape[1:])

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
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def manifest_of(request: Request, rows: np.ndarray, bad: dict[int, str]) -> dict:
    """The manifest of a cache of exactly these images; ``bad`` gives the reason of each unreadable row."""
    return {"format": FORMAT, "images": len(request.ids), "size": request.size, "aspect": request.aspect, "filter": FILTER,
            "ids_hash": request.ids_hash, "hash": hashlib.sha256(rows.tobytes()).hexdigest(),
            "bad": {request.ids[i]: bad[i] for i in sorted(bad)}}


def read_manifest(folder: Path) -> dict:
    """The manifest of a cache; raises :class:`DamagedCache` for another format."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise DamagedCache(f"its format is {manifest.get('format')}, wanted {FORMAT}")
    return manifest


def open_cache(folder: Path, request: Request) -> ImageCache | None:
    """The cache in a folder; None if it lacks requested images or has another size or rule.

    Raises :class:`DamagedCache` if files contradict the manifest.
    """
    manifest = read_manifest(folder)
    if (manifest["size"], manifest["aspect"], manifest["filter"]) != (request.size, request.aspect, FILTER) \
            or manifest["images"] < len(request.ids):
        return None
    listing = (folder / IDS).read_bytes()
    if hashlib.sha256(listing).hexdigest() != manifest["ids_hash"]:
        raise DamagedCache(f"{IDS} is not what its manifest says")
    rows = np.arange(len(request.ids))
    if listing != request.listing:
        positions = {name: i for i, name in enumerate(listing.decode("utf-8", "surrogateescape").split("\n"))}
        rows = np.array([positions.get(name, -1) for name in request.ids])
        if rows.min() < 0:
            return None
    pixels = np.load(folder / PIXELS, mmap_mode="r", allow_pickle=False)
    if pixels.shape != (manifest["images"], request.size, request.size) or pixels.dtype != np.uint8:
        raise DamagedCache(f"{PIXELS} is {pixels.dtype} {pixels.shape}, its manifest says {manifest['images']} images of "
                           f"{request.size} pixels")
    bad = manifest["bad"]
    return ImageCache(folder, manifest, pixels, rows, {name: bad[name] for name in request.ids if name in bad})


def read_rows(cache: ImageCache) -> np.ndarray:
    """The record of each image, (n in the file,) of :data:`ROW`; raises :class:`DamagedCache` if the manifest contradicts."""
    rows = np.load(cache.folder / ROWS, allow_pickle=False)
    if hashlib.sha256(rows.tobytes()).hexdigest() != cache.manifest["hash"]:
        raise DamagedCache(f"{ROWS} is not what its manifest says")
    return rows


def unchanged(cache: ImageCache, rows: np.ndarray, request: Request, i: int) -> bool:
    """Whether pixels and source file of image ``i`` have their checksums; an unreadable source counts as unchanged."""
    row = rows[cache.rows[i]]
    if zlib.crc32(cache[i]) != row["pixel_crc"]:
        return False
    try:
        source = Path(request.paths[i]).read_bytes()
    except OSError:
        return True
    return (len(source), zlib.crc32(source)) == (row["bytes"], row["source_crc"])


def changes(cache: ImageCache, request: Request) -> tuple[list[int], list[int]]:
    """Positions of the requested images that changed: among the sample, and among the unreadable ones."""
    rows = read_rows(cache)
    unreadable = [i for i, name in enumerate(request.ids) if name in cache.bad]
    sampled, mended = ([i for i in some if not unchanged(cache, rows, request, i)] for some in (request.sample, unreadable))
    return sampled, mended


def constant_images(cache: ImageCache) -> np.ndarray:
    """(n,) bool: the readable images that are black or of one grey throughout, told by the checksums of their pixels."""
    rows = read_rows(cache)[cache.rows]
    checksums = [zlib.crc32(bytes([grey]) * cache.pixels[0].size) for grey in range(256)]
    return np.isin(rows["pixel_crc"], np.array(checksums, np.uint32)) & (rows["state"] == DONE)
