"""GPU hours that a grid file takes at most on the NIH set, from counted operations and an assumed rate. Nothing is run.

    python -m benchmarks.gpu_hours      # writes results/gpu_hours.csv

Operations are those of results/costs_*.csv, at other sizes in proportion to the pixels; for backbones that it lacks, those of
the last phase of a preset with that backbone in results/costs_presets_*.csv. Every phase takes all its epochs.
Cells that share a training count it once, and their scoring each, though they also share features. Cells whose network that
file lacks are counted in the column ``left out``.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from charmlib.files import write_text
from charmlib.grid import load_grid
from charmlib.grid.budget import CARDS
from charmlib.grid.sharing import training_of
from charmlib.training.recipes import phases, validations

HERE = Path(__file__).parent
COSTS, OUT = HERE / "results/costs_cpu2_fp32_torch2.14.1.csv", HERE / "results/gpu_hours.csv"
PRESETS = HERE / "results/costs_presets_cpu2_fp16_torch2.14.1.csv"
IMAGES, TEST = {"all": 86_524, "findings": 36_024}, 25_596  # of the official lists
RATES = CARDS["T4"]  # its peak in fp16 is 65


def operations(params: Mapping, costs: Mapping[tuple[str, str], Mapping]) -> tuple[float, float] | None:
    """TFLOP of a cell's training, and of its scoring; None for a network that the costs lack.

    Attention over three scales counts as nothing: it adds 0.4 % to EfficientNetV2-S.
    """
    votes = params["use_bank"] and params["answer"] == "votes"
    published = params["use_attention"] and params["attention"] != "scales"
    row = costs.get((params["arch"], "all" if published else "bank" if params["use_bank"] and not votes else "plain"))
    if row is None or params["system"] != "charm":
        return None
    train, look = (float(row[f"{of}_gflops"]) * (params["image_size"] / 224) ** 2 / 1e3 for of in ("training", "inference"))
    valid = IMAGES["all"] * params["valid_fraction"]
    trained, scored, plan = 0.0, (valid + TEST) * look, phases(params, 1.0)
    validated = validations(plan, params["monitor"])
    for phase in plan:
        images = IMAGES[phase.images] * (1 - params["valid_fraction"])
        trained += phase.epochs * images * (look if phase.head_only else train)
        scored += validated[phase.name] * (valid + (params["bank_size"] if votes else 0)) * look
    return trained, scored


def rows() -> list[dict]:
    """A row for each grid file on the NIH set."""
    with open(COSTS, newline="") as file:
        costs = {(row["arch"], row["case"]): row for row in csv.DictReader(file)}
    with open(PRESETS, newline="") as file:
        presets = {(row["arch"], "plain"): {of: float(row[of]) * (224 / int(row["size"])) ** 2
                                            for of in ("training_gflops", "inference_gflops")} for row in csv.DictReader(file)}
    costs = presets | costs
    out = []
    for path in sorted((HERE.parent / "params").glob("grid_*.yaml")):
        if path.stem.startswith(("grid_nih64", "grid_demo")):
            continue
        cells = [(training_of(cell.params), operations(cell.params, costs)) for cell in load_grid(path).cells]
        known = {training: done for training, done in cells if done is not None}
        total = sum(trained for trained, _ in known.values()) + sum(done[1] for _, done in cells if done is not None)
        out.append({"grid": path.name, "cells": len(cells), "trainings": len({training for training, _ in cells}),
                    "left out": sum(done is None for _, done in cells), **{
                        f"hours at {rate:g} TFLOP/s": f"{total / rate / 3600:.0f}" if known else "" for rate in RATES}})
    return out


if __name__ == "__main__":
    found = rows()
    write_text(OUT, "\n".join([",".join(found[0]), *(",".join(map(str, row.values())) for row in found)]) + "\n")
    print(OUT.read_text())
