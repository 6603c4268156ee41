"""Picture, heat map and crop of the images that a network of two paths saw."""

import matplotlib.pyplot as plt

from charmlib import files
from charmlib.viz.style import SECOND, heading, readable, styled


@styled
def plot_looks(cases, *, note: str = ""):
    """One column per case: the image as the first path saw it with the box (dashed), the heat map, and the crop.

    ``cases`` is a sequence of :class:`charmlib.training.looks.Look`. Returns the figure.
    """
    figure, axes = plt.subplots(3, max(len(cases), 1), figsize=(max(1.9 * len(cases), 6), 7.6), squeeze=False,
                                layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for (above, middle, below), case in zip(axes.T, cases):
        side, (top, left, bottom, right) = len(case.view), case.box
        above.imshow(case.view, cmap="gray", vmin=0, vmax=255)
        for axis in (above, middle):
            axis.add_patch(plt.Rectangle((left * side - 0.5, top * side - 0.5), (right - left) * side, (bottom - top) * side,
                                         fill=False, ls="--", lw=1.5, ec=SECOND))
        names = [files.readable(case.image), *map(readable, case.labels[:3]), f"first path: {_likely(case, 'global')}"]
        above.set_title("\n".join(names), fontsize=7)
        if case.heat is None:
            middle.text(0.5, 0.5, "no heat map", ha="center", transform=middle.transAxes)
        else:
            middle.imshow(case.heat, cmap="viridis", extent=(-0.5, side - 0.5, side - 0.5, -0.5))
            middle.set_title(f"heat, {case.heat.size} cells\n{case.heat.min():.2g} to {case.heat.max():.2g}", fontsize=7)
        below.imshow(case.crop, cmap="gray", vmin=0, vmax=255)
        below.set_title(f"crop\nsecond path: {_likely(case, 'local')}\nboth: {_likely(case, 'fusion')}", fontsize=7)
    return heading(figure, "", f"dashed: what the second path sees. {note}")


def _likely(case, branch: str) -> str:
    name, chance = case.top[branch]
    return f"{readable(name)} {chance:.2f}"
