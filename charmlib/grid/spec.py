"""Grid files: axes and extra cells over a base, checked before anything runs."""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from charmlib import param_sources
from charmlib.grid.sharing import training_of
from charmlib.param_sources import find_file, load_params, parse_assignments, parse_yaml, read_params, read_yaml
from charmlib.params import ParameterError, coerce, effective, missing_need, nearest, no_effect, resolve
from charmlib.training.recipes import phases, steps

KEYS = ("name", "base", "axes", "cells")
_SHORT = {"momentum": "m", "k": "k", "threshold": "t"}
_NAME = re.compile(r"[\w=+-](?:[\w.=+-]*[\w=+-])?")  # at most 255 bytes with what locks and temporary files add
# in any spelling, since some file systems hold A and a for the same; ids made from values ("csv=mine.csv") have a "="
_FILES = re.compile(r"[^=]*\.(csv|html|ipynb|json|npz|png|pt|safetensors|txt|yaml)|kaggle", re.IGNORECASE)


class Cell(NamedTuple):
    """One run: its id (and folder), all parameters but ``run_dir``, and the values of the axes it sets."""

    id: str
    params: dict[str, Any]
    axes: dict[str, Any]


class Grid(NamedTuple):
    """A grid file, expanded.

    ``axes`` are those of the file, then the parameters in which its extra cells differ; ``varied`` those given as lists;
    ``given`` the names that ``-p`` or the topmost file sets to one value.
    """

    name: str
    path: Path
    cells: tuple[Cell, ...]
    axes: tuple[str, ...] = ()
    varied: tuple[str, ...] = ()
    given: tuple[str, ...] = ()

    def shard(self, part: int, parts: int) -> Self:
        """The cells of every ``parts``-th training from the ``part``-th on (1-based), so that none is trained twice; with fewer
        trainings than parts, every ``parts``-th cell."""
        dealt = [training_of(cell.params) for cell in self.cells]
        if len({*dealt}) < parts:
            dealt = [cell.id for cell in self.cells]
        mine = {*list(dict.fromkeys(dealt))[part - 1::parts]}
        return self._replace(cells=tuple(cell for cell, key in zip(self.cells, dealt) if key in mine))


