"""What the memory bank of a run holds, and what it answers an image with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch

from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.enrichment import enrichment, training_shares
from charmlib.evaluation.metrics import prevalence
from charmlib.evaluation.runs import RunFolder, kept_epoch
from charmlib.files import reading, write_csv
from charmlib.nih import NO_FINDING, PARTS
from charmlib.nn import RareMemoryBank, VotingBank
from charmlib.nn.bank import Slots
from charmlib.training.recipes import batches
from charmlib.training.views import tensors

SHOWN = 10  # voting slots of an explanation
COLUMNS = ("slot", "image", "patient", "labels", "similarity", "weight", "step")
VOTED = tuple(name.replace("weight", "contribution") for name in COLUMNS)


@dataclass(frozen=True)
class Explanation:
    """An image, the network's probabilities, and the slots that its memory bank retrieved, or whose votes count most.

    Attributes
    ----------
    image, patient, part : str
        File name, patient, and 'train', 'valid', 'test', or '' for an image outside the split.
    labels : tuple of str
        The image's own findings, ('No Finding',) without one; empty if no label is known.
    probabilities : dict
        Class -> probability, uncalibrated.
    finding : str
        The class that is explained.
    table : DataFrame
        One row a slot: ``slot``, ``image`` (file name of a training image), ``patient``, ``labels`` ('Effusion|Mass'),
        ``similarity``, ``weight`` or ``contribution``, and ``step``, the training batch that wrote it. In a voting bank k slots
        vote for a finding and k against it. The table has those with the largest absolute contribution, the largest first, and
        at most :data:`SHOWN`; the contribution is what the slot adds to the logit of ``finding``, signed, and similarity is the
        cosine of the standardised keys. Other banks have the k retrieved slots, the most similar first; similarity is as
        ``bank_norm`` says, and weight is that of the feature, with the gate and before ``normalize_retrieved``. One image may
        fill several slots.
    parts : dict
        The terms of the logit of ``finding``: 'head', 'prior', and 'votes', the sum of the contributions of all slots. Empty
        without a voting bank.
    share : float
        Share of the table in the sum of the absolute contributions of all slots, 0 to 1; 0 without votes.
    pixels, retrieved : arrays (S, S) and (k, S, S) uint8
        The image and those of the table as they are on disk; black if a slot's image is unknown. Banks of features hold what
        the network of the slot's step computed from the augmented image.
    note : str
        Says if there is no bank, or an empty one; of votes, parts and share in words.
    """

    image: str
    patient: str
    part: str
    labels: tuple[str, ...]
    probabilities: dict[str, float]
    finding: str
    table: pd.DataFrame
    pixels: np.ndarray = field(repr=False)
    retrieved: np.ndarray = field(repr=False)
    note: str = ""
    parts: dict[str, float] = field(default_factory=dict)
    share: float = 0.0

    @property
    def top(self) -> list[tuple[str, float]]:
        """Classes and probabilities, the highest first."""
        return sorted(self.probabilities.items(), key=lambda item: -item[1])


class BankEvidence:
    """The memory bank of a :class:`charmlib.training.run.Run`: its slots, their history, and what they answer."""

    def __init__(self, run):
        self.run, self.data = run, run.data

    @property
    def bank(self) -> Slots | None:
        """The network's bank."""
        return getattr(self.run.net, "bank", None)

    def table(self) -> pd.DataFrame:
        """The filled slots: slot, image (file name), patient, labels as text, step, score, and one column a class.

        See :meth:`charmlib.nn.bank.Slots.table`.

        Raises
        ------
        ValueError
            The run has no bank.
        """
        if self.bank is None:
            raise ValueError(f"{self.run.folder} has no bank (use_bank is off), so there are no slots to show")
        frame = self.data.index.frame
        table = self.bank.table(frame["id"].tolist(), self.data.classes)
        table.insert(2, "patient", table["image"].map(dict(zip(frame["id"], frame["patient"]))))
        return table

    def write(self) -> None:
        """Write ``bank.csv``, if there is a bank."""
        if self.bank is not None:
            write_csv(self.run.folder.bank_file, self.table().drop(columns="labels"))

    def history(self) -> pd.DataFrame:
        """``bank_history.csv``: stage, epoch, filled, one column a class, no_finding; empty for a run without a bank."""
        path = self.run.folder.bank_history_file
        with reading(path, "history of a bank", "delete it; the run does without its curves"):
            return (pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["stage", "epoch", "filled"])).astype(
                {"stage": int, "epoch": int})

    def shares(self) -> dict[str, float]:
        """Prevalence of each finding, and of ``no_finding``, in the training part."""
        return training_shares(self.data.labels[self.data.rows("train")], self.data.classes, self.data.index.normal_class)

    def summary(self, history: list[dict]) -> dict | None:
        """What ``metrics.json`` holds of the bank: slots filled, share of features stored, enrichment; None without a bank."""
        if self.bank is None:
            return None
        table, rows, classes = self.table().dropna(subset="image"), self.data.rows("train"), list(self.data.classes)
        return {"filled": self.bank.filled.item(), "accepted": self.bank.accepted.item() / max(self.bank.seen.item(), 1),
                "enrichment": None if table.empty else enrichment(
                    table[classes].to_numpy(np.float64, na_value=np.nan), table["patient"], self.data.labels[rows],
                    self.data.index.frame["patient"].to_numpy(str)[rows], classes, normal_class=self.data.index.normal_class,
                    offered=self._offered(table["step"].to_numpy(), history))}

    def _offered(self, steps: np.ndarray, history: list[dict]) -> np.ndarray:
        """Weights (n,) of the training images, had each slot written at ``steps`` been drawn from its stage's images."""
        rows, plan, images = self.data.rows("train"), self.run.phases(), self.data.train_images()
        if isinstance(self.bank, VotingBank):
            return np.ones(len(rows))
        with_finding = self.data.index.has_finding()[rows].astype(float)
        end, left, weights = self.bank.steps.item(), np.ones(len(steps), bool), np.zeros(len(rows))
        for stage, phase in reversed({phase.stage: phase for phase in plan}.items()):  # each with its last phase
            kept = kept_epoch([row for row in history if str(row["stage"]) == stage], self.run.params["monitor"]) + 1
            end = end - kept * batches(phase, images) if stage != plan[0].stage else -np.inf
            of_stage = left & (steps >= end)
            shown = with_finding if phase.images == "findings" else np.ones(len(rows))
            weights += of_stage.mean() * shown / max(shown.sum(), 1)
            left &= ~of_stage
        return weights

    def cases(self, count: int = 3) -> list[str]:
        """Test images to look at: the first image with each of the ``count`` rarest findings of the test part, each of another
        patient. Neither scores nor the bank influence the choice."""
        data, rows = self.data, self.data.rows("test")
        share = prevalence(data.labels[data.rows("train")], data.classes)
        patients, names = (data.index.frame[c].to_numpy(str)[rows] for c in ("patient", "id"))
        chosen = {}  # patient -> image
        for name in sorted(data.index.findings, key=lambda c: share[c]):
            found = np.flatnonzero(data.labels[rows, list(data.classes).index(name)] == 1)
            chosen |= {patients[i]: str(names[i]) for i in [i for i in found if patients[i] not in chosen][:1]}
        return list(chosen.values())[:count]

    @torch.no_grad()
    def explain(self, image: str, finding: str = "") -> Explanation:
        """The slots that answer an image (its file name, of any part), in eval mode on the run's device, as scoring does.

        ``finding`` is the class whose logit the contributions of votes are to, by default the most probable finding. A training
        image does not retrieve itself, as in training, and its slot does not vote.

        Raises
        ------
        ValueError
            The data have no such image, or the run has no such class.
        """
        frame, data, net, device = self.data.index.frame, self.data, self.run.net.eval(), self.run.device
        row_of = dict(zip(frame["id"], range(len(frame))))
        if image not in row_of:
            raise ValueError(f"no image {image!r} in {data.index.root}: give a file name as its table has it, such as "
                             f"{frame['id'].iloc[0]!r}")
        if finding not in ("", *data.classes):
            raise ValueError(f"no class {finding!r} in {self.run.folder}: one of {', '.join(data.classes)}")
        row = row_of[image]
        pixels = np.asarray(data.images[row])
        mean, std = tensors(net, device)
        ids = torch.tensor([row], device=device)
        with torch.autocast("cuda", torch.float16, enabled=self.run.precision == "fp16"):
            if self.bank is not None:
                net.see(ids, None)
            logits, seen = net.read(grey_to_network(torch.from_numpy(pixels.copy())[None, None].to(device), mean, std))
        probabilities = dict(zip(data.classes, torch.sigmoid(logits.float())[0].tolist()))
        finding = finding or max(data.index.findings, key=probabilities.get)
        table, note, *votes = answer(self.bank, seen, data.classes, finding, self.table, ids)
        retrieved = [np.zeros_like(pixels) if pd.isna(name) else np.asarray(data.images[row_of[name]])
                     for name in table["image"]]
        part = next((p for p in PARTS if row in data.split.rows(p)), "")
        labels = tuple(c for c, value in zip(data.classes, data.labels[row]) if value == 1) or (
            () if np.isnan(data.labels[row]).all() else (NO_FINDING,))
        return Explanation(image, str(frame["patient"].iloc[row]), part, labels,
                           probabilities, finding, table, pixels,
                           np.stack(retrieved) if retrieved else np.empty((0, *pixels.shape), np.uint8), note, *votes)


