"""One cell on its own, with the same files and rules as a cell of a grid."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from charmlib.grid.cells import GridError, cell_status, find_notebooks
from charmlib.grid.runner import Means, run_cells
from charmlib.grid.spec import Cell, Grid
from charmlib.param_sources import find_file, load_params, parse_assignments
from charmlib.params import resolve, with_absolute_paths


def run_single(path: str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
               rerun_changed: bool = False, notebooks: str | Path | None = None, say=print) -> Path:
    """Train and test one parameter file; returns the run's folder. A finished run is left as it is.

    Raises
    ------
    charmlib.params.ParameterError, GridError
        Wrong parameters; a finished run of other settings; or the run failed (its traceback is in ``error.txt``).
    """
    path = find_file(path)
    params = resolve(load_params(path), parse_assignments(assignments), sources=(str(path), "-p"))
    with_absolute_paths(params)  # refuses what is not there
    folder = Path(out or Path("runs") / path.stem).resolve()
    del params["run_dir"]
    grid = Grid(folder.parent.name, path, (Cell(folder.name, params, {}),), ())
    run_cells(grid, folder.parent, find_notebooks(notebooks), Means(rerun_changed=rerun_changed), split_folder=folder, say=say)
    if cell_status(folder) != "done":
        raise GridError(f"the run failed; its traceback is in {folder}/error.txt")
    return folder
