"""What is pushed: its names, ``kernel-metadata.json``, and a notebook with parameters and files inside.

Kaggle takes one file a kernel, so what the grid file and its bases say travels in a cell that writes them there.
"""

import os
import pprint
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import nbformat
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from charmlib.grid.cells import declared, find_notebooks
from charmlib.param_sources import find_file, read_yaml
from charmlib.params import nearest
from kaggle_setup.client import KaggleError

CODE_FILE = "notebook.ipynb"
T4, NO_GPU = "NvidiaTeslaT4", "none"  # two T4; there is no single one, and a request for a P100 gets these as well


def slug_of(title: str) -> str:
    """The name in the address that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def id_of(user: str, title: str) -> str:
    """``user/slug`` of what has this title: Kaggle files it under the slug of its title, whatever id is given.

    Raises KaggleError for a name that Kaggle would not take.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", user):
        raise KaggleError(f"--user {user!r} is no Kaggle user name: take it from the address of your profile "
                          "(kaggle.com/NAME), lower-case letters, digits and hyphens")
    if not all(6 <= len(name) <= 50 for name in (title, slug_of(title))):
        raise KaggleError(f"the title {title!r} has {len(title)} characters, Kaggle takes 6 to 50: give the grid a shorter "
                          "name (its name: key), or the dataset another --dataset")
    return f"{user}/{slug_of(title)}"


def kernel_metadata(user: str, title: str, *, datasets: Iterable[str] = (), kernels: Iterable[str] = (),
                    accelerator: str = T4, internet: bool = False) -> dict[str, Any]:
    """The content of ``kernel-metadata.json`` for a private notebook.

    Fields with a default are written all the same: the documented default of ``enable_internet`` is false and the client's is
    true (``kaggle`` 2.2.5, ``kernels_push``). Raises KaggleError for a name that Kaggle would not take.
    """
    for option, names in (("--data", datasets), ("--notebook-outputs", kernels)):
        for name in names:
            if not re.fullmatch(r"[\w-]+/[\w-]+(/\d+)?", name):
                raise KaggleError(f"{option} {name!r}: wanted OWNER/NAME as in the address, such as nih-chest-xrays/data")
    return {"id": id_of(user, title), "title": title, "code_file": CODE_FILE, "language": "python",
            "kernel_type": "notebook", "is_private": True, "enable_gpu": accelerator != NO_GPU, "enable_tpu": False,
            "enable_internet": internet, "machine_shape": "" if accelerator == NO_GPU else accelerator, "keywords": [],
            "dataset_sources": list(datasets), "competition_sources": [], "kernel_sources": list(kernels),
            "model_sources": [], "docker_image_pinning_type": "latest"}


def grid_files(grid: str | Path) -> dict[str, str]:
    """Text by place on Kaggle: the grid file first, then all that it is based on, laid out as they lie here.

    Raises ParameterError for a file that is not there or no YAML, KaggleError for a base named by a path of this machine.
    """
    files = [find_file(grid).resolve()]
    for file in files:  # which grows
        content = read_yaml(file)
        entries = [content, *(entry for entry in content.get("cells") or [] if isinstance(entry, dict))]
        for base in (str(entry["base"]) for entry in entries if entry.get("base")):
            if Path(base).is_absolute():
                raise KaggleError(f"{file}: base {base} is a path of this machine; name it relative to the file")
            path = Path(os.path.normpath(file.parent / base))
            if path not in files:
                files.append(path)
    above = os.path.commonpath([file.parent for file in files])
    # where a base is looked for, also when what is found ships with charmlib
    return {f"params/{file.relative_to(above).as_posix()}": find_file(file).read_text() for file in files}


def pushed_notebook(parameters: Mapping[str, Any], files: Mapping[str, str] | None = None, *, gpu: bool = True,
                    name: str = "grid") -> nbformat.NotebookNode:
    """A notebook as Kaggle is to run it, without outputs; ``files`` are those of :func:`grid_files`, which its cell writes.

    Raises KaggleError for a parameter that it does not declare: papermill would only warn, and the defaults would be trained.
    """
    source = find_notebooks() / f"{name}.ipynb"
    names = list(declared(source))
    if unknown := next((given for given in parameters if given not in names), None):
        raise KaggleError(f"{source} declares no parameter '{unknown}'.{nearest(unknown, names)} It has {', '.join(names)}.")
    book = parameterize_notebook(load_notebook_node(str(source)), dict(parameters))
    place = next(i for i, cell in enumerate(book.cells) if cell.cell_type == "code") + 1
    added = [_CHECK_GPU.format(gpu=gpu)]
    if files:
        added.append(_WRITE_FILES.format(files=pprint.pformat(dict(files), width=120, sort_dicts=False)))
    book.cells[place:place] = [nbformat.v4.new_code_cell(code, metadata={"tags": ["kaggle"]}) for code in added]
    for i, cell in enumerate(book.cells):
        cell.id = f"shard-{i:02}"
        cell.metadata.pop("papermill", None)
    del book.metadata["papermill"]
    nbformat.validate(book)
    return book


_CHECK_GPU = "from charmlib.gpu_support import gpu_report\n\nprint(gpu_report(required={gpu}))"
_WRITE_FILES = """# the grid and what it is based on, as they were where this was pushed from
files = {files}
for name, text in files.items():
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)"""
