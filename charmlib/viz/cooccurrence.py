"""Which findings come together."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np

from charmlib.viz.style import heading, readable, styled


@styled
def plot_cooccurrence(labels, classes, *, title: str = "", note: str = ""):
    """Row finding given, share of its images that also show the column finding; the diagonal holds the images of each.

    Images in which either label is unknown are left out of a pair. Returns the figure.
    """
    labels = np.asarray(labels, np.float64)
    positive, there = np.nan_to_num(labels) == 1, ~np.isnan(labels)
    both = positive.T.astype(float) @ positive
    given = positive.T.astype(float) @ there  # images with the row finding in which the column's label is known
    with np.errstate(invalid="ignore", divide="ignore"):
        share = both / given
    off = share.copy()
    np.fill_diagonal(off, np.nan)
    top = np.nanmax(off, initial=0.01)
    figure, axis = plt.subplots(figsize=(8.6, 6.6), layout="constrained")
    image = axis.imshow(off, cmap="cividis", vmin=0, vmax=top)
    for i, j in np.ndindex(*share.shape):
        if i == j:
            axis.text(j, i, f"{int(both[i, i]):,}", ha="center", va="center", fontsize=7.5, fontweight="bold")
        elif not np.isnan(share[i, j]):
            axis.text(j, i, f"{share[i, j]:.0%}", ha="center", va="center", fontsize=7.5,
                      color="white" if share[i, j] < 0.6 * top else "black")
    names = [readable(c) for c in classes]
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="also shows", ylabel="of the images with")
    axis.grid(False)
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the row's images")
    heading(figure, title, note)
    return figure
