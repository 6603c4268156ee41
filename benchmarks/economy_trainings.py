"""What 36 cells that share a training cost, as a multiple of one cell alone.

    python -m benchmarks.economy_trainings ../shared/nih64 ../shared/weights/mobilenet_v2_imagenet1001.pt

Three decays of the mean of the weights x four vote temperatures x three weights of the votes on nih64 (64 pixels, 1 + 2 and 2
epochs, each stage keeps its last).
First one cell is run alone, then the grid, then three cells drawn at random alone. Seconds are of wall clock and of CPU time,
which other work on the machine disturbs less. The result is ``results/economy_trainings.json``.
"""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.measure import RESULTS
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_json

BASE = {"arch": "mobilenet_v2", "norm": "half", "image_size": 64, "stage1_frozen_epochs": 1, "stage1_epochs": 2,
        "stage1_lr": 1e-3, "stage1_batch": 64, "stage2_batch": 64, "stage2_epochs": 2, "stage2_lr_min": 5e-4,
        "stage2_lr_max": 5e-4, "monitor": "last", "patience": 0}
AXES = {"momentum": [0.99, 0.999, 0.9999], "vote_temperature": [0.05, 0.1, 0.2, 0.4], "vote_weight": [0.3, 0.5, 0.7]}


def timed(grid: Path, out: Path, *assignments: str) -> dict[str, float]:
    """Run a grid in a process of its own; its seconds of wall clock, and of CPU with all that it started."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-m", "charmlib", "grid", "run", str(grid), "--out", str(out), "--workers", "1"]
    given = [part for one in assignments for part in ("-p", one)]
    with open(out.with_suffix(".log"), "w") as log:
        subprocess.run([*command, *given], check=True, stdout=log, stderr=subprocess.STDOUT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": round(time.perf_counter() - start, 1),
            "cpu": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_root")
    parser.add_argument("weights")
    parser.add_argument("--limit", type=int, default=0, help="images a part, to try it")
    parser.add_argument("--drawn", type=int, default=3, help="cells to train alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = BASE | {"data_root": str(Path(given.data_root).resolve()), "weights": str(Path(given.weights).resolve()),
                       "limit": given.limit}
        (folder / "base.yaml").write_text(yaml.safe_dump(base))
        grid = folder / "grid_shared.yaml"
        grid.write_text(yaml.safe_dump({"base": "base.yaml", "axes": AXES}))
        first = [f"{name}={values[0]}" for name, values in AXES.items()]
        timed(grid, folder / "warm", *first, "limit=200")  # decodes the images
        alone = timed(grid, folder / "alone", *first)
        shared = timed(grid, folder / "shared")
        drawn = [{name: random.Random(i).choice(values) for name, values in AXES.items()} for i in range(given.drawn)]
        for cell in drawn:
            timed(grid, folder / "drawn", *(f"{name}={value}" for name, value in cell.items()))
        equal = {path.name: RunFolder(path).card["sha256"] == RunFolder(folder / "shared" / path.name).card["sha256"]
                 and (path / "predictions.npz").read_bytes() == (folder / "shared" / path.name / "predictions.npz").read_bytes()
                 for path in (folder / "drawn").glob("*") if RunFolder(path).done}
        logs = "\n".join(path.read_text() for path in (folder / "shared").glob("*/log.txt"))
        trained = re.findall(r"trained (\d+) of (\d+) epochs", logs)
        epochs = [len(RunFolder(path).history) for path in (folder / "shared").iterdir() if RunFolder(path).done]
    share = {name: round(shared[name] / alone[name], 2) for name in alone}
    figures = {"cells": len(epochs), "epochs_of_all_cells": sum(epochs),
               "epochs_trained": sum(epochs) - sum(int(all_) - int(own) for own, all_ in trained),
               "alone": alone, "shared": shared, "times_one_cell": share, "asked": 2.0,
               "drawn_cells_equal_to_the_bit": equal, "limit": given.limit, "axes": AXES, "settings": BASE,
               "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS")}
    if not given.limit:
        write_json(RESULTS / "economy_trainings.json", figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
