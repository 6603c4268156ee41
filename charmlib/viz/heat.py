"""Radiographs beside heat maps: what a network says of one picture, and where it looks in those with boxes."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np

from charmlib import files
from charmlib.data.boxes import CORNERS
from charmlib.evaluation.boxes import margin_of
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.viz.style import OKABE_ITO, SECOND, heading, readable, styled

SHOWN = 5
"""Slots of a memory, and boxed images, that fit on a picture."""

_WHAT = {"evidence": "evidence for {}", "attention": "where the attention reads", "crop": "what the crop is cut by"}


@styled
def plot_heat(pixels: np.ndarray, heat: np.ndarray, finding: str, *, kind: str = "evidence", margin: float = 0.0,
              box: Sequence[float] = (), crop: np.ndarray | None = None,
              slots: Sequence[tuple[np.ndarray | None, str]] = (), note: str = ""):
    """The image (S, S), the same under the map (h, w) with its scale, the crop, and below what the memory answers with.

    ``margin`` is the share of each side of the image outside the map, where the network reads a window. ``box`` (top, left,
    bottom, right in shares of that window) of the ``crop`` (s, s) of a second path is dashed. ``slots`` are images, None if not
    there, with captions. The map is drawn in its own cells, without smoothing: it can show nothing smaller. A map without
    positive evidence says so. Returns the figure.
    """
    columns, slots = 2 + (crop is not None), slots[:SHOWN]
    figure = plt.figure(figsize=(3.7 * columns, 4.1 + 2.6 * bool(slots)), layout="constrained")
    above, *below = figure.subfigures(1 + bool(slots), 1, height_ratios=[4.1, 2.6][:1 + bool(slots)], squeeze=False).flat
    left, right, *third = above.subplots(1, columns)
    size, (low, high) = pixels.shape[-1], np.array([margin, 1 - margin]) * pixels.shape[-1] - 0.5
    for axis in (left, right, *third):
        axis.axis("off")
    for axis in (left, right):
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    if len(box):
        y0, x0, y1, x1 = low + np.asarray(box) * (high - low)
        left.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ls="--", ec=SECOND, lw=1.6))
    left.set_title("image" + ", with the crop's border" * bool(len(box)))
    top = float(heat.max())
    if kind != "evidence":  # a map of features may be negative
        heat = heat - heat.min()
    if top > 0 or kind != "evidence":
        drawn = _shade(right, heat, (low, high, high, low))
        right.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        above.colorbar(plt.cm.ScalarMappable(drawn.norm, drawn.cmap), ax=right, shrink=0.75, label="share of the largest")
    there = top > 0 or kind != "evidence"
    right.set_title(_WHAT[kind].format(readable(finding)) if there else f"no positive evidence for {readable(finding)}")
    for axis in third:
        axis.imshow(crop, cmap="gray", vmin=0, vmax=255)
        axis.set_title("crop, as the second path saw it")
    for axis, (image, caption) in zip(below[0].subplots(1, SHOWN) if slots else (), slots):
        if image is not None:
            axis.imshow(image, cmap="gray", vmin=0, vmax=255)
        axis.set_title(files.readable(caption), fontsize=7, parse_math=False)
    for axis in below[0].axes if slots else ():
        axis.axis("off")
    memory = " Below: the training images that the memory answers with." if slots else ""
    return heading(figure, "", f"{heat.shape[0]} x {heat.shape[1]} cells: nothing smaller shows.{memory} {note}".strip())


@styled
def plot_boxed(run: RunFolder, metrics: Mapping, test: Predictions, reader: Callable, *, note: str = ""):
    """The first test image with a box of each of the rarest findings, each of another patient, under the map of that finding.

    Maps are those of ``heat.npz``; ``reader`` is a :class:`charmlib.data.dataset.ImageReader`. Returns the figure, None if
    there are no maps, boxes or images.
    """
    if not run.heat_file.is_file():
        return None
    maps, boxes = run.heat, reader.boxes({**metrics, "classes": test.classes}, test.ids.tolist(), test.labels)
    boxes = boxes[boxes["id"].isin(maps)].assign(patient=lambda t: test.patients[t["row"].to_numpy(int)])
    shown = []
    for finding in sorted(set(boxes["finding"]), key=lambda c: metrics["train_prevalence"].get(c) or 0):
        new = boxes[(boxes["finding"] == finding) & ~boxes["patient"].isin([case.patient for case in shown])]
        shown += list(new.head(int(len(shown) < SHOWN)).itertuples())
    try:
        images = [reader(metrics, case.id) for case in shown]
    except (OSError, KeyError, ValueError):
        images = []
    if not images:
        return None
    figure, axes = plt.subplots(2, len(images), figsize=(max(2.2 * len(images), 6), 5.2), squeeze=False, layout="constrained")
    for (above, below), pixels, case in zip(axes.T, images, shown):
        heat, size = maps[case.id][case.finding].astype(np.float32), pixels.shape[-1]
        margin = margin_of(metrics["params"]) * size - 0.5
        for axis in (above, below):
            axis.axis("off")
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            x0, y0, x1, y1 = (getattr(case, corner) * size - 0.5 for corner in CORNERS)
            axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=OKABE_ITO[5], lw=1.6))
        if heat.max() > 0:
            _shade(below, heat, (margin, size - 1 - margin, size - 1 - margin, margin))
        below.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        p = 1 / (1 + np.exp(-float(test.logits[case.row, test.classes.index(case.finding)])))
        above.set_title(f"{files.readable(case.id)}\n{readable(case.finding)}, p {p:.3f}", fontsize=8, parse_math=False)
    return heading(figure, "", f"a box is a radiologist's; below, the evidence for that finding in {heat.shape[0]} x "
                   f"{heat.shape[1]} cells. {note}")


def _shade(axis, heat: np.ndarray, extent: Sequence[float]):
    share = heat / max(heat.max(), 1e-30)
    return axis.imshow(share, cmap="inferno", alpha=0.65 * share, vmin=0, vmax=1, interpolation="nearest", extent=extent)
