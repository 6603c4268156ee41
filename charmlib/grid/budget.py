"""Resources of a grid: the time budget, the time that cells take, and disk space."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import NamedTuple

from charmlib.data.dataset import count_images
from charmlib.evaluation.runs import RunFolder
from charmlib.grid.cells import GridError
from charmlib.grid.sharing import training_of
from charmlib.grid.spec import Cell
from charmlib.params import ParameterError, mean_of
from charmlib.session import with_this_package
from charmlib.training.recipes import phase_of, phases

KAGGLE_WEEK = 30  # GPU hours a week of a free account; a session with two cards counts once
CARDS = {"T4": (8.0, 2.0), "P100": (4.0, 1.0)}  # TFLOP/s that a card is assumed to sustain, at best and at worst
KAGGLE_WORKING, KAGGLE_LIMIT = Path("/kaggle/working"), 20e9  # what a session keeps, in bytes; its disk claims more

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
# time for the last report: share of the budget, seconds, and multiples of the time for the tables alone
_REPORT_SHARE, _REPORT_LEAST, _REPORT_TIMES = 0.005, 5.0, 3.0
# cells that agree in these take about the same time an epoch
_COST = ("system", "arch", "image_size", "use_momentum", "use_attention", "use_bank", "attention", "limit", "precision",
         "device", "split", "valid_fraction", "stage1_images", "data_root", "stage1_batch", "stage2_batch", "compile",
         "grad_checkpointing")
_MARGIN = 1.15  # epochs scatter, and the history does not count the time to save one
# above these bytes for each finished cell and each in training, more than any network here needs, no sizes are computed
_PLENTY = 1.5e9, 3e10
_REST = 12e6  # bytes of a finished cell without its checkpoint: notebooks, predictions, report


def seconds_of(text: str | float, option: str = "--budget") -> float:
    """``11h``, ``1h30m``, ``90m`` or ``45s`` as seconds; a number is in seconds. A text needs units: ``11`` may mean hours.

    Raises ParameterError for anything else, and for times up to 0.
    """
    if isinstance(text, str):
        found = re.fullmatch(r"(?:(?:\d+\.?\d*|\.\d+)[dhms])+", text.strip().lower())
        value = sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)([dhms])", found[0])) if found else 0.0
    else:
        value = float(text)
    if not 0 < value < float("inf"):
        raise ParameterError(f"{option} {text!r} is not a time; say 11h, 1h30m, 90m or 45s")
    return value


def hours(seconds: float) -> str:
    """'11.3 h', or '12 min' or '40 s' for less."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class Budget:
    """Seconds from now on, less the time for the report at the end; endless without a number."""

    def __init__(self, seconds: float | None = None):
        self.seconds, self.end = seconds, time.time() + (seconds or float("inf"))
        self._report = max(_REPORT_LEAST, _REPORT_SHARE * (seconds or 0.0))

    def saw_report(self, seconds: float) -> None:
        """The tables alone took this long; the last report, with pictures, gets a multiple."""
        self._report = max(self._report, _REPORT_TIMES * seconds)

    @property
    def deadline(self) -> float | None:
        """Unix time at which cells must have ended for the report to fit; None without a budget."""
        return None if self.seconds is None else self.end - self._report

    def left(self) -> float:
        """Seconds for cells."""
        return self.end - self._report - time.time()


class Pace(NamedTuple):
    """Median seconds of an epoch by phase and of scoring, and the overhead; None if unknown."""

    epochs: Mapping[str, float]
    scoring: float | None
    overhead: float | None
    looks: float | None = None
    """Seconds of all validations of a cell that shares the training of another with another mean of the weights."""

    def epoch(self, phase: str) -> float | None:
        """Of this phase, else of the slowest phase with finished epochs; None if there is none."""
        return self.epochs.get(phase, max(self.epochs.values(), default=None))


