"""Which images an epoch draws: class-aware draws, repeats of rare classes, and the prior of such a sample. Needs no torch.

An epoch is as many draws as there are images, whatever the sampler, so that steps and schedules stay comparable. Images without
a positive class count as one more class.
"""

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from charmlib.param_rows import SAMPLERS


def expected_draws(labels: np.ndarray, sampler: str, *, threshold: float = 0.01,
                   names: Sequence[str] = ()) -> np.ndarray | None:
    """Mean draws of each image in an epoch, (n,) with the sum n; None for 'natural', each image once.

    'class_aware' draws all classes equally often, and an image as often as its classes ask together: sum of 1 / n_c (Shen et
    al., ECCV 2016). That sampler never draws an image without a positive class; here they are a class. 'repeat' repeats an
    image by the largest of its classes' max(1, sqrt(threshold / f_c)), f_c the share of known labels that are positive (Gupta
    et al., LVIS, CVPR 2019). Detectron2's epoch grows by the repeats; here the other images are drawn less. hieuphamha19/CXR_LT
    takes f_c as a share of labels, rounds the factors, so that most images with a factor are never repeated, and caps them at
    10.

    ``labels`` (n, C) are 0, 1 or NaN for unknown. A class without positives cannot be drawn, of which a warning tells.

    Raises ValueError for an unknown sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; available are {', '.join(SAMPLERS)}")
    if sampler == "natural":
        return None
    positive = labels == 1
    positive = np.column_stack([positive, ~positive.any(1)])  # (n, C + 1)
    count, known = positive.sum(0), np.append((~np.isnan(labels)).sum(0), len(labels))
    if sampler == "repeat":
        factor = np.maximum(1, np.sqrt(threshold * known / np.maximum(count, 1)))
        draws = (positive * factor).max(1)
    else:
        if missing := [names[c] if len(names) else f"class {c}" for c in np.flatnonzero(count[:-1] == 0)]:
            warnings.warn(f"sampler class_aware: no training image has {', '.join(missing)}: none can be drawn", stacklevel=2)
        draws = positive @ (1 / np.maximum(count, 1))
    return draws * (len(labels) / draws.sum())


def draw(expected: np.ndarray, uniform: Callable[[int], np.ndarray]) -> np.ndarray:
    """The images of an epoch in their order, n numbers in 0 to n - 1; one of mean e comes floor(e) or ceil(e) times.

    Which of the two is systematic sampling in a random order: the mean is e, and the sum is always n. Copies of an image are
    spread evenly over the epoch, so that a batch rarely holds two. ``uniform`` (n) -> n random numbers in [0, 1).
    """
    order = np.argsort(uniform(len(expected)))
    ends = np.append(0.0, np.cumsum(expected[order]))
    ends *= len(expected) / ends[-1]
    times = np.diff(np.floor(np.append(ends[:-1], len(expected)) + uniform(1))).astype(np.int64)
    copies, place = np.repeat(times, times), np.repeat(uniform(len(expected)), times)
    copy = np.arange(len(copies)) - np.repeat(np.cumsum(times) - times, times)
    return np.repeat(order, times)[np.argsort((copy + place) / copies)]


def shares(labels: np.ndarray, expected: np.ndarray | None = None) -> np.ndarray:
    """Share (C,) of positives among the known labels (n, C), as drawn if ``expected`` draws are given; 0 without known ones."""
    weight = np.ones(len(labels)) if expected is None else expected
    return weight @ (labels == 1) / np.maximum(weight @ ~np.isnan(labels), 1e-9)


def prior_shift(labels: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Log-odds (C,) of the classes as drawn, less those of the images; 0 for a class without positives or without negatives.

    Training on ``logits + shift`` leaves log-odds of the images' own prior in the logits. That is the correction
    ``logits - shift`` of a network trained on the sample (Menon et al., ICLR 2021, section 4.2, for one sigmoid a class), up to
    where the last bias starts.
    """
    p, q = shares(labels), shares(labels, expected)
    both = (p > 0) & (p < 1) & (q > 0) & (q < 1)
    p, q = np.where(both, p, 0.5), np.where(both, q, 0.5)
    return np.log(q / (1 - q)) - np.log(p / (1 - p))
