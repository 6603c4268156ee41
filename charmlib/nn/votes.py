"""A memory bank that predicts from the labels of its slots."""

import torch
import torch.nn.functional as F
from torch import Tensor

from charmlib.nn.bank import Slots

RAREST = 1e-4
"""The lower bound of a class's prevalence in the prior."""
CHOOSE, UNCHOSEN, WEIGHTS = -1, 0.5, tuple(i / 10 for i in range(11))
"""The weight that asks for a choice, the weight until it is made, and the weights to choose among."""
_SAMPLE = 1024  # slots that give the usual similarities


class VotingBank(Slots):
    """Blends the head's logits with the votes of the nearest slots for and against each class.

    The slots hold images of rare findings, and images without a finding (:func:`rare_rows`). In eval mode, for each class c::

        e_c     = (for_c - against_c) / temperature
        logit_c = (1 - weight) logit_c + weight (prior_c + e_c)

    ``for`` and ``against`` are the mean similarities to the k nearest slots with c and without c, each less its usual value:
    the mean over slots without c, which leave themselves out. The nearest of few slots lies farther away, so that a rare class
    would be voted down otherwise. ``prior`` is the log odds of the class prevalence. Logit c is unchanged if the slots hold no
    positive label or no negative label of c.

    In training mode the logits are returned unchanged. Training therefore equals training without a bank to the bit. Only the
    epoch selected by validation may differ, because validation includes the votes. Before that, in this order::

        bank.choose(ids, labels)                  # the images
        bank.renew(slots, keys)                   # their keys by today's weights, in as many calls as one likes
        bank.calibrate()

    Similarities are cosines of keys, whose entries are standardised by mean and deviation over the slots.
    :meth:`calibrate` computes these and the usual similarities.

    Differs from the published papers, whose slots contribute features (:class:`charmlib.nn.RareMemoryBank`). The combination of
    a label cache and a trained head follows Tip-Adapter (Zhang et al., ECCV 2022); the nearest for less the nearest against is
    a balanced k-nearest-neighbour rule.

    Parameters
    ----------
    features, classes, size : int
        K, the length of a key; C, the number of labels per slot; N, the number of slots.
    threshold : float
        Share of the images to choose from, 0 to 1, up to which a finding is rare.
    k : int
        Slots for and slots against a class that vote on it, 1 to N; fewer where the bank has fewer.
    weight : float
        Weight of the votes, 0 to 1; or -1: 0.5, until training chooses it on the validation part. The buffer ``weight``, a
        0-dim float32, holds the one in use, so that a checkpoint carries it.
    temperature : float
        What differences of similarities are divided by, above 0. Small values make the votes more certain.

    Raises
    ------
    ValueError
        A parameter outside its range.
    """

    def __init__(self, features: int, classes: int, *, size: int = 4096, k: int = 5, threshold: float = 0.2,
                 weight: float = 0.5, temperature: float = 0.1):
        super().__init__(features, classes, size, k, threshold)
        self.chooses = weight == CHOOSE
        if not (self.chooses or 0 <= weight <= 1) or temperature <= 0:
            raise ValueError(f"expected weight in [0, 1] or -1, and temperature above 0, got weight={weight}, "
                             f"temperature={temperature}")
        self.temperature = temperature
        self.register_buffer("weight", torch.tensor(UNCHOSEN if self.chooses else weight, dtype=torch.float32))
        self.register_buffer("fitted", torch.zeros(classes, dtype=torch.bool))
        for name, start in (("usual", torch.zeros(2, classes)), ("shares", torch.zeros(classes)),
                            ("mean", torch.zeros(features)), ("deviation", torch.ones(features))):
            self.register_buffer(name, start)
        self._directions, self._found = (None, None), (None, None)  # the writes at which they were made, and what was made

    def forward(self, keys: Tensor, logits: Tensor) -> Tensor:
        """Keys (B, K) and logits (B, C) -> logits (B, C): with votes in eval mode, unchanged in training mode. Raises as
        :meth:`announced`."""
        ids, _ = self.announced(keys)
        if self.training:
            return logits
        with torch.autocast(device_type=keys.device.type, enabled=False):
            votes = self.prior() + self.votes(keys.detach().float(), ids)
            return torch.where(self.fitted, torch.lerp(logits.float(), votes, self.weight), logits.float())

    @torch.no_grad()
    def choose(self, ids: Tensor, labels: Tensor) -> None:
        """Store the images that :func:`rare_rows` chooses among ids (n,) with labels (n, C), and the prevalence of all for the
        prior; :meth:`renew` gives them keys."""
        labels = torch.as_tensor(labels, dtype=torch.float32).to(self.slots.device)
        rows, score = rare_rows(labels, self.threshold, self.size)
        filled, known = len(rows), ~torch.isnan(labels)
        self.shares.copy_(torch.nan_to_num(labels).sum(0) / known.sum(0).clamp(min=1))
        for store, new in ((self.slot_ids, torch.as_tensor(ids).to(labels.device)[rows]), (self.slot_scores, score),
                           (self.slot_labels, torch.nan_to_num(labels[rows], nan=-1.0)), (self.slot_steps, self.steps)):
            store.fill_(-1)
            store[:filled] = new.to(store.dtype)
        self.slots[filled:] = 0
        self.filled.fill_(filled)
        self.seen += len(labels)
        self.accepted += filled

    def prior(self) -> Tensor:
        """Log odds (C,) of the class prevalence among the images to choose from."""
        return torch.logit(self.shares.clamp(RAREST, 1 - RAREST))

    @torch.no_grad()
    def votes(self, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """Votes ``e`` (B, C) of keys (B, K) in logits; 0 where a side has no slot. An image's own slot is excluded."""
        return self.differences(keys, ids) / self.temperature

    def differences(self, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """``for - against`` (B, C) of keys (B, K), as :meth:`votes` divides them."""
        votes = [sum(sign * (share * (near - usual)).sum(1) for sign, usual, (near, _, share) in zip((1, -1), usuals, sides))
                 for usuals, sides in zip(self.usual.T, self._nearest(keys, ids))]
        return torch.stack(votes, 1)

    @torch.no_grad()
    def contributions(self, keys: Tensor, logits: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The terms whose sum is :meth:`forward` in eval mode, of keys (B, K) and the head's logits (B, C).

        Returns the head's part (B, C), the prior's (C,), and the signed contribution of each slot (B, N, C), in logits: 0 for
        those that do not vote. A slot with the class adds if it is more similar than usual, and one without it takes.
        """
        weight, slots, empty = self.weight * self.fitted, [], keys.new_zeros(len(keys), self.size)
        for usuals, sides in zip(self.usual.T, self._nearest(keys, ids)):
            slots.append(sum(empty.scatter(1, of, sign * share * (near - usual))
                             for sign, usual, (near, of, share) in zip((1, -1), usuals, sides)))
        return (1 - weight) * logits, weight * self.prior(), weight / self.temperature * torch.stack(slots, 2)

    def _nearest(self, keys: Tensor, ids: Tensor | None = None):
        """For each class its two sides, for and against: similarities, slots and shares (B, k), with the sum 1, or 0 if a side
        has no slot."""
        n, classes = self._sides()
        similarity = self.directions(keys) @ self.slot_directions()[:n].T
        if ids is not None:
            similarity.masked_fill_((self.slot_ids[:n] == ids[:, None]) & (ids >= 0)[:, None], -torch.inf)
        for with_it, not_without in classes:
            near, of = similarity[:, with_it].topk(min(self.k, len(with_it)))
            against, those = similarity.index_fill(1, not_without, -torch.inf).topk(min(self.k, n))
            sides = [(values.clamp(min=-1), slots, values > -torch.inf)
                     for values, slots in ((near, with_it[of]), (against, those))]
            both = torch.stack([votes.any(1) for _, _, votes in sides]).all(0)[:, None]
            yield [(near, of, both * votes / votes.sum(1, keepdim=True).clamp(min=1)) for near, of, votes in sides]

    @torch.no_grad()
    def calibrate(self) -> None:
        """Mean and deviation of the keys over the filled slots, the classes with slots on both sides, and the usual
        similarities."""
        filled = (torch.arange(self.size, device=self.slots.device) < self.filled)[:, None]
        number = self.filled.clamp(min=1)
        self.mean.copy_(self.slots.sum(0) / number)  # empty slots are 0
        deviation = (((self.slots - self.mean) * filled).square().sum(0) / number).sqrt()
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))
        self.fitted.copy_(((self.slot_labels == 1) & filled).any(0) & ((self.slot_labels == 0) & filled).any(0))
        some = torch.arange(_SAMPLE, device=filled.device) * number // _SAMPLE  # evenly; those of few slots repeat
        for c, sides in enumerate(self._nearest(self.slots[some], self.slot_ids[some])):
            for usual, (near, _, share) in zip(self.usual, sides):
                without = share * (self.slot_labels[some, c] == 0)[:, None]
                usual[c] = (without * near).sum() / without.sum().clamp(min=1)

    def _sides(self) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        """The number of filled slots, and for each class those with it and those not without it (with it, or unknown); kept
        until labels are written."""
        written = None if torch.is_inference(self.slots) else (id(self.slot_labels), self.slot_labels._version)
        if (written is None or self._found[0] != written) and not torch.compiler.is_compiling():
            labels = self.slot_labels[:int(self.filled)]
            self._found = written, (len(labels), [((y == 1).nonzero().flatten(), (y != 0).nonzero().flatten())
                                                  for y in labels.T])
        return self._found[1]

    def slot_directions(self) -> Tensor:
        """:meth:`directions` of all slots (N, K), kept until slots are written."""
        if torch.is_inference(self.slots):
            return self.directions(self.slots)
        written = tuple((id(store), store._version) for store in (self.slots, self.mean, self.deviation))  # torch counts writes
        if self._directions[0] != written:
            self._directions = written, self.directions(self.slots)
        return self._directions[1]

    def directions(self, keys: Tensor) -> Tensor:
        """Standardised keys (n, K) of unit length, whose dot products are the similarities."""
        return F.normalize((keys - self.mean) / self.deviation, dim=1)

    @torch.no_grad()
    def similarity(self, z: Tensor, index: Tensor) -> Tensor:
        """Similarities (B, k) of keys (B, K) and slots of index (B, k), in [-1, 1]; NaN for index -1."""
        slots = self.slot_directions()[index.clamp(min=0)]  # (B, k, K)
        return torch.einsum("bd,bkd->bk", self.directions(z), slots).masked_fill(index < 0, torch.nan)

    @torch.no_grad()
    def renew(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of slots of index (n,) by keys (n, K) of the same images; call :meth:`calibrate` after the last."""
        self.slots.index_copy_(0, slots, keys.float())

    def extra_repr(self) -> str:
        return (f"features={self.slots.shape[1]}, size={self.size}, k={self.k}, threshold={self.threshold}, "
                f"weight={self.weight:.6g}, temperature={self.temperature}")


def rare_rows(labels: Tensor, threshold: float, size: int) -> tuple[Tensor, Tensor]:
    """Images with a finding that is rare, and as many without a finding; at most ``size`` rows (m,) in their order.

    A finding is rare if its share of labels (n, C) of 0, 1 or NaN (unknown) is at or below ``threshold``. At most half of the
    rows go to images with one. If these do not fit, each is filed under its rarest class, and classes give way evenly: those of
    few images keep all. A draw with a fixed seed decides within a class, and among images without a finding.

    Returns the rows, and for each the share of its rarest positive class, 1 without one. CHARM's and MemAug's rarity is a
    feature's length; its threshold knows no labels.
    """
    positive, known = labels == 1, ~torch.isnan(labels)
    score, rarest = torch.where(positive, positive.sum(0) / known.sum(0).clamp(min=1), 1.0).min(1)
    draw = torch.randperm(len(labels), generator=torch.Generator().manual_seed(85)).to(labels.device)
    has = positive.any(1)
    rare, none = (draw[of[draw]] for of in (has & (score <= threshold), ~has & known.any(1)))
    same = rarest[rare, None] == torch.arange(labels.shape[1], device=labels.device)
    rank = same.cumsum(0)[torch.arange(len(rare), device=labels.device), rarest[rare]]  # from 1, within the class
    rare = rare[torch.argsort(rank, stable=True)[:size // 2]]
    rows = torch.cat([rare, none[:min(len(rare), size - len(rare))]]).sort().values
    return rows, score[rows]
