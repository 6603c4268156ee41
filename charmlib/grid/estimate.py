"""How long cells take, as far as the histories of a grid's folder tell."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from charmlib.grid.cells import cell_status
from charmlib.grid.spec import Cell

_COST = ("arch", "image_size", "use_momentum", "use_attention", "use_bank", "attention", "limit", "precision", "device",
         "split", "valid_fraction", "stage1_images", "data_root", "stage1_batch", "stage2_batch", "compile",
         "grad_checkpointing")
"""Cells that agree in these take about the same time an epoch."""
_MARGIN = 1.15
"""Epochs scatter, and saving one is not in the history."""


@dataclass(frozen=True)
class Pace:
    """Seconds of an epoch by phase (``frozen``, ``1``, ``2``), of scoring, and of everything else; None where none has run."""

    epochs: Mapping[str, float]
    scoring: float | None
    overhead: float | None

    def epoch(self, phase: str) -> float | None:
        """Of a phase that has run, or the slowest that has (None: nothing has)."""
        return self.epochs.get(phase, max(self.epochs.values(), default=None))


def kind(params: Mapping, row: Mapping) -> str:
    """The phase that a row of the history belongs to."""
    return "frozen" if row["stage"] == "1" and int(row["epoch"]) < params["stage1_frozen_epochs"] else row["stage"]


def paces(folder: Path, cells: Sequence[Cell]) -> dict[str, Pace]:
    """The pace of each cell: from cells of about its cost where there are any, else from all that has run."""
    rows, totals = [], []
    for cell in cells:
        for row in _history(folder / cell.id):
            rows.append((_cost(cell), kind(cell.params, row), float(row["seconds"])))
        metrics = folder / cell.id / "metrics.json"
        if metrics.is_file():
            totals.append((_cost(cell), json.loads(metrics.read_text())["seconds"]))

    def pace(cost) -> Pace:
        alike = [r for r in rows if r[0] == cost] or rows
        finished = [s for c, s in totals if c == cost] or [s for _, s in totals]
        seconds: dict[str, list[float]] = {}
        for _, phase, value in alike:
            seconds.setdefault(phase, []).append(value)
        return Pace({phase: median(values) for phase, values in seconds.items()},
                    median(s["score"] for s in finished) if finished else None,
                    min(s["overhead"] or 0.0 for s in finished) if finished else None)  # of one that nothing interrupted

    known = {cost: pace(cost) for cost in {_cost(cell) for cell in cells}}
    return {cell.id: known[_cost(cell)] for cell in cells}


def _cost(cell: Cell) -> tuple:
    return tuple(cell.params[name] for name in _COST)


def _history(folder: Path) -> list[dict]:
    path = folder / "history.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def epoch_seconds(folder: Path) -> float:
    """Seconds of all finished epochs of a cell."""
    return sum(float(row["seconds"]) for row in _history(folder))


def next_step(cell: Cell, folder: Path, pace: Pace) -> float:
    """Seconds until a cell that is started now has something more to show: one epoch and its save, or its scores.

    0 where nothing has run yet that would tell.
    """
    before = pace.overhead or 0.0
    if (folder / "model.json").is_file():
        return (before + (pace.scoring or pace.epoch("2") or 0.0)) * _MARGIN
    counts = _left(cell, folder)
    phase = next((p for p in ("frozen", "1", "2") if counts[p]), "2")
    epoch = pace.epoch(phase)
    return 0.0 if epoch is None else (before + epoch) * _MARGIN


def remaining(cell: Cell, folder: Path, pace: Pace) -> float | None:
    """Seconds that a cell still needs at most (early stopping may end it sooner); 0 for a finished one, None where nothing has
    run yet that would tell."""
    if cell_status(folder) == "done":
        return 0.0
    counts = _left(cell, folder) if not (folder / "model.json").is_file() else {}
    if pace.epoch("2") is None:
        return None
    train = sum(n * pace.epoch(phase) for phase, n in counts.items())
    return train + (pace.scoring or pace.epoch("2")) + (pace.overhead or 0.0)


def _left(cell: Cell, folder: Path) -> dict[str, int]:
    """Epochs still to run, by phase."""
    counts = {"frozen": cell.params["stage1_frozen_epochs"], "1": cell.params["stage1_epochs"],
              "2": cell.params["stage2_epochs"]}
    done = _history(folder)
    if any(row["stage"] == "2" for row in done):  # stage 1 may have ended early
        counts["frozen"] = counts["1"] = 0
    for row in done:
        phase = kind(cell.params, row)
        counts[phase] = max(0, counts[phase] - 1)
    return counts
