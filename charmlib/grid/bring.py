"""Cells brought from elsewhere: an earlier session's output, shards of machines that share no folder."""

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pandas as pd

from charmlib.data.dataset import LABELS, PICTURES, WEIGHTS
from charmlib.files import LEASE, remove_temporaries, sync, write_text, write_whole
from charmlib.grid import lease
from charmlib.grid.board import leaderboard, read_record, record_text
from charmlib.grid.cells import CellFolder, GridError
from charmlib.grid.report import write_report
from charmlib.grid.spec import Grid, refuse_names
from charmlib.param_sources import read_yaml
from charmlib.params import READING, changes

KAGGLE_INPUT = Path("/kaggle/input")
_MOUNTS = ("*", "notebooks/*/*", "datasets/*/*")  # where Kaggle mounts outputs: before, and today
# for copies in the making, one folder deeper than any reader looks; seconds after which one counts as killed without locks
_HALF, _OLD = ".half", 600.0
# cells that agree in these have the same split, labels, pictures and weights, or were made from other data
_DATA = (*READING, "labels", "split", "never_test", "valid_fraction", "limit")
_OF = {"split": _DATA, LABELS: _DATA, PICTURES: (*_DATA, "image_size", "aspect", "contrast"), WEIGHTS: ("weights",)}


def bring_cell(source: Path, target: Path) -> bool:
    """Copy the folder of a finished or started cell if it has got further than the target; returns whether it was copied.

    The copy appears whole or not at all, and is writable where the source is read-only. Raises GridError if a process works on
    the target, and for symbolic links in either, which may lead anywhere.
    """
    refuse_links(source)
    refuse_links(target)
    if _progress(source) <= _progress(target):
        return False
    with _aside(target.parent) as place:
        half = place / "new"
        half.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.startswith(LEASE) and file != CellFolder(source).alive_file:
                shutil.copyfile(file, half / file.name, follow_symlinks=False)
                sync(half / file.name)
        sync(half)
        with lease.alone(target):
            refuse_at_work(target)
            if _progress(source) <= _progress(target):
                return False
            with suppress(FileNotFoundError):
                target.rename(place / "old")
            half.rename(target)
    sync(target.parent)
    return True


@contextmanager
def _aside(folder: Path) -> Iterator[Path]:
    """A new hidden folder below ``folder`` for copies in the making and for what is to be removed.

    One process at a time has it, so all that lies there before is left from a killed one, and removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / _HALF
    with lease.alone(aside) as sure:
        if aside.is_symlink():
            aside.unlink()
        for left in aside.glob("*"):
            if sure or time.time() - left.stat().st_mtime > _OLD:
                shutil.rmtree(left, ignore_errors=True)
        place = aside / uuid.uuid4().hex[:8]
        place.mkdir(parents=True)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            with suppress(OSError):  # another's, without locks
                aside.rmdir()


def refuse_links(folder: Path) -> None:
    """Raise GridError for a cell's folder that is or holds a symbolic link: what is written there would land elsewhere."""
    links = [folder] if folder.is_symlink() else [file for file in folder.glob("*") if file.is_symlink()]
    if links:
        raise GridError(f"{links[0]} is a symbolic link to {os.readlink(links[0])}: a cell's folder holds plain files; put "
                        "what it leads to in its place if you trust it")


def _progress(folder: Path) -> float:
    """Epochs of a cell, infinity when it is done, -1 where there is nothing to resume."""
    cell = CellFolder(folder)
    return float("inf") if cell.done else cell.progress if cell.resumable else -1


def remove_cell(folder: Path) -> None:
    """Remove a cell's folder, whole at once, for it to run again; raises GridError if a process works on it."""
    with _aside(folder.parent) as place, lease.alone(folder), suppress(FileNotFoundError):
        refuse_at_work(folder)
        folder.rename(place / "old")


def refuse_at_work(folder: Path) -> None:
    """Raise GridError, naming the process, if a living one works on a cell."""
    if words := lease.holder(folder):
        raise GridError(f"{folder} is being worked on by {words}: wait for its end, or stop it")


