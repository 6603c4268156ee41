"""``report.html``, pictures and tables of a grid."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.enrichment import NONE, compare_enrichment
from charmlib.evaluation.published import beside_published
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.tables import class_table, origin_note, split_note, with_intervals
from charmlib.files import write_csv, write_whole
from charmlib.grid.board import NO_VALIDATION, board_axes, over_seeds
from charmlib.viz import page
from charmlib.viz.bank_content import plot_bank_history, plot_enrichment_map
from charmlib.viz.curves import plot_roc, plot_roc_bands
from charmlib.viz.heat_maps import heat_maps
from charmlib.viz.history import plot_history

_BANKS = ("Share of a bank's slots with a finding over its prevalence in the training part, the rarest first, with 95 % "
          "intervals by bootstrap over the training part's patients; runs that differ only in their seed show the spread of "
          "training. 'Expected' is the share in slots drawn at random, each from the images of its stage: a bank that still "
          "holds slots of stage 1, which shows findings only, is enriched without any choice.")


def write_report(folder: str | Path, board: pd.DataFrame, *, name: str | None = None,
                 out: str | Path | None = None) -> Path | None:
    """Write a grid's report into its folder, or ``out``; None while no cell is done.

    Files: ``report.html``, ``roc.png`` and ``roc_bands.png`` (of the cell ranked first; the board's first if none has a rank),
    ``seeds.csv`` (with a seed axis), ``enrichment.csv`` (with banks). ``name`` is the grid's, the folder's by default.
    """
    folder = Path(folder)
    out = Path(out or folder)
    done = board[board["split"].notna()]
    if done.empty:
        return None
    best = done[done["rank"] == 1].iloc[0] if done["rank"].notna().any() else done.iloc[0]
    run, first = RunFolder(folder / best["cell"]), pd.notna(best["rank"])
    metrics, note = run.metrics, split_note(run.metrics)
    title = f"{run.name}, {'ranked first by validation' if first else 'not ranked'}"
    seeds, banks = over_seeds(board), bank_table(folder, board)
    for file, table in (("seeds.csv", seeds), ("enrichment.csv", banks)):
        if table is not None:
            write_csv(out / file, table)
    with matplotlib.rc_context({"figure.max_open_warning": 0}):
        pictures = [("ROC curves on the whole test part", plot_roc(run.test, title=title, note=note)),
                    ("Interval bands", plot_roc_bands(run.test, metrics["test"], title=title, note=note))]
        for file, (_, figure) in zip(("roc.png", "roc_bands.png"), pictures):
            write_whole(out / file, lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=130))
        maps = heat_maps(board, note=note)
        if maps is not None:
            pictures.append(("Mean test AUC over the grid (for reading; ranks come from validation)", maps))
        pictures.append((f"Training of {run.name}", plot_history(
            pd.read_csv(run.history_file), monitor=metrics["params"]["monitor"],
            note=split_note(metrics, "valid" if metrics["valid"] else "train"))))
        if banks is not None:
            pictures += bank_pictures(folder, board, banks, note=split_note(metrics, "train"))
        drawn = [text for title, figure in pictures for text in (page.heading(title), page.picture(figure, title))]
        for _, figure in pictures:  # or a notebook that runs the grid shows them all
            plt.close(figure)
    listed, apart = parted(board)
    parts = [page.paragraph(f"{note}. {origin_note(metrics)}.", ""), *map(page.paragraph, reasons(board))]
    parts += _section("Leaderboard", ("Ranked by validation mean AUC. " if first else "No cell is ranked. ")
                      + "The test columns are for reading, with 95 % intervals by bootstrap over patients."
                      + (f" '=' marks cells that the test part cannot tell from {run.name}: by the interval of their paired "
                         "difference at 5 %, corrected for the number of cells (Holm)." if first else ""),
                      shown_board(listed) if len(listed) else None, "first board" if first else "board")
    if seeds is not None:
        parts += _section("Over seeds", "Mean and standard deviation over training seeds, on one test part.",
                          with_intervals(seeds, 4), "first")
    parts += _section(f"Classes of {run.name}", "", with_intervals(class_table(metrics["test"], run.test.positives)), "first")
    if banks is not None:
        shown = [c for c in banks if not c.endswith(" expected") or c.startswith(("any ", "no finding"))]
        parts += _section("Do the banks hold rare findings?", _BANKS,
                          with_intervals(banks[shown], 2).replace("undefined", ""))
    if len(apart):
        parts += _section("Without a validation part", "\n".join(f"{line}." for line in board_notes(apart)), shown_apart(apart),
                          "board")
    published, remark = beside_published(metrics)
    parts += drawn + _section("Beside published figures", remark,
                              None if published is None else with_intervals(published, 4), "words")
    return page.write_page(out / "report.html", f"Grid {name or folder.name}", parts, drawn=metrics["data"]["drawn"])


def _section(heading: str, text: str, table: pd.DataFrame | None, kind: str = "") -> list[str]:
    tables = [] if table is None else [page.table(table, kind)]
    return [page.heading(heading), *map(page.paragraph, text.splitlines()), *tables]


def bank_table(folder: Path, board: pd.DataFrame) -> pd.DataFrame | None:
    """What the cells' banks hold: one row a finished cell with a filled bank, seeds of a setting together; None without any.

    Columns: cell, the grid's axes, slots, then as :func:`charmlib.evaluation.enrichment.compare_enrichment`.
    """
    banks = {cell: RunFolder(folder / cell).metrics["bank"] or {} for cell in board["cell"][board["split"].notna()]}
    found = {cell: bank["enrichment"] for cell, bank in banks.items() if bank.get("enrichment")}
    if not found:
        return None
    axes = board_axes(board)
    table = board[["cell", *axes]].merge(compare_enrichment(found), on="cell")
    order = sorted(axes, key=lambda axis: axis == "seed")
    return table.sort_values([*order, "cell"], key=lambda column: column.astype(str), ignore_index=True)


def bank_pictures(folder: Path, board: pd.DataFrame, table: pd.DataFrame, *, note: str = "") -> list[tuple[str, object]]:
    """(title, figure): enrichment of every cell, and, for cells of one split, the filling of the banks over time, a panel a
    setting in the order of the board."""
    pictures = [("What the memory banks hold", plot_enrichment_map(table, note=note))]
    held = board[board["cell"].isin(table["cell"])]
    axes = [a for a in (*board_axes(board), "split") if a != "seed" and held[a].astype(str).nunique() > 1]
    histories: dict[str, list[pd.DataFrame]] = {}
    for _, row in held.iterrows():
        run = RunFolder(folder / row["cell"])
        if run.bank_history_file.is_file():
            setting = ", ".join(f"{a} {row[a]}" for a in axes) or ("" if "seed" in board_axes(board) else run.name)
            histories.setdefault(setting or "all seeds", []).append(pd.read_csv(run.bank_history_file))
    if histories and held["split"].nunique() == 1:  # one training part, so one prevalence of each finding
        bank = RunFolder(folder / held["cell"].iloc[0]).metrics["bank"]["enrichment"]
        shares = {name: finding["prevalence"] for name, finding in {**bank["classes"], NONE: bank[NONE]}.items()}
        pictures.append(("What filled the memory banks", plot_bank_history(histories, shares, note=note)))
    return pictures


def board_notes(board: pd.DataFrame) -> list[str]:
    """A line for each split on the board (images, patients, share of positives), and why some cells have no rank."""
    lines = reasons(board)
    for split, cells in board.dropna(subset=["split"]).groupby("split"):
        first = cells.iloc[0]
        lines.append(f"split {split}: {int(first['n_images']):,} test images of {int(first['n_patients']):,} patients, "
                     f"{first['positive_share']:.1%} with a finding")
    apart = parted(board)[1]["cell"]
    return lines + ([f"no validation: {', '.join(apart)} trained on the validation patients too (valid_fraction 0); nothing "
                     "was chosen on validation, so no rank"] if len(apart) else [])


def reasons(board: pd.DataFrame) -> list[str]:
    """A line for each failed or damaged cell of a leaderboard: why."""
    return [f"{row['cell']} {row['status']}: {row['reason']}" for _, row in board.iterrows() if row.get("reason")]


def parted(board: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The cells of a leaderboard with a validation part, and those without."""
    apart = board["status"] == NO_VALIDATION
    return board[~apart], board[apart]


def shown_apart(apart: pd.DataFrame) -> pd.DataFrame:
    """Cells without a validation part for reading: a list, not a ranking."""
    return shown_board(apart).drop(columns=["rank", "valid AUC", "difference to the first (95 %)"])


def shown_board(board: pd.DataFrame) -> pd.DataFrame:
    """A leaderboard for reading: intervals in one column, '=' at cells that cannot be told from the first, and the split's
    columns only where they differ (:func:`board_notes` has them too)."""
    shown = board.rename(columns={"ci_low": "test_mean_auc low", "ci_high": "test_mean_auc high",
                                  "diff_low": "diff_first low", "diff_high": "diff_first high"})
    shown["cell"] += shown["same_as_first"].eq(True).map({True: " =", False: ""})
    shown["overhead_seconds"] = shown["overhead_seconds"].round(1)
    if shown["split"].dropna().nunique() <= 1:
        shown = shown.drop(columns=["split", "n_images", "n_patients", "positive_share"])
    for column in (*board_axes(board), "seconds", "overhead_seconds"):
        shown[column] = ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else str(v) for v in shown[column]]
    shown = with_intervals(shown.drop(columns=["same_as_first", "reason"], errors="ignore"))
    return shown.replace("undefined", "").rename(columns={
        "valid_mean_auc": "valid AUC", "test_mean_auc": "test AUC (95 %)", "diff_first": "difference to the first (95 %)",
        "overhead_seconds": "overhead"})


def board_text(board: pd.DataFrame) -> str:
    """A leaderboard for a terminal."""
    listed, apart = parted(board)
    lines = [*board_notes(listed), shown_board(listed).to_string(index=False)] if len(listed) else []
    if board["same_as_first"].eq(True).any():
        lines.append("= cannot be told from the first at 5 %, corrected for the number of cells (Holm)")
    if (seeds := over_seeds(board)) is not None:
        lines += ["", "over seeds (of training, on one test part):", with_intervals(seeds, 4).to_string(index=False)]
    if len(apart):
        lines += ["", *board_notes(apart), shown_apart(apart).to_string(index=False)]
    return "\n".join(lines)
