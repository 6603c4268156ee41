"""The last act of a run: ``metrics.json``, which marks it as done. Light, because every cell's process imports it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from charmlib.files import write_json

FORMAT = 1
PART_FILE = "scored.json"
"""What the test notebook knows; ``metrics.json`` is made of it when the whole run is done."""


def finish(run: str | Path, *, cell: str | None = None, hash: str | None = None, code: str | None = None,
           wall: float | None = None) -> Path | None:
    """Turn what the test notebook found into ``metrics.json``, the mark of a finished run, and drop ``resume.pt``.

    A runner of cells does this itself, with the cell's name and hash, the hash of the notebooks' code and the wall time; the
    notebook's own call is then left to it (returns None).

    Raises
    ------
    FileNotFoundError
        The run has not been scored.
    """
    folder = Path(run)
    if os.environ.get("CHARM_CELL") and hash is None:
        print("scored; the grid's runner writes metrics.json")
        return None
    part = folder / PART_FILE
    if not part.is_file():
        raise FileNotFoundError(f"no {part}: score the run with the test notebook first")
    metrics = json.loads(part.read_text())
    if wall is not None:
        metrics["seconds"]["overhead"] = round(wall - metrics["seconds"]["train"] - metrics["seconds"]["score"], 3)
    path = folder / "metrics.json"
    write_json(path, {"format": FORMAT, "cell": cell or folder.name, "hash": hash, "code": code, **metrics})
    part.unlink()
    (folder / "resume.pt").unlink(missing_ok=True)
    return path