def answer(bank: Slots | None, seen: dict[str, torch.Tensor], classes: Sequence[str], finding: str,
           slots: Callable[[], pd.DataFrame], ids: torch.Tensor | None = None
           ) -> tuple[pd.DataFrame, str, dict[str, float], float]:
    """``table``, ``note``, ``parts`` and ``share`` of an :class:`Explanation`, for the one image that the network has ``seen``.

    ``slots`` gives the filled slots with the columns of :data:`COLUMNS` that no image decides.
    """
    table = pd.DataFrame(columns=list(COLUMNS))
    if bank is None:
        return table, "the network has no memory bank (use_bank is off)", {}, 0.0
    if not bank.filled:
        return table, "the memory bank is empty: it did not answer", {}, 0.0
    if not isinstance(bank, VotingBank):
        return _retrieved(bank, seen["z"].float(), slots(), ids), "", {}, 0.0
    table, parts, share = _voted(bank, seen, list(classes).index(finding), slots(), ids)
    return table, f"{finding}: logit {sum(parts.values()):+.3f} = " + ", ".join(
        f"{name} {value:+.3f}" for name, value in parts.items()) + (
        f" of the nearest of {int(bank.filled):,} slots; those shown make {share:.1%} of the absolute contributions"
    ), parts, share


def _voted(bank: VotingBank, seen: dict[str, torch.Tensor], c: int, slots: pd.DataFrame, ids: torch.Tensor | None
           ) -> tuple[pd.DataFrame, dict[str, float], float]:
    """Table, parts and share of an :class:`Explanation` of class c."""
    head, prior, votes = bank.contributions(seen["keys"], seen["head"].float(), ids)
    votes = votes[0, :, c].double()
    top = votes.abs().topk(min(2 * bank.k, SHOWN, len(votes))).indices
    top = top[votes[top] != 0]
    found = pd.DataFrame({"slot": top.tolist(), "similarity": bank.similarity(seen["keys"], top[None])[0].tolist(),
                          "contribution": votes[top].tolist()})
    share = float(votes[top].abs().sum() / votes.abs().sum().clamp(min=1e-30))
    parts = {"head": head[0, c], "prior": prior[c], "votes": votes.sum()}
    return found.merge(slots, on="slot")[list(VOTED)], {k: v.item() + 0.0 for k, v in parts.items()}, share  # no -0


def _retrieved(bank: RareMemoryBank, query: torch.Tensor, slots: pd.DataFrame, ids: torch.Tensor | None) -> pd.DataFrame:
    """The table of an :class:`Explanation` of a bank of features."""
    index, weights, _ = bank.retrieve(query, ids)
    weights = weights if bank.gate is None else bank.gate * weights
    found = pd.DataFrame({"slot": index[0].tolist(), "similarity": bank.similarity(query, index)[0].tolist(),
                          "weight": weights[0].tolist()})
    return found[found["slot"] >= 0].merge(slots, on="slot")[list(COLUMNS)]


def stored_slots(run: RunFolder, classes: Sequence[str]) -> pd.DataFrame:
    """The filled slots as ``bank.csv`` has them, without the run's data: slot, image, patient, labels, step, and more."""
    with reading(run.bank_file, "list of a bank's slots", "copy it from where it is whole"):
        table = pd.read_csv(run.bank_file, dtype={"image": str, "patient": str})
        positive = table[list(classes)].to_numpy() == 1
        return table.assign(labels=["|".join(c for c, there in zip(classes, row) if there) or NO_FINDING for row in positive])
