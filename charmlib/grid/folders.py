"""Cells' folders brought from elsewhere: an earlier session's output, another shard."""

from __future__ import annotations

import shutil
from pathlib import Path

from charmlib.files import sync
from charmlib.grid.cells import cell_status, epochs_done
from charmlib.lease import NAME as LEASE

_HALF = ".half"


def bring_cell(source: Path, target: Path) -> bool:
    """Copy a finished or started cell's folder, unless the one that is there has got as far; returns whether it was copied.

    The copy appears whole or not at all. What is read-only at the source can be written in the copy.
    """
    if _got(source) <= _got(target):
        return False
    half = target.with_name(f".{target.name}{_HALF}")
    shutil.rmtree(half, ignore_errors=True)  # of a copy that was killed
    half.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and not file.name.startswith(LEASE):
            shutil.copyfile(file, half / file.name)
            sync(half / file.name)
    sync(half)
    shutil.rmtree(target, ignore_errors=True)
    half.rename(target)
    sync(target.parent)
    return True


def _got(folder: Path) -> float:
    """How far a cell has got: epochs, or infinitely far when it is done; -1 where there is nothing to go on from."""
    status = cell_status(folder)
    if status == "done":
        return float("inf")
    resumable = (folder / "resume.pt").is_file() or (folder / "model.json").is_file()
    return epochs_done(folder) if resumable else -1
