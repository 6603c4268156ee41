"""What the memory banks of a grid's cells hold: ``enrichment.csv``, and pictures for its report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from charmlib.evaluation.enrichment import NONE, compare_enrichment
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_whole
from charmlib.grid.board import board_axes
from charmlib.viz.bank_content import plot_bank_history, plot_enrichment_map


def bank_table(folder: Path, board: pd.DataFrame) -> pd.DataFrame | None:
    """One row a finished cell with a bank that is not empty, seeds of a setting together; None where there is none.

    Columns: cell, the grid's axes, slots, then as :func:`charmlib.evaluation.enrichment.compare_enrichment`.
    """
    banks = {cell: RunFolder(folder / cell).metrics.get("bank") or {} for cell in board["cell"][board["split"].notna()]}
    found = {cell: bank["enrichment"] for cell, bank in banks.items() if bank.get("enrichment")}
    if not found:
        return None
    axes = board_axes(board)
    table = board[["cell", *axes]].merge(compare_enrichment(found), on="cell")
    order = [a for a in axes if a != "seed"] + [a for a in axes if a == "seed"]
    return table.sort_values([*order, "cell"], key=lambda c: c.astype(str), ignore_index=True)


def without_expected(table: pd.DataFrame) -> pd.DataFrame:
    """The table for reading: what random slots would have is left for the groups and for no finding only."""
    return table[[c for c in table.columns if not c.endswith(" expected") or c.startswith(("any ", "no finding"))]]


def write_bank_table(out: Path, table: pd.DataFrame) -> None:
    """Write ``enrichment.csv``."""
    write_whole(out / "enrichment.csv", lambda temporary: table.to_csv(temporary, index=False))


def bank_pictures(folder: Path, board: pd.DataFrame, table: pd.DataFrame, *, note: str = "") -> list[tuple[str, object]]:
    """(title, figure): enrichment of every cell, and, for cells of one split, what filled the banks over time, a panel a
    setting in the order of the board."""
    pictures = [("What the memory banks hold", plot_enrichment_map(table, note=note))]
    held = board[board["cell"].isin(table["cell"])]
    axes = [a for a in (*board_axes(board), "split") if a != "seed" and held[a].astype(str).nunique() > 1]
    histories: dict[str, list[pd.DataFrame]] = {}
    for _, row in held.iterrows():
        path = folder / row["cell"] / "bank_history.csv"
        if path.is_file():
            setting = ", ".join(f"{a} {row[a]}" for a in axes) or ("" if "seed" in board_axes(board) else row["cell"])
            histories.setdefault(setting or "all seeds", []).append(pd.read_csv(path))
    if histories and held["split"].nunique() == 1:  # one training part, so one prevalence of each finding
        bank = RunFolder(folder / held["cell"].iloc[0]).metrics["bank"]["enrichment"]
        shares = {**{name: f["prevalence"] for name, f in bank["classes"].items()}, NONE: bank[NONE]["prevalence"]}
        pictures.append(("What filled the memory banks", plot_bank_history(histories, shares, note=note)))
    return pictures
