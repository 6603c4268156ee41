"""Whether a grid fits on its disk, before hours are spent on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from charmlib.grid.cells import GridError, cell_status
from charmlib.grid.spec import Cell
from charmlib.session import with_this_package

KAGGLE_WORKING, KAGGLE_LIMIT = Path("/kaggle/working"), 20e9
"""What a Kaggle session may keep; its disk says more."""

_PLENTY = 1.5e9, 8e9
"""Bytes a finished cell, and one in training, that no network here needs: with so much free nothing is computed."""
_REST = 12e6
"""Bytes of a finished cell that are not its checkpoint: notebooks, predictions, report."""


def refuse_without_space(cells: Sequence[Cell], folder: Path, at_once: int, *, say: Callable[[str], None] = print) -> None:
    """Say what cells that are to run will take, and whether that is there.

    Raises
    ------
    GridError
        Not even one cell can be trained in the space that is left.
    """
    todo = [cell for cell in cells if cell_status(folder / cell.id) != "done"]
    free = free_bytes(folder)
    at_once = min(at_once, len(todo))
    if not todo or free > len(todo) * _PLENTY[0] + at_once * _PLENTY[1]:
        return
    kept, training = _sizes(cells, folder)
    need = len(todo) * kept + at_once * training
    words = (f"{len(todo)} cells need about {_gb(need)} in {folder} ({_gb(kept)} a finished cell, {_gb(training)} more while "
             f"one trains, {at_once} at once); {_gb(free)} are free")
    if free < kept + training:
        raise GridError(f"{words}: not even one fits. Make room, or name another --out.")
    if free < need:
        say(f"WARNING: {words}, so the grid will stop at a full disk, losing nothing. Run a part of it elsewhere (--shard).")
    else:
        say(words)


def free_bytes(folder: Path, *, working: Path = KAGGLE_WORKING, limit: float = KAGGLE_LIMIT) -> float:
    """What may still be written there: the disk's free space, on Kaggle no more than its limit for results leaves."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = float(shutil.disk_usage(there).free)
    if working.is_dir() and there.resolve().is_relative_to(working.resolve()):
        used = sum(f.stat().st_size for f in working.rglob("*") if f.is_file() and not f.is_symlink())
        free = min(free, limit - used)
    return free


def _sizes(cells: Sequence[Cell], folder: Path) -> tuple[float, float]:
    """Bytes of a finished cell, and on top of them while one trains (its resume file, twice while a new one is written)."""
    kept = [_bytes(folder / c.id, "*") for c in cells if cell_status(folder / c.id) == "done"]
    resumes = [_bytes(folder / c.id, "resume.pt") for c in cells if (folder / c.id / "resume.pt").is_file()]
    if kept and resumes:
        return median(kept), 2 * max(resumes)
    model, resume = computed_sizes([c.params for c in cells])
    return (median(kept) if kept else model + _REST), 2 * (max(resumes) if resumes else resume)


def computed_sizes(params: Sequence[dict]) -> tuple[int, int]:
    """Bytes of the largest checkpoint and resume file of these parameters, by a process that may import torch."""
    asked = subprocess.run([sys.executable, "-m", "charmlib.training.size"], input=json.dumps(list(params)), text=True,
                           capture_output=True, env=with_this_package(os.environ))
    if asked.returncode:
        raise GridError(f"the networks of this grid cannot be built: {asked.stderr.strip().splitlines()[-1]}")
    model, resume = json.loads(asked.stdout.splitlines()[-1])
    return model, resume


def _bytes(folder: Path, pattern: str) -> int:
    return sum(f.stat().st_size for f in folder.glob(pattern) if f.is_file())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
