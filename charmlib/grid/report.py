"""``report.html`` and ``roc.png`` of a grid: one self-contained page."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.published import beside_published
from charmlib.evaluation.results import load_metrics, load_predictions
from charmlib.files import write_text, write_whole
from charmlib.viz.grid import heat_maps
from charmlib.viz.history import plot_history
from charmlib.viz.roc import plot_roc

_STYLE = """body{font:15px/1.45 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}img{max-width:100%}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px}th,td{padding:3px 9px;text-align:right;border-bottom:1px solid #ddd;
white-space:nowrap}th{border-bottom:2px solid #888}.board tr:first-child td{font-weight:600}
.published th,.published td{text-align:left}.note{color:#555}
.drawn{background:#fff3cd;padding:.5em .8em;border-radius:4px}"""


def write_report(folder: str | Path, board: pd.DataFrame, grid=None) -> Path | None:
    """Write ``roc.png`` (of the cell that validation ranks first) and ``report.html``; None while no cell is done."""
    folder = Path(folder)
    ranked = board[board["rank"] == 1]
    if ranked.empty:
        ranked = board[board["status"] == "quick check"]
    if ranked.empty:
        return None
    best = ranked.iloc[0]
    metrics = load_metrics(folder / best["cell"])
    predictions = load_predictions(folder / best["cell"])
    with matplotlib.rc_context({"figure.max_open_warning": 0}):
        roc = plot_roc(predictions, title=f"{best['cell']}, ranked first by validation", note=split_note(metrics))
        write_whole(folder / "roc.png", lambda temporary: roc.savefig(temporary, format="png", dpi=130))
        pictures = [("ROC curves on the whole test part", roc)]
        maps = heat_maps(board)
        if maps is not None:
            pictures.append(("Mean test AUC over the grid (for reading; ranks come from validation)", maps))
        history = pd.read_csv(folder / best["cell"] / "history.csv")
        pictures.append((f"Training of {best['cell']}", plot_history(history)))
        images = "".join(f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' src='{_data_url(figure)}'>"
                         for title, figure in pictures)
        for _, figure in pictures:  # or a notebook that runs the grid shows them all
            plt.close(figure)
    drawn = ("<p class='drawn'>Made from <b>drawn phantoms</b>, not radiographs: this shows that the software works and "
             "nothing else.</p>") if metrics["data"]["drawn"] else ""
    published, remark = beside_published(metrics)
    compare = f"<h2>Beside published figures</h2><p class='note'>{html.escape(remark)}</p>"
    if published is not None:
        compare += f"<div class='scroll published'>{_table(published)}</div>"
    name = grid.name if grid is not None else folder.name
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Grid {html.escape(name)}</title>
<style>{_STYLE}</style><h1>Grid {html.escape(name)}</h1>{drawn}
<p>{html.escape(split_note(metrics))}. {html.escape(metrics['device'])}, {metrics['precision']},
torch {metrics['versions']['torch']}, charmlib {metrics['versions']['charmlib']}, seed {metrics['params']['seed']}.
Research use only.</p>
<h2>Leaderboard</h2><p class="note">Ranked by validation mean AUC. The test columns are for reading, with 95 %
intervals by bootstrap over patients; differences within them say nothing.</p>
<div class="scroll board">{_table(board)}</div>{images}{compare}</html>"""
    write_text(folder / "report.html", page)
    return folder / "report.html"


def split_note(metrics: dict) -> str:
    """What must stand beside every score: data, split, images, patients, share of positives."""
    part = metrics["split"]["test"]
    return (f"{metrics['data']['name']}, split '{metrics['split']['name']}' ({metrics['split']['hash'][:8]}): "
            f"{part['images']:,} test images of {part['patients']:,} patients, {part['positive_share']:.0%} with a finding")


def _table(frame: pd.DataFrame) -> str:
    shown = frame.copy()
    if "n_images" in shown and shown["split"].dropna().nunique() == 1:  # said once, above the table
        shown = shown.drop(columns=["split", "n_images", "n_patients"])
    for column in shown.columns:
        if column.endswith(("_auc", "ci_low", "ci_high")) or column == "mean AUC":
            shown[column] = shown[column].map(lambda v: "" if pd.isna(v) else f"{v:.4f}")
    return shown.astype(object).where(shown.notna(), "").to_html(index=False, border=0)


def _data_url(figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
