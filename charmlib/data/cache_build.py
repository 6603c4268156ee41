"""Building and repairing an image cache.

A cache is built in a folder whose name ends in ``.partial``, synced, given its manifest and then renamed, so a folder with a
manifest is complete. A build that was killed continues: a row counts as done if its pixels have their checksum.

Images are decoded in processes, because the fast PNG decoder holds the interpreter's lock. Their pixels go straight into the
memory map.
"""

import contextlib
import math
import multiprocessing
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import ModuleType

import filelock
import numpy as np
from tqdm import tqdm

from charmlib import files, session
from charmlib.data import cache_file
from charmlib.data.images import BLANK, Scale, common_scale, fit, open_picture, spread, to_grey
from charmlib.data.splits import SPLIT_SEED

_WORTH_PROCESSES = 400  # images; starting processes takes as long as decoding some
_CHUNK = 16  # images a task; one future an image would take a gigabyte for a million of them
_parsing = threading.Lock()
_LOG = {"mininterval": 20, "maxinterval": 20, "delay": 20, "leave": False,  # progress in a log: a line every 20 seconds
        "bar_format": "{desc} {n_fmt} of {total_fmt} images, {rate_fmt}, about {remaining} left\n"}


def build(request: cache_file.Request, home: Path, workers: int, say: Callable[[str], None]) -> cache_file.ImageCache:
    """A new cache in the folder ``home``; of two concurrent builds the second waits. Raises OSError for too little room."""
    home.mkdir(parents=True, exist_ok=True)
    target = home / request.name
    with lock(target, say):
        with contextlib.suppress(*cache_file.DAMAGE):
            cache = cache_file.open_cache(target, request)
            if cache is not None and not any(cache_file.changes(cache, request)):
                return cache  # another process has built it meanwhile
        if target.exists():  # damaged: keep its good rows as those of an unfinished build
            shutil.rmtree(_partial(target), ignore_errors=True)
            (target / cache_file.MANIFEST).unlink(missing_ok=True)
            os.rename(target, _partial(target))
        _fill(request, target, workers, say)
    return cache_file.open_cache(target, request)


def repair(request: cache_file.Request, cache: cache_file.ImageCache, suspects: Sequence[int], home: Path, workers: int,
           say: Callable[[str], None]) -> cache_file.ImageCache:
    """Check images against pixels and source files, and decode those that changed again.

    Runs that have the cache open keep their view, because files are replaced. A cache that is read-only or holds more images
    stays as it is, and a new one is built in ``home``. Missing source files are named and their rows kept.
    """
    rows, changed = cache_file.read_rows(cache.folder, cache.manifest), []
    check = partial(cache_file.changed, cache, rows, request)
    _for_each(ThreadPoolExecutor(workers), check, suspects, "checked", changed.extend)
    if gone := [request.ids[i] for i in suspects if not os.path.exists(request.paths[i])]:
        say(f"{len(gone)} source files are gone, their rows are kept: {_some(gone)}")
    say(f"checked {len(suspects):,} images in {cache.folder}: {len(changed)} changed"
        + (f" ({_some([request.ids[i] for i in changed])})" if changed else ""))
    if not changed:
        return cache
    larger = cache.manifest["ids_hash"] != request.ids_hash
    if larger or not all(os.access(p, os.W_OK) for p in (cache.folder, cache.folder.parent)):
        say(f"{cache.folder} {'holds more than these images' if larger else 'is read-only'}: building one of these in {home}")
        return build(request, home, workers, say)
    target = cache.folder.with_name(request.name)  # a new name if sampled files changed their size
    with lock(target, say):
        if not (cache.folder / cache_file.MANIFEST).is_file() or cache_file.read_manifest(cache.folder) != cache.manifest:
            say(f"another process mended {cache.folder} meanwhile")
        else:
            unfinished = _partial(target)
            shutil.rmtree(unfinished, ignore_errors=True)
            if cache.pixels.nbytes < 0.98 * shutil.disk_usage(target.parent).free:
                shutil.copytree(cache.folder, unfinished, ignore=shutil.ignore_patterns(cache_file.MANIFEST, cache_file.ROWS))
            else:
                say("no room for a copy: mending in place, which runs that have it open will see")
                (cache.folder / cache_file.MANIFEST).unlink()
                os.rename(cache.folder, unfinished)
            rows["state"][changed] = 0
            np.save(unfinished / cache_file.ROWS, rows)
            if cache.manifest["scale"]:
                files.write_json(unfinished / cache_file.SCALE, {"scale": cache.manifest["scale"]})
            _fill(request, target, workers, say)
            if target != cache.folder:
                shutil.rmtree(cache.folder, ignore_errors=True)
    return build(request, target.parent, workers, say)


