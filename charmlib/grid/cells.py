"""A cell's identity and state, as far as its folder tells."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path

import charmlib
from charmlib.evaluation.runs import PART_FILE
from charmlib.files import remove_temporaries
from charmlib.grid import lease
from charmlib.params import UNHASHED

NOTEBOOKS = ("train", "test")
IDENTITY = "cell.json"
"""Id, hash and more of a cell that is not finished, so that it never goes on under other settings."""
RUNNING = ".running.ipynb"
"""Both notebooks as far as they are executed."""
ALIVE = ".alive"
"""The file that the kernel of a cell touches as it works."""


class Ended(IntEnum):
    """How a cell's process ended: its exit status."""

    DONE = 0
    FAILED = 1
    BUSY = 75
    """Another process works on the cell."""
    OUT_OF_TIME = 76
    LEASE_LOST = 77
    DISK_FULL = 78
    CRASHED = 79
    """The kernel, or the process itself, was killed."""
    HUNG = 80
    STOPPED = 143


class GridError(RuntimeError):
    """A grid that cannot go on; the message names the cell or file and the remedy."""


def find_notebooks(folder: str | Path | None = None) -> Path:
    """The folder of ``train.ipynb`` and ``test.ipynb``: given, of the checkout or wheel, or in the current folder.

    Raises
    ------
    GridError
        Not found; lists where it was looked for.
    """
    package = Path(charmlib.__file__).parent
    places = [Path(folder)] if folder else [package.parent / "notebooks", package / "shipped" / "notebooks",
                                            Path("notebooks"), Path(".")]
    for place in places:
        if all((place / f"{name}.ipynb").is_file() for name in NOTEBOOKS):
            return place.resolve()
    raise GridError(f"no train.ipynb and test.ipynb in {', '.join(map(str, places))}: name their folder with --notebooks")


def notebook_code(notebooks: Path) -> str:
    """The text of the code cells of both notebooks, which is part of what a result depends on."""
    import nbformat  # half a second, and this module is imported for each command

    cells = [cell["source"] for name in NOTEBOOKS
             for cell in nbformat.read(notebooks / f"{name}.ipynb", as_version=4).cells if cell["cell_type"] == "code"]
    return "\n\n".join(cells)


def cell_hash(params: Mapping, code: str, split_hash: str) -> str:
    """16 hex digits over the parameters (not where things are), the notebooks' code, the split and charmlib's version."""
    what = {"params": {k: params[k] for k in sorted(params) if k not in UNHASHED}, "code": code, "split": split_hash,
            "version": charmlib.__version__}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def code_hash(code: str) -> str:
    """16 hex digits of the notebooks' code, kept with every result."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def read_identity(folder: Path) -> dict:
    """What the folder of an unfinished cell says of it (id, hash, seconds spent); empty where it says nothing readable."""
    try:
        return json.loads((folder / IDENTITY).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def finished(folder: Path, hash_: str) -> bool:
    """Whether a cell is done, under these very settings.

    Raises
    ------
    GridError
        Done under others.
    """
    if cell_status(folder) != "done":
        return False
    theirs = json.loads((folder / "metrics.json").read_text()).get("hash")
    if theirs != hash_:
        raise GridError(f"{folder.name} was finished by another runner under other settings (hash {theirs}, wanted {hash_}); "
                        "use another --out, or --rerun-changed")
    return True


def epochs_done(folder: Path) -> int:
    """Finished epochs, by the history; one more when trained, another when scored: grows as long as a cell gets on."""
    path = folder / "history.csv"
    lines = path.read_text().count("\n") - 1 if path.is_file() else 0
    return lines + (folder / "model.json").is_file() + (folder / PART_FILE).is_file()


def cell_status(folder: Path) -> str:
    """'done', 'failed', 'started' (has finished epochs to go on from) or 'pending'."""
    if (folder / "metrics.json").is_file():
        return "done"
    if (folder / "error.txt").is_file():
        return "failed"
    return "started" if (folder / "resume.pt").is_file() or (folder / "model.json").is_file() else "pending"


def tidy(folder: Path) -> None:
    """Remove what a finished cell no longer needs, where its process was killed before it did so itself."""
    if cell_status(folder) == "done" and not lease.holder(folder):
        for name in ("resume.pt", PART_FILE, IDENTITY, ALIVE, "error.txt"):
            (folder / name).unlink(missing_ok=True)
        remove_temporaries(folder)
