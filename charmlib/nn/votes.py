"""A memory bank whose slots answer with their labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from charmlib.nn.bank import RareMemoryBank

FLOOR = 1e-3
"""Added to shares before their logarithm: no slot with a finding among the neighbours is not proof that there is none."""


class VotingBank(RareMemoryBank):
    """Remembered images; the ``k`` slots most like a new image vote, with their labels, on its logits.

    In eval mode, for each class c::

        share_c = sum_j w_j [slot j has c]          w = softmax of the k similarities / temperature
        logit_c + weight * log(share_c / share of c in the bank)

    a nearest-neighbour estimate of how much more likely each finding is here than in the bank as a whole, so that what a
    strategy keeps more of gains nothing by that alone. In training mode the logits pass through unchanged and the batch is
    offered to the strategy: the network is trained as it would be without a bank, down to the bits, and votes cannot make it
    lazy (trained with them it scored lower). An empty bank changes nothing.

    Similarities are cosines of keys less the mean of the bank's slots. Keys may consist of blocks (one for each scale of
    :class:`charmlib.models.CharmNet`), whose cosines are averaged, so that a wide block does not drown a narrow one.

    Not in the published papers, whose slots give their features instead (:class:`RareMemoryBank`). The idea is that of
    nearest-neighbour language models (Khandelwal et al., ICLR 2020) and Tip-Adapter (Zhang et al., ECCV 2022).

    Parameters
    ----------
    features, classes, size, threshold, strategy, rule, bank_momentum
        As in :class:`RareMemoryBank`; ``features`` is the length of a key.
    k : int
        Slots that vote, 1 or more; all where there are no more.
    weight : float
        Of the votes beside the logits, 0 or more.
    temperature : float
        Of the softmax over similarities, which are in [-1, 1]; above 0. Small ones let the nearest decide.
    blocks : sequence of int
        Lengths of a key's parts, which make ``features`` together; one part by default.

    Raises
    ------
    ValueError
        A parameter outside its range.
    """

    def __init__(self, features: int, classes: int, *, size: int = 1024, k: int = 128, weight: float = 2.0,
                 temperature: float = 0.15, blocks: Sequence[int] = (), strategy: str = "balanced", **options):
        super().__init__(features, classes, size=size, k=min(k, size), strategy=strategy, **options)
        self.blocks = list(blocks) or [features]
        if sum(self.blocks) != features:
            raise ValueError(f"blocks {self.blocks} make {sum(self.blocks)} features, the keys have {features}")
        if weight < 0 or temperature <= 0:
            raise ValueError(f"wanted weight >= 0 and temperature > 0, got weight={weight}, temperature={temperature}")
        self.weight, self.temperature = weight, temperature

    def forward(self, keys: Tensor, logits: Tensor) -> Tensor:
        """Keys (B, K) and logits (B, C) -> logits (B, C): voted on in eval mode, as they are in training mode, which writes.

        A batch whose labels ``expect`` did not tell is not remembered.

        Raises
        ------
        ValueError
            ``expect`` announced a batch of another size.
        """
        ids, labels = self.announced(keys)
        with torch.autocast(device_type=keys.device.type, enabled=False):
            keys = keys.detach().float()
            if self.training:
                if labels is not None:  # what has no labels could never vote
                    self.write(keys, ids, labels, logits)
                return logits
            return logits + self.weight * self.votes(keys, ids)

    @torch.no_grad()
    def votes(self, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """``log(share_c / share of c in the bank)`` of each key, (B, C); 0 where nobody, or nobody who knows of c, votes."""
        _, weights, labels = self.retrieve(keys, ids)
        share, heard = _shares(labels, weights[:, :, None], 1)
        filled = (torch.arange(self.size, device=keys.device) < self.filled)[:, None]
        base, _ = _shares(self.slot_labels, filled.float(), 0)
        return torch.where(heard, torch.log(share + FLOOR) - torch.log(base + FLOOR), 0.0)

    @torch.no_grad()
    def retrieve(self, keys: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Who votes on each key: slot numbers (B, k), most similar first and -1 where fewer than k may vote, their weights
        (B, k; 0 there) and their labels (B, k, C), int8 with -1 where unknown. An image has no vote on itself."""
        similarity = self.directions(keys) @ self.directions(self.slots).T  # (B, N)
        banned = torch.arange(self.size, device=keys.device) >= self.filled
        if ids is not None:
            banned = banned | ((self.slot_ids == ids[:, None]) & (ids >= 0)[:, None])
        best, index = similarity.masked_fill_(banned, -torch.inf).topk(self.k, dim=1)
        valid = best > -torch.inf
        weights = torch.softmax((best / self.temperature).masked_fill(~valid, -1e30), dim=1) * valid
        return index.masked_fill(~valid, -1), weights, self.slot_labels[index]

    def directions(self, keys: Tensor) -> Tensor:
        """Keys (n, K) less the mean of the slots, each block scaled so that dot products are means of the blocks' cosines."""
        mean = self.slots.sum(0) / self.filled.clamp(min=1)  # slots not yet filled are 0
        parts = (keys - mean).split(self.blocks, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / len(parts) ** 0.5

    @torch.no_grad()
    def similarity(self, z: Tensor, index: Tensor) -> Tensor:
        """What slots were chosen by: the mean cosines (B, k) of keys (B, K) with slots number ``index`` (B, k); NaN for -1."""
        slots = self.directions(self.slots)[index.clamp(min=0)]  # (B, k, K)
        return torch.einsum("bd,bkd->bk", self.directions(z), slots).masked_fill(index < 0, torch.nan)

    @torch.no_grad()
    def renew(self, slots: Tensor, keys: Tensor) -> None:
        """Put new keys (n, K) of the same images into the slots number ``slots`` (n,)."""
        self.slots.index_copy_(0, slots, keys.float())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={self.weight}, temperature={self.temperature}, blocks={self.blocks}"


def _shares(labels: Tensor, weights: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The weighted share of 1 among the known labels (0 or 1; -1 is unknown) along ``dim``, and whether any is known."""
    known = (weights * (labels >= 0)).sum(dim)
    return (weights * (labels == 1)).sum(dim) / known.clamp(min=1e-12), known > 0
