"""Keep the results of the grid that compares memory strategies, with the difference of each from no memory.

    python benchmarks/keep_memaug.py runs/nih64_memaug benchmarks/results/nih64_memaug

writes ``<target>_leaderboard.csv``, ``<target>_against_none.csv`` (for each setting, the mean over its seeds of the paired
difference in mean test AUC from no memory with the same seed), ``<target>_enrichment.csv`` and ``.png``,
``<target>_history.png`` (content of the banks by epoch) and ``<target>.json`` (split, device, versions, seconds).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from charmlib.evaluation.intervals import interval, mean_of_defined
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.tables import split_note
from charmlib.files import write_json
from charmlib.grid.board import leaderboard
from charmlib.grid.report import bank_pictures, bank_table

NONE = "no_memory"
RARE = 4
"""Number of the rarest findings with a mean of their own."""


def setting(cell: str) -> str:
    """A cell's name without its seed: 'strategy=fifo_seed=85' is 'fifo'."""
    return cell.rpartition("_seed=")[0].removeprefix("strategy=")


def against_none(folder: Path, board: pd.DataFrame) -> pd.DataFrame:
    """One row per setting: validation and test mean AUC over seeds, and the paired difference from no memory, also over the
    rarest findings. Resamples draw patients. Differences are averaged over the seeds within each resample, and also given by
    seed."""
    runs: dict[str, dict[int, RunFolder]] = {}
    for run in (RunFolder(folder / cell) for cell in board["cell"]):
        runs.setdefault(setting(run.name), {})[run.metrics["params"]["seed"]] = run
    first = RunFolder(folder / board["cell"].iloc[0]).metrics
    rare = [first["classes"].index(name) for name in rarest(first)]
    rows = []
    for name, by_seed in runs.items():
        row = {"setting": name, "seeds": len(by_seed),
               "valid_mean_auc": np.mean([run.metrics["valid"]["mean_auc"] for run in by_seed.values()]),
               "test_mean_auc": np.mean([run.metrics["test"]["mean_auc"] for run in by_seed.values()])}
        if name != NONE:
            for what, columns in (("difference", slice(None)), ("rare_difference", rare)):
                samples, points = [], []
                for ours, theirs in ((run, runs[NONE][seed]) for seed, run in by_seed.items()):
                    samples.append(mean_of_defined(ours.resamples.auc[:, columns])
                                   - mean_of_defined(theirs.resamples.auc[:, columns]))
                    points.append(_mean(ours.metrics, columns) - _mean(theirs.metrics, columns))
                low, high, _ = interval(np.mean(samples, axis=0))
                row |= {what: np.mean(points), f"{what}_low": low, f"{what}_high": high,
                        f"{what}_by_seed": " ".join(f"{p:+.4f}" for p in points)}
        rows.append(row)
    return pd.DataFrame(rows).sort_values("valid_mean_auc", ascending=False, ignore_index=True)


def rarest(metrics: dict) -> list[str]:
    """The findings with the fewest positives in the training part."""
    return sorted(metrics["classes"], key=metrics["train_prevalence"].get)[:RARE]


def _mean(metrics: dict, columns) -> float:
    values = np.array([metrics["test"]["auc"][name] for name in metrics["classes"]], dtype=float)
    return float(np.nanmean(values[columns]))


def main(folder: Path, target: Path) -> None:
    board = leaderboard(folder)
    waiting = board["cell"][board["status"] != "done"].tolist()
    if waiting:
        raise SystemExit(f"{folder}: {', '.join(waiting)} is not done; run the grid again first")
    board.to_csv(f"{target}_leaderboard.csv", index=False)
    table = against_none(folder, board)
    table.round(4).to_csv(f"{target}_against_none.csv", index=False)
    shutil.copyfile(folder / "enrichment.csv", f"{target}_enrichment.csv")
    metrics = {cell: RunFolder(folder / cell).metrics for cell in board["cell"]}
    one = next(iter(metrics.values()))
    pictures = bank_pictures(folder, board, bank_table(folder, board), note=split_note(one))
    for name, figure in zip(("enrichment", "history"), pictures.values()):
        figure.savefig(f"{target}_{name}.png", dpi=80)
        plt.close(figure)
    write_json(f"{target}.json", {
        "split": one["split"], "device": one["device"], "precision": one["precision"], "versions": one["versions"],
        "train_prevalence": one["train_prevalence"], "rarest": rarest(one),
        "seconds": {c: m["seconds"] for c, m in metrics.items()},
        "accepted": {c: m["bank"] and m["bank"]["accepted"] for c, m in metrics.items()}})
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
