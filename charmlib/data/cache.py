"""Images decoded and resized once, kept as one uint8 array that all runs of a machine share.

A cache is two files, ``<key>.npy`` (n, size, size) and ``<key>.json``. The key covers the paths, sizes and times of
the source files, so a changed data set gets another cache. The array is written under a temporary name and renamed
before its manifest is, so a manifest that is there belongs to an array that is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from charmlib.data.images import read_grey
from charmlib.data.paths import default_cache_dir

FORMAT = 1


def cache_key(paths: Sequence[str], size: int) -> str:
    """A name for these files at this size: changes with any path, file size or modification time."""
    digest = hashlib.sha256(f"charm-cache {FORMAT} {size} bilinear\n".encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"{path}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode())
    return f"grey{size}-{digest.hexdigest()[:16]}"


def cached_images(paths: Sequence[str], size: int, *, cache_dir: str | Path = "", workers: int = 2,
                  progress: bool = True) -> tuple[np.ndarray, dict[str, str]]:
    """All images as a read-only memory map (n, size, size) uint8, decoding them only if no cache holds them.

    Parameters
    ----------
    paths : sequence of str
        Image files; row i of the result is ``paths[i]``.
    size : int
        Pixels a side.
    cache_dir : path
        '' is :func:`charmlib.data.paths.default_cache_dir`.
    workers : int
        Threads that decode (Pillow releases the interpreter while it decodes).

    Returns
    -------
    images, bad
        Unreadable files have a black row and stand in ``bad`` (path -> reason): leave them out.

    Raises
    ------
    OSError
        Not enough room; says how much is needed and how much there is.
    """
    folder = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    key = cache_key(paths, size)
    array, manifest = folder / f"{key}.npy", folder / f"{key}.json"
    if manifest.is_file() and array.is_file():
        kept = json.loads(manifest.read_text())
        images = np.load(array, mmap_mode="r", allow_pickle=False)
        if images.shape == (len(paths), size, size) and images.dtype == np.uint8:
            return images, kept["bad"]
    folder.mkdir(parents=True, exist_ok=True)
    needed, free = len(paths) * size * size, shutil.disk_usage(folder).free
    if needed > 0.95 * free:
        raise OSError(f"the cache of {len(paths)} images at {size} pixels needs {needed / 1e9:.1f} GB, {folder} has "
                      f"{free / 1e9:.1f} GB free: name another cache_dir or a smaller image_size")
    temporary = folder / f"{key}.{os.getpid()}.npy.tmp"
    try:
        bad = _decode_all(paths, size, temporary, workers, progress)
        os.replace(temporary, array)
    finally:
        temporary.unlink(missing_ok=True)
    note = folder / f"{key}.{os.getpid()}.json.tmp"
    note.write_text(json.dumps({"format": FORMAT, "images": len(paths), "size": size, "bad": bad}))
    os.replace(note, manifest)
    return np.load(array, mmap_mode="r", allow_pickle=False), bad


def _decode_all(paths, size, target: Path, workers: int, progress: bool) -> dict[str, str]:
    images = np.lib.format.open_memmap(target, mode="w+", dtype=np.uint8, shape=(len(paths), size, size))
    bad: dict[str, str] = {}

    def decode(i):
        try:
            images[i] = read_grey(paths[i], size)
        except Exception as error:
            # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for damaged files
            bad[paths[i]] = f"{type(error).__name__}: {error}"

    start = last = time.monotonic()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for done, _ in enumerate(pool.map(decode, range(len(paths))), 1):
            if progress and (time.monotonic() - last > 10 or (done == len(paths) and done > 2000)):
                last = time.monotonic()
                print(f"decoded {done} of {len(paths)} images, {done / (last - start):.0f} a second",
                      file=sys.stderr, flush=True)
    images.flush()
    with open(target, "rb+") as file:
        os.fsync(file.fileno())
    return dict(sorted(bad.items()))
