"""The image cache: every image decoded and resized once, into one uint8 array that all runs of a machine share.

A cache is a folder of four files:

- ``pixels.npy``: uint8 (n, size, size);
- ``ids.txt``: the n image ids, a line each, in the order of the rows;
- ``rows.npy``: for each row the size of its source file, width and height of the picture in it, and CRC-32 checksums of
  the source file and of the pixels (:data:`charmlib.data.decoding.ROW`);
- ``charm_cache.json``: the manifest: count, size, aspect rule, filter, hash of the ids, hash of all rows, unreadable files.

It is built in a folder whose name ends in ``.partial``, synced, given its manifest and only then renamed, so a folder
that has a manifest is whole. A build that was killed goes on where it was: rows count as done only if their pixels have
their checksum. A cache holds no absolute path and no file time, so it may be copied, mounted elsewhere, or attached
read-only (a Kaggle dataset).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from charmlib.data.decoding import DONE, PIXELS, ROW, ROWS, Decoders, decode_row, file_size, open_rows
from charmlib.data.images import FILTER
from charmlib.data.parallel import for_each, to_stderr
from charmlib.data.paths import default_cache_dir, kaggle_caches
from charmlib.files import sync, write_json

FORMAT = 2
MANIFEST, IDS = "charm_cache.json", "ids.txt"
_WORTH_PROCESSES = 400  # images; starting processes takes as long as decoding some
_SAMPLE = 16  # rows that are held against their source files whenever a cache is opened


class DamagedCache(Exception):
    """Files of a cache that do not fit together."""


_DAMAGE = (DamagedCache, OSError, ValueError, KeyError, EOFError, TypeError, AttributeError)  # what damaged files end in


@dataclass
class ImageCache:
    """An open cache, seen through the ids that were asked for.

    ``array[i]``, ``array[rows]`` and :meth:`take` count in the order of those ids, whatever the order in the file.
    """

    folder: Path
    manifest: dict
    pixels: np.ndarray  # (n in the file, size, size), a read-only memory map
    rows: np.ndarray | None = None  # row in the file of each image asked for; None where both are the same
    bad: dict[str, str] = field(default_factory=dict)  # of the ids asked for: unreadable source -> reason; pixels black

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self), *self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels) if self.rows is None else len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return np.asarray(self.pixels[index if self.rows is None else self.rows[index]])

    def take(self, index: np.ndarray, axis: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """As ``numpy.ndarray.take`` along the images: one indexed read into ``out`` (B, size, size), no copy between."""
        index = np.asarray(index) if self.rows is None else self.rows[index]
        if len(index) and not 0 <= index.min() <= index.max() < len(self.pixels):
            raise IndexError(f"rows {index.min()} to {index.max()} of a cache of {len(self.pixels)} images")
        return self.pixels.take(index, axis=axis, out=out, mode="clip")  # 'raise' would buffer the output

    def only(self, kept: np.ndarray) -> ImageCache:
        """The same cache seen through some of its images: ``kept`` is a mask or row numbers."""
        rows = (np.arange(len(self.pixels)) if self.rows is None else self.rows)[kept]
        return ImageCache(self.folder, self.manifest, self.pixels, rows)


def open_images(ids: Sequence[str], paths: Sequence[str], size: int, *, aspect: str = "stretch", cache_dir: str | Path = "",
                workers: int = 2, say: Callable[[str], None] | None = None) -> ImageCache:
    """The cache that holds these images at this size, wherever it lies; built first if there is none.

    Looked for in ``cache_dir``, in this machine's scratch folder and among what is attached on Kaggle. A cache fits if it has
    all ids (more is no harm), and its checksums and, where they are there, its source files agree in a sample of rows. If some
    of these source files have changed, every file is checked, and those that changed are decoded again. Of two processes
    that ask for a missing cache at once, one builds it and the other waits.

    Parameters
    ----------
    ids, paths : sequences of str
        Name and file of each image.
    size : int
        Pixels a side.
    aspect : {'stretch', 'pad', 'crop'}
        See :func:`charmlib.data.images.fit`.
    cache_dir : path
        Folder of caches, or one cache; '' is :func:`charmlib.data.paths.default_cache_dir`. Where it cannot be written, new
        caches go to that default.
    workers : int
        Processes that decode, or threads where there are few images.
    say : callable
        Gets a line where something takes time; standard error by default.

    Raises
    ------
    OSError
        Not enough room; says how much is needed and how much there is.
    """
    say = say or to_stderr
    wanted = _Wanted(list(ids), list(paths), size, aspect)
    found, stale, suspects = _find(wanted, cache_dir, say)
    if found is None and stale is not None:
        found = _verified(wanted, stale, suspects, _home(cache_dir), workers, say)
    if found is None:
        found = _build(wanted, _home(cache_dir), workers, say)
    return found


def verify_images(ids: Sequence[str], paths: Sequence[str], size: int, *, aspect: str = "stretch",
                  cache_dir: str | Path = "", workers: int = 2, say: Callable[[str], None] | None = None) -> ImageCache:
    """As :func:`open_images`, after a check of every row: its pixels and its whole source file against their checksums.

    Rows that changed are decoded again, which for a read-only cache means a new one elsewhere. Source files that are gone
    are named, and their rows kept.
    """
    say = say or to_stderr
    wanted = _Wanted(list(ids), list(paths), size, aspect)
    found, stale, _ = _find(wanted, cache_dir, say)
    found = found or stale
    if found is None:
        say("no cache of these images yet: building it")
        return open_images(ids, paths, size, aspect=aspect, cache_dir=cache_dir, workers=workers, say=say)
    return _verified(wanted, found, range(len(wanted.ids)), _home(cache_dir), workers, say)


def content_of(folder: str | Path) -> dict:
    """Manifest of a cache, with what its source pictures were: ``sizes``, (width, height) -> images."""
    folder = Path(folder)
    rows = np.load(folder / ROWS, allow_pickle=False)
    pairs, counts = np.unique(rows[["width", "height"]][rows["state"] == DONE], return_counts=True)
    sizes = {(int(w), int(h)): int(n) for (w, h), n in sorted(zip(pairs.tolist(), counts), key=lambda x: -x[1])}
    return {**_manifest(folder), "sizes": sizes}


class _Wanted:
    """What is asked for, and the name that a cache of exactly this gets."""

    def __init__(self, ids: list[str], paths: list[str], size: int, aspect: str):
        if len(ids) != len(paths) or not ids:
            raise ValueError(f"{len(ids)} ids and {len(paths)} files: wanted one file for each of at least one id")
        self.ids, self.paths, self.size, self.aspect = ids, paths, size, aspect
        self.listing = "\n".join(ids).encode("utf-8", "surrogateescape")  # file names need not be text
        self.ids_hash = hashlib.sha256(self.listing).hexdigest()
        self.sample = np.unique(np.linspace(0, len(ids) - 1, _SAMPLE).astype(int))

    @property
    def name(self) -> str:
        # The sampled files' sizes tell data sets apart that share their ids, such as the NIH set and a resized copy of it.
        sizes = [file_size(self.paths[i]) for i in self.sample]
        digest = hashlib.sha256(f"{FORMAT} {self.ids_hash} {sizes}".encode()).hexdigest()[:10]
        return f"grey{self.size}-{self.aspect}-{len(self.ids)}-{digest}"


def _home(cache_dir: str | Path) -> Path:
    """Where new caches go."""
    home = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    if (home / MANIFEST).is_file():
        home = home.parent
    there = next(p for p in (home, *home.absolute().parents) if p.exists())
    return home if os.access(there, os.W_OK) else default_cache_dir()


def _find(wanted: _Wanted, cache_dir: str | Path, say) -> tuple[ImageCache | None, ImageCache | None, Sequence[int]]:
    """The first cache that fits; without one, the first some of whose source files have changed, and which to look at."""
    stale, suspects = None, ()
    places = [Path(cache_dir).expanduser()] if cache_dir else []
    places += [default_cache_dir(), *kaggle_caches(MANIFEST)]
    for folder in sorted(_folders(places), key=lambda folder: folder.name != wanted.name):
        try:
            cache = _open(folder, wanted)
            strange, mended = ([], []) if cache is None else _sample(cache, wanted)
        except _DAMAGE as error:
            say(f"{folder} is not used: {error}")
            continue
        if cache is None:
            continue
        if len(strange) * 2 > len(wanted.sample):
            continue  # another data set with the same names
        if not (strange or mended):
            return cache, None, ()
        if stale is None:
            stale, suspects = cache, range(len(wanted.ids)) if strange else mended
            what = f"{len(strange)} of {len(wanted.sample)} sampled images differ from" if strange else \
                f"{len(mended)} of the unreadable images are no longer what they were in"
            say(f"{what} {folder}, such as {wanted.ids[(strange + mended)[0]]}")
    return None, stale, suspects


def _folders(places: Sequence[Path]) -> Iterator[Path]:
    seen = set()
    for place in places:
        inside = [place] if (place / MANIFEST).is_file() else sorted(p.parent for p in place.glob(f"*/{MANIFEST}"))
        for folder in inside:
            if folder.suffix != ".partial" and folder.resolve() not in seen:
                seen.add(folder.resolve())
                yield folder


def _manifest(folder: Path) -> dict:
    manifest = json.loads((folder / MANIFEST).read_text())
    if manifest.get("format") != FORMAT:
        raise DamagedCache(f"its format is {manifest.get('format')}, wanted {FORMAT}")
    return manifest


def _open(folder: Path, wanted: _Wanted) -> ImageCache | None:
    """The cache in a folder, or None if it holds other images, another size or another rule."""
    manifest = _manifest(folder)
    if (manifest["size"], manifest["aspect"], manifest["filter"]) != (wanted.size, wanted.aspect, FILTER):
        return None
    rows = None
    if manifest["images"] < len(wanted.ids):
        return None
    listing = (folder / IDS).read_bytes()
    if hashlib.sha256(listing).hexdigest() != manifest["ids_hash"]:
        raise DamagedCache(f"{IDS} is not what its manifest says")
    if manifest["ids_hash"] != wanted.ids_hash:
        where = {name: i for i, name in enumerate(listing.decode("utf-8", "surrogateescape").split("\n"))}
        found = [where.get(name, -1) for name in wanted.ids]
        if min(found) < 0:
            return None
        rows = np.array(found, dtype=np.int64)
    pixels = np.load(folder / PIXELS, mmap_mode="r", allow_pickle=False)
    if pixels.shape != (manifest["images"], wanted.size, wanted.size) or pixels.dtype != np.uint8:
        raise DamagedCache(f"{PIXELS} is {pixels.dtype} {pixels.shape}, its manifest says {manifest['images']} images of "
                           f"{wanted.size} pixels")
    bad = manifest["bad"] if rows is None else {n: manifest["bad"][n] for n in wanted.ids if n in manifest["bad"]}
    return ImageCache(folder, manifest, pixels, rows, bad)


def _sample(cache: ImageCache, wanted: _Wanted) -> tuple[list[int], list[int]]:
    """Which images' pixels or source files are not those of the cache: in the sample, and among the unreadable."""
    kept = np.load(cache.folder / ROWS, allow_pickle=False)
    if hashlib.sha256(kept.tobytes()).hexdigest() != cache.manifest["hash"]:
        raise DamagedCache(f"{ROWS} is not what its manifest says")
    unreadable = [i for i, name in enumerate(wanted.ids) if name in cache.bad] if cache.bad else []
    return tuple([int(i) for i in where if not _same(cache, kept, wanted, i)] for where in (wanted.sample, unreadable))


