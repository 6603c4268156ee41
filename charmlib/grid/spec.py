"""Grid files: axes and extra cells over a base, checked before anything runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from charmlib.param_sources import find_file, load_params, read_yaml
from charmlib.params import ParameterError, coerce, nearest, resolve, with_absolute_paths

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
    """A grid file, expanded. ``axes`` are those of the file, then what else its extra cells set differently."""

    name: str
    path: Path
    cells: tuple[Cell, ...]
    axes: tuple[str, ...]

    def shard(self, part: int, parts: int) -> Grid:
        """Every ``parts``-th cell from the ``part``-th on (1-based): shards of about equal length."""
        return Grid(self.name, self.path, self.cells[part - 1::parts], self.axes)


def parse_shard(text: str) -> tuple[int, int]:
    """``'2/3'`` as (2, 3).

    Raises
    ------
    ParameterError
        It is something else.
    """
    part, slash, parts = str(text).partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ParameterError(f"--shard {text!r}: wanted I/N such as 2/3, with 1 <= I <= N")
    return int(part), int(parts)


def cell_id(values: Mapping[str, Any]) -> str:
    """``m0.99_k5_t0.2`` for the three axes of CHARM, ``name=value`` for others, joined by ``_``."""
    short = [f"{letter}{_text(values[name])}" for name, letter in _SHORT.items() if name in values]
    long = [f"{name}={_text(value)}" for name, value in values.items() if name not in _SHORT]
    return "_".join(short + long) or "base"


def _text(value: Any) -> str:
    return re.sub(r"[^\w.+-]", "-", str(value)).strip("-")


def load_grid(path: str | Path, assignments: Iterable[str] = ()) -> Grid:
    """Read a grid file and lay ``name=value`` assignments over it.

    An assignment to an axis pins it; a list in YAML form (``k=[2,3]``) replaces it, or the list of an entry of ``cells``.
    Every cell is resolved here, so whatever is wrong with any of them is an error before the first one runs.

    Raises
    ------
    ParameterError
        Names the file, the key or cell, and the nearest valid name.
    """
    path = find_file(path)
    content = read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise ParameterError(f"{path}: unknown key '{key}'.{nearest(key, KEYS)} A grid file has {', '.join(KEYS)}.")
    axes = _axes(content.get("axes") or {}, path)
    entries = content.get("cells") or []
    listed = {name for entry in entries if isinstance(entry, dict) for name, value in entry.items() if isinstance(value, list)}
    fixed: dict[str, Any] = {}
    replaced: dict[str, list] = {}
    for pair in assignments:
        name, eq, text = pair.partition("=")
        if not eq:
            raise ParameterError(f"-p {pair!r}: wanted name=value.")
        name, values = name.strip(), _list_or_none(text)
        if values is not None:
            (replaced if name in listed and name not in axes else axes)[name] = _values(name, values, f"-p {name}")
            fixed.pop(name, None)
            continue
        fixed[name] = coerce(name, text.strip(), "-p")
        if name in axes:
            axes[name] = [fixed[name]]
    if "run_dir" in fixed or "run_dir" in axes:
        raise ParameterError("run_dir cannot be set for a grid: each cell has its own folder. Use --out.")
    cells = [_cell({}, dict(zip(axes, combination)), fixed, content.get("base"), path)
             for combination in itertools.product(*axes.values())] if axes else []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ParameterError(f"{path}: cells[{i}] is {entry!r}, wanted a mapping of parameters.")
        values = {k: v for k, v in entry.items() if k not in ("name", "base")}
        own = {k: replaced.get(k) or _values(k, v, f"{path}: cells[{i}]") for k, v in values.items()
               if isinstance(v, list) and k not in fixed}
        values = {k: fixed[k] if k in fixed else v if k in own else coerce(k, v, f"{path}: cells[{i}]")
                  for k, v in values.items()}
        for combination in itertools.product(*own.values()):  # an entry with lists is one cell for each combination
            chosen = dict(zip(own, combination))
            named = {**entry, "name": f"{entry['name']}_{cell_id(chosen)}"} if own and "name" in entry else entry
            cells.append(_cell(named, values | chosen, fixed, entry.get("base", content.get("base")), path))
    if not cells:
        raise ParameterError(f"{path}: neither axes nor cells; nothing to run.")
    unique: dict[str, Cell] = {}
    for cell in cells:
        other = unique.setdefault(cell.id, cell)
        if other.params != cell.params:
            raise ParameterError(f"{path}: two different cells would be called '{cell.id}'; give one of them a name.")
    names = list(axes)
    for name in dict.fromkeys(a for cell in unique.values() for a in cell.axes if a not in axes):
        if len({str(cell.params[name]) for cell in unique.values()}) > 1:
            names.append(name)
    return Grid(str(content.get("name") or path.stem.removeprefix("grid_")), path, tuple(unique.values()),
                tuple(dict.fromkeys(names)))


def _cell(entry, values, fixed, base, path: Path) -> Cell:
    below = load_params(path.parent / base) if base else {}
    params = resolve(below, values, fixed, sources=(str(base), str(path), "-p"))
    with_absolute_paths(params)  # refuses what is not there
    name = entry.get("name")
    if name is not None and not re.fullmatch(r"[\w.=+-]+", str(name)):
        raise ParameterError(f"{path}: the cell name {name!r} cannot be a folder; use letters, digits and . _ = + -")
    del params["run_dir"]
    return Cell(str(name or cell_id(values)), params, dict(values))


def _axes(axes: Any, path: Path) -> dict[str, list]:
    if not isinstance(axes, dict):
        raise ParameterError(f"{path}: axes must be 'name: [values]' lines, found {axes!r}.")
    return {name: _values(name, values, f"{path}: axes") for name, values in axes.items()}


def _values(name: str, values: Any, source: str) -> list:
    if not isinstance(values, list) or not values:
        raise ParameterError(f"{source}: axis '{name}' is {values!r}, wanted a list such as [0.1, 0.2].")
    out = [coerce(name, value, source) for value in values]
    if len(set(out)) != len(out):
        raise ParameterError(f"{source}: axis '{name}' has a value twice: {values}.")
    return out


def _list_or_none(text: str) -> list | None:
    if not text.strip().startswith("["):
        return None
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ParameterError(f"-p: {text!r} is not a YAML list: {error}") from error
    return value if isinstance(value, list) else None
