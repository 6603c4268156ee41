"""Loss curves, validation AUC (where there is such a part) and what the bank took, over the epochs of both stages."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd

from charmlib.viz.style import OKABE_ITO, heading, styled


@styled
def plot_history(history, *, note: str = ""):
    """Draw ``history.csv`` (a DataFrame or the list of its rows) with a note over it; returns the figure."""
    history = pd.DataFrame(history)
    history["stage"] = history["stage"].astype(str)
    bank = pd.to_numeric(history["bank_accepted"], errors="coerce")
    validated = pd.to_numeric(history["valid_loss"], errors="coerce").notna().any()
    panels = 1 + validated + bank.notna().any()
    figure, axes = plt.subplots(1, panels, figsize=(4.0 * panels, 3.3), squeeze=False, layout="constrained")
    axes = axes[0]
    epochs = range(1, len(history) + 1)
    for name, colour, marker in (("train_loss", OKABE_ITO[0], "o"), ("valid_loss", OKABE_ITO[1], "s"))[:1 + validated]:
        for i, (_, rows) in enumerate(history.groupby("stage", sort=True)):
            at = [epochs[j] for j in rows.index]
            axes[0].plot(at, rows[name], color=colour, marker=marker, ms=4, label=name.replace("_", " ") if i == 0 else None)
    axes[0].set(title="loss (stages have their own)", xlabel="epoch")
    axes[0].legend(frameon=False)
    if validated:
        for _, rows in history.groupby("stage", sort=True):
            axes[1].plot([epochs[j] for j in rows.index], rows["valid_auc"], color=OKABE_ITO[2], marker="o", ms=4)
        axes[1].set(title="validation mean AUC", xlabel="epoch")
    if bank.notna().any():
        axes[-1].bar(epochs, bank, color=OKABE_ITO[4])
        axes[-1].set(title="share of features the bank took", xlabel="epoch", ylim=(0, 1))
    border = int((history["stage"] == "1").sum())
    for axis in axes:
        axis.xaxis.get_major_locator().set_params(integer=True)
        if 0 < border < len(history):
            axis.axvline(border + 0.5, color="#999999", lw=1, ls=":")
    if 0 < border < len(history):
        axes[int(validated)].annotate("stage 2", (border + 0.55, 0.02), xycoords=("data", "axes fraction"), fontsize=9,
                                      color="#666666")
    heading(figure, "", note)
    return figure
