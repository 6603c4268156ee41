"""What the memory bank answered one image with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.metrics import prevalence
from charmlib.nih import NO_FINDING, PARTS

COLUMNS = ("slot", "image", "patient", "labels", "similarity", "weight", "step")


@dataclass(frozen=True)
class Explanation:
    """An image, what the network says of it, and the slots that its memory answered with.

    Attributes
    ----------
    image, patient, part : str
        File name, patient, and 'train', 'valid', 'test', or '' where the split has left it out.
    labels : tuple of str
        The image's own findings, ('No Finding',) without one; empty where no label is known.
    probabilities : dict
        Class -> probability, uncalibrated.
    table : DataFrame
        One row a slot that answered, best first: ``slot``, ``image`` (file name of a training image), ``patient``,
        ``labels`` ('Effusion|Mass'), ``similarity`` (mean cosine of the keys of a bank that votes; else what ``bank_norm``
        makes it, the cosine for 'both'), ``weight`` (of its labels, 0 to 1, in a bank that votes, which asks all slots and
        names the k most similar; else of its feature, the gate of 'gated' included, before ``normalize_retrieved`` scales the
        sum) and ``step``, the training batch that wrote it. One image may fill several slots.
    pixels, retrieved : arrays (S, S) and (k, S, S) uint8
        The image, and those of the table as they are on disk, which is how a bank that votes compares them. Of other banks
        the slot holds the feature that the network of its step gave the image, turned and mirrored. Black where a slot's
        image is not known.
    note : str
        What to know: that there is no bank, or that it is empty.
    """

    image: str
    patient: str
    part: str
    labels: tuple[str, ...]
    probabilities: dict[str, float]
    table: pd.DataFrame
    pixels: np.ndarray = field(repr=False)
    retrieved: np.ndarray = field(repr=False)
    note: str = ""

    @property
    def top(self) -> list[tuple[str, float]]:
        """Classes and probabilities, the highest first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])


@torch.no_grad()
def explain(run, image: str) -> Explanation:
    """The slots that answered an image, in eval mode on the run's device, as the run scores it.

    A training image is not answered with itself, as in training.

    Raises
    ------
    ValueError
        The data have no such image.
    """
    frame, data, net = run.data.index.frame, run.data, run.net.eval()
    rows = np.flatnonzero(frame["id"].to_numpy(str) == image)
    if not len(rows):
        raise ValueError(f"no image {image!r} in {data.index.root}: give a file name as its table has it, such as "
                         f"{frame['id'].iloc[0]!r}")
    row = int(rows[0])
    pixels = np.asarray(data.images[row])
    mean, std = (torch.tensor(v, device=run.device).view(1, -1, 1, 1) for v in (net.mean, net.std))
    grey = torch.from_numpy(pixels.copy())[None, None].to(run.device)
    ids, table = torch.tensor([row], device=run.device), pd.DataFrame(columns=list(COLUMNS))
    with torch.autocast("cuda", torch.float16, enabled=run.precision == "fp16"):
        if net.bank is not None:
            net.bank.expect(ids)
        x = grey_to_network(grey, mean, std)
        logits = net(x)
        z, keys = net.encode(x)
    note = "the network has no memory bank (use_bank is off)"
    if net.bank is not None:
        table = _retrieved(run, z.float() if keys is None else keys, ids)
        note = f"all {int(net.bank.filled):,} slots voted" if keys is not None else ""
        note = note if len(table) else "the memory bank is empty: it did not answer"
    positions = dict(zip(frame["id"], range(len(frame))))
    retrieved = [np.zeros_like(pixels) if pd.isna(name) else np.asarray(data.images[positions[name]])
                 for name in table["image"]]
    part = next((p for p in PARTS if row in data.split.rows(p)), "")
    return Explanation(image, str(frame["patient"].iloc[row]), part, _findings(data.labels[row], data.classes),
                       dict(zip(data.classes, torch.sigmoid(logits.float())[0].tolist())), table, pixels,
                       np.stack(retrieved) if retrieved else np.empty((0, *pixels.shape), np.uint8), note)


def _retrieved(run, z: torch.Tensor, ids: torch.Tensor) -> pd.DataFrame:
    """The table of an :class:`Explanation`."""
    bank = run.net.bank
    index, weights, _ = bank.retrieve(z, ids)
    weights = weights if bank.gate is None else bank.gate * weights
    found = pd.DataFrame({"slot": index[0].tolist(), "similarity": bank.similarity(z, index)[0].tolist(),
                          "weight": weights[0].tolist()})
    slots = run.bank_table()[["slot", "image", "patient", "labels", "step"]]
    return found[found["slot"] >= 0].merge(slots, on="slot")[list(COLUMNS)]


def rare_cases(run, count: int) -> list[str]:
    """See :meth:`charmlib.training.run.Run.cases`."""
    data, rows = run.data, run.data.rows("test")
    share = prevalence(data.labels[data.rows("train")], data.classes)
    patients, names = (data.index.frame[c].to_numpy(str)[rows] for c in ("patient", "id"))
    chosen, known = [], set()
    for name in sorted((c for c in data.classes if c != NO_FINDING), key=lambda c: share[c]):
        positive = data.labels[rows, list(data.classes).index(name)] == 1
        free = [i for i in np.flatnonzero(positive) if patients[i] not in known]
        if free and len(chosen) < count:
            chosen.append(str(names[free[0]]))
            known.add(patients[free[0]])
    return chosen


def _findings(labels: np.ndarray, classes: Sequence[str]) -> tuple[str, ...]:
    if np.isnan(labels).all():
        return ()
    return tuple(c for c, value in zip(classes, labels) if value == 1) or (NO_FINDING,)
