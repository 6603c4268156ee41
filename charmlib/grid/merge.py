"""One grid of several folders: shards of machines that do not see each other, rounds of sessions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_text, write_whole
from charmlib.grid.board import leaderboard
from charmlib.grid.cells import GridError, cell_status, read_identity
from charmlib.grid.folders import bring_cell, refuse_at_work, remove_half_copies
from charmlib.grid.report import write_report
from charmlib.params import UNHASHED

_DATA = ("classes", "csv", "labels", "split", "valid_fraction", "limit")
"""Cells that agree in these have the same split, or were made from other data."""
_VERSIONS = ("charmlib", "torch", "torchvision", "fastai")


def merge_grids(out: str | Path, folders: Sequence[str | Path], *, say: Callable[[str], None] = print) -> pd.DataFrame:
    """Put the cells of several folders of one grid into ``out``, with its leaderboard and report; returns the leaderboard.

    Of a cell that is in several folders, the one that has got furthest is taken; ``out`` itself may hold some already. The
    folders stay as they are.

    Raises
    ------
    GridError
        A folder holds no grid, or a cell is being worked on; the folders differ in the parameters of a cell, in a split, in the
        notebooks or in versions: says where.
    """
    out = Path(out).expanduser().resolve()
    sources = [Path(f).expanduser().resolve() for f in folders]
    places = [*([out] if (out / "grid.yaml").is_file() else []), *(s for s in sources if s != out)]
    records = {place: _record(place) for place in places}
    together = _one_record(records)
    _refuse_mixture([stamp for place in places for stamp in _stamps(place, records[place])])
    out.mkdir(parents=True, exist_ok=True)
    remove_half_copies(out)
    for place in places:
        if place == out:
            continue
        for split in place.glob("split*.csv"):
            write_whole(out / split.name, lambda temporary, split=split: shutil.copyfile(split, temporary))
        brought = [c["id"] for c in together["cells"] if bring_cell(place / c["id"], out / c["id"])]
        say(f"{len(brought)} cells from {place}")
    write_text(out / "grid.yaml", yaml.safe_dump(together, sort_keys=False))
    board = leaderboard(out)
    write_report(out, board)
    return board


@dataclass(frozen=True)
class _Stamp:
    """What a finished or started cell was made with."""

    place: Path
    cell: str
    data: tuple
    split: str
    code: str
    versions: dict[str, str]


def _record(place: Path) -> dict:
    if not (place / "grid.yaml").is_file():
        raise GridError(f"{place} holds no grid (no grid.yaml); name the folders that `grid run` wrote")
    return yaml.safe_load((place / "grid.yaml").read_text())


def _one_record(records: dict[Path, dict]) -> dict:
    """The grid that all folders are parts of."""
    (first_place, first), *others = records.items()
    cells = {c["id"]: c for c in first["cells"]}
    for place, record in others:
        if record["axes"] != first["axes"]:
            raise GridError(f"{place} is a grid over {', '.join(record['axes'])}, {first_place} one over "
                            f"{', '.join(first['axes'])}: not parts of one grid")
        for cell in record["cells"]:
            known = cells.setdefault(cell["id"], cell)["params"]
            for name in known.keys() | cell["params"].keys():
                if name not in UNHASHED and known.get(name) != cell["params"].get(name):
                    raise GridError(f"cell {cell['id']} has {name} {cell['params'].get(name)!r} in {place} and "
                                    f"{known.get(name)!r} in {first_place}: their scores do not belong on one leaderboard")
    return {**first, "cells": list(cells.values())}


def _stamps(place: Path, record: dict):
    for cell in record["cells"]:
        folder = place / cell["id"]
        refuse_at_work(folder)
        data = tuple(str(cell["params"].get(name)) for name in _DATA)
        if cell_status(folder) == "done":
            m = RunFolder(folder).metrics
            yield _Stamp(place, cell["id"], data, m["split"]["hash"], m.get("code") or "",
                         {name: m["versions"][name] for name in _VERSIONS})
        elif known := read_identity(folder):
            yield _Stamp(place, cell["id"], data, known.get("split", ""), known.get("code", ""),
                         {"charmlib": known.get("charmlib", "")})


def _refuse_mixture(stamps: list[_Stamp]) -> None:
    splits: dict[tuple, _Stamp] = {}
    versions: dict[str, _Stamp] = {}
    for stamp in stamps:
        first = stamps[0]
        other = splits.setdefault(stamp.data, stamp)
        if other.split != stamp.split:
            _refuse("the split", other, other.split, stamp, stamp.split)
        if first.code != stamp.code:
            _refuse("the notebooks' code", first, first.code, stamp, stamp.code)
        for name, theirs in stamp.versions.items():
            known = versions.setdefault(name, stamp)
            if known.versions[name] != theirs:
                _refuse(f"the version of {name}", known, known.versions[name], stamp, theirs)


def _refuse(what: str, one: _Stamp, value: str, other: _Stamp, theirs: str) -> None:
    raise GridError(f"{what} differs: {value} of {one.cell} in {one.place}, {theirs} of {other.cell} in {other.place}. Their "
                    "scores do not belong on one leaderboard; run the odd ones again.")