def parse_shard(text: str) -> tuple[int, int]:
    """``'2/3'`` as (2, 3); ParameterError for another form."""
    part, slash, parts = str(text).partition("/")
    if not (slash and part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise ParameterError(f"--shard {text!r}: wanted I/N such as 2/3, with 1 <= I <= N")
    return int(part), int(parts)


def cell_id(values: Mapping[str, Any]) -> str:
    """``m0.99_k5_t0.2`` for the three axes of CHARM, ``name=value`` for others, joined by ``_``."""
    texts = {name: re.sub(r"[^\w.+-]", "-", value).strip("-") if isinstance(value, str) else str(value)
             for name, value in values.items()}
    short = [f"{letter}{texts[name]}" for name, letter in _SHORT.items() if name in texts]
    return "_".join(short + [f"{name}={text}" for name, text in texts.items() if name not in _SHORT]) or "base"


def refuse_names(ids: Iterable[Any], source: str | Path) -> None:
    """Raise ParameterError for ids that cannot be cells' folders: paths, hidden or overlong names, names of files,
    and two that are one name on a file system without upper and lower case. Names the ``source``."""
    seen: dict[str, str] = {}
    for id_ in ids:
        text = str(id_)
        if not (isinstance(id_, str) and _NAME.fullmatch(text)) or _FILES.fullmatch(text) or len(text.encode()) > 200:
            raise ParameterError(f"{source}: the cell name {id_!r} cannot be a folder; use at most 200 letters, digits and . _ "
                                 "= + -, no . at either end, and no name of a file such as grid.yaml")
        if (other := seen.setdefault(unicodedata.normalize("NFKC", text).casefold(), text)) is not text:
            raise ParameterError(f"{source}: the cell names {other!r} and {id_!r} are one folder on some file systems; give "
                                 "one another name")


def load_grid(path: str | Path, assignments: Iterable[str] = ()) -> Grid:
    """Read a grid file and lay ``name=value`` assignments over it.

    An assignment to an axis pins it; a list in YAML form (``k=[2,3]``) replaces it, or the list of an entry of ``cells``.
    Every cell is resolved here, so an error in any of them is raised before the first one runs: a ParameterError that names the
    file, the key or cell, and the nearest valid name.
    """
    path = find_file(path)
    content = {"axes": None, "cells": None, "base": None, "name": None} | read_yaml(path)
    for key in content:
        if key not in KEYS:
            raise ParameterError(f"{path}: unknown key '{key}'.{nearest(key, KEYS)} A grid file has {', '.join(KEYS)}; "
                                 f"`python -m charmlib run {path}` runs a file of parameters.")
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
    refuse_names(unique, path)
    grid_name = str(content["name"] or path.stem.removeprefix("grid_"))
    if grid_name.startswith(".") or re.search(r"[/\\\0-\x1f]", grid_name):
        raise ParameterError(f"{path}: the name {grid_name!r} cannot be a folder; use letters, digits and . _ = + -")
    names = [name for cell in unique.values() for name in cell.axes
             if len({str(other.params[name]) for other in unique.values()}) > 1]
    varied = tuple(dict.fromkeys(name for name in (*axes, *in_entries) if name not in fixed))
    grid = Grid(grid_name, path, tuple(unique.values()),
                tuple(dict.fromkeys([*axes, *names])), varied,
                tuple(dict.fromkeys([*fixed, *(name for cell in unique.values() for name in cell.axes if name not in varied)])))
    refuse_dead_axes(grid)
    return grid


def refuse_dead_axes(grid: Grid, images: Mapping[str, Mapping[str, int]] | None = None) -> None:
    """Raise ParameterError for an axis that changes nothing in any cell; names it, and what would give it an effect.

    ``images`` (cell id -> numbers of training images, 'all' and 'findings') tells the steps of each cell.
    """
    acts = {cell.id: acting(cell, images and images[cell.id]) for cell in grid.cells}
    for name in grid.varied:
        cells = [cell for cell in grid.cells if name in cell.axes]
        alive = [cell for cell in cells if not missing_need(name, cell.params)]
        if not alive:
            raise ParameterError(f"{grid.path}: axis '{name}' has no effect in any cell; it needs "
                                 f"{missing_need(name, cells[0].params)}. Set that in the base, or remove the axis.")
        same = {acts[cell.id].get(name, cell.id) for cell in alive}
        if len(same) == 1 and len({cell.params[name] for cell in alive}) > 1:
            raise ParameterError(f"{grid.path}: all values of axis '{name}' amount to {same.pop():.5g} in every cell, so all "
                                 "runs would be the same. Choose smaller values, or more epochs.")


def acting(cell: Cell, images: Mapping[str, int] | None) -> dict[str, Any]:
    """The parameters of a cell as they act in its number of steps; see :func:`charmlib.params.effective`."""
    return effective(cell.params, steps(phases(cell.params), images) if images else None)


def remarks(grid: Grid, images: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What to know before a grid runs: given values without effect, in one line, and cells that are the same run."""
    needs = {name: [missing_need(name, cell.params) for cell in grid.cells if name in cell.axes] or
             [missing_need(name, cell.params) for cell in grid.cells] for name in grid.given}
    runs: dict[str, list[str]] = {}
    for cell in grid.cells:
        runs.setdefault(str(acting(cell, images[cell.id])), []).append(cell.id)
    twins = [" = ".join(ids) for ids in runs.values() if len(ids) > 1]
    return list(filter(None, [no_effect({name: each[0] if all(each) else "" for name, each in needs.items()}),
                              f"the same run: {'; '.join(twins)}" if twins else ""]))


def _assigned(assignments: Iterable[str]) -> tuple[dict[str, Any], dict[str, list]]:
    """Single values and lists of ``name=value`` assignments; the last one of a name counts."""
    fixed, lists = {}, {}
    for pair in assignments:
        name, _, text = (part.strip() for part in pair.partition("="))
        fixed.pop(name, None)
        if not text.startswith("["):
            fixed |= parse_assignments([pair])
            continue
        lists[name] = _values(name, parse_yaml(text, f"-p: {text!r}", "a YAML list"), f"-p {name}")
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
        cells.append(Cell(id_, _resolved(below, values | chosen, fixed, sources=(str(base), str(path), "-p")), values | chosen))
    return cells


def read_cell(path: str | Path, assignments: Iterable[str] = (), id_: str = "") -> Cell:
    """A parameter file with assignments as a cell; raises ParameterError as :func:`charmlib.params.resolve`."""
    (own, below), fixed = read_params(path), parse_assignments(assignments)
    return Cell(id_, _resolved({**below, **own}, fixed, sources=(str(path), "-p")), own | fixed)


def _resolved(*layers: Mapping, sources: tuple[str, ...]) -> dict[str, Any]:
    params = resolve(*layers, sources=sources)
    param_sources.with_absolute_paths(params)  # refuses missing files
    phases(params)  # refuses parameters that would train nothing
    del params["run_dir"]
    return params


def _values(name: str, values: Any, source: str) -> list:
    if not isinstance(values, list) or not values:
        raise ParameterError(f"{source}: axis '{name}' is {values!r}, wanted a list such as [0.1, 0.2].")
    out = [coerce(name, value, source) for value in values]
    if len(set(out)) != len(out):
        raise ParameterError(f"{source}: axis '{name}' has a value twice: {values}.")
    return out
