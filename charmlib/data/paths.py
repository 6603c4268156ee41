"""Where the data is: resolved at run time, never assumed (Kaggle has changed its mounts before)."""

from __future__ import annotations

import os
from pathlib import Path

from charmlib.nih import KAGGLE_DATASETS, TABLES


def _has_table(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TABLES)


def resolve_data_root(data_root: str | Path = "", *, kaggle_input: str | Path = "/kaggle/input") -> Path:
    """The data folder: the given one, or what is attached on Kaggle, or ``./data``, or else drawn phantoms.

    On Kaggle the mounts of today (``datasets/<owner>/<slug>``) are tried, then those of before (``<slug>``), then a
    search four folders deep for an NIH table; finding nothing there is an error. Elsewhere the embedded default is
    written to the cache and said so: drawn radiographs, which every table and picture made from them names as such.

    Raises
    ------
    FileNotFoundError
        The given folder is not there, or nothing is attached on Kaggle; lists what was tried.
    """
    if data_root:
        root = Path(data_root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"data_root: no folder {root}")
        return root.resolve()  # so that one data set has one cache, from wherever it is named
    base, tried = Path(kaggle_input), []
    for owner, slug in KAGGLE_DATASETS:
        for folder in (base / "datasets" / owner / slug, base / slug):
            tried.append(str(folder))
            if folder.is_dir() and _has_table(folder):
                return folder
    if base.is_dir():
        for depth in ("*", "*/*", "*/*/*", "*/*/*/*"):
            for folder in sorted(base.glob(depth)):
                if folder.is_dir() and _has_table(folder):
                    return folder
        raise FileNotFoundError("no data is attached: add the dataset nih-chest-xrays/data to the notebook, or say data_root. "
                                f"Looked for {' or '.join(TABLES)} in {', '.join(tried)} and {base} four folders deep")
    if _has_table(Path("data")):
        return Path("data").resolve()
    from charmlib.data.phantom import make_phantoms

    folder = default_cache_dir() / "phantoms"
    print(f"no data_root given and no NIH data found: taking DRAWN PHANTOMS in {folder}", flush=True)
    return make_phantoms(folder, size=128)


def kaggle_caches(manifest: str, kaggle_input: str | Path = "/kaggle/input") -> list[Path]:
    """Folders with a file ``manifest`` among what is attached on Kaggle, in its mounts of today and of before.

    Never looks into folders as deep as the images lie: listing those takes longer than decoding some.
    """
    base, found = Path(kaggle_input), []
    for kind in ("datasets/*/*", "notebooks/*/*", "*"):
        for inside in ("", "*/", "*/*/"):
            found += sorted(base.glob(f"{kind}/{inside}{manifest}"))
    return list(dict.fromkeys(path.parent for path in found))


def default_cache_dir() -> Path:
    """Scratch space for decoded images: ``$CHARM_CACHE``, Kaggle's ``/kaggle/temp``, or the user's cache folder."""
    if os.environ.get("CHARM_CACHE"):
        return Path(os.environ["CHARM_CACHE"])
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") and Path("/kaggle").is_dir():
        return Path("/kaggle/temp/charm_cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charmlib"
