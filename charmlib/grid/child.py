"""The process that runs one cell: ``python -m charmlib.grid.child`` with the cell as JSON on standard input.

Papermill executes both notebooks here, so that a crash or a kill stays in this process and its kernel.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from pathlib import Path

import nbformat

from charmlib.processes import die_with_parent


def run_cell(cell: dict) -> None:
    """Execute train and test of a cell (id, hash, params, folder, notebooks, started) and write its metrics."""
    import papermill

    from charmlib.evaluation.results import finish
    from charmlib.files import write_json, write_whole
    from charmlib.grid.cells import IDENTITY
    from charmlib.params import UNHASHED, coerce

    folder, notebooks = Path(cell["folder"]), Path(cell["notebooks"])
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY, {"id": cell["id"], "hash": cell["hash"]})
    params = {name: coerce(name, value, "cell") for name, value in cell["params"].items()}
    params["run_dir"] = str(folder)
    os.environ["CHARM_CELL"], os.environ["CHARM_BATCH"] = cell["id"], "1"
    for name in ("train", "test"):
        known = declared(notebooks / f"{name}.ipynb")
        given = {k: v for k, v in params.items() if k in known} if name == "train" else \
            {k: params[k] for k in ("run_dir", *UNHASHED) if k in known and k in params}
        partial = folder / f".{name}.running.ipynb"
        try:
            papermill.execute_notebook(str(notebooks / f"{name}.ipynb"), str(partial), parameters=given,
                                       cwd=str(folder), progress_bar=False, log_output=False, start_timeout=180)
        finally:  # a failed notebook is kept too: it shows where
            if partial.is_file():
                write_whole(folder / f"{name}.ipynb", lambda temporary, source=partial: temporary.write_bytes(
                    source.read_bytes()))
                partial.unlink()
    finish(folder, cell=cell["id"], hash=cell["hash"], wall=time.time() - cell["started"])
    (folder / IDENTITY).unlink()


def declared(notebook: Path) -> set[str]:
    """The names that a notebook's ``parameters`` cell sets (papermill only warns of others)."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return {line.split(":")[0].strip() for line in cell.source.splitlines() if ":" in line.split("#")[0]}
    raise ValueError(f"{notebook} has no cell tagged 'parameters'")


def main() -> int:
    die_with_parent()  # the notebook's own kernel watches this process and ends with it
    warnings.filterwarnings("ignore")
    cell = json.load(sys.stdin)
    error = Path(cell["folder"]) / "error.txt"
    try:
        error.unlink(missing_ok=True)
        run_cell(cell)
    except Exception as problem:
        error.parent.mkdir(parents=True, exist_ok=True)
        error.write_text(traceback.format_exc())
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