def paces(folder: Path, cells: Iterable[Cell]) -> dict[str, Pace]:
    """The pace of each cell: from cells of about its cost if any have run, else from all that have."""
    trainings, totals, costs, looks = {}, [], {}, {}
    for cell in cells:
        run = RunFolder(folder / cell.id)
        cost = costs[cell.id] = tuple(cell.params[name] for name in _COST)
        plan = phases(cell.params)
        with suppress(ValueError, KeyError, TypeError, OSError):  # a damaged one, which the board names
            rows = [(cost, phase_of(plan, row).name, float(row["seconds"])) for row in run.history]
            if run.done and run.metrics.get("shares_training_with"):
                looks[cost] = max(looks.get(cost, 0.0), run.metrics["seconds"]["train"])
                continue
            totals += [(cost, run.metrics["seconds"])] if run.done else []
            if rows:  # of unfinished cells that share a training, those of the one that trains
                key = training_of(cell.params)
                trainings[key] = max(trainings.get(key, []), rows, key=lambda rows: sum(s for *_, s in rows))
    epochs = [row for rows in trainings.values() for row in rows]

    def pace(cost: tuple) -> Pace:
        alike = [epoch for epoch in epochs if epoch[0] == cost] or epochs
        finished = [s for c, s in totals if c == cost] or [s for _, s in totals]
        return Pace({phase: median(s for _, p, s in alike if p == phase) for phase in {p for _, p, _ in alike}},
                    median(s["score"] for s in finished) if finished else None,
                    min(s["overhead"] or 0.0 for s in finished) if finished else None,  # the least: of an uninterrupted one
                    looks.get(cost, max(looks.values(), default=None)))

    known = {cost: pace(cost) for cost in set(costs.values())}
    return {cell: known[cost] for cell, cost in costs.items()}


def probed(cells: Sequence[Cell], say: Callable[[str], None] = print) -> tuple[dict[str, Pace], dict[str, Pace]]:
    """The pace of cells by 20 training steps a phase on this machine, one probe for cells of about the same cost: in seconds,
    and in TFLOP instead of seconds.

    Cells whose data are not there are left out, and decoding images is not counted.
    """
    asked, costs = {}, {}
    for cell in cells:
        costs[cell.id] = cost = tuple(cell.params[name] for name in _COST)
        with suppress(ValueError, OSError):
            asked[cost] = asked.get(cost) or {"params": cell.params, "images": count_images(cell.params)}
    if not asked:
        return {}, {}
    say(f"timing {len(asked)} kinds of cells by a few steps each")
    found = dict(zip(asked, _answer("charmlib.training.probe", list(asked.values()))))
    return tuple({cell: Pace(found[cost][unit]["epochs"], found[cost][unit]["scoring"], None, found[cost][unit]["looks"])
                  for cell, cost in costs.items() if cost in found} for unit in ("seconds", "tflop"))


def next_step(cell: Cell, run: RunFolder, pace: Pace) -> float:
    """Seconds from a cell's start to its next result: one epoch and its save, or its scores. 0 if unknown."""
    before, counts = pace.overhead or 0.0, _left(cell, run)
    epoch = pace.epoch(next((phase for phase, n in counts.items() if n), [*counts][-1]))
    if run.trained:
        return (before + (pace.scoring or epoch or 0.0)) * _MARGIN
    return 0.0 if epoch is None else (before + epoch) * _MARGIN


def remaining(cell: Cell, run: RunFolder, pace: Pace) -> float:
    """Seconds that a cell still needs at most (early stopping may end it sooner); 0 when finished, infinite if unknown."""
    counts = _left(cell, run)
    last = pace.epoch([*counts][-1])
    if run.done or last is None:
        return 0.0 if run.done else float("inf")
    return sum(n * pace.epoch(phase) for phase, n in counts.items()) + (pace.scoring or last) + (pace.overhead or 0.0)


