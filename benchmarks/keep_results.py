"""Keep the results of a finished grid: leaderboard, classes, operating points, paired differences, pictures.

    python benchmarks/keep_results.py runs/nih64 benchmarks/results/nih64

writes ``<target>_leaderboard.csv``, ``<target>_per_class.csv`` (cells and classes with intervals),
``<target>_operating.csv`` (at Youden's point), ``<target>_paired.csv`` (each cell minus the first), ``<target>_*.png`` of the
cell that validation ranks first, and ``<target>.json`` (split, device, versions, calibration).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.compare import compare, verdict
from charmlib.evaluation.score import evaluate_run
from charmlib.evaluation.tables import class_table, operating_table, with_intervals
from charmlib.files import write_json
from charmlib.grid.board import leaderboard
from charmlib.grid.report import board_notes, shown_board
from charmlib.viz.run_report import run_pictures

KEPT = {"ROC curves with interval bands": "bands", "Precision and recall": "precision_recall", "AUC by class": "per_class",
        "Counts at the operating point 'youden'": "counts", "Calibration": "calibration",
        "Co-occurrence of findings (test part)": "cooccurrence"}


def main(folder: Path, target: Path) -> None:
    board = leaderboard(folder)
    board.to_csv(f"{target}_leaderboard.csv", index=False)
    scored = {cell: evaluate_run(folder / cell) for cell in board["cell"]}
    first, (metrics, test) = next(iter(scored.items()))
    classes = pd.concat([class_table(m["test"], p.positives).assign(cell=c) for c, (m, p) in scored.items()])
    classes.round(4).to_csv(f"{target}_per_class.csv", index=False)
    calls = pd.concat([operating_table(m["test"], "youden").assign(cell=c) for c, (m, _) in scored.items()])
    calls.round(4).to_csv(f"{target}_operating.csv", index=False)
    pairs = []
    for cell in list(scored)[1:]:
        table = compare(test, scored[cell][1])
        print(f"{cell} minus {first}: {verdict(table, first, cell)}")
        pairs.append(table.assign(first_run=first, second_run=cell))
    pd.concat(pairs).round(4).to_csv(f"{target}_paired.csv", index=False)
    write_json(f"{target}.json", {
        "split": metrics["split"], "device": metrics["device"], "precision": metrics["precision"],
        "versions": metrics["versions"], "seed": metrics["params"]["seed"],
        "bank": {c: m["bank"] for c, (m, _) in scored.items()},
        "seconds": {c: m["seconds"] for c, (m, _) in scored.items()},
        "calibration": {c: {k: {n: v[n] for n in ("temperature", "mean_ece", "mean_brier")}
                            for k, v in m["test"]["calibration"].items()} for c, (m, _) in scored.items()}})
    shutil.copyfile(folder / "roc.png", f"{target}_roc.png")
    for title, figure in run_pictures(metrics, test).items():
        if title in KEPT:
            figure.savefig(f"{target}_{KEPT[title]}.png", dpi=100)
        plt.close(figure)
    print("\n".join([*board_notes(board), shown_board(board).to_string(index=False)]))
    print(with_intervals(classes[classes["cell"] == first].drop(columns="cell")).to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
