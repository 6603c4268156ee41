"""Disk space: whether a grid fits, checked before hours are spent on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from charmlib.evaluation.runs import RunFolder
from charmlib.grid.cells import GridError
from charmlib.grid.spec import Cell
from charmlib.session import with_this_package

KAGGLE_WORKING, KAGGLE_LIMIT = Path("/kaggle/working"), 20e9
"""The folder that a Kaggle session keeps, and how many bytes of it; its disk claims more."""

_PLENTY = 1.5e9, 8e9
"""More bytes than any network here needs for a finished cell, and for one in training: sizes are not computed above that."""
_REST = 12e6
"""Bytes of a finished cell without its checkpoint: notebooks, predictions, report."""


def refuse_without_space(cells: Sequence[Cell], folder: Path, at_once: int, *, say: Callable[[str], None] = print) -> None:
    """Say how many bytes the unfinished cells need and how many are free.

    Raises
    ------
    GridError
        The free space is too small to train a single cell.
    """
    runs = [RunFolder(folder / cell.id) for cell in cells]
    todo = sum(not run.done for run in runs)
    at_once, free = min(at_once, todo), free_bytes(folder)
    if not todo or free > todo * _PLENTY[0] + at_once * _PLENTY[1]:
        return
    kept = [_bytes(run.path, "*") for run in runs if run.done]
    resumes = [run.resume_file.stat().st_size for run in runs if run.resume_file.is_file()]
    computed = (0, 0) if kept and resumes else computed_sizes([cell.params for cell in cells])
    cell = median(kept) if kept else computed[0] + _REST
    training = 2 * (max(resumes) if resumes else computed[1])  # twice while a new resume file is written
    need = todo * cell + at_once * training
    words = (f"{todo} cells need about {_gb(need)} in {folder} ({_gb(cell)} a finished cell, {_gb(training)} more while "
             f"one trains, {at_once} at once); {_gb(free)} are free")
    if free < cell + training:
        raise GridError(f"{words}: not even one fits. Make room, or name another --out.")
    say(words if free >= need else f"WARNING: {words}, so the grid will stop at a full disk, losing nothing. Run a part of it "
        "elsewhere (--shard).")


def free_bytes(folder: Path, *, working: Path = KAGGLE_WORKING, limit: float = KAGGLE_LIMIT) -> float:
    """Free bytes of the folder's disk; on Kaggle at most what its limit for results leaves."""
    there = existing(folder.absolute())
    free = float(shutil.disk_usage(there).free)
    if working.is_dir() and there.resolve().is_relative_to(working.resolve()):
        free = min(free, limit - _bytes(working, "**/*"))
    return free


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def computed_sizes(params: Sequence[dict]) -> tuple[int, int]:
    """Bytes of the largest checkpoint and resume file of these parameters, computed by a process that imports torch."""
    asked = subprocess.run([sys.executable, "-m", "charmlib.training.size"], input=json.dumps(list(params)), text=True,
                           capture_output=True, env=with_this_package(os.environ))
    if asked.returncode:
        raise GridError(f"the networks of this grid cannot be built: {asked.stderr.strip().splitlines()[-1]}")
    model, resume = json.loads(asked.stdout.splitlines()[-1])
    return model, resume


def _bytes(folder: Path, pattern: str) -> int:
    return sum(f.stat().st_size for f in folder.glob(pattern) if f.is_file() and not f.is_symlink())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
