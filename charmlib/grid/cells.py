"""A cell's identity, and its state as read from its folder."""

import ast
import hashlib
import json
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

import charmlib
from charmlib.evaluation.runs import RunFolder
from charmlib.files import json_or_empty, remove_temporaries
from charmlib.grid import lease
from charmlib.params import UNHASHED

NOTEBOOKS = ("train", "test")
_VERSIONS = ("charmlib", "torch", "torchvision", "fastai")


class Ended(IntEnum):
    """Exit status of a cell's process."""

    DONE = 0
    FAILED = 1
    BUSY = 75  # another process works on the cell
    OUT_OF_TIME = 76
    LEASE_LOST = 77
    DISK_FULL = 78
    CRASHED = 79  # the kernel, or the process itself, was killed
    HUNG = 80
    STOPPED = 143


class GridError(RuntimeError):
    """A grid that cannot go on; the message names the cell or file and the remedy."""


def find_notebooks(folder: str | Path | None = None) -> Path:
    """The folder of ``train.ipynb`` and ``test.ipynb``: given, that of the checkout or wheel, or the current one.

    Raises GridError, listing the searched folders.
    """
    package = Path(charmlib.__file__).parent
    searched = [Path(folder)] if folder else [package.parent / "notebooks", package / "shipped" / "notebooks",
                                              Path("notebooks"), Path(".")]
    for place in searched:
        if all((place / f"{name}.ipynb").is_file() for name in NOTEBOOKS):
            return place.resolve()
    raise GridError(f"no train.ipynb and test.ipynb in {', '.join(map(str, searched))}: name their folder with --notebooks")


def notebook_code(notebooks: Path) -> str:
    """The text of the code cells of both notebooks, on which results depend."""
    import nbformat  # half a second, and each command imports this module

    books = [nbformat.read(notebooks / f"{name}.ipynb", as_version=4) for name in NOTEBOOKS]
    return "\n\n".join(cell["source"] for book in books for cell in book.cells if cell["cell_type"] == "code")


def declared(notebook: Path) -> dict[str, Any]:
    """The values in a notebook's cell tagged ``parameters``, by name; ValueError if it has none."""
    import nbformat

    # not by papermill's inspect_notebook (2.7), which overlooks a line whose comment holds brackets
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])]
    if not cells:
        raise ValueError(f"{notebook} has no cell tagged 'parameters'")
    lines = [node for node in ast.parse(cells[0].source).body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: ast.literal_eval(node.value) for node in lines}


def cell_hash(params: Mapping, code: str, split_hash: str, digests: Mapping[str, str]) -> str:
    """16 hex digits over the parameters (without paths and machine), the notebooks' code, the split, charmlib's version, and
    what :func:`charmlib.data.dataset.digests` gives of the labels, pictures and weights."""
    what = {"params": {k: params[k] for k in sorted(params) if k not in UNHASHED}, "code": code, "split": split_hash,
            "version": charmlib.__version__, "digests": dict(digests)}
    return code_hash(json.dumps(what, sort_keys=True))


def code_hash(code: str) -> str:
    """16 hex digits of the notebooks' code, kept with every result."""
    return hashlib.sha256(code.encode()).hexdigest()[:16]


class CellFolder(RunFolder):
    """A run's folder that a grid's processes share.

    While the cell is unfinished, ``cell.json`` holds id, hash, split, code, digests, charmlib version, start (Unix time) and
    the seconds spent before it; ``.running.ipynb`` is both notebooks as far as they are executed; the kernel touches
    ``.alive``.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.identity_file, self.running_file = self.path / "cell.json", self.path / ".running.ipynb"
        self.alive_file = self.path / ".alive"

    @property
    def identity(self) -> dict:
        """Content of ``cell.json``; empty where it is missing or damaged."""
        return json_or_empty(self.identity_file)

    @property
    def made_with(self) -> dict[str, str]:
        """Split, notebooks' code, digests and versions of a finished or started cell, by name; empty for another.

        Raises GridError for one that is damaged.
        """
        try:
            if self.done:
                made = self.metrics
                split, digests, versions = made["split"]["hash"], made["data"].get("digests", {}), made["versions"]
            elif made := self.identity:
                split, digests, versions = made["split"], made.get("digests", {}), {"charmlib": made["charmlib"]}
            else:
                return {}
            return {"split": split, "notebooks' code": made["code"], **digests,
                    **{f"version of {name}": versions[name] for name in _VERSIONS if name in versions}}
        except (KeyError, TypeError, AttributeError) as error:
            raise GridError(f"{self.metrics_file if self.done else self.identity_file} is damaged ({type(error).__name__}: "
                            f"{error}); remove {self} to run the cell again") from error

    @property
    def reason(self) -> str:
        """Why the cell failed, in a line: the end of a traceback, or the beginning of the runner's note; '' if it did not."""
        text = self.error_file.read_text(errors="replace").strip() if self.status == "failed" else ""
        return "".join(text.splitlines()[-1:] if "Traceback" in text else text.splitlines()[:1])

    @property
    def progress(self) -> int:
        """Finished epochs, plus one when trained and one when scored."""
        return len(self.history) + self.trained + self.scored_file.is_file()

    def done_as(self, hash_: str) -> bool:
        """Whether the cell is finished; raises GridError if it has other settings than those of this hash."""
        if self.done and self.metrics["hash"] != hash_:
            raise GridError(f"{self.name} was finished by another runner under other settings (hash {self.metrics['hash']}, "
                            f"wanted {hash_}); use another --out, or --rerun-changed")
        return self.done

    def tidy(self) -> None:
        """Remove the working files of a finished cell that a killed process left."""
        if self.done and not lease.holder(self):
            for file in (self.resume_file, self.scored_file, self.identity_file, self.alive_file, self.error_file):
                file.unlink(missing_ok=True)
            remove_temporaries(self.path)
