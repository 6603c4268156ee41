"""The demo's own judgement: what its cells scored, in a sentence, and where to look next.

    python benchmarks/demo_check.py runs/demo

Exits 1 if the mean test AUC of the cell that validation ranks first is below 0.75, or less than 0.10 above that of logistic
regression on 16 x 16 thumbnails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from charmlib.data.dataset import open_dataset
from charmlib.evaluation.compare import mean_auc_difference
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_json

FLOOR, MARGIN = 0.75, 0.10


def thumbnail_auc(data) -> float:
    """Mean test AUC of one logistic regression a class on 16 x 16 thumbnails of the training part."""
    small = np.stack([np.asarray(Image.fromarray(i).resize((16, 16), Image.Resampling.BOX)) for i in data.images])
    small = small.reshape(len(small), -1) / 255.0
    train, test = data.rows("train"), data.rows("test")
    scores = []
    for c in range(len(data.classes)):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
        scores.append(model.fit(small[train], data.labels[train, c]).decision_function(small[test]))
    return mean_auc(data.labels[test], np.stack(scores, 1), data.classes)


def sentence(folder: Path, board: pd.DataFrame, thumbnails: float) -> str:
    """The result of CHARM's first cell by validation beside the plain network, the other systems and the thumbnails."""
    board = board.sort_values("rank").set_index("cell")
    charm = next(cell for cell in board.index if cell.startswith("charm"))
    auc = board["test_mean_auc"]
    low, high, _ = mean_auc_difference(RunFolder(folder / "plain"), RunFolder(folder / charm))
    others = ", ".join(f"{cell} {auc[cell]:.3f}" for cell in board.index if cell != "plain" and not cell.startswith("charm"))
    return (f"CHARM's default ({charm}) has a mean test AUC of {auc[charm]:.3f} and the plain network {auc['plain']:.3f}: a "
            f"difference of {auc[charm] - auc['plain']:+.3f} (95 % {low:+.3f} to {high:+.3f}).\n"
            f"The others: {others}, logistic regression on thumbnails {thumbnails:.3f}.\n"
            "This is one seed on drawn X-rays, which test software and say nothing of patients.")


def main(folder: Path) -> int:
    board = pd.read_csv(folder / "leaderboard.csv")
    best = board[board["rank"] == 1].iloc[0]
    metrics = RunFolder(folder / best["cell"]).metrics
    kept = folder / "thumbnails.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    if known.get("split") != metrics["split"]["hash"]:
        known = {"split": metrics["split"]["hash"], "mean_test_auc": thumbnail_auc(open_dataset(metrics["params"]))}
        write_json(kept, known)
    ours, theirs = metrics["test"]["mean_auc"], known["mean_test_auc"]
    print(f"\n{sentence(folder, board, theirs)}\n\nopen this report: {(folder / 'report.html').resolve().as_uri()}\n"
          f"open the explorer: make explore RUNS={folder}")
    if ours < FLOOR or ours - theirs < MARGIN:
        print(f"FAILED: wanted at least {FLOOR} and {MARGIN} more than the thumbnails", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
