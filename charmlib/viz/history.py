"""Training curves: loss, validation AUC (if there is such a part) and the share of features stored in the bank, by epoch."""

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.evaluation.runs import kept_epoch
from charmlib.viz.style import GUIDE, OKABE_ITO, heading, mark_stages, styled


@styled
def plot_history(history, *, monitor: str = "valid_loss", note: str = ""):
    """Draw ``history.csv`` (a DataFrame or the list of its rows) with a note over it; returns the figure.

    A grey band marks each stage's kept epoch: the best by ``monitor``, the last without a validation part.
    """
    history = pd.DataFrame(history)
    bank = pd.to_numeric(history["bank_accepted"], errors="coerce")
    validated = pd.to_numeric(history["valid_loss"], errors="coerce").notna().any()
    panels = 1 + validated + bank.notna().any()
    figure, (axes,) = plt.subplots(1, panels, figsize=(max(4.0 * panels, 6.0), 3.5), squeeze=False, layout="constrained")
    lines = (0, "train_loss", OKABE_ITO[0], "o"), (0, "valid_loss", OKABE_ITO[1], "s"), (1, "valid_auc", OKABE_ITO[2], "o")
    for i, (_, rows) in enumerate(history.groupby(history["stage"].astype(str))):
        for panel, column, colour, marker in lines if validated else lines[:1]:
            axes[panel].plot(rows.index + 1, rows[column], color=colour, marker=marker, ms=4,
                             label=None if i else column.replace("_", " "))
        kept = rows.index[kept_epoch(rows.to_dict("records"), monitor)] + 1
        for axis in axes:
            axis.axvspan(kept - 0.3, kept + 0.3, color=GUIDE, alpha=0.3, lw=0, label=None if i else "kept epoch", zorder=0)
    axes[0].set(title="loss (one per stage)")
    axes[0].legend(frameon=False)
    if validated:
        axes[1].set(title="validation mean AUC")
    if bank.notna().any():
        axes[-1].bar(history.index + 1, bank, color=OKABE_ITO[4])
        axes[-1].set(title="share of features stored in the bank", ylim=(0, 1))
    for i, axis in enumerate(axes):
        axis.set_xlabel("epoch of the stage")
        mark_stages(axis, history["stage"], named=i == validated)
    return heading(figure, "", note)
