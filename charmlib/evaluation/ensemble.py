"""The mean of several runs' predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.special import expit, logit

from charmlib.evaluation.compare import aligned
from charmlib.evaluation.runs import Predictions


def mean_ensemble(members: Sequence[Predictions]) -> Predictions:
    """Predictions whose probabilities are the mean of the members', given as logits again.

    Raises
    ------
    ValueError
        Fewer than two members, or they are not of the same images, classes and labels. Whether one was trained on
        another's test images is for :func:`charmlib.evaluation.leaks.refuse_leaks`, which needs the runs' folders.
    """
    if len(members) < 2:
        raise ValueError(f"an ensemble needs at least two runs, found {len(members)}")
    same = aligned(*members)
    mean = np.mean([expit(p.logits.astype(np.float64)) for p in same], axis=0)
    # probabilities within float64's last steps of 0 and 1 have no finite logit
    return replace(same[0], logits=logit(np.clip(mean, 1e-300, 1 - 2**-53)))
