"""``leaderboard.csv``: ranked by validation, with the test score and its interval beside, for reading."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import yaml

from charmlib.evaluation.results import load_metrics
from charmlib.files import write_whole
from charmlib.grid.cells import GridError, cell_status

LAST = ["valid_mean_auc", "test_mean_auc", "ci_low", "ci_high", "split", "n_images", "n_patients", "seconds",
        "overhead_seconds", "status"]

_NEEDS = {"momentum": "use_momentum", **dict.fromkeys(
    ("k", "threshold", "bank_size", "strategy", "rule", "retrieval", "bank_norm"), "use_bank")}
"""An axis says nothing about a cell whose part is switched off, and stays blank there."""


def leaderboard(folder: str | Path, grid=None) -> pd.DataFrame:
    """Collect the cells of a grid's folder, write ``leaderboard.csv`` there, and return it.

    Rank 1 has the highest **validation** mean AUC; the test column decides nothing. Quick checks and cells that are
    not done have no rank. Ranks are only given within one split: cells of another split are another contest.

    Raises
    ------
    GridError
        The folder holds no grid.
    """
    folder = Path(folder)
    cells, axes = _cells(folder, grid)
    rows = []
    for cell, params in cells.items():
        row = {"rank": pd.NA, "cell": cell, "status": cell_status(folder / cell)}
        m = load_metrics(folder / cell) if row["status"] == "done" else None
        params = m["params"] if m else params
        row |= {name: None if not params.get(_NEEDS.get(name), True) else params[name] for name in axes}
        if m:
            drawn = " (drawn phantoms)" if m["data"]["drawn"] else ""
            row |= {"valid_mean_auc": m["valid"]["mean_auc"], "test_mean_auc": m["test"]["mean_auc"],
                    "ci_low": m["test"]["mean_auc_low"], "ci_high": m["test"]["mean_auc_high"],
                    "split": f"{m['split']['name']} {m['split']['hash'][:8]}{drawn}",
                    "n_images": m["split"]["test"]["images"], "n_patients": m["split"]["test"]["patients"],
                    "seconds": round(m["seconds"]["train"] + m["seconds"]["score"], 1),
                    "overhead_seconds": m["seconds"]["overhead"]}
            if m["quick_check"]:
                row["status"] = "quick check"
        rows.append(row)
    board = pd.DataFrame(rows, columns=["rank", "cell", *axes, *LAST])
    ranked = board["status"] == "done"
    order = board[ranked].groupby("split")["valid_mean_auc"].rank(ascending=False, method="first")
    board["rank"] = order.reindex(board.index).astype("Int64")
    board = board.sort_values(["split", "rank", "status", "cell"], na_position="last", ignore_index=True)
    write_whole(folder / "leaderboard.csv", lambda temporary: board.to_csv(temporary, index=False))
    return board


def _cells(folder: Path, grid) -> tuple[dict[str, dict], list[str]]:
    """Cell -> parameters, and the axes' names: of the given grid, or of the one that the folder was made with."""
    if grid is not None:
        listed, axes = {c.id: c.params for c in grid.cells}, list(grid.axes)
    elif (folder / "grid.yaml").is_file():
        kept = yaml.safe_load((folder / "grid.yaml").read_text())
        listed, axes = {c["id"]: c["params"] for c in kept["cells"]}, list(kept["axes"])
    else:
        raise GridError(f"{folder} holds no grid (no grid.yaml)")
    # cells of another call of the same grid (a pinned axis, another shard) stay on the board
    others = sorted(p.parent.name for p in folder.glob("*/metrics.json") if p.parent.name not in listed)
    return listed | {name: {} for name in others}, [a for a in axes if a != "split"]  # which the board has anyway
