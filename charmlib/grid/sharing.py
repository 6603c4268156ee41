"""Cells that share a training: those whose parameters differ only in what acts when scoring."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from charmlib.grid.cells import CellFolder, code_hash
from charmlib.params import PARAMS, effective, mean_of

NOTEBOOKS = "487cad4ed5f8b47d"
"""What :func:`charmlib.grid.cells.code_hash` gives of this version's notebooks.

Those of a user may do more than train and score. The cells after the first run without notebooks, and would leave it out. So
with others no training is shared.
"""


def training_of(params: Mapping) -> str:
    """16 hex digits over the parameters that act in training; equal for cells that share one.

    Parameters that the table marks ``scores`` stay out. Schedule 'plateau' shares nothing, since its rates follow the
    validation part.
    """
    acting = {name: value for name, value in effective(params).items()
              if params["schedule"] == "plateau" or not _scores(name, params)}
    return code_hash(json.dumps(acting, sort_keys=True))


def _scores(name: str, params: Mapping) -> bool:
    scores = PARAMS[name].scores
    return scores(params) if callable(scores) else scores


def shared_jobs(jobs: Sequence[dict]) -> list[dict]:
    """One job for each training with unfinished cells: that of the first of them, with the others as its ``members``.

    A training of several cells gets a ``tape``: the arguments of :class:`charmlib.training.tape.Tape`, whose files lie in the
    folder of its first cell, finished or not. A cell that went on alone before, with a ``resume.pt``, stays alone, and so do
    all with other notebooks than :data:`NOTEBOOKS`.
    """
    trainings: dict[tuple, list[dict]] = {}
    for job in jobs:
        alone = job["id"] if CellFolder(job["folder"]).resume_file.is_file() or job["code"] != NOTEBOOKS else ""
        of_data = json.dumps([job["split"], job["code"], job["digests"]], sort_keys=True)
        trainings.setdefault((training_of(job["params"]), of_data, alone), []).append(job)
    found = []
    for (training, *_), cells in trainings.items():
        first, *others = todo = [job for job in cells if not CellFolder(job["folder"]).done] or [None]
        if first is None:
            remove_tape(cells[0]["folder"])
        elif len(cells) == 1 or (not others and not _tape(cells[0]["folder"])):
            found.append(first)
        else:
            means = sorted({mean_of(job["params"]) for job in todo})
            found.append(first | {"members": others, "tape": {"folder": cells[0]["folder"], "training": training,
                                                             "means": [list(mean) for mean in means]}})
    return found


def rest(job: dict, without: Sequence[dict] = ()) -> dict | None:
    """The job of a training's cells that an ended one has left, ``without`` some; None if it has left none."""
    first, *others = [member for member in job.get("members", ())
                      if member not in without and not CellFolder(member["folder"]).done] or [None]
    return first and first | {"members": others, "tape": job["tape"]}


def remove_tape(folder: str | Path) -> None:
    """Remove the files of a tape whose cells are all finished."""
    for file in _tape(folder):
        file.unlink(missing_ok=True)


def _tape(folder: str | Path) -> list[Path]:
    return [*Path(folder).glob("tape_*.pt")]
