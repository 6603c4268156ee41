"""Heat maps of a grid over momentum, k and threshold."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from charmlib.viz.style import heading, styled


@styled
def heat_maps(board: pd.DataFrame, *, value: str = "test_mean_auc", rows: str = "k", columns: str = "threshold",
              panels: str = "momentum", note: str = ""):
    """One map of ``rows`` x ``columns`` for each value of ``panels``; None if the board is no such grid.

    Each field shows the value, and its interval where the board has one. Drawn are ranked cells of the first one's split
    that have all three axes. Where several share a field (a further axis), the best **by validation** is shown, and the
    picture says so. ``note`` says what data it is of; without one the board's own columns do.
    """
    if not {rows, columns, panels, value} <= set(board.columns):
        return None
    frame = board.dropna(subset=["rank", rows, columns, panels, value])
    frame = frame[frame["split"] == frame.sort_values("rank")["split"].iloc[0]] if len(frame) else frame
    if len(frame) < 2:
        return None
    fields = frame.sort_values("valid_mean_auc", ascending=False).drop_duplicates([panels, rows, columns])
    notes = [note or _note(frame.iloc[0])]
    if len(fields) < len(frame):
        notes.append("best by validation of the cells that share a field")
    frame = fields
    tall, wide, deep = (sorted(frame[axis].unique()) for axis in (rows, columns, panels))
    low, high = frame[value].min(), frame[value].max()
    pad = max(high - low, 1e-3) * 0.05
    width = max(2.2, 1.25 * len(wide)) * len(deep) + 1.4
    figure, axes = plt.subplots(1, len(deep), figsize=(width, 0.85 * len(tall) + 1.5), squeeze=False, sharey=True,
                                layout="constrained")
    for axis, panel in zip(axes[0], deep):
        grid = np.full((len(tall), len(wide)), np.nan)
        here = frame[frame[panels] == panel]
        for _, cell in here.iterrows():
            r, c = tall.index(cell[rows]), wide.index(cell[columns])
            grid[r, c] = cell[value]
        image = axis.imshow(grid, cmap="cividis", vmin=low - pad, vmax=high + pad, aspect="auto")
        for _, cell in here.iterrows():
            r, c = tall.index(cell[rows]), wide.index(cell[columns])
            text = f"{cell[value]:.3f}"
            if pd.notna(cell.get("ci_low")) and value == "test_mean_auc":
                text += f"\n{cell['ci_low']:.3f} to {cell['ci_high']:.3f}"
            dark = (cell[value] - low) < 0.5 * max(high - low, 1e-9)
            axis.text(c, r, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        axis.set(title=f"{panels} {panel:g}", xlabel=columns)
        axis.set_xticks(range(len(wide)), [f"{v:g}" for v in wide])
        axis.set_yticks(range(len(tall)), [f"{v:g}" for v in tall])
        axis.grid(False)
    axes[0, 0].set_ylabel(rows)
    figure.colorbar(image, ax=axes[0].tolist(), label=value.replace("_", " "), shrink=0.9)
    heading(figure, "", "; ".join(notes))
    return figure


def _note(row: pd.Series) -> str:
    if not {"n_images", "n_patients", "positive_share"} <= set(row.index):
        return f"split {row['split']}"
    return (f"split {row['split']}: {int(row['n_images']):,} test images of {int(row['n_patients']):,} patients, "
            f"{row['positive_share']:.1%} with a finding")
