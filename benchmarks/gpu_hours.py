"""GPU hours that a grid file takes at most on the NIH set, from counted operations and an assumed rate. Nothing is run.

    python -m benchmarks.gpu_hours      # writes results/gpu_hours.csv

Operations are those of results/costs_*.csv, at other sizes in proportion to the pixels. Every phase takes all its epochs.
Cells whose network that file lacks are counted in the column ``left out``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from charmlib.files import write_text
from charmlib.grid import load_grid
from charmlib.training.recipes import phases

HERE = Path(__file__).parent
COSTS, OUT = HERE / "results/costs_cpu2_fp32_torch2.14.1.csv", HERE / "results/gpu_hours.csv"
IMAGES, TEST = {"all": 86_524, "findings": 36_024}, 25_596  # of the official lists
RATES = 8.0, 2.0  # TFLOP/s that a T4 is assumed to sustain, at best and at worst; its peak in fp16 is 65


def operations(params: Mapping, costs: Mapping[tuple[str, str], Mapping]) -> float | None:
    """TFLOP of a cell's training and scoring; None for a network that the costs lack."""
    on = [params[f"use_{part}"] for part in ("momentum", "attention", "bank")]
    votes = on[2] and params["answer"] == "votes"
    row = costs.get((params["arch"], "all" if all(on) else "bank" if on[2] and not votes else "plain"))
    if row is None or params["system"] != "charm":
        return None
    train, look = (float(row[f"{of}_gflops"]) * (params["image_size"] / 224) ** 2 / 1e3 for of in ("training", "inference"))
    valid = IMAGES["all"] * params["valid_fraction"]
    total = (valid + TEST) * look
    for phase in phases(params, 1.0):
        images = IMAGES[phase.images] * (1 - params["valid_fraction"])
        after = valid + (params["bank_size"] if votes else 0)
        total += phase.epochs * (images * (look if phase.trains == ("head",) else train) + after * look)
    return total


def rows() -> list[dict]:
    """A row for each grid file on the NIH set."""
    with open(COSTS, newline="") as file:
        costs = {(row["arch"], row["case"]): row for row in csv.DictReader(file)}
    out = []
    for path in sorted((HERE.parent / "params").glob("grid_*.yaml")):
        if path.stem.startswith(("grid_nih64", "grid_demo")):
            continue
        done = [operations(cell.params, costs) for cell in load_grid(path).cells]
        known = [value for value in done if value is not None]
        out.append({"grid": path.name, "cells": len(done), "left out": len(done) - len(known), **{
            f"hours at {rate:g} TFLOP/s": f"{sum(known) / rate / 3600:.0f}" if known else "" for rate in RATES}})
    return out


if __name__ == "__main__":
    found = rows()
    write_text(OUT, "\n".join([",".join(found[0]), *(",".join(map(str, row.values())) for row in found)]) + "\n")
    print(OUT.read_text())
