"""An image beside the training images that the memory bank retrieved for it, or whose votes count most."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from charmlib import files
from charmlib.viz.style import heading, readable, styled

SLOTS = 5
"""Number of retrieved images that fit beside the query."""

_CAPTION = 1.2
"""Height of a caption in inches."""


@styled
def plot_explanation(cases, *, note: str = ""):
    """One row per case: the image with its labels and highest probabilities, then the slots of its table, best first.

    These have labels, similarity, and weight or contribution; at most :data:`SLOTS` are drawn. Beside an image that slots vote
    on stand the terms of its finding's logit. Returns the figure. ``cases`` is an Explanation, or a sequence of them; see
    :class:`charmlib.training.bank_evidence.Explanation`.
    """
    cases = list(cases) if isinstance(cases, Sequence) else [cases]
    if not cases:
        return heading(plt.figure(figsize=(6, 0.8)), "", f"no case to show: no image here has a finding. {note}")
    slots = max(len(case.table) for case in cases)
    columns = 1 + min(slots, SLOTS)
    width, height = max(1.9 * columns, 6), (1.85 + _CAPTION) * len(cases) + 0.5
    figure, axes = plt.subplots(len(cases), columns, figsize=(width, height), squeeze=False)
    # a fixed layout: matplotlib's constrained one takes half a second more for so many captions
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.05 / height, top=1 - (0.5 + _CAPTION) / height, wspace=0.05,
                           hspace=_CAPTION / 1.85)
    for axis in axes.flat:
        axis.axis("off")
    for row, case in zip(axes, cases):
        likely = "\n".join(f"{readable(name)} {p:.2f}" for name, p in case.top[:2])
        logit = "\n{}: logit {:+.2f} =\nhead {head:+.2f}, prior {prior:+.2f},\nvotes {votes:+.2f} ({:.1%} shown)".format(
            readable(case.finding), sum(case.parts.values()), case.share, **case.parts) if case.parts else ""
        _image(row[0], case.pixels,
               f"{case.image}, {case.part or 'in no part'}\n{_lines(case.labels)}\npredicted: {likely}{logit}")
        for axis, pixels, (_, slot) in zip(row[1:], case.retrieved, case.table.head(SLOTS).iterrows()):
            labels = _lines(str(slot["labels"]).split("|"))
            last = f"contribution {slot['contribution']:+.3f}" if case.parts else f"weight {slot['weight']:.3f}"
            _image(axis, pixels, f"{slot['image']}\n{labels}\nsimilarity {slot['similarity']:.3f}\n{last}")
    told = ("the slots with the largest contributions to the finding's logit, and in brackets their share of all absolute "
            "contributions") if any(case.parts for case in cases) else (
        f"the {SLOTS} most similar of the {slots} training images that the memory retrieved" if slots > SLOTS else
        "the training images that the memory retrieved")
    return heading(figure, "", ". ".join(filter(None, [
        f"left: the image; then {told}", *dict.fromkeys(case.note for case in cases if not case.parts), note])))


def _image(axis, pixels: np.ndarray, caption: str) -> None:
    axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
    axis.set_title(files.readable(caption), fontsize=7)


def _lines(labels: Sequence[str]) -> str:
    """Up to three labels in lines; the last line counts those that are left out."""
    names = [readable(name) for name in labels if name]
    return "\n".join(names if len(names) < 4 else [*names[:2], f"and {len(names) - 2} more"]) or "labels unknown"
