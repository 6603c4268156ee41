"""Cells' folders brought from elsewhere: an earlier session's output, another shard."""

from __future__ import annotations

import shutil
import time
import uuid
from pathlib import Path

from charmlib.files import LEASE, sync
from charmlib.grid import lease
from charmlib.grid.cells import ALIVE, GridError, cell_status, epochs_done

_HALF = ".half"
_OLD = 600.0
"""Seconds without a new file after which a copy counts as killed."""


def bring_cell(source: Path, target: Path) -> bool:
    """Copy a finished or started cell's folder, unless the one that is there has got as far; returns whether it was copied.

    The copy appears whole or not at all. What is read-only at the source can be written in the copy.

    Raises
    ------
    GridError
        The cell is being worked on where it would be copied to.
    """
    if _got(source) <= _got(target):
        return False
    half = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}{_HALF}")
    half.mkdir(parents=True)
    try:
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.startswith(LEASE) and file.name != ALIVE:
                shutil.copyfile(file, half / file.name)
                sync(half / file.name)
        sync(half)
        with lease.alone(target):
            refuse_at_work(target)
            if _got(source) <= _got(target):
                return False
            shutil.rmtree(target, ignore_errors=True)
            half.rename(target)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    sync(target.parent)
    return True


def remove_cell(folder: Path) -> None:
    """Remove a cell that is to be run again.

    Raises
    ------
    GridError
        It is being worked on.
    """
    with lease.alone(folder):
        refuse_at_work(folder)
        shutil.rmtree(folder, ignore_errors=True)


def remove_half_copies(folder: Path) -> None:
    """Remove what killed copies left in a grid's folder."""
    for half in folder.glob(f".*{_HALF}"):
        if time.time() - half.stat().st_mtime > _OLD:  # not one that another is making
            shutil.rmtree(half, ignore_errors=True)


def refuse_at_work(folder: Path) -> None:
    """Refuse to change a cell that a living process works on.

    Raises
    ------
    GridError
        One does; says which.
    """
    if words := lease.holder(folder):
        raise GridError(f"{folder} is being worked on by {words}: wait for its end, or stop it")


def _got(folder: Path) -> float:
    """How far a cell has got: epochs, or infinitely far when it is done; -1 where there is nothing to go on from."""
    status = cell_status(folder)
    if status == "done":
        return float("inf")
    resumable = (folder / "resume.pt").is_file() or (folder / "model.json").is_file()
    return epochs_done(folder) if resumable else -1
