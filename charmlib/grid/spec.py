"""Grid files: axes and extra cells over a base, checked before anything runs."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml

from charmlib.params import (
    ParameterError,
    coerce,
    find_file,
    load_params,
    nearest,
    parse_assignments,
    read_yaml,
    resolve,
    with_absolute_paths,
)

KEYS = ("name", "base", "axes", "cells")
_SHORT = {"momentum": "m", "k": "k", "threshold": "t"}


@dataclass(frozen=True)
class Cell:
    """One run: its id (and folder), all parameters but ``run_dir``, and the values of the axes it sets."""

    id: str
    params: dict[str, Any]
    axes: dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """A grid file, expanded. ``axes`` are those of the file, then the parameters in which its extra cells differ."""

    name: str
    path: Path
    cells: tuple[Cell, ...]
    axes: tuple[str, ...] = ()

    def shard(self, part: int, parts: int) -> Self:
        """Every ``parts``-th cell from the ``part``-th on (1-based): shards of about equal length."""
        return replace(self, cells=self.cells[part - 1::parts])


def parse_shard(text: str) -> tuple[int, int]:
    """``'2/3'`` as (2, 3); ParameterError for another form."""
    part, slash, parts = str(text).partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ParameterError(f"--shard {text!r}: wanted I/N such as 2/3, with 1 <= I <= N")
    return int(part), int(parts)


def cell_id(values: Mapping[str, Any]) -> str:
    """``m0.99_k5_t0.2`` for the three axes of CHARM, ``name=value`` for others, joined by ``_``."""
    texts = {name: re.sub(r"[^\w.+-]", "-", str(value)).strip("-") for name, value in values.items()}
    short = [f"{letter}{texts[name]}" for name, letter in _SHORT.items() if name in texts]
    return "_".join(short + [f"{name}={text}" for name, text in texts.items() if name not in _SHORT]) or "base"


def load_grid(path: str | Path, assignments: Iterable[str] = ()) -> Grid:
    """Read a grid file and lay ``name=value`` assignments over it.

    An assignment to an axis pins it; a list in YAML form (``k=[2,3]``) replaces it, or the list of an entry of ``cells``.
    Every cell is resolved here, so an error in any of them is raised before the first one runs.

    Raises
    ------
    ParameterError
        Names the file, the key or cell, and the nearest valid name.
    """
    path = find_file(path)
    content = {"axes": None, "cells": None, "base": None, "name": None} | read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise ParameterError(f"{path}: unknown key '{key}'.{nearest(key, KEYS)} A grid file has {', '.join(KEYS)}.")
    axes, entries = content["axes"] or {}, content["cells"] or []
    if not isinstance(axes, dict):
        raise ParameterError(f"{path}: axes must be 'name: [values]' lines, found {axes!r}.")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ParameterError(f"{path}: cells[{i}] is {entry!r}, wanted a mapping of parameters.")
    axes = {name: _values(name, values, f"{path}: axes") for name, values in axes.items()}
    fixed, lists = _assigned(assignments)
    in_entries = {name for entry in entries for name, value in entry.items() if isinstance(value, list)} - axes.keys()
    axes |= {name: values for name, values in lists.items() if name not in in_entries}
    if "run_dir" in fixed or "run_dir" in axes:
        raise ParameterError("run_dir cannot be set for a grid: each cell has its own folder. Use --out.")
    cells = _cells(axes, f"{path}: axes", content["base"], path, fixed, {}) if axes else []
    for i, entry in enumerate(entries):
        cells += _cells(entry, f"{path}: cells[{i}]", content["base"], path, fixed, lists)
    if not cells:
        raise ParameterError(f"{path}: neither axes nor cells; nothing to run.")
    unique: dict[str, Cell] = {}
    for cell in cells:
        if unique.setdefault(cell.id, cell).params != cell.params:
            raise ParameterError(f"{path}: two different cells would be called '{cell.id}'; give one of them a name.")
    names = [name for cell in unique.values() for name in cell.axes
             if len({str(other.params[name]) for other in unique.values()}) > 1]
    return Grid(str(content["name"] or path.stem.removeprefix("grid_")), path, tuple(unique.values()),
                tuple(dict.fromkeys([*axes, *names])))


def _assigned(assignments: Iterable[str]) -> tuple[dict[str, Any], dict[str, list]]:
    """Single values and lists of ``name=value`` assignments; the last one of a name counts."""
    fixed, lists = {}, {}
    for pair in assignments:
        name, _, text = (part.strip() for part in pair.partition("="))
        fixed.pop(name, None)
        if not text.startswith("["):
            fixed |= parse_assignments([pair])
            continue
        try:
            lists[name] = _values(name, yaml.safe_load(text), f"-p {name}")
        except yaml.YAMLError as error:
            raise ParameterError(f"-p: {text!r} is not a YAML list: {error}") from error
    return fixed, lists


def _cells(entry: Mapping, source: str, base: str | None, path: Path, fixed: Mapping, lists: Mapping) -> list[Cell]:
    """The cells of the axes or of one entry: one for each combination of its lists."""
    name, base = entry.get("name"), entry.get("base", base)
    values, own = {}, {}
    for key, value in entry.items():
        if key in fixed:
            values[key] = fixed[key]
        elif isinstance(value, list):
            own[key] = values[key] = lists.get(key) or _values(key, value, source)
        elif key not in ("name", "base"):
            values[key] = coerce(key, value, source)
    below = load_params(path.parent / base) if base else {}
    cells = []
    for combination in itertools.product(*own.values()):
        chosen = dict(zip(own, combination))
        id_ = cell_id(values | chosen) if name is None else f"{name}_{cell_id(chosen)}" if own else str(name)
        if not re.fullmatch(r"[\w.=+-]+", id_):
            raise ParameterError(f"{path}: the cell name {name!r} cannot be a folder; use letters, digits and . _ = + -")
        cells.append(Cell(id_, _resolved(below, values | chosen, fixed, sources=(str(base), str(path), "-p")), values | chosen))
    return cells


def read_cell(path: str | Path, assignments: Iterable[str] = (), id_: str = "") -> Cell:
    """A parameter file with assignments as a cell without axes; raises ParameterError as :func:`charmlib.params.resolve`."""
    return Cell(id_, _resolved(load_params(path), parse_assignments(assignments), sources=(str(path), "-p")), {})


def _resolved(*layers: Mapping, sources: tuple[str, ...]) -> dict[str, Any]:
    params = resolve(*layers, sources=sources)
    with_absolute_paths(params)  # refuses missing files
    del params["run_dir"]
    return params


def _values(name: str, values: Any, source: str) -> list:
    if not isinstance(values, list) or not values:
        raise ParameterError(f"{source}: axis '{name}' is {values!r}, wanted a list such as [0.1, 0.2].")
    out = [coerce(name, value, source) for value in values]
    if len(set(out)) != len(out):
        raise ParameterError(f"{source}: axis '{name}' has a value twice: {values}.")
    return out
