"""Write strategies of memory banks: the seven of MemAug, its later loss-aware one, a class-balanced one, and one by labels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Strategy(nn.Module):
    """Selects the rows of a batch that a :class:`charmlib.nn.RareMemoryBank` stores, and their slots.

    The base class accepts every row and writes to a ring buffer, which overwrites the oldest slots. Shapes never depend on
    the data and no value is read from the device, so a strategy never waits for the GPU.
    """

    needs_logits = needs_labels = False
    refreshes = False
    """Whether a stored image keeps its slot, which then takes the new feature, labels and score."""
    chooses = False
    """Whether ``choose`` selects from all labels at once, in place of ``judge`` and ``place`` in training."""

    def __init__(self, classes: int):
        super().__init__()

    def judge(self, bank, z: Tensor, logits: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features (B, D), logits (B, C) and labels (B, C) -> score (B,) and candidates for storage (B,) bool."""
        return z.new_zeros(len(z)), torch.ones(len(z), dtype=torch.bool, device=z.device)

    def place(self, bank, keep: Tensor, score: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates, scores and ids (B,) -> stored rows (B,) bool and slots (B,), distinct for all stored rows."""
        return ring(bank, keep)


class Rarity(Strategy):
    """Norms far from the batch mean mu: ``r_i = | ||z_i|| - mu | / mu`` (MemAug, ISCIT 2024, eq. 3 and 4; CHARM).

    Rule 'rare' stores r above the threshold (text of both papers), rule 'published' stores r below it (code of both). Rule
    'angle' stores ``1 - cos(z_i, zbar)`` above it, with zbar the mean vector of the batch (CHARM's figure).
    """

    def judge(self, bank, z, logits, labels):
        score = batch_rarity(bank, z)
        return score, passes_threshold(bank, score)


class Statistical(Strategy):
    """Norms far from their running mean M: ``r_i = | ||z_i|| - M | / M`` (MemAug).

    Each batch first updates ``M <- b M + (1 - b) mu``; the first batch sets M = mu. b is the ``bank_momentum`` of the bank,
    published as 0.9 in stage 1 and 0.9999 in stage 2. b = 0 gives :class:`Rarity`, whose rules 'rare' and 'published' apply.

    Differs from the published code in the rule only, which is 'published' there.
    """

    def __init__(self, classes: int):
        super().__init__(classes)
        self.register_buffer("mean_norm", torch.zeros(()))

    def judge(self, bank, z, logits, labels):
        now = z.norm(dim=1).mean()
        mean = torch.where(bank.seen == 0, now, torch.lerp(now, self.mean_norm, bank.bank_momentum))
        self.mean_norm.copy_(torch.where(torch.isfinite(now), mean, self.mean_norm))  # skips an overflow
        score = rarity(z, self.mean_norm)
        return score, passes_threshold(bank, score)


class Entropy(Strategy):
    """High binary entropy of the predicted probabilities p: ``-p log p - (1 - p) log(1 - p)`` in nats, averaged over classes.

    Stores the fraction ``threshold`` of the batch with the highest score. MemAug calls it prediction entropy. Differs from its
    code, which computes ``-sum v log|v|`` of the normalised feature vector v. Entries of v may be negative, so that value is
    neither an entropy nor a function of the prediction.
    """

    needs_logits = True

    def judge(self, bank, z, logits, labels):
        score = F.binary_cross_entropy_with_logits(logits, torch.sigmoid(logits), reduction="none").mean(1)
        return score, top_share(score, bank.threshold)


class Diversity(Strategy):
    """Low similarity to the filled slots m: ``1 - max_j cos(z_i, m_j)`` (MemAug); 1 for an empty bank.

    Stores the fraction ``threshold`` of the batch with the highest score, or the whole batch if all scores are equal. Differs
    from the published code, whose strict comparison rejects the equal scores of an empty bank, so that it stays empty.
    """

    def judge(self, bank, z, logits, labels):
        score = novelty(bank, z)
        return score, top_share(score, bank.threshold)


class Hybrid(Strategy):
    """Mean of the scores of :class:`Rarity` and :class:`Diversity` (MemAug, weight 0.5).

    Stores the fraction ``threshold`` of the batch with the highest score. High rarity is therefore preferred under every
    rule, as in the published code. The rule 'angle' only replaces the rarity score by the angle.
    """

    weight = 0.5

    def judge(self, bank, z, logits, labels):
        score = torch.lerp(batch_rarity(bank, z), novelty(bank, z), self.weight)
        return score, top_share(score, bank.threshold)


class Fifo(Strategy):
    """First in, first out: the bank holds the last N features (MemAug). All scores are 0."""


class Reservoir(Strategy):
    """A uniform sample of all features: after n features each is stored with probability N / n (MemAug). All scores are 0.

    Implements algorithm R exactly (Vitter, ACM TOMS 11, 1985). Feature t (from 0) fills slot t while t < N; later it
    replaces slot j, drawn uniformly from 0 .. t, if j < N. Of two rows that draw the same slot, the later one is stored.

    Differs from the published code, which stores with probability N / (batches x batch size) into a ring buffer. Its sample is
    biased towards recent features.
    """

    def place(self, bank, keep, score, ids):
        batch = torch.arange(len(keep), device=keep.device)
        number = bank.seen + batch
        draw = torch.rand(len(keep), dtype=torch.float64, device=keep.device)  # float32 is too coarse for long runs
        slot = torch.where(number < bank.size, number, (draw * (number + 1)).long())
        taken = keep & (slot < bank.size)
        return taken & ~has_later_duplicate(slot, taken), slot.clamp(max=bank.size - 1)


class Hard(Strategy):
    """The N samples with the highest loss: harder samples replace the easiest slots.

    The score is the binary cross-entropy of the training prediction, averaged over the known labels. Stored images first
    update the feature and the loss of their slot. The other images of the batch then compete with all slots. An image
    without id (-1) may fill several slots. ``threshold`` and ``rule`` are unused.

    The source is the loss-aware bank that MemAug's authors added later. Differs from their code, which scores
    0.6 loss + 0.4 (1 - mean |p - 0.5|). Their code also offers only the highest 30 % of a batch, never updates the loss of a
    stored sample, and adapts k to the confidence of a first prediction.
    """

    needs_logits = needs_labels = refreshes = True

    def judge(self, bank, z, logits, labels):
        known = ~torch.isnan(labels)
        loss = F.binary_cross_entropy_with_logits(logits, torch.nan_to_num(labels), reduction="none") * known
        return loss.sum(1) / known.sum(1).clamp(min=1), known.any(1)

    def place(self, bank, keep, score, ids):
        keep = keep & ~has_later_duplicate(ids, keep & (ids >= 0))  # the last row of each image
        at_home, home, again, row = match_ids(bank, ids, keep)

        number = torch.arange(bank.size, device=keep.device)
        ease = torch.where(again, score[row], bank.slot_scores).double()
        ease = torch.where(number < bank.filled, ease, number.double() - 1e9)  # free slots first, in order
        rows = min(len(keep), bank.size)
        easiest = ease.topk(rows, largest=False).indices

        # The i-th hardest new image replaces the i-th easiest slot if it is harder. The N hardest of all are then stored.
        new = keep & ~at_home
        position = torch.argsort(torch.argsort(score.masked_fill(~new, -torch.inf), descending=True, stable=True))
        rival = easiest[position.clamp(max=rows - 1)]
        fits = new & (position < rows) & (score > ease[rival])
        evicted = ((home[:, None] == rival) & fits).any(1)  # stored images whose slot a harder image takes
        return (at_home & ~evicted) | fits, torch.where(at_home, home, rival)


class Balanced(Strategy):
    """An equal number of slots for each class, filled with its newest images; all images of rare classes are stored.

    Each image is filed under its rarest positive class, by the positives seen so far, or under 'no finding'. Slots that a rare
    class cannot fill go to the other classes. The score is the index of the class, C for 'no finding'. A stored image keeps
    and updates its slot. Images without a known label are rejected. ``threshold`` and ``rule`` are unused.

    This strategy is unpublished. The rarity of CHARM and MemAug concerns the norm of a feature, and banks filled by it hold
    rare findings no more often than the training part. The closest published method is class-balancing reservoir sampling
    (Chrysakis and Moens, ICML 2020), which draws images at random instead of keeping the newest.
    """

    needs_labels = refreshes = True

    def __init__(self, classes: int):
        super().__init__(classes)
        self.register_buffer("positives", torch.zeros(classes, dtype=torch.int64))

    def judge(self, bank, z, logits, labels):
        positive = labels == 1  # False for an unknown label (NaN)
        self.positives += positive.sum(0) * torch.isfinite(z).all()
        rarest = torch.where(positive, self.positives, torch.iinfo(torch.int64).max).argmin(1)
        return torch.where(positive.any(1), rarest, positive.shape[1]).float(), ~torch.isnan(labels).all(1)

    def place(self, bank, keep, score, ids):
        keep = keep & ~has_later_duplicate(ids, keep & (ids >= 0))  # the last row of each image
        at_home, home, again, row = match_ids(bank, ids, keep)
        slots = torch.arange(bank.size, device=keep.device)

        # Slots and new images together: the class of each, and the number of steps since it was written.
        present = torch.cat([slots < bank.filled, keep & ~at_home])
        shelf = torch.cat([torch.where(again, score[row], bank.slot_scores), score]).long()
        age = torch.cat([torch.where(again, 0, bank.steps - bank.slot_steps), torch.zeros_like(ids)])
        span = bank.steps + 2  # more than any age
        absent = torch.iinfo(torch.int64).max // 4 // span

        # The rank of each within its class, newest first. The lowest ranks stay, which gives all classes equal shares.
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


class Labels(Strategy):
    """Images with a finding that is rare by its labels: the share of the images that have it is at or below ``threshold``.

    A :class:`charmlib.nn.VotingBank` needs no feature until it answers. It stores the choice (``choose``) among all images at
    hand, and as many images without a finding. At most half of the N slots go to images with one. If these do not fit, each is
    filed under its rarest class, and classes give way evenly: those of few images keep all. A draw with a fixed seed decides
    within a class, and among images without a finding. Other banks store each batch's images in a ring, by the shares so far.

    The score is the share of an image's rarest positive class, 1 without one. ``rule`` is unused. CHARM's and MemAug's rarity
    is a feature's length; its threshold knows no labels.
    """

    needs_labels = chooses = True

    def __init__(self, classes: int):
        super().__init__(classes)
        for name in ("positives", "known"):
            self.register_buffer(name, torch.zeros(classes, dtype=torch.int64))

    def judge(self, bank, z, logits, labels):
        finite = torch.isfinite(z).all()
        self.positives += (labels == 1).sum(0) * finite
        self.known += (~torch.isnan(labels)).sum(0) * finite
        score, _ = rarest(labels, self.positives, self.known)
        return score, (labels == 1).any(1) & (score <= bank.threshold)

    def choose(self, bank, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (n, C) of 0, 1 or NaN -> the rows to store (m,), m at most N, in their order, and the scores (m,)."""
        positive, known = labels == 1, ~torch.isnan(labels)
        score, of_image = rarest(labels, positive.sum(0), known.sum(0))
        draw = torch.randperm(len(labels), generator=torch.Generator().manual_seed(85)).to(labels.device)
        has = positive.any(1)
        rare, none = (draw[of[draw]] for of in (has & (score <= bank.threshold), ~has & known.any(1)))
        same = of_image[rare, None] == torch.arange(labels.shape[1], device=labels.device)
        rank = same.cumsum(0)[torch.arange(len(rare), device=labels.device), of_image[rare]]  # from 1, within the class
        rare = rare[torch.argsort(rank, stable=True)[:bank.size // 2]]
        rows = torch.cat([rare, none[:min(len(rare), bank.size - len(rare))]]).sort().values
        return rows, score[rows]


def rarest(labels: Tensor, positives: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Share and index (n,) of the rarest positive class of labels (n, C), by numbers (C,) of positive and known ones; share 1
    without a positive class."""
    return torch.where(labels == 1, positives / known.clamp(min=1), 1.0).min(1)


STRATEGIES: dict[str, type[Strategy]] = {
    "rarity": Rarity, "statistical": Statistical, "entropy": Entropy, "diversity": Diversity, "hybrid": Hybrid, "fifo": Fifo,
    "reservoir": Reservoir, "hard": Hard, "balanced": Balanced, "labels": Labels}


def batch_rarity(bank, z: Tensor) -> Tensor:
    """Rarity (B,) of each row compared with its batch: ``1 - cos(z_i, zbar)`` under the rule 'angle', in [0, 2], with zbar the
    mean vector of the batch; otherwise :func:`rarity`."""
    if bank.rule == "angle":
        return 1 - F.cosine_similarity(z, z.mean(0, keepdim=True), dim=1)
    return rarity(z, z.norm(dim=1).mean())


def rarity(z: Tensor, mean: Tensor) -> Tensor:
    """``| ||z_i|| - mean | / mean`` (B,), 0 or more."""
    return (z.norm(dim=1) - mean).abs() / mean.clamp(min=1e-12)


def novelty(bank, z: Tensor) -> Tensor:
    """``1 - max_j cos(z_i, m_j)`` (B,) over the filled slots m, in [0, 2]; 1 for an empty bank."""
    free = torch.arange(bank.size, device=z.device) >= bank.filled
    similarity = F.normalize(z, dim=1) @ bank.slots.T
    similarity /= torch.linalg.vector_norm(bank.slots, dim=1).clamp_(min=1e-12)  # without a normalised copy of all slots
    nearest = similarity.masked_fill(free, -torch.inf).amax(1)
    return 1 - torch.where(bank.filled > 0, nearest, torch.zeros_like(nearest))


def passes_threshold(bank, score: Tensor) -> Tensor:
    """Whether each score (B,) is below the threshold under the rule 'published', or above it under the other rules."""
    return score < bank.threshold if bank.rule == "published" else score > bank.threshold


def top_share(score: Tensor, share: float) -> Tensor:
    """Rows (B,) at or above the ``1 - share`` quantile of their batch: at least one row, and all rows if all scores tie."""
    past, low = math.modf((1 - min(share, 1.0)) * (len(score) - 1))
    ordered = score.sort().values[int(low):]  # torch.quantile of older releases waits for the GPU
    return score >= torch.lerp(ordered[0], ordered[min(1, len(ordered) - 1)], past)


def ring(bank, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Stored rows (B,) and their consecutive slots (B,) from the bank's pointer, which advances.

    At most the last N rows are stored; with the retrieval 'published' the first ones, up to the last slot.
    """
    count = keep.sum()
    rank = torch.cumsum(keep, 0) - 1
    if bank.retrieval == "published":
        count = torch.minimum(count, bank.size - bank.pointer)
        taken = keep & (rank < count)
    else:
        taken = keep & (rank >= count - bank.size)
    slot = (bank.pointer + rank) % bank.size
    bank.pointer.copy_((bank.pointer + count) % bank.size)
    return taken, slot


def match_ids(bank, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of stored images (B,) bool and their slots (B,), then slots with such a row (N,) bool and its index (N,)."""
    same = (ids[:, None] == bank.slot_ids) & (keep & (ids >= 0))[:, None]  # (B, N)
    return same.any(1), same.to(torch.uint8).argmax(1), same.any(0), same.to(torch.uint8).argmax(0)


def has_later_duplicate(target: Tensor, among: Tensor) -> Tensor:
    """Whether each row (B,) of ``among`` has the same target as a later row of ``among``."""
    order = torch.arange(len(target), device=target.device)
    return ((target[:, None] == target) & among[:, None] & among & (order[:, None] < order)).any(1)