def _same(cache: ImageCache, kept: np.ndarray, wanted: _Wanted, i: int) -> bool:
    at = i if cache.rows is None else int(cache.rows[i])
    row = kept[at]
    if zlib.crc32(np.ascontiguousarray(cache.pixels[at])) != row["pixel_crc"]:
        return False
    try:  # a source that is gone says nothing against the cache
        if file_size(wanted.paths[i]) != row["bytes"]:
            return not os.path.exists(wanted.paths[i])
        with open(wanted.paths[i], "rb") as file:
            return zlib.crc32(file.read()) == row["source_crc"]
    except OSError:
        return True


def _verified(wanted: _Wanted, cache: ImageCache, suspects: Sequence[int], home: Path, workers: int, say) -> ImageCache:
    """The cache after a check of the suspects, those that changed decoded again; all runs that have it open keep what they
    see, for they map the files that are replaced."""
    kept = np.load(cache.folder / ROWS, allow_pickle=False)
    gone = [wanted.ids[i] for i in suspects if not os.path.exists(wanted.paths[i])]
    same = np.ones(len(wanted.ids), bool)

    def check(chunk: Sequence[int]) -> None:
        for i in chunk:
            same[i] = _same(cache, kept, wanted, i)

    for_each(check, suspects, workers, "checked", say)
    changed = np.flatnonzero(~same)
    if gone:
        say(f"{len(gone)} source files are gone, their rows are kept: {_some(gone)}")
    say(f"checked {len(suspects):,} images in {cache.folder}: {len(changed)} changed"
        + (f" ({_some([wanted.ids[i] for i in changed])})" if len(changed) else ""))
    if not len(changed):
        return cache
    if cache.rows is not None or not all(os.access(p, os.W_OK) for p in (cache.folder, cache.folder.parent)):
        say(f"{cache.folder} " + ("is read-only" if cache.rows is None else "holds more than these images")
            + f": building one of these in {home}")
        return _build(wanted, home, workers, say)
    target = cache.folder.with_name(wanted.name)  # another one where sampled files have another size now
    with _lock(target.parent, target.name, say):
        if not (cache.folder / MANIFEST).is_file() or _manifest(cache.folder) != cache.manifest:
            say(f"another process mended {cache.folder} meanwhile")
        else:
            partial = _partial(target)
            shutil.rmtree(partial, ignore_errors=True)
            if cache.pixels.nbytes < 0.98 * shutil.disk_usage(target.parent).free:
                shutil.copytree(cache.folder, partial, ignore=shutil.ignore_patterns(MANIFEST, ROWS))
            else:
                say("no room for a copy: mending in place, which runs that have it open will see")
                (cache.folder / MANIFEST).unlink()
                os.rename(cache.folder, partial)
            kept["state"][changed] = 0
            np.save(partial / ROWS, kept)
            _fill(wanted, partial, target, workers, say)
            if target != cache.folder:
                shutil.rmtree(cache.folder, ignore_errors=True)
    with contextlib.suppress(*_DAMAGE):
        return _open(target, wanted)
    return _build(wanted, home, workers, say)


