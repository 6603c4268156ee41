"""A grid goes on from an earlier session's output, which Kaggle attaches read-only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from charmlib.grid.cells import GridError
from charmlib.grid.folders import bring_cell, remove_half_copies
from charmlib.grid.spec import Grid

KAGGLE_INPUT = Path("/kaggle/input")
_MOUNTS = ("*", "notebooks/*/*", "datasets/*/*")
"""Where Kaggle mounts outputs: before, and today."""


def bring_earlier(grid: Grid, folder: Path, source: str | Path | None = None, *, inputs: Path = KAGGLE_INPUT,
                  say: Callable[[str], None] = print) -> int:
    """Copy the finished and started cells of an earlier session of this grid into its folder; returns how many.

    ``source`` is that grid's folder; without one, outputs that are attached to a Kaggle notebook are looked through, and only
    folders of a grid of this name are used. Cells that are here already and have got as far stay as they are.

    Raises
    ------
    GridError
        ``source`` holds no grid.
    """
    if source is not None and not (Path(source) / "grid.yaml").is_file():
        raise GridError(f"{source} holds no grid to continue from (no grid.yaml); name the folder that has the cells' folders")
    brought = 0
    if folder.is_dir():
        remove_half_copies(folder)
    for place in [Path(source)] if source is not None else list(_attached(grid.name, inputs)):
        if place.resolve() == folder.resolve():
            continue
        cells = [cell.id for cell in grid.cells if bring_cell(place / cell.id, folder / cell.id)]
        if cells:
            say(f"{len(cells)} cells of an earlier session copied from {place}: {', '.join(cells[:4])}"
                + (f" and {len(cells) - 4} more" if len(cells) > 4 else ""))
        brought += len(cells)
    return brought


def _attached(name: str, inputs: Path) -> Iterator[Path]:
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ and inputs == KAGGLE_INPUT:
        return
    for mount in _MOUNTS:
        for inside in (name, f"runs/{name}", "."):
            for record in sorted(inputs.glob(f"{mount}/{inside}/grid.yaml")):
                if (yaml.safe_load(record.read_text()) or {}).get("name") == name:
                    yield record.parent
