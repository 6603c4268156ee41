"""A radiograph beside the heat map of one finding."""

import matplotlib.pyplot as plt
import numpy as np

from charmlib.viz.style import OKABE_ITO, heading, readable, styled


@styled
def plot_heat(pixels: np.ndarray, heat: np.ndarray, finding: str, *, boxes: np.ndarray = (), margin: float = 0.0,
              note: str = ""):
    """The image (S, S) with ``boxes`` (k, 4) in shares of its sides, then the same under the map (h, w), with its scale.

    ``margin`` is the share of each side of the image outside the map, where the network reads a window.
    The map is drawn in its own cells, without smoothing: it can show nothing smaller. A map without positive evidence says so.
    Returns the figure.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 4.1), layout="constrained")
    size = pixels.shape[-1]
    for axis in (left, right):
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axis.axis("off")
        for x0, y0, x1, y1 in np.reshape(boxes, (-1, 4)) * size - 0.5:
            axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=OKABE_ITO[5], lw=1.6))
    left.set_title("image" + (", with the radiologists' box" if len(boxes) else ""))
    top = float(heat.max())
    if top > 0:
        share, (low, high) = heat / top, (size * margin - 0.5, size * (1 - margin) - 0.5)
        drawn = right.imshow(share, cmap="inferno", alpha=0.65 * share, vmin=0, vmax=1, interpolation="nearest",
                             extent=(low, high, high, low))
        right.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        figure.colorbar(plt.cm.ScalarMappable(drawn.norm, drawn.cmap), ax=right, shrink=0.75, label="share of the largest")
    right.set_title(f"evidence for {readable(finding)}" if top > 0 else f"no positive evidence for {readable(finding)}")
    return heading(figure, "", f"{heat.shape[0]} x {heat.shape[1]} cells: nothing smaller shows. {note}".strip())