def _build(wanted: _Wanted, home: Path, workers: int, say) -> ImageCache:
    home.mkdir(parents=True, exist_ok=True)
    target = home / wanted.name
    with _lock(home, wanted.name, say):
        with contextlib.suppress(*_DAMAGE):
            cache = _open(target, wanted)
            if cache is not None and not any(_sample(cache, wanted)):
                return cache  # another process built it while this one waited
        if target.exists():  # damaged: an unfinished build again, in which what is good is kept
            shutil.rmtree(_partial(target), ignore_errors=True)
            (target / MANIFEST).unlink(missing_ok=True)
            os.rename(target, _partial(target))
        _fill(wanted, _partial(target), target, workers, say)
    cache = _open(target, wanted)
    if cache is None:
        raise DamagedCache(f"{target} does not hold what was just written to it")
    return cache


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _fill(wanted: _Wanted, partial: Path, target: Path, workers: int, say) -> None:
    """Decode what is still missing in a partial cache, then make it a whole one."""
    pixels, rows = _begin(wanted, partial)
    bad: dict[int, str] = {}
    todo = [i for i in range(len(wanted.ids)) if not _kept(pixels, rows, wanted, i)]
    if len(todo) < len(wanted.ids):
        say(f"going on with {partial}: {len(wanted.ids) - len(todo):,} of {len(wanted.ids):,} images are there")
    if len(todo) < _WORTH_PROCESSES or workers < 2:
        for_each(lambda chunk: bad.update({i: why for i in chunk if (why := decode_row(
            pixels, rows, i, wanted.paths[i], wanted.aspect))}), todo, workers, "decoded", say)
    else:
        with Decoders(partial, wanted.aspect) as decoders:
            for_each(lambda chunk: bad.update(decoders.decode([(i, wanted.paths[i]) for i in chunk])), todo, workers, "decoded",
                     say)
    pixels.flush()
    rows.flush()
    digest = hashlib.sha256(rows.tobytes()).hexdigest()
    for name in (PIXELS, ROWS, IDS):
        sync(partial / name)
    write_json(partial / MANIFEST, {
        "format": FORMAT, "images": len(wanted.ids), "size": wanted.size, "aspect": wanted.aspect, "filter": FILTER,
        "ids_hash": wanted.ids_hash, "hash": digest, "bad": {wanted.ids[i]: bad[i] for i in sorted(bad)}})
    if target.exists():  # the cache that this one mends; runs that have it open keep its files
        old = target.with_name(target.name + ".old.partial")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old)
    else:
        os.rename(partial, target)
    sync(target.parent)


