"""``report.html`` and ``roc.png`` of a grid: one self-contained page."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.published import beside_published
from charmlib.evaluation.score import evaluate_run
from charmlib.evaluation.tables import class_table, origin_note, split_note, with_intervals
from charmlib.files import write_whole
from charmlib.grid.banks import bank_pictures, bank_table, without_expected, write_bank_table
from charmlib.grid.board import NO_VALIDATION, board_axes, over_seeds
from charmlib.viz import page
from charmlib.viz.curves import plot_roc, plot_roc_bands
from charmlib.viz.heat_maps import heat_maps
from charmlib.viz.history import plot_history


def write_report(folder: str | Path, board: pd.DataFrame, grid=None, *, out: str | Path | None = None) -> Path | None:
    """Write ``roc.png``, ``roc_bands.png`` (of the cell that validation ranks first; where none has a rank, of the board's
    first), ``seeds.csv`` (with a seed axis), ``enrichment.csv`` (with banks) and ``report.html`` into the grid's folder, or
    ``out``; None while no cell is done."""
    folder = Path(folder)
    out = Path(out or folder)
    ranked = board[board["rank"] == 1]
    if ranked.empty:
        ranked = board[board["status"].isin(["quick check", "control", NO_VALIDATION])]
    if ranked.empty:
        return None
    best = ranked.iloc[0]
    metrics, predictions = evaluate_run(folder / best["cell"])  # anew, so that runs of an older version have all of it
    note, part = split_note(metrics), metrics["test"]
    first = pd.notna(best["rank"])
    named = f"{best['cell']}, {'ranked first by validation' if first else 'not ranked'}"
    seeds = over_seeds(board)
    if seeds is not None:
        write_whole(out / "seeds.csv", lambda temporary: seeds.to_csv(temporary, index=False))
    banks = bank_table(folder, board)
    if banks is not None:
        write_bank_table(out, banks)
    with matplotlib.rc_context({"figure.max_open_warning": 0}):
        roc = plot_roc(predictions, title=named, note=note)
        write_whole(out / "roc.png", lambda temporary: roc.savefig(temporary, format="png", dpi=130))
        bands = plot_roc_bands(predictions, part, title=named, note=note)
        write_whole(out / "roc_bands.png", lambda temporary: bands.savefig(temporary, format="png", dpi=130))
        pictures = [("ROC curves on the whole test part", roc), ("Interval bands", bands)]
        maps = heat_maps(board, note=note)
        if maps is not None:
            pictures.append(("Mean test AUC over the grid (for reading; ranks come from validation)", maps))
        pictures.append((f"Training of {best['cell']}", plot_history(pd.read_csv(folder / best["cell"] / "history.csv"),
                                                                     note=note)))
        if banks is not None:
            pictures += bank_pictures(folder, board, banks, note=note)
        drawn = [text for title, figure in pictures for text in (page.heading(title), page.picture(figure, title))]
        for _, figure in pictures:  # or a notebook that runs the grid shows them all
            plt.close(figure)
    name = grid.name if grid is not None else folder.name
    listed, apart = parted(board)
    parts = [page.paragraph(f"{note}. {origin_note(metrics)}.", ""), page.heading("Leaderboard"),
             page.paragraph(("Ranked by validation mean AUC. " if first else "No cell is ranked. ")
                            + "The test columns are for reading, with 95 % intervals by bootstrap over patients."
                            + (f" '=' marks cells whose paired difference from {best['cell']} has an interval that holds 0: "
                               "the test part cannot tell them from it." if first else "")),
             *([page.table(shown_board(listed), "first board" if first else "board")] if len(listed) else [])]
    if seeds is not None:
        parts += [page.heading("Over seeds"),
                  page.paragraph("Mean and standard deviation over training seeds, on one test part."),
                  page.table(with_intervals(seeds, 4), "first")]
    parts += [page.heading(f"Classes of {best['cell']}"),
              page.table(with_intervals(class_table(part, predictions.positives)), "first")]
    if banks is not None:
        parts += [page.heading("Do the banks hold rare findings?"),
                  page.paragraph("Share of a bank's slots with a finding over its prevalence in the training part, the rarest "
                                 "first, with 95 % intervals by bootstrap over the training part's patients; runs that differ "
                                 "in their seed alone show what training itself adds to that. 'Expected' is what slots drawn "
                                 "at random would have, each from the images of its stage: a bank that still holds slots of "
                                 "stage 1, which shows findings only, is enriched without any choice."),
                  page.table(with_intervals(without_expected(banks), 2).replace("undefined", ""))]
    if len(apart):
        parts += [page.heading("Without a validation part"), *(page.paragraph(f"{line}.") for line in board_notes(apart)),
                  page.table(shown_apart(apart), "board")]
    published, remark = beside_published(metrics)
    parts += [*drawn, page.heading("Beside published figures"), page.paragraph(remark)]
    if published is not None:
        parts.append(page.table(with_intervals(published, 4), "words"))
    return page.write_page(out / "report.html", f"Grid {name}", parts, drawn=metrics["data"]["drawn"])


def board_notes(board: pd.DataFrame) -> list[str]:
    """A line for each split on the board (images, patients, share of positives), and why some cells have no rank."""
    lines = []
    for split, cells in board.dropna(subset=["split"]).groupby("split"):
        first = cells.iloc[0]
        lines.append(f"split {split}: {int(first['n_images']):,} test images of {int(first['n_patients']):,} patients, "
                     f"{first['positive_share']:.1%} with a finding")
    apart = parted(board)[1]["cell"]
    return lines + ([f"no validation: {', '.join(apart)} trained on the validation patients too (valid_fraction 0); nothing "
                     "was chosen on validation, so no rank"] if len(apart) else [])


def parted(board: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A leaderboard without the cells that had no validation part, and these."""
    apart = board["status"] == NO_VALIDATION
    return board[~apart], board[apart]


def shown_apart(apart: pd.DataFrame) -> pd.DataFrame:
    """Cells without a validation part for reading: a list, not a ranking."""
    return shown_board(apart).drop(columns=["rank", "valid AUC", "less the first (95 %)"])


def shown_board(board: pd.DataFrame) -> pd.DataFrame:
    """A leaderboard for reading: intervals in one column, '=' at cells that cannot be told from the first, and the split's
    columns only where they differ (they are said above)."""
    shown = board.rename(columns={"ci_low": "test_mean_auc low", "ci_high": "test_mean_auc high",
                                  "diff_low": "diff_first low", "diff_high": "diff_first high"})
    shown["cell"] += shown["same_as_first"].eq(True).map({True: " =", False: ""})
    shown["overhead_seconds"] = shown["overhead_seconds"].round(1)
    if shown["split"].dropna().nunique() <= 1:
        shown = shown.drop(columns=["split", "n_images", "n_patients", "positive_share"])
    plain = [*board_axes(board), "seconds", "overhead_seconds"]
    for column in plain:
        shown[column] = ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else str(v) for v in shown[column]]
    return with_intervals(shown.drop(columns="same_as_first")).replace("undefined", "").rename(columns={
        "valid_mean_auc": "valid AUC", "test_mean_auc": "test AUC (95 %)", "diff_first": "less the first (95 %)",
        "overhead_seconds": "overhead"})
