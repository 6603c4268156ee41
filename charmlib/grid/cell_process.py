"""The process that runs one cell: ``python -m charmlib.grid.cell_process`` with the cell as JSON on standard input.

Papermill executes both notebooks here, in one kernel, so that a crash or a kill stays in this process and its kernel. With
``look`` in the job, the cell is finished and the test notebook alone is executed. The process holds the lease of the cell's
folder; its exit status is a :class:`charmlib.grid.cells.Ended`.
"""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from traitlets.config import Config

import charmlib
from charmlib import session
from charmlib.files import DiskFull, LeaseLost, for_papermill, is_disk_full, remove_temporaries, write_json, write_text
from charmlib.grid import lease
from charmlib.grid.cells import NOTEBOOKS, CellFolder, Ended, declared
from charmlib.grid.sharing import remove_tape
from charmlib.param_sources import changed
from charmlib.params import coerce
from charmlib.session import PARENT, die_with_parent, end_children, own_temporary_folder

_BETWEEN = "between"  # tag of the cell that deletes the train notebook's variables before the test notebook starts
_CLEAR = """import matplotlib.pyplot
matplotlib.pyplot.close("all")
get_ipython().run_line_magic("reset", "-f")
import gc
_ = gc.collect()"""


def run_cell(job: dict, sockets: Path | None = None) -> None:
    """Execute train and test of a cell (id, hash, split, code, params, folder, notebooks, started) and write its metrics.

    Both run in one kernel, whose ``sockets`` lie in that folder, cleared in between: a second start and a second import of
    torch cost as much as a short epoch. Without such a folder the cell runs in this process, without notebooks.
    """
    from charmlib.evaluation.runs import finish

    cell, notebooks = CellFolder(job["folder"]), Path(job["notebooks"])
    spent = _spent(cell, job["hash"])
    write_json(cell.identity_file, {key: job[key] for key in ("id", "hash", "split", "code", "digests", "started")}
               | {"charmlib": charmlib.__version__, "spent": spent})
    params = {name: coerce(name, value, "cell") for name, value in job["params"].items()} | {"run_dir": str(cell.path)}
    if sockets:
        _execute({notebooks / f"{name}.ipynb": params for name in NOTEBOOKS}, cell, sockets)
    else:
        from charmlib import Run  # as the notebooks have it

        run = Run.open(params)
        run.train()
        run.score(maps=False)  # the first cell of a mean of the weights is enough to look at, and maps cost as much as a score
    first = Path(job["tape"]["folder"]).name if job.get("tape") else job["id"]
    finish(cell.path, cell=job["id"], hash=job["hash"], code=job["code"], wall=spent + time.time() - job["started"],
           shares=first if first != job["id"] else None)
    for file in (cell.identity_file, cell.alive_file):
        file.unlink(missing_ok=True)


def look_at(job: dict, sockets: Path) -> None:
    """Execute the test notebook alone, for a finished cell that shares the training of another and has none."""
    cell = CellFolder(job["folder"])
    _execute({Path(job["notebooks"]) / "test.ipynb": job["params"] | {"run_dir": str(cell.path)}}, cell, sockets)


def run_members(job: dict) -> None:
    """Run the other cells of a training in this process, after its first; one that fails keeps its error and the rest go on.

    A cell that another process works on is left to it.
    """
    for member in job["members"]:
        cell, before = CellFolder(member["folder"]), dict(os.environ)
        with contextlib.suppress(lease.Busy):
            held = lease.take(cell)
            held.keep(lost=lambda: os._exit(Ended.LEASE_LOST))
            os.environ.update(held.environment)
            try:
                _run_unless_done(member | {"notebooks": job["notebooks"], "started": time.time(), "tape": job["tape"]}, cell)
            except Exception as problem:
                if _ended(problem) is not Ended.FAILED:
                    raise
                write_text(cell.error_file, traceback.format_exc())
            finally:
                os.environ.update({name: before[name] for name in held.environment})
                held.release()
    if all(CellFolder(member["folder"]).done for member in job["members"]):
        remove_tape(job["tape"]["folder"])


def _run_unless_done(job: dict, cell: CellFolder, sockets: Path | None = None) -> None:
    remove_temporaries(cell)
    cell.error_file.unlink(missing_ok=True)
    if not cell.done_as(job["hash"]):  # finished by another while this one waited for the lease
        run_cell(job, sockets)


def _spent(cell: CellFolder, hash_: str) -> float:
    """Seconds of earlier attempts at this cell; a killed one counts up to its last sign of life."""
    before = cell.identity
    if before.get("hash") != hash_:
        return 0.0
    spent = before["spent"]
    if cell.alive_file.is_file():
        spent += max(0.0, cell.alive_file.stat().st_mtime - before["started"])
    # a copied cell comes without its last sign of life, whose time would be that of the copy
    return max(spent, sum(float(row["seconds"]) for row in cell.history))


def injected(notebook: Path, params: Mapping) -> dict[str, Any]:
    """The parameters that papermill sets in a notebook: those that differ from its ``parameters`` cell and, in its ``options``,
    all others that differ from their declaration."""
    there = declared(notebook)
    given = {name: value for name, value in params.items() if name in there and value != there[name]}
    options = {name: value for name, value in changed(params).items() if name not in there} if "options" in there else {}
    return given | ({"options": options} if options else {})