def lock(target: Path, say: Callable[[str], None]) -> filelock.AcquireReturnProxy:
    """One process at a time for a cache, ``with lock(...)``; the system frees the lock of a process that was killed."""
    file = target.with_name(f".{target.name}.lock")
    try:
        return files.lock(file, timeout=0)
    except filelock.Timeout:
        say(f"another process is building {target}: waiting for it")
        return files.lock(file)


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _fill(request: cache_file.Request, target: Path, workers: int, say) -> None:
    """Decode the missing rows of a partial cache, then rename it to ``target``."""
    folder = _partial(target)
    pixels, rows = _begin(request, folder)
    bad = _decode_missing(request, folder, pixels, rows, workers, say)
    pixels.flush()
    rows.flush()
    for name in (cache_file.PIXELS, cache_file.ROWS, cache_file.IDS):
        files.sync(folder / name)
    files.write_json(folder / cache_file.MANIFEST, cache_file.manifest_of(request, rows, bad, _scale_in(folder)))
    (folder / cache_file.SCALE).unlink(missing_ok=True)
    old = target.with_name(target.name + ".old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():  # the cache that is repaired; runs that have it open keep its files
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)
    files.sync(target.parent)


def _begin(request: cache_file.Request, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writable maps of pixels and rows: of the unfinished build that is there, or new ones with their room reserved."""
    shape, home = (len(request.ids), request.size, request.size), folder.parent
    with contextlib.suppress(*cache_file.DAMAGE):
        _scale_in(folder)  # without its scale an unfinished build starts again
        if (folder / cache_file.IDS).read_bytes() == request.listing:
            pixels, rows = _maps(folder)
            if (pixels.shape, pixels.dtype, rows.shape, rows.dtype) == (shape, np.uint8, shape[:1], cache_file.ROW):
                return pixels, rows
    shutil.rmtree(folder, ignore_errors=True)
    what, needed = f"cache of {shape[0]:,} images at {request.size} pixels", math.prod(shape) + 64 * shape[0]
    if needed > 0.98 * (free := shutil.disk_usage(home).free):
        raise OSError(f"the {what} needs {needed / 1e6:,.1f} MB, {home} has {free / 1e6:,.1f} MB free: name another cache_dir "
                      "or a smaller image_size")
    folder.mkdir()
    try:
        for name, kind, form in ((cache_file.PIXELS, np.uint8, shape), (cache_file.ROWS, cache_file.ROW, shape[:1])):
            np.lib.format.open_memmap(folder / name, mode="w+", dtype=kind, shape=form)
            if hasattr(os, "posix_fallocate"):  # or a disk that fills up later would kill the process (SIGBUS)
                with open(folder / name, "rb+") as file:
                    os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:  # a quota, which the free space does not show
        shutil.rmtree(folder)
        raise OSError(f"{home} does not take the {needed / 1e6:,.1f} MB that the {what} needs ({error.strerror}): name another "
                      "cache_dir") from error
    (folder / cache_file.IDS).write_bytes(request.listing)
    return _maps(folder)


def _maps(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    names = (cache_file.PIXELS, cache_file.ROWS)
    with _parsing:  # numpy reads a header by ast, which in Python 3.11 may fail when two threads do so (CPython issue 106905)
        return tuple(np.load(folder / name, mmap_mode="r+", allow_pickle=False) for name in names)


def _decode_missing(request: cache_file.Request, folder: Path, pixels: np.ndarray, rows: np.ndarray, workers: int, say
                    ) -> dict[int, str]:
    """Decode every row that is not done; returns row -> reason of the unreadable files.

    Pictures of more than 8 bits wait until all others are done; then their common scale is found, and they follow. If the
    decoder crashes its process, the rows that were being decoded are tried one by one, each in a new process.
    """
    bad: dict[int, str] = {}

    def missing() -> list[tuple[int, str]]:
        done = np.isin(rows["state"], (cache_file.DONE, cache_file.BLANK))
        return [(i, path) for i, path in enumerate(request.paths) if i not in bad and not (
            done[i] and zlib.crc32(pixels[i]) == rows["pixel_crc"][i] and cache_file.file_size(path) in (rows["bytes"][i], -1))]

    if len(todo := missing()) < len(request.ids):
        say(f"going on with {folder}: {len(request.ids) - len(todo):,} of {len(request.ids):,} images are there")
    pool = _processes if len(todo) >= _WORTH_PROCESSES and workers > 1 else ThreadPoolExecutor
    while todo:
        decode = partial(_decode, folder, request.aspect, request.contrast, scale := _scale_in(folder))
        try:
            _for_each(pool(workers), decode, todo, "decoded", bad.update)
            if scale is not None or not len(deep := np.flatnonzero(rows["state"] == cache_file.DEEP)):
                break
            scale = _find_scale(request, deep)
            say(f"{len(deep):,} pictures of more than 8 bits: values from {scale[0]:g} to {scale[1]:g} become black to white")
            files.write_json(folder / cache_file.SCALE, {"scale": scale})
            suspects = []
        except BrokenExecutor:
            if not (suspects := np.flatnonzero(rows["state"] == cache_file.STARTED).tolist()):
                raise
        for i in suspects:
            try:
                _for_each(_processes(1), decode, [(i, request.paths[i])], "decoded", bad.update)
            except BrokenExecutor:
                pixels[i], bad[i] = 0, "the decoder crashed on it"
                rows["pixel_crc"][i], rows["state"][i] = zlib.crc32(pixels[i]), cache_file.BAD
        todo = missing()
    return bad


def _scale_in(folder: Path) -> Scale | None:
    """The scale of an unfinished build, None before it is found; ValueError for a damaged file."""
    file = folder / cache_file.SCALE
    if not file.is_file():
        return None
    low, high = files.read_json(file, "scale of a cache", f"delete {folder}")["scale"]
    return float(low), float(high)


def _find_scale(request: cache_file.Request, deep: np.ndarray) -> Scale:
    """The scale of pictures of more than 8 bits, from up to 64 of the training part, drawn with the seed of the splits."""
    train = np.intersect1d(deep, request.train()) if request.train else deep
    chosen = np.random.default_rng(SPLIT_SEED).permutation(train if len(train) else deep)[:64]
    return common_scale([open_picture(request.paths[i]) for i in chosen])


def _decode(folder: Path, aspect: str, contrast: str, scale: Scale | None, work: Sequence[tuple[int, str]]) -> dict[int, str]:
    """Decode (row, path) pairs into a partial cache; returns row -> reason of the unreadable files, whose rows are black."""
    (pixels, rows), bad = _maps(folder), {}
    for i, path in work:
        width = height = 0
        rows["state"][i] = cache_file.STARTED
        rows["bytes"][i], rows["source_crc"][i] = cache_file.file_size(path), 0  # of a file that is there and cannot be read
        try:
            source = Path(path).read_bytes()
            rows["bytes"][i], rows["source_crc"][i] = len(source), zlib.crc32(source)
            grey = open_picture(source)
            if isinstance(grey, np.ndarray):
                if scale is None:
                    rows["state"][i] = cache_file.DEEP
                    continue
                grey = to_grey(grey, scale)
            pixels[i] = fit(grey, pixels.shape[1], aspect, contrast)
            width, height = grey.size
            state = cache_file.BLANK if spread(grey) < BLANK else cache_file.DONE
        except ImportError:
            raise
        except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for damaged files
            pixels[i], state, bad[i] = 0, cache_file.BAD, f"{type(error).__name__}: {error}"
        rows["width"][i], rows["height"][i], rows["pixel_crc"][i] = width, height, zlib.crc32(pixels[i])
        rows["state"][i] = state  # last: a row that says it is done has all the rest
    return bad


def _processes(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), session.die_with_parent, (os.getpid(),))


def _for_each(pool: Executor, do: Callable, items: Sequence, verb: str, take: Callable) -> None:
    """Call ``do`` with a few items at a time and ``take`` with each result; an exception ends the pool after those at work."""
    chunks = [items[i:i + _CHUNK] for i in range(0, len(items), _CHUNK)]
    watched = sys.stderr.isatty() or session.person_watches()
    with pool, tqdm(total=len(items), desc=verb, unit=" images", **({} if watched else _LOG)) as bar:
        try:
            with _main_hidden():
                results = pool.map(do, chunks)
            for chunk, result in zip(chunks, results):
                take(result)
                session.alive()
                bar.update(len(chunk))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Spawn processes that do not import the calling script, which may lack the guard ``if __name__ == '__main__'``."""
    main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
