"""Where parameters come from: YAML files, the command line's assignments, and a notebook's parameters cell."""

import ast
import itertools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from charmlib.params import DEFAULTS, PARAMS, ParameterError, coerce, nearest


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # libyaml, where it is, is ten times as fast
    """Plain YAML in which each key of a mapping stands once."""

    def construct_mapping(self, node, deep=False):
        seen = {}
        for key, _ in node.value:
            if isinstance(key.value, str) and seen.setdefault(key.value, key) is not key:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice: in line "
                                                        f"{seen[key.value].start_mark.line + 1} and line "
                                                        f"{key.start_mark.line + 1}; keep one")
        return super().construct_mapping(node, deep)


_LARGEST = 100_000  # characters that a file may gain by its aliases


def parse_yaml(text: str | bytes, source: str, what: str = "valid YAML") -> Any:
    """YAML text, such as '[2, 3]', as plain Python values; ParameterError names the ``source`` if it is none, if a key stands
    twice, or if aliases make it much larger than it is."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _size(node, {}) > 2 * len(text) + _LARGEST:
            raise ValueError(f"its aliases (*name) stand for more than {_LARGEST:,} characters; write the values out")
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # yaml ends in errors of many classes on odd scalars
        raise ParameterError(f"{source} is not {what}: {error}") from error


def _size(node: yaml.Node, sizes: dict[int, float]) -> float:
    """Nodes, and characters of their scalars, with each alias written out; infinite for a node that holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = math.inf
        parts = [node.value] if isinstance(node.value, str) else itertools.chain(*node.value) \
            if isinstance(node, yaml.MappingNode) else node.value
        sizes[id(node)] = 1 + sum(len(part) if isinstance(part, str) else _size(part, sizes) for part in parts)
    return sizes[id(node)]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dict, empty for an empty file; ParameterError, naming the file, if it is missing or no mapping."""
    path = find_file(path)
    if path.is_dir():
        raise ParameterError(f"{path} is a folder; name a YAML file")
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ParameterError(f"no file {path}.{nearest(path.name, there)}")
    content = path.read_bytes()
    try:
        content = parse_yaml(content.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ParameterError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParameterError(f"{path}: wanted 'name: value' lines, found {type(content).__name__}.")
    return content


def find_file(path: str | Path) -> Path:
    """``path`` if it is there, else the file of that name that ships with charmlib (``params/charm.yaml`` anywhere)."""
    path = Path(path)
    parts = path.parts[path.parts.index("params") + 1:] if "params" in path.parts else path.parts
    package = Path(__file__).parent
    shipped = (folder.joinpath(*parts) for folder in (package.parent / "params", package / "shipped" / "params"))
    return next((file for file in (path, *shipped) if file.is_file()), path)


def load_params(path: str | Path) -> dict[str, Any]:
    """What a parameter file and its bases set; see :func:`read_params`."""
    own, below = read_params(path)
    return {**below, **own}


def read_params(path: str | Path, *, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter file, coerced: what it sets itself, and what its ``base`` (a file beside it, which may have one too) sets.

    Raises ParameterError as :func:`read_yaml` and :func:`coerce`, and for files that are each other's base.
    """
    path = find_file(path)
    content = read_yaml(path)
    if grid := sorted({"axes", "cells"} & content.keys()):
        raise ParameterError(f"{path} is a grid file (it has {' and '.join(grid)}), no file of parameters: "
                             f"`python -m charmlib grid run {path}` runs it")
    base = content.pop("base", None)
    own = {name: coerce(name, value, str(path)) for name, value in content.items()}
    if base is None:
        return own, {}
    if not isinstance(base, str):
        raise ParameterError(f"{path}: base is {base!r}, wanted the name of a file beside it.")
    chain = (*above, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ParameterError(f"{path}: its base {base} is based on this file itself.")
    theirs, below = read_params(path.parent / base, above=chain)
    return own, {**below, **theirs}


def parse_assignments(pairs, source: str = "-p") -> dict[str, Any]:
    """``['k=3', 'weights=none']`` as checked parameters; ParameterError for a pair without ``=``, or as :func:`coerce`."""
    out = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise ParameterError(f"{source} {pair!r}: wanted name=value.")
        out[name.strip()] = coerce(name.strip(), value.strip(), source)
    return out


def cell_source(names: Iterable[str] | None = None) -> str:
    """The text of a notebook's ``parameters`` cell: one typed line a parameter, grouped, with its meaning.

    By default those that the train notebook shows, and ``options`` for all others. Comments hold neither brackets nor '=',
    which papermill's own reading of the cell overlooks.
    """
    lines, group = [], None
    for p in (PARAMS[name] for name in names or [name for name, p in PARAMS.items() if p.shown]):
        if p.group != group:
            lines.append(("" if group is None else "\n") + f"# {p.group}")
            group = p.group
        allowed = f": {', '.join(map(str, p.choices))}{f', {p.also}' if p.also else ''}" if p.choices else ""
        lines.append(f"{p.name}: {p.type.__name__} = {p.default!r}  # {p.reason}{allowed}")
    if names is None:
        lines.append("options: dict = {}  # any other parameter by name; `python -m charmlib params` lists them")
    return "\n".join(lines)


def from_notebook(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a notebook's namespace sets, ``options`` included, checked.

    ``options`` may also be text in YAML form, as ``papermill -p options "{k: 3}"`` gives it. Raises ParameterError, naming the
    nearest one, for a name in ``options``, in the parameters cell or given by papermill that is no parameter.
    """
    options = namespace.get("options", {})
    if isinstance(options, str):
        options = parse_yaml(options, "options") or {}
    if not isinstance(options, dict):
        raise ParameterError(f"options is {options!r}, wanted a dict such as {{'use_bank': False}}")
    injected = set().union(*(given for _, given in _injected(namespace)))
    for name in sorted(injected | set(namespace.get("__annotations__", ()))):
        if name not in PARAMS and name != "options":
            coerce(name, None, "notebook")
    shown = {name: namespace[name] for name in PARAMS if name in namespace}
    return {name: coerce(name, value, "notebook") for name, value in {**shown, **options}.items()}


def _injected(namespace: Mapping[str, Any]) -> list[tuple[list[str], set[str]]]:
    """For each cell that papermill added: the names in the parameters cell before it, and the names that it sets."""
    cells = list(namespace.get("In", []))
    return [([node.target.id for node in ast.walk(ast.parse(before)) if isinstance(node, ast.AnnAssign)],
             {node.id for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)})
            for before, cell in zip(["", *cells], cells) if cell.lstrip().startswith("# Parameters\n")]


def refuse_unknown(namespace: Mapping[str, Any]) -> None:
    """Refuse a name given by papermill that the notebook's own ``parameters`` cell lacks, where it would have no effect.

    The ParameterError names the nearest one and all that the notebook takes.
    """
    for takes, given in _injected(namespace):
        if set(takes) <= set(namespace.get("__annotations__", ())):  # else of the notebook that ran before in this kernel
            for name in sorted(given - set(takes)):
                raise ParameterError(f"unknown parameter '{name}' (notebook).{nearest(name, takes)} This notebook takes "
                                     f"{', '.join(takes)}.")


def changed(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters whose value is not the declared default."""
    return {name: value for name, value in params.items() if value != DEFAULTS.get(name)}


def with_absolute_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the files and folders that they name as absolute paths, ``~`` expanded.

    Raises ParameterError for a weight file, a list or a folder of lists that is not there.
    """
    out = dict(params)
    for name, words in (("weights", ("imagenet", "none")), ("split", ("official", "patient")), ("never_test", ("",))):
        if out[name] not in words and not (name == "split" and out[name].startswith("fold:")):
            path = Path(out[name]).expanduser()
            if not path.exists():
                wanted = ", ".join([*filter(None, words), "an existing path"])
                raise ParameterError(f"parameter '{name}': nothing at {path}; wanted {wanted}.")
            out[name] = str(path.resolve())
    for name in ("csv", "cache_dir", "run_dir"):
        path = Path(out.get(name) or "").expanduser()
        if out.get(name) and (name != "csv" or path.exists()):  # a csv may also be relative to data_root
            out[name] = str(path.resolve())
    return out