def _sockets(cell: CellFolder) -> Path:
    """A new folder of this user alone for the sockets of the cell's kernel: a port shows its outputs to every local user.

    What a killed process of this cell left in it is removed.
    """
    with contextlib.suppress(OSError):  # another user made it
        place = own_temporary_folder() / hashlib.sha256(os.fsencode(cell.path)).hexdigest()[:16]
        if len(os.fsencode(place)) < 80:  # a socket's path has 103 bytes at most
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(mode=0o700)
            return place
    return Path(tempfile.mkdtemp(prefix="charm-", dir="/tmp"))


def _execute(notebooks: Mapping[Path, Mapping], cell: CellFolder, sockets: Path) -> None:
    """Run notebooks, each with the parameters that it declares, as one, and keep each as executed, also when it failed."""
    import papermill

    books = [papermill.execute_notebook(for_papermill(notebook), None, parameters=injected(notebook, params),
                                        prepare_only=True, progress_bar=False) for notebook, params in notebooks.items()]
    joined = nbformat.from_dict(books[0])
    for book in books[1:]:
        joined.cells += [nbformat.v4.new_code_cell(_CLEAR, metadata={"tags": [_BETWEEN]}), *book.cells]
    source = cell.path / ".both.ipynb"
    write_text(source, nbformat.writes(joined))
    try:
        papermill.execute_notebook(*map(for_papermill, (source, cell.running_file)), cwd=str(cell.path),
                                   progress_bar=False, log_output=False, start_timeout=180, config=Config(
                                       KernelManager={"transport": "ipc", "connection_file": str(sockets / "kernel.json")}))
    finally:
        source.unlink(missing_ok=True)
        _split({notebook.name: book for notebook, book in zip(notebooks, books)}, cell)


def _split(books: Mapping[str, nbformat.NotebookNode], cell: CellFolder) -> None:
    try:
        done = nbformat.read(cell.running_file, as_version=4)
    except (FileNotFoundError, nbformat.reader.NotJSONError):  # nothing ran, or the disk was full
        return
    finally:
        cell.running_file.unlink(missing_ok=True)
    parts = [[]]
    for part in done.cells:
        if _BETWEEN in part.metadata.get("tags", []):
            parts.append([])
        else:
            parts[-1].append(part)
    for (name, book), own in zip(books.items(), parts):
        if any(part.get("execution_count") for part in own):
            took = sum(part.metadata.get("papermill", {}).get("duration") or 0.0 for part in own)
            book.cells = own
            book.metadata.papermill |= {"output_path": str(cell.path / name), "duration": round(took, 3)}
            write_text(cell.path / name, nbformat.writes(book))


def main() -> int:
    die_with_parent(int(os.environ[PARENT]))  # the notebook's own kernel watches this process and ends with it
    warnings.filterwarnings("ignore")
    job = json.load(sys.stdin)
    cell = CellFolder(job["folder"])
    tape = job.get("tape")
    try:
        held, sockets = lease.take(cell), _sockets(cell)
        other = lease.take(tape["folder"]) if tape and tape["folder"] != job["folder"] else None  # whose first cell is finished
    except (lease.Busy, OSError) as problem:
        return _ended(problem)

    def leave(ended: Ended) -> None:
        end_children()
        shutil.rmtree(sockets, ignore_errors=True)
        for one in filter(None, (held, other)):
            one.release()
        os._exit(ended)

    signal.signal(signal.SIGTERM, lambda *_: leave(Ended.STOPPED))
    held.keep(lost=lambda: leave(Ended.LEASE_LOST))
    os.environ.update(held.environment)
    os.environ.update({session.BATCH: "1"} if job.get("look") else {
        session.CELL: job["id"], session.BATCH: "1", session.ALIVE: str(cell.alive_file)})
    if tape:
        os.environ[session.TAPE] = json.dumps(tape)
    if other:
        other.keep(lost=lambda: leave(Ended.LEASE_LOST))
    try:
        if job.get("look"):
            look_at(job, sockets)
        else:
            _run_unless_done(job, cell, sockets)
        if tape:
            run_members(job)
        return Ended.DONE
    except Exception as problem:
        ended = _ended(problem)
        if ended is Ended.FAILED:
            write_text(cell.error_file, traceback.format_exc())
        return ended
    finally:
        shutil.rmtree(sockets, ignore_errors=True)
        for one in filter(None, (held, other)):
            one.release()


# by the class of an exception, which papermill passes on by name only
_ENDS = {"DeadKernelError": Ended.CRASHED, "Busy": Ended.BUSY, session.OutOfTime.__name__: Ended.OUT_OF_TIME,
         LeaseLost.__name__: Ended.LEASE_LOST, DiskFull.__name__: Ended.DISK_FULL}


def _ended(problem: Exception) -> Ended:
    """How a cell ended whose notebooks, or whose process, raised this; prints one line for the runner.

    The line is the last one of the problem's text (fastai adds some before it), after its class if the status does not tell.
    """
    name, text = getattr(problem, "ename", type(problem).__name__), str(getattr(problem, "evalue", "") or problem)
    full = is_disk_full(problem) or (name == "OSError" and "No space left on device" in text)
    ended = Ended.DISK_FULL if full else _ENDS.get(name, Ended.FAILED)
    last = "".join(text.strip().splitlines()[-1:]).strip()
    print(f"{name}: {last}" if ended is Ended.FAILED else last, file=sys.stderr)
    return ended


if __name__ == "__main__":
    sys.exit(main())
