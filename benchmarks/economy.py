"""What a grid costs beside its trainings, beside another commit in one run.

    python -m benchmarks.economy boards runs/demo/charm_k2_t0.05 --before b5f82ba --cell-before CELL

``boards`` makes a grid of 500 finished cells from one, in a temporary folder: 50 settings of k and threshold with ten
seeds each, whose scores are the cell's with noise of their own. The commit before, which may not read today's files, gets
such a grid of a cell of its own, made with its code. It times ``grid status`` and ``grid report`` of both
commits as a user starts them, in turn: on a folder that nobody has read yet (``first``), after one more cell has finished
(``one more``), and with nothing new (``again``). The commit before keeps nothing, so it is timed once a round. Seconds are
of the CPU, which a busy machine hardly changes. The result is ``results/economy_boards.json``.
"""

import argparse
import itertools
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml

from benchmarks.measure import RESULTS, median_ratio
from charmlib.evaluation.intervals import bootstrap, save_resamples
from charmlib.evaluation.runs import RunFolder, save_predictions
from charmlib.files import write_json

ROOT = Path(__file__).parents[1]
LEFT = (".board.json", "leaderboard.csv", "report.html")  # what a commit keeps in a grid's folder between its boards
DISTINCT = 21  # sets of scores; drawing the resamples of 500 would take minutes


def many_cells(cell: RunFolder, folder: Path, number: int = 500) -> list[Path]:
    """A grid's folder of so many finished cells made from one; returns the cells' folders."""
    metrics, test, valid, grid = cell.metrics, cell.test, cell.valid, []
    for i, (setting, seed) in enumerate(itertools.islice(itertools.product(range(number // 10), range(10)), number)):
        own = {"k": 1 + setting % 5, "threshold": round(0.01 * (1 + setting // 5), 2), "seed": seed}
        params = metrics["params"] | own
        name = "k{k}_t{threshold}_seed={seed}".format(**own)
        target, source = folder / name, folder / grid[i % DISTINCT]["id"] if i >= DISTINCT else None
        shutil.copytree(cell.path, target, ignore=shutil.ignore_patterns("*.ipynb", "*.safetensors", "fastai", "resamples.npz"))
        if source:
            shutil.copy(source / "predictions.npz", target)
            shutil.copy(source / "resamples.npz", target)
        else:
            draw = np.random.default_rng(i)
            parts = {part: {**{key: getattr(p, key) for key in ("ids", "patients", "labels")}, **p.about, "logits":
                            (p.logits + draw.normal(0, 0.3, p.logits.shape)).astype(np.float32)}
                     for part, p in (("valid", valid), ("test", test))}
            save_predictions(target / "predictions.npz", parts, test.classes, test.normal_class)
            noisy = parts["test"]
            save_resamples(target / "resamples.npz", bootstrap(noisy["labels"], noisy["logits"], noisy["patients"]))
        score = float(np.random.default_rng(number + i).normal(0.7, 0.01))
        write_json(target / "metrics.json", metrics | {"cell": name, "params": params,
                                                       "valid": metrics["valid"] | {"mean_auc": score}})
        grid.append({"id": name, "params": {k: v for k, v in params.items() if k != "run_dir"}, "axes": own})
    (folder / "grid.yaml").write_text(yaml.safe_dump({"name": folder.name, "axes": ["k", "threshold", "seed"], "cells": grid}))
    for split in (*cell.path.glob("split*.csv"), *cell.path.parent.glob("split*.csv")):
        shutil.copy(split, folder)
    return [folder / each["id"] for each in grid]


def seconds_of(code: Path, *command: str) -> float:
    """CPU seconds of a command with the charmlib of a checkout; a failed one raises with what it said."""
    start = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    done = subprocess.run([sys.executable, "-W", "ignore", *map(str, command)], cwd=code, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{code}:{ROOT}"})
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - start, 2)


def boards(cell: str, before: str, cell_before: str, number: int, rounds: int) -> dict:
    """Seconds of status and report by case and commit, one list over the rounds each."""
    from charmlib.grid.board import record_text  # which the commit before lacks

    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        old, folder, folder_before = Path(place) / "before", Path(place) / "grid", Path(place) / "grid_before"
        old.mkdir()
        archive = subprocess.run(["git", "archive", before], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x"], cwd=old, input=archive, check=True)
        seconds_of(old, __file__, "make", cell_before, folder_before, "--cells", number)
        cells = many_cells(RunFolder(cell), folder, number)
        (folder / "grid.yaml").write_text(record_text(yaml.safe_load((folder / "grid.yaml").read_text())))
        for turn in range(rounds):
            for what in ("status", "report"):
                own = seconds_of(old, "-m", "charmlib", "grid", what, folder_before)
                for case in ("first", "one more", "again"):
                    if case == "first":
                        for file in LEFT:
                            (folder / file).unlink(missing_ok=True)
                    elif case == "one more":
                        with open(cells[turn] / "metrics.json", "a") as file:
                            file.write(" ")
                    seconds = found.setdefault(f"{what}, {case}", {"before": [], "now": []})
                    seconds["before"].append(own)
                    seconds["now"].append(seconds_of(ROOT, "-m", "charmlib", "grid", what, folder))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["boards", "make"])
    parser.add_argument("cell", help="folder of a finished cell")
    parser.add_argument("out", nargs="?", help="of make: the grid's folder")
    parser.add_argument("--cell-before", help="folder of one that the other commit has finished [default: the same]")
    parser.add_argument("--before", default="b5f82ba", help="commit to compare with")
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    if given.what == "make":
        many_cells(RunFolder(given.cell), Path(given.out), given.cells)
        return
    cells = [str(Path(cell).resolve()) for cell in (given.cell, given.cell_before or given.cell)]
    found = boards(cells[0], given.before, cells[1], given.cells, given.rounds)
    share = {case: round(median_ratio(seconds["now"], seconds["before"]), 3) for case, seconds in found.items()}
    test = RunFolder(given.cell).test
    write_json(RESULTS / "economy_boards.json", {
        "before": given.before, "rounds": given.rounds, "cells": given.cells,
        "test_images": len(test.ids), "classes": len(test.classes),
        "cpu_seconds": found, "share_of_before": share, "asked": "at most a third, each"})
    for case, seconds in found.items():
        print(f"{case}: {statistics.median(seconds['before']):.1f} s before, {statistics.median(seconds['now']):.1f} s now: "
              f"x {share[case]}")
    print(json.dumps(share))


if __name__ == "__main__":
    main()
