"""Copy what is worth keeping of a finished grid: its leaderboard, and each class's test AUC by cell.

    python benchmarks/keep_results.py runs/nih64 benchmarks/results/nih64

writes ``<target>_leaderboard.csv``, ``<target>_per_class.csv``, ``<target>_roc.png`` and ``<target>.json`` (split, device,
versions).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd

from charmlib.evaluation.results import load_metrics, load_predictions
from charmlib.files import write_json


def main(folder: Path, target: Path) -> None:
    board = pd.read_csv(folder / "leaderboard.csv")
    board.to_csv(f"{target}_leaderboard.csv", index=False)
    done = {cell: load_metrics(folder / cell) for cell in board["cell"]}
    first = next(iter(done.values()))
    positives = (load_predictions(folder / board["cell"][0]).labels == 1).sum(0)
    table = pd.DataFrame({"test_positives": dict(zip(first["classes"], positives.tolist())),
                          **{cell: m["test"]["auc"] for cell, m in done.items()}})
    table.round(4).to_csv(f"{target}_per_class.csv", index_label="class")
    write_json(f"{target}.json", {
        "split": first["split"], "device": first["device"], "precision": first["precision"], "versions": first["versions"],
        "seed": first["params"]["seed"], "bank": {cell: m["bank"] for cell, m in done.items()},
        "seconds": {cell: m["seconds"] for cell, m in done.items()}})
    shutil.copyfile(folder / "roc.png", f"{target}_roc.png")
    print(board.to_string(index=False))
    print(table.round(3).to_string())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