def _left(cell: Cell, run: RunFolder) -> dict[str, int]:
    plan = phases(cell.params)
    done = [phase_of(plan, row).name for row in run.history]
    reached = max((i for i, phase in enumerate(plan) if phase.name in done), default=0)  # earlier phases may have ended early
    return {phase.name: 0 if run.trained or i < reached else max(0, phase.epochs - done.count(phase.name))
            for i, phase in enumerate(plan)}


def refuse_without_space(cells: Sequence[Cell], folder: Path, at_once: int, *, say: Callable[[str], None] = print) -> None:
    """Say how many bytes the unfinished cells need and how many are free; GridError if not even one can be trained."""
    runs = [RunFolder(folder / cell.id) for cell in cells]
    todo = sum(not run.done for run in runs)
    at_once, free = min(at_once, todo), free_bytes(folder)
    if not todo or free > todo * _PLENTY[0] + at_once * _PLENTY[1]:
        return
    kept = [_bytes(run.path, "*") for run in runs if run.done]
    resumes = [run.resume_file.stat().st_size for run in runs if run.resume_file.is_file()]
    computed = (0, 0) if kept and resumes else computed_sizes([cell.params for cell in cells])
    cell = median(kept) if kept else computed[0] + _REST
    training = 2 * (max(resumes) if resumes else computed[1])  # twice while a new resume file is written
    shared = sorted(_tapes([cell.params for cell, run in zip(cells, runs) if not run.done]), key=lambda found: -found[0])
    tapes = [networks * computed_sizes([params])[0] for networks, params in shared[:at_once]]
    need = todo * cell + at_once * training + sum(tapes)
    training += max(tapes, default=0)
    words = (f"{todo} cells need about {_gb(need)} in {folder} ({_gb(cell)} a finished cell, {_gb(training)} more while "
             f"one trains, {at_once} at once); {_gb(free)} are free")
    if free < cell + training:
        raise GridError(f"{words}: not even one fits. Make room, or name another --out.")
    say(words if free >= need else f"WARNING: {words}, so the grid will stop at a full disk, losing nothing. Run a part of it "
        "elsewhere (--shard).")


def _tapes(params: Sequence[dict]) -> list[tuple[int, dict]]:
    """Of each training that several cells share: how many networks its tape holds, which are the network and its means after
    each epoch, and the parameters of one cell."""
    sharing = {}
    for some in params:
        sharing.setdefault(training_of(some), []).append(some)
    return [(sum(phase.epochs for phase in phases(some[0])) * len({(0.0, False), *map(mean_of, some)}), some[0])
            for some in sharing.values() if len(some) > 1]


def free_bytes(folder: Path, *, working: Path = KAGGLE_WORKING, limit: float = KAGGLE_LIMIT) -> float:
    """Free bytes of the folder's disk; on Kaggle at most what its limit for results leaves."""
    there = existing(folder.absolute())
    free = float(shutil.disk_usage(there).free)
    if working.is_dir() and there.resolve().is_relative_to(working.resolve()):
        free = min(free, limit - _bytes(working, "**/*"))
    return free


def existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def computed_sizes(params: Sequence[dict]) -> tuple[int, int]:
    """Bytes of the largest checkpoint and resume file of these parameters, computed by a process that imports torch."""
    model, resume = _answer("charmlib.training.size", list(params))
    return model, resume


def _answer(module: str, question: list[dict]) -> list:
    """What a module that imports torch prints for a question, both in JSON."""
    asked = subprocess.run([sys.executable, "-W", "ignore", "-m", module], input=json.dumps(question), text=True,
                           capture_output=True, env=with_this_package(os.environ))
    if asked.returncode:
        raise GridError(f"the networks of this grid cannot be built: {asked.stderr.strip().splitlines()[-1]}")
    return json.loads(asked.stdout.splitlines()[-1])


def _bytes(folder: Path, pattern: str) -> int:
    return sum(f.stat().st_size for f in folder.glob(pattern) if f.is_file() and not f.is_symlink())


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
