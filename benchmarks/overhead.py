"""Overhead of a grid cell (its time without training and scoring), as a multiple of the bare imports that it needs.

    python -m benchmarks.overhead

Measures `overhead_seconds` of cells on drawn phantoms: the time from the start of a cell's process to its metrics.json,
without the epochs and the scoring. Before each cell, one ``import torch, fastai.vision.learner`` is timed in a fresh
interpreter, so that both run under the same load.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

from benchmarks.measure import median_ratio, save
from charmlib.data.phantom import make_phantoms
from charmlib.evaluation.runs import RunFolder
from charmlib.grid import run_grid

BARE = "import torch, fastai.vision.learner"
SETTINGS = {"arch": "mobilenet_v2", "weights": "none", "norm": "half", "image_size": 64, "stage1_frozen_epochs": 1,
            "stage1_epochs": 1, "stage2_epochs": 1, "stage1_lr": 1e-3, "stage1_batch": 32, "stage2_batch": 32}


def bare_import() -> float:
    """Seconds of a fresh interpreter that imports what every cell needs."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", BARE], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    bare, overhead = [], []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = make_phantoms(folder / "phantoms", images=600, size=64)
        (folder / "base.yaml").write_text(yaml.safe_dump({**SETTINGS, "data_root": str(data)}))
        (folder / "grid_one.yaml").write_text("base: base.yaml\naxes: {seed: [2]}\n")
        for i in range(rounds + 1):
            seconds = bare_import()
            run_grid(folder / "grid_one.yaml", out=folder / f"round{i}", say=lambda line: None)
            if i:  # the first of each fills the caches of the disk
                bare.append(seconds)
                overhead.append(RunFolder(folder / f"round{i}" / "seed=2").metrics["seconds"]["overhead"])
    figures = {"bare_import_seconds": bare, "overhead_seconds": overhead, "ratio": round(median_ratio(overhead, bare), 2),
               "asked": 3.0, "settings": SETTINGS}
    path = save("overhead", torch.device("cpu"), "fp32", figures)
    print(f"bare import {statistics.median(bare):.1f} s, a cell's overhead {statistics.median(overhead):.1f} s: "
          f"x {figures['ratio']} (asked: at most x 3)\n{path}")


if __name__ == "__main__":
    main()
