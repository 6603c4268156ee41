"""Grids of radiographs."""

import math

import matplotlib.pyplot as plt
import numpy as np

from charmlib.files import readable


def show_images(images, titles=(), *, columns: int = 5, axes=None, boxes=None, note: str = ""):
    """Figure of grey images (n, H, W) or (n, 1, H, W), in [0, 1] or uint8, each with a title and ``boxes`` (x0, y0, x1, y1).

    ``axes`` draws into given axes; ``note`` is the title of the figure.
    """
    images = [np.asarray(image).squeeze() for image in images]
    if axes is None:
        columns = min(columns, max(len(images), 1))
        rows, lines = math.ceil(len(images) / columns), max((t.count("\n") + 1 for t in titles), default=1)
        _, axes = plt.subplots(rows, columns, figsize=(2.2 * columns, (2.2 + 0.16 * lines) * rows), layout="constrained")
    axes = np.ravel(axes)
    for i, axis in enumerate(axes):
        axis.axis("off")
        if i < len(images):
            axis.imshow(images[i], cmap="gray", vmin=0, vmax=255 if images[i].dtype == np.uint8 else 1)
            if i < len(titles):
                axis.set_title(readable(titles[i]), fontsize=8, parse_math=False)
            for x0, y0, x1, y1 in (boxes[i] if boxes is not None else ()):
                axis.add_patch(plt.Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="#e69f00", lw=1.2))
    if note:
        axes[0].figure.suptitle(readable(note), fontsize=9, color="#b34700", parse_math=False)
    return axes[0].figure
