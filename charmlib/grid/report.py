"""``report.html``, pictures and tables of a grid."""

from collections.abc import Mapping
from hashlib import sha256
from os.path import relpath
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

import charmlib
from charmlib.evaluation.enrichment import NONE, compare_enrichment
from charmlib.evaluation.published import beside_published
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.tables import class_table, origin_note, split_note, with_intervals
from charmlib.files import write_csv, write_whole
from charmlib.grid.board import DIFFERENCE, NO_VALIDATION, PLAIN, SEEDS, Kept, board_axes, over_seeds, state_of
from charmlib.grid.cells import CellFolder
from charmlib.viz import page
from charmlib.viz.bank_content import PANELS, plot_bank_history, plot_enrichment_map
from charmlib.viz.curves import plot_roc, plot_roc_bands
from charmlib.viz.heat_maps import heat_maps
from charmlib.viz.history import plot_history
from charmlib.viz.run_report import rarest_first, score_words, settings

_SEEDS = ("Cells that differ only in their seed are one configuration. A standard deviation (sd) over seeds is the spread of "
          "training, on one test part. The interval of a difference draws patients and seeds. A difference survives both if "
          "every seed has its sign and 0 is outside its interval, corrected for the number of configurations (Holm).")
_BANKS = ("Share of a bank's slots with a finding over its prevalence in the training part, the rarest first, with 95 % "
          "intervals by bootstrap over the training part's patients; runs that differ only in their seed show the spread of "
          "training. 'Expected' is the share in slots drawn at random, each from the images of its stage: a bank that still "
          "holds slots of stage 1, which shows findings only, is enriched without any choice.")


BANKS = 20
"""Number of banks that fit on a picture."""


def write_report(folder: str | Path, board: pd.DataFrame, *, name: str | None = None,
                 out: str | Path | None = None) -> Path | None:
    """Write a grid's report into its folder, or ``out``; None while no cell is done.

    Files: ``report.html``, ``roc.png`` and ``roc_bands.png`` (of the cell ranked first; the board's first if none has a rank),
    ``seeds.csv`` (with several seeds), ``enrichment.csv`` (with banks). ``name`` is the grid's, the folder's by default. A
    report that was made from the same board and files stays as it is.
    """
    folder = Path(folder)
    out, path = Path(out or folder), Path(out or folder) / "report.html"
    done = board[board["split"].notna()]
    if done.empty:
        return None
    best = done[done["rank"] == 1].iloc[0] if done["rank"].notna().any() else done.iloc[0]
    files = [out / "roc.png", out / "roc_bands.png"]
    states = [state_of(CellFolder(folder / cell)) for cell in done["cell"]]
    made_from = sha256(f"{charmlib.__version__} {name} {states} {board.to_csv()}".encode("utf-8", "replace")).hexdigest()[:16]
    if all(file.is_file() for file in (path, *files)) and made_from in path.read_text(errors="replace")[:300]:
        return path
    run, first, kept = RunFolder(folder / best["cell"]), pd.notna(best["rank"]), Kept(folder)
    (metrics, test), note = rarest_first(run.metrics, run.test), split_note(run.metrics)
    title = f"{run.name}, {'ranked first by validation' if first else 'not ranked'}"
    seeds, banks = over_seeds(board), bank_table(folder, board)
    for file, table in (("seeds.csv", seeds), ("enrichment.csv", banks)):
        if table is not None:
            write_csv(out / file, table)
    with matplotlib.rc_context({"figure.max_open_warning": 0}):
        pictures = {"ROC curves on the whole test part": plot_roc(test, title=title, note=note),
                    "Interval bands": plot_roc_bands(test, metrics["test"], title=title, note=note)}
        for file, (title, figure) in zip(files, list(pictures.items())):  # drawn once for its file and the page
            pictures[title] = page.png(figure, 130)
            write_whole(file, lambda temporary, title=title: temporary.write_bytes(pictures[title]))
            plt.close(figure)
        maps = heat_maps(board, note=note)
        if maps is not None:
            pictures["Mean test AUC over the grid (for reading; ranks come from validation)"] = maps
        pictures[f"Training of {run.name}"] = plot_history(
            pd.read_csv(run.history_file), monitor=metrics["params"]["monitor"],
            note=split_note(metrics, "valid" if metrics["valid"] else "train"))
        if banks is not None:
            pictures |= bank_pictures(folder, board, banks, note=split_note(metrics, "train"))
        drawn = page.pictures(pictures)
        for figure in list(pictures.values())[2:]:  # or a notebook that runs the grid shows them all
            plt.close(figure)
    listed, apart = parted(board)
    plain = next((cell for cell in done["cell"] if PLAIN.items() <= kept.of(CellFolder(folder / cell))["params"].items()),
                 None)
    links = {f"{cell}{mark}": f"{relpath(folder, out)}/{cell}/report.html" for cell in done["cell"] for mark in ("", " =")
             if (folder / cell / "report.html").is_file()}
    parts = [page.paragraph(head_line(board, metrics, plain), "lead"), page.paragraph(f"{note}. {origin_note(metrics)}.", ""),
             *map(page.paragraph, reasons(board)), settings(metrics["params"], run.name),
             page.paragraph(page.ORDER), *drawn]
    parts += _section("Leaderboard", ("Ranked by validation mean AUC. " if first else "No cell is ranked. ")
                      + "The test columns are for reading, with 95 % intervals by bootstrap over patients. A cell's name leads "
                      "to its own report, beside which its notebooks lie."
                      + (f" '=' marks cells that the test part cannot tell from {run.name}: by the interval of their paired "
                         "difference at 5 %, corrected for the number of cells (Holm)." if first else ""),
                      shown_board(listed) if len(listed) else None, "first board" if first else "board", links)
    if seeds is not None:
        parts += _section("Over seeds", _SEEDS, shown_seeds(seeds), "first words")
    parts += _section(f"Classes of {run.name}", "", with_intervals(class_table(metrics["test"], test.positives)), "first")
    if banks is not None:
        shown = [c for c in banks if not c.endswith(" expected") or c.startswith(("any ", "no finding"))]
        parts += _section("Do the banks hold rare findings?", _BANKS,
                          with_intervals(banks[shown], 2).replace("undefined", ""))
    if len(apart):
        parts += _section("Without a validation part", "\n".join(f"{line}." for line in board_notes(apart)), shown_apart(apart),
                          "board", links)
    published, remark = beside_published(metrics)
    parts += _section("Beside published figures", remark, None if published is None else with_intervals(published, 4), "words")
    return page.write_page(path, f"Grid {name or folder.name}", parts, drawn=metrics["data"]["drawn"], made_from=made_from)