def bring_earlier(grid: Grid, folder: Path, source: str | Path | None = None, *, inputs: Path = KAGGLE_INPUT,
                  say: Callable[[str], None] = print) -> int:
    """Copy the finished and started cells of an earlier session of this grid into its folder; returns how many.

    ``source`` is that grid's folder (GridError if it holds none); without one, the outputs attached to a Kaggle notebook are
    searched for grids of this name. Cells that have got as far here stay as they are.
    """
    if source is not None and not (Path(source) / "grid.yaml").is_file():
        raise GridError(f"{source} holds no grid to continue from (no grid.yaml); name the folder that has the cells' folders")
    brought = 0
    with _aside(folder):  # removes what killed copies left
        pass
    for place in _attached(grid.name, inputs) if source is None else [Path(source)]:
        here = place.resolve() == folder.resolve()
        cells = [cell.id for cell in grid.cells if not here and bring_cell(place / cell.id, folder / cell.id)]
        brought += len(cells)
        if cells:
            say(f"{len(cells)} cells of an earlier session copied from {place}: {', '.join(cells[:4])}"
                + (f" and {len(cells) - 4} more" if len(cells) > 4 else ""))
    return brought


def _attached(name: str, inputs: Path) -> Iterator[Path]:
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ or inputs != KAGGLE_INPUT:
        for pattern in (f"{mount}/{inside}/grid.yaml" for mount in _MOUNTS for inside in (name, f"runs/{name}", ".")):
            yield from (record.parent for record in sorted(inputs.glob(pattern))
                        if read_yaml(record).get("name") == name)


def merge_grids(out: str | Path, folders: Sequence[str | Path], *, say: Callable[[str], None] = print) -> pd.DataFrame:
    """Put the cells of several folders of one grid into ``out``, with its leaderboard and report; returns the leaderboard.

    Of a cell in several folders, the one that has got furthest is taken; ``out`` may hold cells already. The folders stay as
    they are.

    Raises GridError for a folder that holds no grid, if a process works on a cell, and if the folders differ in the parameters
    of a cell, in a split, in the notebooks or in versions: says where.
    """
    out = Path(out).expanduser().resolve()
    places = [place for folder in folders if (place := Path(folder).expanduser().resolve()) != out]
    records = {place: read_record(place) for place in ([out] if (out / "grid.yaml").is_file() else []) + places}
    together = _one_record(records)
    _refuse_mixture(records)
    with _aside(out):  # as above
        remove_temporaries(out)
    write_text(out / "grid.yaml", record_text(together))  # first: a killed merge is known for what it is
    for place in places:
        for split in place.glob("split*.csv"):
            if split.is_file() and not split.is_symlink():
                write_whole(out / split.name, lambda temporary, split=split: shutil.copyfile(split, temporary))
        brought = sum(bring_cell(place / cell["id"], out / cell["id"]) for cell in together["cells"])
        say(f"{brought} cells from {place}")
    board = leaderboard(out)
    write_report(out, board)
    return board


def _one_record(records: dict[Path, dict]) -> dict:
    """The grid that all folders are parts of; raises GridError where they differ in axes or parameters."""
    (first_place, first), *others = records.items()
    cells = {cell["id"]: cell for cell in first["cells"]}
    for place, record in others:
        if record["axes"] != first["axes"]:
            raise GridError(f"{place} is a grid over {', '.join(record['axes'])}, {first_place} one over "
                            f"{', '.join(first['axes'])}: not parts of one grid")
        for cell in record["cells"]:
            ours, theirs = cells.setdefault(cell["id"], cell)["params"], cell["params"]
            for name in changes(theirs, ours):
                raise GridError(f"cell {cell['id']} has {name} {theirs[name]!r} in {place} and {ours[name]!r} in "
                                f"{first_place}: their scores do not belong on one leaderboard")
    refuse_names(cells, " and ".join(map(str, records)))
    return {**first, "cells": list(cells.values())}


def _refuse_mixture(records: dict[Path, dict]) -> None:
    """Refuse cells that were made with other data, code or versions than others of the same parameters."""
    seen: dict[tuple, tuple[str, str]] = {}
    for place, cell in ((place, cell) for place, record in records.items() for cell in record["cells"]):
        refuse_at_work(place / cell["id"])
        for name, value in CellFolder(place / cell["id"]).made_with.items():
            where, roots = f"of {cell['id']} in {place}", {"data_root"} & {*records[place]["axes"]}
            decides = (str(cell["params"][param]) for param in (*_OF[name], *roots)) if name in _OF else ()
            known, first = seen.setdefault((name, *decides), (value, where))
            if known != value:
                raise GridError(f"the {name} differs: {known} {first}, {value} {where}. Their scores do not belong on one "
                                "leaderboard; run the differing cells again.")
