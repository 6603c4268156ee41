"""The notebook of one shard: ``grid.ipynb`` with its parameters, the grid's files and a GPU check inside.

Kaggle takes one file a kernel, so what the grid file and its bases say travels in a cell that writes them there.
"""

from __future__ import annotations

import ast
import os
import pprint
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat

from charmlib.grid.cells import find_notebooks
from charmlib.kaggle.errors import KaggleError
from charmlib.param_sources import find_file, read_yaml
from charmlib.params import nearest

FOLDER = "params"
"""Where the grid's files go in the session's working folder."""


def grid_files(grid: str | Path) -> tuple[str, dict[str, str]]:
    """The grid file's place on Kaggle, and the text of each file that it needs by place, laid out as they lie here: its
    bases, and theirs.

    Raises
    ------
    charmlib.params.ParameterError
        A file is not there or no YAML.
    KaggleError
        A base is named by a path of this machine.
    """
    path = find_file(grid).resolve()
    files, waiting = {}, [path]
    while waiting:
        file = waiting.pop(0)
        if file not in files:
            files[file] = None
            waiting += _bases(file)
    above = os.path.commonpath([file.parent for file in files])
    places = {file: f"{FOLDER}/{file.relative_to(above).as_posix()}" for file in files}
    return places[path], {places[file]: find_file(file).read_text() for file in files}


def _bases(file: Path) -> list[Path]:
    """Where a grid or parameter file looks for what it is based on, also when what is found there ships with charmlib."""
    content = read_yaml(file)
    entries = [content, *(entry for entry in content.get("cells") or [] if isinstance(entry, dict))]
    bases = [str(entry["base"]) for entry in entries if entry.get("base")]
    for base in bases:
        if Path(base).is_absolute():
            raise KaggleError(f"{file}: base {base} is a path of this machine; name it relative to the file")
    return [Path(os.path.normpath(file.parent / base)) for base in bases]


def shard_notebook(parameters: Mapping[str, Any], files: Mapping[str, str], *, gpu: bool = True,
                   notebooks: str | Path | None = None) -> nbformat.NotebookNode:
    """``grid.ipynb`` as Kaggle is to run it, without outputs.

    Raises
    ------
    KaggleError
        A parameter that the notebook does not declare: papermill would only warn, and the defaults would be trained.
    """
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    source = find_notebooks(notebooks) / "grid.ipynb"
    book = load_notebook_node(str(source))
    _refuse_undeclared(parameters, book, source)
    book = parameterize_notebook(book, dict(parameters))
    place = next(i for i, cell in enumerate(book.cells) if cell.cell_type == "code") + 1
    book.cells[place:place] = [_cell(_gpu_source(gpu)), _cell(_files_source(files))]
    for i, cell in enumerate(book.cells):
        cell.id = f"shard-{i:02}"
        cell.metadata.pop("papermill", None)
    del book.metadata["papermill"]
    nbformat.validate(book)
    return book


def _refuse_undeclared(parameters: Iterable[str], book: nbformat.NotebookNode, source: Path) -> None:
    # not by papermill's inspect_notebook (2.7), which overlooks a line whose comment holds brackets
    cell = next(cell for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    declared = [node.target.id for node in ast.parse(cell.source).body if isinstance(node, ast.AnnAssign)]
    for name in parameters:
        if name not in declared:
            raise KaggleError(f"{source} declares no parameter '{name}'.{nearest(name, declared)} "
                              f"It has {', '.join(declared)}.")


def _cell(source: str) -> nbformat.NotebookNode:
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata["tags"] = ["kaggle"]
    return cell


def _gpu_source(gpu: bool) -> str:
    return f"from charmlib.gpu_support import gpu_report\n\nprint(gpu_report(required={gpu}))"


def _files_source(files: Mapping[str, str]) -> str:
    return ("# the grid and what it is based on, as they were where this was pushed from\n"
            f"files = {pprint.pformat(dict(files), width=120, sort_dicts=False)}\n"
            "for name, text in files.items():\n"
            "    Path(name).parent.mkdir(parents=True, exist_ok=True)\n"
            "    Path(name).write_text(text)")
