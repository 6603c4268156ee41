"""What a memory bank takes of a batch, and which slots give way: the seven strategies of MemAug and the loss-aware one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Strategy(nn.Module):
    """Judges a batch for a :class:`charmlib.nn.RareMemoryBank` and says where what it takes goes.

    ``judge`` gives a score (B,) and what may be stored (B,) bool; ``place`` gives what is stored (B,) bool and the slot of
    each row (B,), in range for all rows and different for all that are stored. Unless a strategy says otherwise, accepted rows
    go in batch order to the ring's pointer, the oldest slots giving way. Shapes never depend on the data and nothing is
    read from the device, so a GPU is never waited for.
    """

    needs_logits = needs_labels = False
    by = ""
    """What it needs the labels for, in words."""
    refreshes = False
    """Whether an image that is held keeps its slot and only brings it up to date."""

    def __init__(self, classes: int):
        super().__init__()

    def judge(self, bank, z: Tensor, logits: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def place(self, bank, keep: Tensor, score: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ring(bank, keep)


class Rarity(Strategy):
    """Odd lengths: ``r_i = | ||z_i|| - mu | / mu``, mu the batch mean of ``||z||`` (MemAug, ISCIT 2024, eq. 3 and 4; CHARM).

    Kept where r is above the threshold (rule 'rare', the papers' text), below it (rule 'published', both papers' code), or
    where ``1 - cos(z_i, zbar)`` is above it, zbar the batch's mean vector (rule 'angle', CHARM's figure).
    """

    def judge(self, bank, z, logits, labels):
        score = oddness(bank, z)
        return score, by_rule(bank, score)


class Statistical(Strategy):
    """Odd lengths beside a running mean M of ``||z||``: ``r_i = | ||z_i|| - M | / M`` (MemAug).

    ``M <- b M + (1 - b) mu`` before each batch is judged, the first batch setting it; b is the bank's ``bank_momentum`` (0.9
    in stage 1, 0.9999 in stage 2). With b = 0 it is :class:`Rarity`. Rules 'rare' and 'published' as there, no 'angle'.

    Differs from the published code in the rule only, which there is 'published'.
    """

    def __init__(self, classes: int):
        super().__init__(classes)
        self.register_buffer("mean_norm", torch.zeros(()))

    def judge(self, bank, z, logits, labels):
        now = z.norm(dim=1).mean()
        mean = torch.where(bank.seen == 0, now, torch.lerp(now, self.mean_norm, bank.bank_momentum))
        self.mean_norm.copy_(torch.where(torch.isfinite(now), mean, self.mean_norm))  # an overflow must not stay in it
        score = rarity(z, self.mean_norm)
        return score, by_rule(bank, score)


class Entropy(Strategy):
    """The most uncertain: mean over classes of ``-p log p - (1 - p) log(1 - p)``, in nats, p the predicted probability.

    Kept is the share ``threshold`` of the batch with the highest entropy. Published (MemAug) as "prediction entropy"; its code
    takes ``-sum v log|v|`` of the normalised feature vector instead, which holds no prediction and, having negative
    entries, is no entropy.
    """

    needs_logits = True

    def judge(self, bank, z, logits, labels):
        score = F.binary_cross_entropy_with_logits(logits, torch.sigmoid(logits), reduction="none").mean(1)
        return score, top_share(score, bank.threshold)


class Diversity(Strategy):
    """Least like what is there: ``1 - max_j cos(z_i, m_j)`` over the filled slots (MemAug); 1 for an empty bank.

    Kept is the share ``threshold`` of the batch with the highest score, or all of it where all are equal. The published code
    compares strictly, so that its bank, empty and scoring all alike, never takes a first feature.
    """

    def judge(self, bank, z, logits, labels):
        score = novelty(bank, z)
        return score, top_share(score, bank.threshold)


class Hybrid(Strategy):
    """Odd and new: ``0.5 rarity + 0.5 novelty``, the scores of :class:`Rarity` and :class:`Diversity` (MemAug, weight 0.5).

    Kept is the share ``threshold`` of the batch with the highest score, so high rarity counts whatever the rule (also in the
    published code); the rule 'angle' takes the angle for it.
    """

    weight = 0.5

    def judge(self, bank, z, logits, labels):
        score = torch.lerp(oddness(bank, z), novelty(bank, z), self.weight)
        return score, top_share(score, bank.threshold)


class Fifo(Strategy):
    """Everything, oldest out: the bank holds the last N features (MemAug). All scores are 0."""

    def judge(self, bank, z, logits, labels):
        return everything(z)


class Reservoir(Strategy):
    """A uniform sample of everything seen: after n features each is held with probability N / n (MemAug).

    Exact, by Vitter's algorithm R (ACM TOMS 11, 1985): feature number t (from 0) goes to slot t while there are free ones,
    then to slot j drawn from 0 .. t, if j < N. Where two of a batch draw the same slot, the later one has it, as
    one after the other. The published code stores with probability N / (batches x this batch's size) into a ring, whose
    oldest slots give way, so its sample leans to the recent. All scores are 0.
    """

    def judge(self, bank, z, logits, labels):
        return everything(z)

    def place(self, bank, keep, score, ids):
        batch = torch.arange(len(keep), device=keep.device)
        number = bank.seen + batch
        draw = torch.rand(len(keep), dtype=torch.float64, device=keep.device)  # float32 has too few values for a long run
        slot = torch.where(number < bank.size, number, (draw * (number + 1)).long())
        taken = keep & (slot < bank.size)
        return taken & ~overtaken(slot, taken), slot.clamp(max=bank.size - 1)


class Hard(Strategy):
    """The hardest: keeps the N samples with the highest loss, the easiest giving way to harder ones.

    The score is the binary cross-entropy of the prediction that the batch was trained on, mean over the classes whose label is
    known. An image that the bank holds first takes its new feature and its new loss into the slot that it has, so that no
    slot keeps the loss of an early epoch; then the batch's other images compete with all slots. Images without an id (-1)
    cannot be told from one another and may fill several slots. The threshold and the rule are not used.

    From the loss-aware bank that MemAug's authors added later. Differs from that code, which scores 0.6 loss + 0.4 (1 - mean
    |p - 0.5|), offers the highest 30 % of a batch only, never looks at a held sample again (so that losses of the first
    epochs stay), and adapts k to the confidence of a first prediction: k is fixed here.
    """

    needs_logits = needs_labels = refreshes = True
    by = "judges by the loss"

    def judge(self, bank, z, logits, labels):
        known = ~torch.isnan(labels)
        loss = F.binary_cross_entropy_with_logits(logits, torch.nan_to_num(labels), reduction="none") * known
        return loss.sum(1) / known.sum(1).clamp(min=1), known.any(1)

    def place(self, bank, keep, score, ids):
        keep = keep & ~overtaken(ids, keep & (ids >= 0))  # the last of an image that a batch holds twice
        at_home, home, again, row = held(bank, ids, keep)

        number = torch.arange(bank.size, device=keep.device)
        ease = torch.where(again, score[row], bank.slot_scores).double()
        ease = torch.where(number < bank.filled, ease, number.double() - 1e9)  # free slots first, in order
        rows = min(len(keep), bank.size)
        easiest = ease.topk(rows, largest=False).indices

        # Hardest newcomer to easiest slot, next to next: those that are harder than their slot's holder make up, with the
        # slots left, the N hardest of all.
        new = keep & ~at_home
        position = torch.argsort(torch.argsort(score.masked_fill(~new, -torch.inf), descending=True, stable=True))
        rival = easiest[position.clamp(max=rows - 1)]
        fits = new & (position < rows) & (score > ease[rival])
        evicted = ((home[:, None] == rival) & fits).any(1)  # an image at home whose slot a harder one takes
        return (at_home & ~evicted) | fits, torch.where(at_home, home, rival)


class Balanced(Strategy):
    """As many slots for each finding as it can fill: the newest images of every class, rare classes whole.

    An image stands with its rarest finding, by the positives seen so far, or with those that have none. Slots are shared out
    evenly: each class keeps its newest images, and what a rare class cannot fill goes to the others. The score is the number
    of the class that an image stands with, C for those without a finding. An image that the bank holds keeps its slot and
    brings it up to date, so that no image fills two. Images of which no label is known are not taken. The threshold and the
    rule are not used.

    Not a published strategy: the rarity of CHARM and MemAug is that of a feature's length, and banks filled by it hold rare
    findings no more often than the training part does. The nearest relative is class-balanced memory in continual learning
    (Chrysakis and Moens, ICML 2020), which draws at random where this keeps the newest.
    """

    needs_labels = refreshes = True
    by = "shares slots out by class"

    def __init__(self, classes: int):
        super().__init__(classes)
        self.register_buffer("positives", torch.zeros(classes, dtype=torch.int64))

    def judge(self, bank, z, logits, labels):
        positive = labels == 1  # an unknown label (NaN) is none
        self.positives += positive.sum(0) * torch.isfinite(z).all()
        rarest = torch.where(positive, self.positives, torch.iinfo(torch.int64).max).argmin(1)
        return torch.where(positive.any(1), rarest, positive.shape[1]).float(), ~torch.isnan(labels).all(1)

    def place(self, bank, keep, score, ids):
        keep = keep & ~overtaken(ids, keep & (ids >= 0))  # the last of an image that a batch holds twice
        at_home, home, again, row = held(bank, ids, keep)
        slots = torch.arange(bank.size, device=keep.device)

        # Slots and newcomers together: which class each stands with, and how many steps ago it was written.
        present = torch.cat([slots < bank.filled, keep & ~at_home])
        shelf = torch.cat([torch.where(again, score[row], bank.slot_scores), score]).long()
        age = torch.cat([torch.where(again, 0, bank.steps - bank.slot_steps), torch.zeros_like(ids)])
        span = bank.steps + 2  # more than any age
        absent = torch.iinfo(torch.int64).max // 4 // span

        # How many newer ones of its class each has before it; those with the fewest stay, so that all classes get alike.
        order = torch.argsort(torch.where(present, shelf, absent) * span + age, stable=True)
        sorted_shelf = torch.where(present, shelf, absent)[order]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=keep.device) - torch.searchsorted(sorted_shelf, sorted_shelf)
        best = torch.argsort(torch.where(present, rank, absent) * span + age, stable=True)[:bank.size]
        stays = torch.zeros_like(present)
        stays[best] = True
        stays = stays & present

        new, free = stays[bank.size:], torch.argsort(stays[:bank.size].to(torch.uint8), stable=True)
        target = free[(torch.cumsum(new, 0) - 1).clamp(min=0, max=bank.size - 1)]
        return new | (at_home & stays[home]), torch.where(at_home, home, target)


STRATEGIES: dict[str, type[Strategy]] = {
    "rarity": Rarity, "statistical": Statistical, "entropy": Entropy, "diversity": Diversity, "hybrid": Hybrid, "fifo": Fifo,
    "reservoir": Reservoir, "hard": Hard, "balanced": Balanced}


def everything(z: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of 0 and all rows accepted, for strategies that judge nothing."""
    return z.new_zeros(len(z)), torch.ones(len(z), dtype=torch.bool, device=z.device)


