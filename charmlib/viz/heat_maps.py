"""Heat maps of a grid over momentum, k and threshold."""

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.viz.style import heading, number_map, styled


@styled
def heat_maps(board: pd.DataFrame, *, value: str = "test_mean_auc", rows: str = "k", columns: str = "threshold",
              panels: str = "momentum", note: str = ""):
    """One map of ``rows`` x ``columns`` for each value of ``panels``; None for a board without these axes.

    Each field shows the value, and its interval if the board has one. The maps hold the ranked cells with all three axes, of
    the split of the first one. If several share a field (a further axis), the best **by validation** is shown, and the
    picture says so. ``note`` describes the data; by default it is made from the board's columns.
    """
    if not {rows, columns, panels, value} <= set(board.columns):
        return None
    frame = board.dropna(subset=["rank", rows, columns, panels, value])
    frame = frame[frame["split"] == frame.sort_values("rank")["split"].iloc[0]] if len(frame) else frame
    if len(frame) < 2:
        return None
    fields = frame.sort_values("valid_mean_auc", ascending=False).drop_duplicates([panels, rows, columns])
    several = "; best by validation of the cells that share a field" if len(fields) < len(frame) else ""
    text = fields[value].map("{:.3f}".format)
    if value == "test_mean_auc" and "ci_low" in fields:
        limits = "\n" + fields["ci_low"].map("{:.3f}".format) + " to " + fields["ci_high"].map("{:.3f}".format)
        text += limits.where(fields["ci_low"].notna(), "")
    fields = fields.assign(text=text)
    tall, wide, deep = (sorted(fields[axis].unique()) for axis in (rows, columns, panels))
    low, high = fields[value].min(), fields[value].max()
    pad = max(high - low, 1e-3) * 0.05
    figure, (axes,) = plt.subplots(1, len(deep), squeeze=False, sharey=True, layout="constrained", figsize=(
        max(2.2, 1.25 * len(wide)) * len(deep) + 1.4, 0.85 * len(tall) + 1.5))
    for axis, panel in zip(axes, deep):
        here = fields[fields[panels] == panel].pivot(index=rows, columns=columns, values=[value, "text"])
        values, texts = (here[v].reindex(index=tall, columns=wide) for v in (value, "text"))
        values = values.to_numpy(float)
        image = number_map(axis, values, texts.fillna("").to_numpy(), [f"{v:g}" for v in tall], [f"{v:g}" for v in wide],
                           fontsize=8, cmap="cividis", vmin=low - pad,
                           vmax=high + pad, aspect="auto")
        axis.set(title=f"{panels} {panel:g}", xlabel=columns)
    axes[0].set_ylabel(rows)
    figure.colorbar(image, ax=axes.tolist(), label=value.replace("_", " "), shrink=0.9)
    first, counts = frame.iloc[0], ""
    if {"n_images", "n_patients", "positive_share"} <= set(frame):
        counts = (f": {int(first['n_images']):,} test images of {int(first['n_patients']):,} patients, "
                  f"{first['positive_share']:.1%} with a finding")
    return heading(figure, "", (note or f"split {first['split']}{counts}") + several)