def head_line(board: pd.DataFrame, metrics: Mapping, plain: str | None = None) -> str:
    """What came out, in words: the first cell with its interval, the first configuration over seeds, and how far ``plain``,
    the best cell of a plain network, is from them."""
    rows, cell, seeds = board.set_index("cell"), metrics["cell"], over_seeds(board)
    split, words = rows.loc[cell, "split"], "Not ranked" if pd.isna(rows.loc[cell, "rank"]) else "Ranked first"
    words += f": {cell}, {score_words(metrics)}. "
    for _, top in () if seeds is None else seeds[seeds["split"] == split][:1].iterrows():
        words += (f"Over {top['seeds']} seeds, {top['configuration']} is first: {top['test_mean']:.3f}, standard deviation "
                  f"{top['test_sd']:.3f}. ")
    if plain is None or rows.loc[plain, "split"] != split:
        return words
    row = rows.loc[plain]
    over = pd.notna(row["seeds_diff"])
    difference, low, high, verdict = row[SEEDS if over else DIFFERENCE]
    if pd.isna(difference):
        return words + "That is the plain network."
    of, drawn, told = ("configuration", "patients and seeds", verdict) if over else ("cell", "patients", not verdict)
    name = row["configuration"] if over else plain
    return words + (f"Less the plain network ({name}): {-difference:+.3f} (95 % over {drawn}: "
                    f"{-high:+.3f} to {-low:+.3f}). Corrected for the number of {of}s, it can{'' if told else 'not'} be told "
                    "from 0.")


def _section(heading: str, text: str, table: pd.DataFrame | None, kind: str = "", links: Mapping | None = None) -> list[str]:
    tables = [] if table is None else [page.table(table, kind, links)]
    return [page.heading(heading), *map(page.paragraph, text.splitlines()), *tables]