def oddness(bank, z: Tensor) -> Tensor:
    """Of each of a batch beside the others, (B,): by direction for the rule 'angle', else by length."""
    return angle(z) if bank.rule == "angle" else rarity(z, z.norm(dim=1).mean())


def rarity(z: Tensor, mean: Tensor) -> Tensor:
    """``| ||z_i|| - mean | / mean``, (B,)."""
    return (z.norm(dim=1) - mean).abs() / mean.clamp(min=1e-12)


def angle(z: Tensor) -> Tensor:
    """``1 - cos(z_i, zbar)``, (B,)."""
    return 1 - F.cosine_similarity(z, z.mean(0, keepdim=True), dim=1)


def novelty(bank, z: Tensor) -> Tensor:
    """``1 - max_j cos(z_i, m_j)`` over the filled slots, (B,); 1 for an empty bank."""
    free = torch.arange(bank.size, device=z.device) >= bank.filled
    similarity = F.normalize(z, dim=1) @ bank.slots.T
    similarity /= torch.linalg.vector_norm(bank.slots, dim=1).clamp_(min=1e-12)  # no normalised copy of all slots
    nearest = similarity.masked_fill(free, -torch.inf).amax(1)
    return 1 - torch.where(bank.filled > 0, nearest, torch.zeros_like(nearest))


