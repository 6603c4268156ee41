"""Write strategies of memory banks: the seven of MemAug, and its later loss-aware one."""

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


STRATEGIES: dict[str, type[Strategy]] = {
    "rarity": Rarity, "statistical": Statistical, "entropy": Entropy, "diversity": Diversity, "hybrid": Hybrid, "fifo": Fifo,
    "reservoir": Reservoir, "hard": Hard}


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
