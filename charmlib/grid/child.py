"""The process that runs one cell: ``python -m charmlib.grid.child`` with the cell as JSON on standard input.

Papermill executes both notebooks here, in one kernel, so that a crash or a kill stays in this process and its kernel. The
process holds the lease of the cell's folder; how it ended is its exit status (:class:`charmlib.grid.cells.Ended`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import nbformat

import charmlib
from charmlib import session
from charmlib.files import DiskFull, LeaseLost, is_disk_full, remove_temporaries, write_json, write_text
from charmlib.grid import lease
from charmlib.grid.cells import ALIVE, IDENTITY, RUNNING, Ended, finished, read_identity
from charmlib.grid.estimate import epoch_seconds
from charmlib.session import PARENT, die_with_parent, end_children

_BETWEEN = "between"
"""Tag of the cell that clears away what the train notebook defined before the test notebook starts."""
_CLEAR = """import matplotlib.pyplot
matplotlib.pyplot.close("all")
get_ipython().run_line_magic("reset", "-f")
import gc
_ = gc.collect()"""


def run_cell(cell: dict) -> None:
    """Execute train and test of a cell (id, hash, split, code, params, folder, notebooks, started) and write its metrics.

    Both run in one kernel, cleared in between: a second start and a second import of torch cost as much as a short epoch.
    """
    from charmlib.evaluation.runs import finish
    from charmlib.params import UNHASHED, coerce

    folder, notebooks = Path(cell["folder"]), Path(cell["notebooks"])
    spent = _spent(folder, cell["hash"])
    write_json(folder / IDENTITY, {key: cell[key] for key in ("id", "hash", "split", "code", "started")}
               | {"charmlib": charmlib.__version__, "spent": spent})
    params = {name: coerce(name, value, "cell") for name, value in cell["params"].items()}
    params["run_dir"] = str(folder)
    books = []
    for name in ("train", "test"):
        known = declared(notebooks / f"{name}.ipynb")
        wanted = params if name == "train" else {k: params[k] for k in ("run_dir", *UNHASHED) if k in params}
        books.append(_with_parameters(notebooks / f"{name}.ipynb", {k: v for k, v in wanted.items() if k in known}))
    _execute(books, folder)
    finish(folder, cell=cell["id"], hash=cell["hash"], code=cell["code"],
           wall=spent + time.time() - cell["started"])
    for name in (IDENTITY, ALIVE):
        (folder / name).unlink(missing_ok=True)


def _spent(folder: Path, hash_: str) -> float:
    """Seconds that earlier attempts at this cell took, those that were killed up to their last sign of life."""
    before = read_identity(folder)
    if before.get("hash") != hash_:
        return 0.0
    alive, spent = folder / ALIVE, before.get("spent", 0.0)
    if "started" in before and alive.is_file():
        spent += max(0.0, alive.stat().st_mtime - before["started"])
    # a copied cell comes without its last sign of life, whose time would be that of the copy
    return max(spent, epoch_seconds(folder))


def declared(notebook: Path) -> set[str]:
    """The names that a notebook's ``parameters`` cell sets (papermill only warns of others)."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return {line.split(":")[0].strip() for line in cell.source.splitlines() if ":" in line.split("#")[0]}
    raise ValueError(f"{notebook} has no cell tagged 'parameters'")


def _with_parameters(notebook: Path, given: dict) -> nbformat.NotebookNode:
    import papermill

    return papermill.execute_notebook(str(notebook), None, parameters=given, prepare_only=True, progress_bar=False)


def _execute(books: list[nbformat.NotebookNode], folder: Path) -> None:
    """Run both notebooks as one, and keep each as executed; one that failed is kept too, since it shows where."""
    import papermill

    train, test = books
    joined = nbformat.from_dict(train)
    between = nbformat.v4.new_code_cell(_CLEAR, metadata={"tags": [_BETWEEN]})
    joined.cells = [*train.cells, between, *test.cells]
    source, partial = folder / ".both.ipynb", folder / RUNNING
    write_text(source, nbformat.writes(joined))
    try:
        papermill.execute_notebook(str(source), str(partial), cwd=str(folder), progress_bar=False, log_output=False,
                                   start_timeout=180)
    finally:
        source.unlink(missing_ok=True)
        _split(partial, books, folder)


