"""Folders of data and caches, found at run time because Kaggle changes its mounts."""

import os
from contextlib import suppress
from itertools import chain
from pathlib import Path

from charmlib import session
from charmlib.nih import KAGGLE_DATASETS, TABLES


def resolve_data_root(data_root: str | Path = "", *, kaggle_input: str | Path = "/kaggle/input") -> Path | None:
    """The data folder: the given one, or what is attached on Kaggle, or ``./data``; None if there is none.

    On Kaggle the mounts ``datasets/<owner>/<slug>`` and ``<slug>`` are tried, then a search four folders deep for an NIH
    table. Raises FileNotFoundError if the given folder is missing, or nothing is attached on Kaggle; lists what was tried.
    """
    if data_root:
        root = Path(data_root).expanduser()
        if not root.is_dir():
            raise FileNotFoundError(f"data_root: no folder {root}")
        return root.resolve()  # so that one data set has one cache, whatever path names it
    base = Path(kaggle_input)
    tried = [folder for owner, slug in KAGGLE_DATASETS for folder in (base / "datasets" / owner / slug, base / slug)]
    searched = (folder for depth in ("*", "*/*", "*/*/*", "*/*/*/*") for folder in sorted(base.glob(depth)))
    for folder in chain(tried, searched):
        if _has_table(folder):
            return folder
    if base.is_dir():
        raise FileNotFoundError(
            "no data is attached: add the dataset nih-chest-xrays/data to the notebook, or say data_root. "
            f"Looked for {' or '.join(TABLES)} in {', '.join(map(str, tried))} and {base} four folders deep")
    return Path("data").resolve() if _has_table(Path("data")) else None


def _has_table(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TABLES)


def kaggle_caches(manifest: str, kaggle_input: str | Path = "/kaggle/input") -> list[Path]:
    """Folders with a file ``manifest`` among what is attached on Kaggle.

    The search ends above the folders of images: listing those takes longer than decoding some.
    """
    found = [path.parent for kind in ("datasets/*/*", "notebooks/*/*", "*") for inside in ("", "*/", "*/*/")
             for path in sorted(Path(kaggle_input).glob(f"{kind}/{inside}{manifest}"))]
    return list(dict.fromkeys(found))


def default_cache_dir() -> Path:
    """Scratch space for decoded images: ``$CHARM_CACHE``, Kaggle's ``/kaggle/temp``, or the user's cache folder.

    A user without a home folder that can be written (containers) gets a folder of the machine's temporary ones.
    """
    if os.environ.get("CHARM_CACHE"):
        return Path(os.environ["CHARM_CACHE"])
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE") and Path("/kaggle").is_dir():
        return Path("/kaggle/temp/charm_cache")
    with suppress(RuntimeError):  # an unknown user without HOME
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "charmlib"
        if writable(folder):
            return folder
    return session.own_temporary_folder()


def writable(folder: Path) -> bool:
    """Whether the folder, or the nearest one above it that exists, can be written."""
    return os.access(next(p for p in (folder, *folder.absolute().parents) if p.exists()), os.W_OK)