def bank_table(folder: Path, board: pd.DataFrame) -> pd.DataFrame | None:
    """What the cells' banks hold: one row a finished cell with a filled bank, seeds of a setting together; None without any.

    Columns: cell, the grid's axes, slots, then as :func:`charmlib.evaluation.enrichment.compare_enrichment`.
    """
    kept = Kept(folder)
    banks = {cell: kept.of(CellFolder(folder / cell))["enrichment"] for cell in board["cell"][board["split"].notna()]}
    found = {cell: bank for cell, bank in banks.items() if bank}
    if not found:
        return None
    axes = board_axes(board)
    table = board[["cell", *axes]].merge(compare_enrichment(found), on="cell")
    order = sorted(axes, key=lambda axis: axis == "seed")
    return table.sort_values([*order, "cell"], key=lambda column: column.astype(str), ignore_index=True)


def bank_pictures(folder: Path, board: pd.DataFrame, table: pd.DataFrame, *, note: str = "") -> dict[str, object]:
    """Title -> figure: enrichment of the first :data:`BANKS` cells of the board, and, for cells of one split, the filling of
    the banks over time, a panel a configuration in the order of the board."""
    held = board[board["cell"].isin(table["cell"])]
    drawn = table[table["cell"].isin(held["cell"][:BANKS])]
    more = f"The first {BANKS} of {len(table)} cells. " if len(drawn) < len(table) else ""
    pictures = {"What the memory banks hold": plot_enrichment_map(drawn, note=more + note)}
    files: dict[str, list[Path]] = {}
    for cell, setting in zip(held["cell"], held["configuration"]):
        if (file := RunFolder(folder / cell).bank_history_file).is_file():
            files.setdefault(setting, []).append(file)
    if files and held["split"].nunique() == 1:  # one training part, so one prevalence of each finding
        bank = RunFolder(folder / held["cell"].iloc[0]).metrics["bank"]["enrichment"]
        shares = {name: finding["prevalence"] for name, finding in {**bank["classes"], NONE: bank[NONE]}.items()}
        histories = {setting: list(map(pd.read_csv, paths)) if i < PANELS else [] for i, (setting, paths) in
                     enumerate(files.items())}
        pictures["What filled the memory banks"] = plot_bank_history(histories, shares, note=note)
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
    shown["training_of"] = shown["training_of"].fillna("")
    if not shown["training_of"].any():
        shown = shown.drop(columns="training_of")
    if shown["split"].dropna().nunique() <= 1:
        shown = shown.drop(columns=["split", "n_images", "n_patients", "positive_share"])
    for column in (*board_axes(board), "seconds", "overhead_seconds"):
        shown[column] = _short(shown[column])
    shown = with_intervals(shown.drop(columns=["same_as_first", "reason", "configuration", *SEEDS], errors="ignore"))
    return shown.replace("undefined", "").rename(columns={
        "valid_mean_auc": "valid AUC", "test_mean_auc": "test AUC (95 %)", "diff_first": "difference to the first (95 %)",
        "overhead_seconds": "overhead", "training_of": "shares training with"})


def _short(values: pd.Series) -> list[str]:
    return ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else str(v) for v in values]


def shown_seeds(seeds: pd.DataFrame) -> pd.DataFrame:
    """The table of :func:`charmlib.grid.board.over_seeds` for reading."""
    words = {"configuration": "configuration", "seeds": "seeds", "valid_mean": "valid AUC", "valid_sd": "sd",
             "test_mean": "test AUC", "test_sd": "sd ", "seeds_diff": "difference to the first (95 %)",
             "survives": "survives both"}
    limits = {f"seeds_{side}": f"{words['seeds_diff']} {side}" for side in ("low", "high")}
    named = {"split": "split"} if seeds["split"].nunique() > 1 else {}
    shown = seeds[[*named, *words, *limits]].rename(columns=words | limits).astype({name: float for name in limits.values()})
    shown["survives both"] = ["" if pd.isna(v) else "yes" if v else "no" for v in shown["survives both"]]
    return with_intervals(shown, 4).replace("undefined", "")


def board_text(board: pd.DataFrame) -> str:
    """A leaderboard for a terminal."""
    listed, apart = parted(board)
    lines = [*board_notes(listed), shown_board(listed).to_string(index=False)] if len(listed) else []
    if board["same_as_first"].eq(True).any():
        lines.append("= cannot be told from the first at 5 %, corrected for the number of cells (Holm)")
    if (seeds := over_seeds(board)) is not None:
        lines += ["", "over seeds (of training, on one test part):", shown_seeds(seeds).to_string(index=False)]
    if len(apart):
        lines += ["", *board_notes(apart), shown_apart(apart).to_string(index=False)]
    return "\n".join(lines)