def by_rule(bank, score: Tensor) -> Tensor:
    """Which scores the threshold lets in: those below it under the rule 'published', else those above."""
    return score < bank.threshold if bank.rule == "published" else score > bank.threshold


def top_share(score: Tensor, share: float) -> Tensor:
    """The ``share`` of a batch with the highest scores, those at or above its quantile: of small batches up to one row more
    than the share, at least one, and all where all tie."""
    place = (1 - min(share, 1.0)) * (len(score) - 1)
    low = math.floor(place)
    ordered = score.sort().values  # torch.quantile reads the device in older releases
    return score >= torch.lerp(ordered[low], ordered[min(low + 1, len(score) - 1)], place - low)


def ring(bank, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted rows in batch order from the bank's pointer on, which moves behind them. Of more than N the last N stay."""
    count = keep.sum()
    rank = torch.cumsum(keep, 0) - 1
    taken = keep & (rank >= count - bank.size)
    slot = (bank.pointer + rank) % bank.size
    bank.pointer.copy_((bank.pointer + count) % bank.size)
    return taken, slot


def held(bank, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which of a batch's rows (B,) the bank holds and in which slot, and which slots (N,) that concerns and by which row."""
    same = (ids[:, None] == bank.slot_ids) & (keep & (ids >= 0))[:, None]  # (B, N)
    return same.any(1), same.to(torch.uint8).argmax(1), same.any(0), same.to(torch.uint8).argmax(0)


def overtaken(target: Tensor, among: Tensor) -> Tensor:
    """Rows (B,) of ``among`` whose target a later row of ``among`` has too."""
    order = torch.arange(len(target), device=target.device)
    same = (target[:, None] == target) & among[:, None] & among & (order[:, None] < order)
    return same.any(1)