def _split(partial: Path, books: list[nbformat.NotebookNode], folder: Path) -> None:
    """``train.ipynb`` and ``test.ipynb`` of what was executed as one."""
    try:
        done = nbformat.read(partial, as_version=4)
    except (FileNotFoundError, nbformat.reader.NotJSONError):  # nothing ran, or the disk was full
        return
    finally:
        partial.unlink(missing_ok=True)
    at = next(i for i, cell in enumerate(done.cells) if _BETWEEN in cell.metadata.get("tags", []))
    for name, book, cells in zip(("train", "test"), books, (done.cells[:at], done.cells[at + 1:])):
        if any(cell.get("execution_count") for cell in cells):
            book.cells = cells
            book.metadata.papermill |= {"output_path": str(folder / f"{name}.ipynb"),
                                        "duration": round(sum(c.metadata.get("papermill", {}).get("duration") or 0.0
                                                              for c in cells), 3)}
            write_text(folder / f"{name}.ipynb", nbformat.writes(book))


def main() -> int:
    die_with_parent(int(os.environ[PARENT]))  # the notebook's own kernel watches this process and ends with it
    warnings.filterwarnings("ignore")
    cell = json.load(sys.stdin)
    folder = Path(cell["folder"])
    try:
        held = lease.take(folder)
    except lease.Busy as busy:
        return _say(Ended.BUSY, busy)
    except OSError as error:
        return _say(_how(error), error)

    def leave(ended: Ended) -> None:
        end_children()
        held.release()
        os._exit(ended)

    signal.signal(signal.SIGTERM, lambda *_: leave(Ended.STOPPED))
    held.keep(lost=lambda: leave(Ended.LEASE_LOST))
    os.environ.update(held.environment)
    os.environ.update({session.CELL: cell["id"], session.BATCH: "1", session.ALIVE: str(folder / ALIVE)})
    try:
        remove_temporaries(folder)
        (folder / "error.txt").unlink(missing_ok=True)
        if not finished(folder, cell["hash"]):  # by another, while this one waited for its turn
            run_cell(cell)
        return Ended.DONE
    except Exception as problem:
        ended = _how(problem)
        if ended is Ended.FAILED:
            write_text(folder / "error.txt", traceback.format_exc())
        return _say(ended, problem)
    finally:
        held.release()


def _how(problem: Exception) -> Ended:
    """What became of a cell whose notebooks, or whose process, raised this."""
    from nbclient.exceptions import DeadKernelError

    if isinstance(problem, DeadKernelError):
        return Ended.CRASHED
    name, text = getattr(problem, "ename", type(problem).__name__), str(getattr(problem, "evalue", problem))
    if name == session.OutOfTime.__name__:
        return Ended.OUT_OF_TIME
    if name == LeaseLost.__name__:
        return Ended.LEASE_LOST
    if name == DiskFull.__name__ or is_disk_full(problem) or (name == "OSError" and "No space left on device" in text):
        return Ended.DISK_FULL
    return Ended.FAILED


def _say(ended: Ended, problem: Exception) -> Ended:
    """One line for the runner: the problem's class, where its words do not say it all, and its last line (fastai adds some)."""
    text = (getattr(problem, "evalue", None) or str(problem)).strip().splitlines()
    name = "" if ended is not Ended.FAILED else f"{getattr(problem, 'ename', type(problem).__name__)}: "
    print(f"{name}{text[-1].strip() if text else ''}", file=sys.stderr)
    return ended


if __name__ == "__main__":
    sys.exit(main())
