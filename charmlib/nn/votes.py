"""A memory bank whose slots answer with their labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from charmlib.nn.bank import RareMemoryBank

FLOOR = 0.003
"""Added to a class's variance in the bank: a handful of slots cannot say how steep the odds of their class are."""
RATE, RAREST = 0.01, 1e-4
"""Step of the running share of each class among the images seen, and the least share taken for true."""


class VotingBank(RareMemoryBank):
    """Remembered images; what their labels say of a new image, by how like they are, is a second opinion beside the logits.

    In eval mode, for each class c::

        e_c     = sum_j a_jc kernel(key, slot j)                kernel = exp((similarity - 1) / temperature)
        logit_c = (1 - weight) logit_c + weight (prior_c + e_c)

    where the ``a`` solve a kernel ridge regression of the slots' labels (less the share of c in the bank, over its variance),
    so that slots that say the same share one vote and what a strategy keeps more of gains nothing by that alone; ``prior`` is
    the log odds of c among the images seen lately. In training mode the logits pass through unchanged and the batch is
    offered to the strategy: the steps of training are those without a bank, down to the bits, and votes cannot make the
    network lazy (trained with them it scored lower). What may differ is the epoch that validation picks, since validation
    scores with the votes. A bank that is empty, or has only positives or no positives of c, leaves logit c as it is.

    Similarities are cosines of keys less the mean of the bank's slots. Keys may consist of blocks (one for each scale of
    :class:`charmlib.models.CharmNet`), whose cosines are averaged, so that a wide block does not drown a narrow one.

    The regression is solved when the bank is put into eval mode after training, and by :meth:`solve`. It takes N x N numbers
    for a moment (N slots), and N^3 / 3 multiplications.

    Not in the published papers, whose slots give their features instead (:class:`RareMemoryBank`). The idea of a cache of
    labels beside a trained head is that of Tip-Adapter (Zhang et al., ECCV 2022); the regression is textbook kernel ridge.

    Parameters
    ----------
    features, classes, size, threshold, strategy, rule, bank_momentum
        As in :class:`RareMemoryBank`; ``features`` is the length of a key.
    k : int
        Slots that :meth:`retrieve` names, 1 or more; all vote.
    weight : float
        Of the bank's opinion, 0 to 1.
    temperature : float
        Of the kernel; similarities are in [-1, 1]. Above 0; small ones let only near slots vote.
    ridge : float
        Of the regression, above 0; large ones trust single slots less.
    blocks : sequence of int
        Lengths of a key's parts, which make ``features`` together; one part by default.

    Raises
    ------
    ValueError
        A parameter outside its range.
    """

    def __init__(self, features: int, classes: int, *, size: int = 3072, k: int = 5, weight: float = 0.5,
                 temperature: float = 0.8, ridge: float = 3.0, blocks: Sequence[int] = (), strategy: str = "balanced",
                 **options):
        super().__init__(features, classes, size=size, k=min(k, size), strategy=strategy, **options)
        self.blocks = list(blocks) or [features]
        if sum(self.blocks) != features:
            raise ValueError(f"blocks {self.blocks} make {sum(self.blocks)} features, the keys have {features}")
        if not 0 <= weight <= 1 or temperature <= 0 or ridge <= 0:
            raise ValueError(f"wanted weight in [0, 1], temperature and ridge above 0, got weight={weight}, "
                             f"temperature={temperature}, ridge={ridge}")
        self.weight, self.temperature, self.ridge = weight, temperature, ridge
        self.register_buffer("coefficients", torch.zeros(size, classes))
        self.register_buffer("shares", torch.zeros(classes))

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
            votes, heard = self.votes(keys, ids)
            prior = torch.logit(self.shares.clamp(RAREST, 1 - RAREST))
            return torch.where(heard, torch.lerp(logits.float(), prior + votes, self.weight), logits.float())

    @torch.no_grad()
    def write(self, z: Tensor, ids: Tensor | None = None, labels: Tensor | None = None, logits: Tensor | None = None) -> None:
        super().write(z, ids, labels, logits)
        if labels is not None:
            labels = torch.as_tensor(labels).to(z.device).as_subclass(Tensor).float()
            known = ~torch.isnan(labels)
            share = torch.nan_to_num(labels).sum(0) / known.sum(0).clamp(min=1)
            rate = torch.clamp(1 / self.steps, min=RATE) * known.any(0)  # the mean of all batches, at first
            self.shares.lerp_(share, rate)

    @torch.no_grad()
    def votes(self, keys: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``e`` of each key, (B, C), in logits; and which classes the bank has an opinion on, (C,) bool. An image has no vote
        on itself."""
        kernel = self.kernel(self.directions(keys) @ self.directions(self.slots).T)
        if ids is not None:
            kernel = kernel.masked_fill((self.slot_ids == ids[:, None]) & (ids >= 0)[:, None], 0.0)
        return kernel @ self.coefficients, self.coefficients.any(0)

    def kernel(self, similarity: Tensor) -> Tensor:
        """How much slots so similar have to say: (0, 1]."""
        return torch.exp((similarity - 1) / self.temperature)

    @torch.no_grad()
    def solve(self) -> None:
        """Fit the regression to what the slots hold now."""
        with torch.autocast(device_type=self.slots.device.type, enabled=False):
            used = (torch.arange(self.size, device=self.slots.device) < self.filled).float()[:, None]
            known = (self.slot_labels >= 0) * used
            base = ((self.slot_labels == 1) * known).sum(0) / known.sum(0).clamp(min=1)
            rest = (self.slot_labels - base) * known / (base * (1 - base) + FLOOR)
            slots = self.directions(self.slots)
            matrix = self.kernel(slots @ slots.T) * used * used.T
            matrix.diagonal().add_(self.ridge)
            # cholesky_ex waits for no device; what cannot be factored (by rounding, never with a ridge above 0) is left out
            factor, failed = torch.linalg.cholesky_ex(matrix)
            self.coefficients.copy_(torch.where(failed == 0, torch.cholesky_solve(rest, factor), 0.0))

    def train(self, mode: bool = True):
        ends = self.training and not mode
        super().train(mode)
        if ends:
            self.solve()
        return self

    @torch.no_grad()
    def retrieve(self, keys: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The slots most like each key: their numbers (B, k), the most similar first and -1 where there are fewer, how much
        each has to say (B, k; the kernel, 0 for -1) and their labels (B, k, C), int8 with -1 where unknown."""
        similarity = self.directions(keys) @ self.directions(self.slots).T  # (B, N)
        banned = torch.arange(self.size, device=keys.device) >= self.filled
        if ids is not None:
            banned = banned | ((self.slot_ids == ids[:, None]) & (ids >= 0)[:, None])
        best, index = similarity.masked_fill_(banned, -torch.inf).topk(self.k, dim=1)
        valid = best > -torch.inf
        return index.masked_fill(~valid, -1), self.kernel(best) * valid, self.slot_labels[index]

    def directions(self, keys: Tensor) -> Tensor:
        """Keys (n, K) less the mean of the slots, each block scaled so that dot products are means of the blocks' cosines."""
        mean = self.slots.sum(0) / self.filled.clamp(min=1)  # slots not yet filled are 0
        parts = (keys - mean).split(self.blocks, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / len(parts) ** 0.5

    @torch.no_grad()
    def similarity(self, z: Tensor, index: Tensor) -> Tensor:
        """The mean cosines (B, k) of keys (B, K) with slots number ``index`` (B, k); NaN for -1."""
        slots = self.directions(self.slots)[index.clamp(min=0)]  # (B, k, K)
        return torch.einsum("bd,bkd->bk", self.directions(z), slots).masked_fill(index < 0, torch.nan)

    @torch.no_grad()
    def renew(self, slots: Tensor, keys: Tensor) -> None:
        """Put new keys (n, K) of the same images into the slots number ``slots`` (n,); :meth:`solve` when all are in."""
        self.slots.index_copy_(0, slots, keys.float())

    def extra_repr(self) -> str:
        return (f"{super().extra_repr()}, weight={self.weight}, temperature={self.temperature}, ridge={self.ridge}, "
                f"blocks={self.blocks}")
