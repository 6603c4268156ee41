"""Co-occurrence of findings."""

import matplotlib.pyplot as plt
import numpy as np

from charmlib.viz.style import heading, number_map, readable, styled


@styled
def plot_cooccurrence(labels, classes, *, title: str = "", note: str = ""):
    """For each row's finding, the share of its images that also show the column's finding; returns the figure.

    The diagonal holds the number of images of each finding. A pair is counted over images in which both labels are known.
    """
    labels = np.asarray(labels, np.float64)
    positive, there = np.nan_to_num(labels) == 1, ~np.isnan(labels)
    both = positive.T.astype(float) @ positive
    with np.errstate(invalid="ignore", divide="ignore"):
        share = both / (positive.T.astype(float) @ there)  # of the images in which the column's label is known
    np.fill_diagonal(share, np.nan)
    top = np.nanmax(share, initial=0.01)
    texts = np.array([["" if np.isnan(v) else f"{v:.0%}" for v in row] for row in share], dtype=object)
    np.fill_diagonal(texts, [f"{count:,.0f}" for count in np.diag(both)])
    names = [readable(c) for c in classes]
    figure, axis = plt.subplots(figsize=(8.6, 6.6), layout="constrained")
    image = number_map(axis, share, texts, names, names, fontsize=7.5,
                       slanted={"rotation": 45, "ha": "right"}, cmap="cividis", vmin=0, vmax=top)
    for text in axis.texts:
        text.set_fontweight("bold" if len(set(text.get_position())) == 1 else "normal")
    axis.set(xlabel="also shows", ylabel="of the images with")
    figure.colorbar(image, ax=axis, shrink=0.7, label="share of the row's images")
    return heading(figure, title, note)
