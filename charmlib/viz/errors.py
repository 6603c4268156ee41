"""The images that a run is most wrong about."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.special import expit

from charmlib.data.show import show_images
from charmlib.evaluation.metrics import known
from charmlib.evaluation.runs import Predictions
from charmlib.viz.style import readable

SHOWN = 5
"""Images of each kind."""


def worst_errors(predictions: Predictions) -> dict[str, list[dict]]:
    """'missed' and 'false': up to :data:`SHOWN` images each, of as many findings, the worst first.

    Each has image, class, probability and error: of a missed image the share of images without the finding that outscore it, of
    a false one the share of images with the finding that it outscores.
    """
    found: dict[str, list[dict]] = {"missed": [], "false": []}
    for c in predictions.findings:
        y, score, rows = known(predictions.labels, predictions.logits, c)
        for kind, mine, others in (("missed", y == 1, -score[y == 0]), ("false", y == 0, score[y == 1])):
            if mine.any() and len(others):
                sign = -1 if kind == "missed" else 1
                error = np.searchsorted(np.sort(others), sign * score[mine]) / len(others)
                at = np.flatnonzero(mine)[i := int(np.lexsort((sign * score[mine], error))[-1])]
                found[kind].append({"image": str(predictions.ids[rows[at]]), "class": predictions.classes[c],
                                    "probability": float(expit(score[at])), "error": float(error[i])})
    return {kind: sorted(cases, key=lambda case: -case["error"])[:SHOWN] for kind, cases in found.items()}


def plot_errors(worst: Mapping[str, Sequence[Mapping]], image_of: Callable, metrics: Mapping, *, note: str = ""):
    """:func:`worst_errors` as images, a row each of missed and false ones; returns the figure, None if no image can be read.

    ``image_of(metrics, image)`` gives an image (H, W) in uint8 and raises OSError, KeyError or ValueError if there is none.
    """
    words = {"missed": "missed: below {:.1%} without it", "false": "false: above {:.1%} with it"}
    cases = [(case, words[kind].format(case["error"])) for kind in words for case in worst[kind]]
    try:
        images = [image_of(metrics, case["image"]) for case, _ in cases]
    except (OSError, KeyError, ValueError):
        return None
    titles = [f"{readable(case['class'])}, p {case['probability']:.3f}\n{text}\n{case['image']}" for case, text in cases]
    return show_images(images, titles, columns=max(map(len, worst.values())), note=note) if images else None
