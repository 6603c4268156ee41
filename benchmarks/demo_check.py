"""The demo's own judgement: the cell that validation ranks first against logistic regression on 16 x 16 thumbnails.

    python benchmarks/demo_check.py runs/demo

Exits 1 if that cell's mean test AUC is below 0.75, or less than 0.10 above the thumbnails'.
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
    print(f"\nranked first by validation: {best['cell']}, mean test AUC {ours:.4f} on {metrics['data']['name']}; "
          f"logistic regression on 16 x 16 thumbnails {theirs:.4f}")
    for name in ("leaderboard.csv", "roc.png", "report.html"):
        print(folder / name)
    if ours < FLOOR or ours - theirs < MARGIN:
        print(f"FAILED: wanted at least {FLOOR} and {MARGIN} more than the thumbnails", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
