"""Training curves: loss, validation AUC (if there is such a part) and the share of features stored in the bank, by epoch."""

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.viz.style import OKABE_ITO, heading, mark_stages, styled


@styled
def plot_history(history, *, note: str = ""):
    """Draw ``history.csv`` (a DataFrame or the list of its rows) with a note over it; returns the figure."""
    history = pd.DataFrame(history)
    bank = pd.to_numeric(history["bank_accepted"], errors="coerce")
    validated = pd.to_numeric(history["valid_loss"], errors="coerce").notna().any()
    panels = 1 + validated + bank.notna().any()
    figure, (axes,) = plt.subplots(1, panels, figsize=(4.0 * panels, 3.3), squeeze=False, layout="constrained")
    lines = (0, "train_loss", OKABE_ITO[0], "o"), (0, "valid_loss", OKABE_ITO[1], "s"), (1, "valid_auc", OKABE_ITO[2], "o")
    for panel, column, colour, marker in lines if validated else lines[:1]:
        for i, (_, rows) in enumerate(history.groupby(history["stage"].astype(str))):
            axes[panel].plot(rows.index + 1, rows[column], color=colour, marker=marker, ms=4,
                             label=None if i else column.replace("_", " "))
    axes[0].set(title="loss (one per stage)", xlabel="epoch")
    axes[0].legend(frameon=False)
    if validated:
        axes[1].set(title="validation mean AUC", xlabel="epoch")
    if bank.notna().any():
        axes[-1].bar(history.index + 1, bank, color=OKABE_ITO[4])
        axes[-1].set(title="share of features stored in the bank", xlabel="epoch", ylim=(0, 1))
    for i, axis in enumerate(axes):
        mark_stages(axis, history["stage"], named=i == validated)
    return heading(figure, "", note)