def _begin(wanted: _Wanted, partial: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writable maps of pixels and rows: of the unfinished build that is there, or new ones with their room reserved."""
    shape = (len(wanted.ids), wanted.size, wanted.size)
    with contextlib.suppress(*_DAMAGE):
        if hashlib.sha256((partial / IDS).read_bytes()).hexdigest() == wanted.ids_hash:
            pixels, rows = open_rows(partial)
            if pixels.shape == shape and pixels.dtype == np.uint8 and rows.shape == shape[:1] and rows.dtype == ROW:
                return pixels, rows
    shutil.rmtree(partial, ignore_errors=True)
    _room(int(np.prod(shape)) + len(wanted.ids) * 64, wanted, partial.parent)
    partial.mkdir()
    pixels = np.lib.format.open_memmap(partial / PIXELS, mode="w+", dtype=np.uint8, shape=shape)
    rows = np.lib.format.open_memmap(partial / ROWS, mode="w+", dtype=ROW, shape=shape[:1])
    try:
        for name in (PIXELS, ROWS):  # or a disk that fills up later would kill the process (SIGBUS)
            with open(partial / name, "rb+") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:  # a quota, which the free space does not show
        shutil.rmtree(partial)
        raise OSError(f"{partial.parent} does not take the {_megabytes(pixels.nbytes)} that the cache of {shape[0]:,} images "
                      f"at {wanted.size} pixels needs ({error.strerror}): name another cache_dir") from error
    (partial / IDS).write_bytes(wanted.listing)
    return pixels, rows


def _room(needed: int, wanted: _Wanted, home: Path) -> None:
    free = shutil.disk_usage(home).free
    if needed > 0.98 * free:
        raise OSError(f"the cache of {len(wanted.ids):,} images at {wanted.size} pixels needs {_megabytes(needed)}, {home} has "
                      f"{_megabytes(free)} free: name another cache_dir or a smaller image_size")


def _megabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _kept(pixels: np.ndarray, rows: np.ndarray, wanted: _Wanted, i: int) -> bool:
    """Whether an unfinished build has this row: done, with its pixels' checksum, and of a source of the same size."""
    row = rows[i]
    return (row["state"] == DONE and zlib.crc32(np.ascontiguousarray(pixels[i])) == row["pixel_crc"]
            and file_size(wanted.paths[i]) in (row["bytes"], -1))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _lock(home: Path, name: str, say) -> Iterator[None]:
    """One process at a time for a cache; the system frees the lock of one that was killed."""
    with open(home / f".{name}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is building {home / name}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
