"""Opening the image cache: searched for, checked, and built or repaired where that is needed."""

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from charmlib.data import cache_file
from charmlib.data.cache_build import build, repair
from charmlib.data.paths import default_cache_dir, kaggle_caches, writable


def open_images(ids: Sequence[str], paths: Sequence[str], size: int, *, aspect: str = "stretch", contrast: str = "none",
                train: Callable[[], Sequence[int]] | None = None, cache_dir: str | Path = "", workers: int = 0,
                verify: bool = False, say: Callable[[str], None] | None = None) -> cache_file.ImageCache:
    """The cache that holds these images at this size, wherever it lies; built first if there is none.

    Searched is ``cache_dir``; without one, or where nothing can be written there, also this machine's scratch folder and the
    inputs attached on Kaggle. A cache fits if it has all ids (perhaps more) and a sample of its rows agrees with its checksums
    and the source files. If sampled source files changed, every file is checked, and those that changed are decoded again. Of
    two concurrent builds the second waits for the first. Raises OSError for too little room; names the bytes needed and free.

    Parameters
    ----------
    ids, paths, size, aspect, contrast
        Name and file of each image; pixels a side; rules of :func:`charmlib.data.images.fit`.
    train : callable
        Gives the positions of the training images, on which the common scale of pictures of more than 8 bits is found; all
        images without it. A cache that is there already keeps its scale.
    cache_dir : path
        Folder of caches, or one cache; '' is :func:`charmlib.data.paths.default_cache_dir`, which also replaces a read-only
        folder for new caches.
    workers : int
        Processes that decode, or threads for few images; 0 is one a core.
    verify : bool
        Check pixels and source file of every row, and decode those that changed again. Rows of missing files are kept.
    say : callable
        Receives messages; standard error by default.
    """
    say, workers = say or partial(print, file=sys.stderr, flush=True), workers or os.cpu_count()
    request = cache_file.Request(ids, paths, size, aspect, contrast, train)
    cache, suspects = _find(request, cache_dir, say)
    home = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    home = home.parent if (home / cache_file.MANIFEST).is_file() else home
    home = home if writable(home) else default_cache_dir()
    if cache is None:
        if verify:
            say("no cache of these images yet: building it")
        return build(request, home, workers, say)
    suspects = range(len(ids)) if verify else suspects
    return repair(request, cache, suspects, home, workers, say) if suspects else cache


def content_of(folder: str | Path) -> dict:
    """Manifest of a cache, with the sizes of its source pictures: ``sizes``, (width, height) -> images."""
    folder = Path(folder)
    manifest = cache_file.read_manifest(folder)
    rows = cache_file.read_rows(folder, manifest)
    sizes = Counter(rows[["width", "height"]][np.isin(rows["state"], (cache_file.DONE, cache_file.BLANK))].tolist())
    return {**manifest, "sizes": dict(sizes.most_common())}


def _find(request: cache_file.Request, cache_dir: str | Path, say) -> tuple[cache_file.ImageCache | None, Sequence[int]]:
    """The first cache that fits; else the first in which some images changed, and the images to check in it."""
    found, suspects = None, ()
    for folder in sorted(_folders(cache_dir), key=lambda folder: folder.name != request.name):
        try:
            cache = cache_file.open_cache(folder, request)
            sampled, mended = ([], []) if cache is None else cache_file.changes(cache, request)
        except cache_file.DAMAGE as error:
            say(f"{folder} is not used: {error}")
            continue
        same_data = cache is not None and len(sampled) * 2 <= len(request.sample)
        if same_data and not (sampled or mended):
            return cache, ()
        if same_data and found is None:
            found, suspects = cache, range(len(request.ids)) if sampled else mended
            what = f"{len(sampled)} of {len(request.sample)} sampled images differ from" if sampled else \
                f"{len(mended)} of the unreadable images are no longer what they were in"
            say(f"{what} {folder}, such as {request.ids[(sampled + mended)[0]]}")
    return found, suspects


def _folders(cache_dir: str | Path) -> list[Path]:
    """Folders of all finished caches, each once."""
    named, found = [Path(cache_dir).expanduser()] if cache_dir else [], []
    elsewhere = not (named and writable(named[0]))
    for place in named + [default_cache_dir()] * elsewhere:
        here = (place / cache_file.MANIFEST).is_file()
        found += [place] if here else sorted(p.parent for p in place.glob(f"*/{cache_file.MANIFEST}"))
    unique: dict[Path, Path] = {}
    for folder in found + (kaggle_caches(cache_file.MANIFEST) if elsewhere else []):
        unique.setdefault(folder.resolve(), folder)
    return [folder for folder in unique.values() if folder.suffix != ".partial"]
