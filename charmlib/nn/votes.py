"""A memory bank that predicts from the labels of its slots."""

from collections.abc import Sequence

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from charmlib.nn.bank import RareMemoryBank

FLOOR = 0.003
"""Added to the variance of each class in the bank, which limits the votes of classes with few positive slots."""
RATE, RAREST = 0.01, 1e-4
"""Step size of the running class prevalence, and the lower bound of that prevalence in the prior."""
CHOOSE, UNCHOSEN, WEIGHTS = -1, 0.5, tuple(i / 10 for i in range(11))
"""The weight that asks for a choice, the weight until it is made, and the weights to choose among."""


class VotingBank(RareMemoryBank):
    """Blends the head's logits with a kernel ridge regression on the labels of stored images.

    In eval mode, for each class c::

        e_c     = sum_j a_jc kernel(key, slot j)                kernel = exp((similarity - 1) / temperature)
        logit_c = (1 - weight) logit_c + weight (prior_c + e_c)

    The coefficients ``a`` solve a kernel ridge regression on the labels of the slots, minus their mean and divided by their
    variance. Similar slots therefore share one vote, and a higher prevalence in the bank alone does not raise ``e``.
    ``prior`` is the log odds of the class prevalence in recent batches. Logit c is unchanged if the slots hold no positive
    label or no negative label of c.

    In training mode the logits are returned unchanged and the strategy stores features of the batch. Training therefore
    equals training without a bank to the bit. Only the epoch selected by validation may differ, because validation includes
    the votes. Training through the votes scored lower.

    Similarities are cosines of keys, centred by the mean of the slots. Keys may consist of blocks, such as the scales of
    :class:`charmlib.models.CharmNet`. The cosines of the blocks are averaged, so that wide and narrow blocks weigh the same.

    The regression is solved by :meth:`solve`, and at a change from training to eval mode if slots were written since. It needs
    N^2 floats of temporary memory and N^3 / 3 multiplications for N filled slots.

    Differs from the published papers, whose slots contribute features (:class:`RareMemoryBank`). The combination of a label
    cache and a trained head follows Tip-Adapter (Zhang et al., ECCV 2022).

    Parameters
    ----------
    features, classes, size, threshold, strategy, rule, bank_momentum
        As in :class:`RareMemoryBank`; ``features`` is K, the length of a key.
    k : int
        Slots that an explanation shows, 1 or more. All slots vote.
    weight : float
        Weight of the votes, 0 to 1; or -1: 0.5, until training chooses it on the validation part. The buffer ``weight``, a
        0-dim float32, holds the one in use, so that a checkpoint carries it.
    temperature : float
        Temperature of the kernel, above 0. Small values restrict the votes to similar slots.
    ridge : float
        Ridge of the regression, above 0. Large values reduce the influence of single slots.
    blocks : sequence of int
        Lengths of the blocks of a key, with the sum ``features``; one block by default.

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
            raise ValueError(f"blocks {self.blocks} have {sum(self.blocks)} features in total, the keys have {features}")
        self.chooses = weight == CHOOSE
        if not (self.chooses or 0 <= weight <= 1) or temperature <= 0 or ridge <= 0:
            raise ValueError(f"expected weight in [0, 1] or -1, temperature and ridge above 0, got weight={weight}, "
                             f"temperature={temperature}, ridge={ridge}")
        self.temperature, self.ridge = temperature, ridge
        self.register_buffer("weight", torch.tensor(UNCHOSEN if self.chooses else weight, dtype=torch.float32))
        self.register_buffer("coefficients", torch.zeros(size, classes))
        self.register_buffer("shares", torch.zeros(classes))
        self._solved, self._directions = None, (None, None)  # the writes when last solved; those of the kept directions

    def forward(self, keys: Tensor, logits: Tensor) -> Tensor:
        """Keys (B, K) and logits (B, C) -> logits (B, C): with votes in eval mode; unchanged in training mode, which writes.

        A batch without labels from :meth:`expect` is not stored. Raises as :meth:`announced`.
        """
        ids, labels = self.announced(keys)
        with torch.autocast(device_type=keys.device.type, enabled=False):
            keys = keys.detach().float()
            if self.training:
                if labels is not None:  # images without labels cannot vote
                    self.write(keys, ids, labels, logits)
                return logits
            votes, fitted = self.votes(keys, ids)
            return torch.where(fitted, torch.lerp(logits.float(), self.prior() + votes, self.weight), logits.float())

    def prior(self) -> Tensor:
        """Log odds (C,) of the class prevalence in recent batches."""
        return torch.logit(self.shares.clamp(RAREST, 1 - RAREST))

    @torch.no_grad()
    def write(self, z: Tensor, ids: Tensor | None = None, labels: Tensor | None = None, logits: Tensor | None = None) -> None:
        super().write(z, ids, labels, logits)
        if labels is not None:
            labels = torch.as_tensor(labels).to(z.device).as_subclass(Tensor).float()
            known = ~torch.isnan(labels)
            share = torch.nan_to_num(labels).sum(0) / known.sum(0).clamp(min=1)
            rate = torch.clamp(1 / self.steps, min=RATE) * known.any(0)  # at first the mean of all batches
            self.shares.lerp_(share, rate)

    @torch.no_grad()
    def votes(self, keys: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Votes ``e`` (B, C) of keys (B, K) in logits, and the fitted classes (C,) bool. An image's own slot is excluded."""
        return self.kernels(keys, ids) @ self.coefficients, self.coefficients.any(0)

    @torch.no_grad()
    def contributions(self, keys: Tensor, logits: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The terms whose sum is :meth:`forward` in eval mode, of keys (B, K) and the head's logits (B, C).

        Returns the head's part (B, C), the prior's (C,), and the signed contribution of each slot (B, N, C), in logits: 0 for
        an image's own slot and for empty ones.
        """
        weight = self.weight * self.coefficients.any(0)  # (C,)
        return (1 - weight) * logits, weight * self.prior(), weight * self.coefficients * self.kernels(keys, ids)[:, :, None]

    def kernels(self, keys: Tensor, ids: Tensor | None = None) -> Tensor:
        """Kernel values (B, N) of keys (B, K) and slots, 0 for an image's own slot."""
        kernel = self.kernel(self.directions(keys) @ self.slot_directions().T)
        return kernel if ids is None else kernel.masked_fill((self.slot_ids == ids[:, None]) & (ids >= 0)[:, None], 0.0)

    def kernel(self, similarity: Tensor) -> Tensor:
        """Similarities in [-1, 1] -> kernel values in (0, 1], of the same shape."""
        return torch.exp((similarity - 1) / self.temperature)

    @torch.no_grad()
    def solve(self) -> None:
        """Fit the regression to the filled slots.

        Raises
        ------
        MemoryError
            They are too many for the device; see :meth:`refuse`.
        """
        filled = int(self.filled)
        self.refuse(filled)
        with torch.autocast(device_type=self.slots.device.type, enabled=False):
            labels = self.slot_labels[:filled]
            known = (labels >= 0).float()
            base = ((labels == 1) * known).sum(0) / known.sum(0).clamp(min=1)
            rest = (labels - base) * known / (base * (1 - base) + FLOOR)
            slots = self.directions(self.slots[:filled])
            # the matrix is large: its factor takes its place, column by column as LAPACK has it
            matrix = (slots @ slots.T).sub_(1).div_(self.temperature).exp_().mT
            matrix.diagonal().add_(self.ridge)
            # cholesky_ex does not wait for the GPU; coefficients are 0 if rounding makes the factorisation fail
            failed = torch.empty((), dtype=torch.int32, device=matrix.device)
            torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
            self.coefficients.zero_()
            half = torch.linalg.solve_triangular(matrix, rest, upper=False)  # cholesky_solve copies the factor
            solution = torch.linalg.solve_triangular(matrix.mT, half, upper=True)
            self.coefficients[:filled] = torch.where(failed == 0, solution, 0.0)
        self._solved = self._written()

    def refuse(self, filled: int) -> None:
        """Refuse a regression over so many slots that does not fit in memory.

        Raises
        ------
        MemoryError
            Names the gigabytes needed and free, and the remedy.
        """
        device, needed = self.slots.device, 5 * filled**2  # the matrix, and some space to work
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if needed > free:
            raise MemoryError(f"the votes of {filled:,} slots need {needed / 1e9:.1f} GB to be solved, {free / 1e9:.1f} GB are "
                              "free: lower bank_size")

    def train(self, mode: bool = True):
        ends = self.training and not mode
        super().train(mode)
        if ends and self._solved != self._written():
            self.solve()
        return self

    def _written(self) -> tuple:
        """Changes whenever slots, labels or their number do: torch counts the writes to a tensor."""
        return tuple((id(store), store._version) for store in (self.slots, self.slot_labels, self.filled))

    def slot_directions(self) -> Tensor:
        """:meth:`directions` of all slots (N, K); in eval mode they are kept until slots are written."""
        if self.training or torch.is_inference(self.slots):
            return self.directions(self.slots)
        if self._directions[0] != (written := self._written()):
            self._directions = written, self.directions(self.slots)
        return self._directions[1]

    def directions(self, keys: Tensor) -> Tensor:
        """Centred keys (n, K), scaled so that their dot products are the mean cosines of the blocks."""
        mean = self.slots.sum(0) / self.filled.clamp(min=1)  # empty slots are 0
        parts = (keys - mean).split(self.blocks, dim=1)
        return torch.cat([F.normalize(part, dim=1) for part in parts], 1) / len(parts) ** 0.5

    @torch.no_grad()
    def similarity(self, z: Tensor, index: Tensor) -> Tensor:
        """Mean cosines (B, k) of keys (B, K) and slots of index (B, k), in [-1, 1]; NaN for index -1."""
        slots = self.slot_directions()[index.clamp(min=0)]  # (B, k, K)
        return torch.einsum("bd,bkd->bk", self.directions(z), slots).masked_fill(index < 0, torch.nan)

    @torch.no_grad()
    def renew(self, slots: Tensor, keys: Tensor) -> None:
        """Replace the keys of slots of index (n,) by keys (n, K) of the same images; call :meth:`solve` after the last."""
        self.slots.index_copy_(0, slots, keys.float())

    def extra_repr(self) -> str:
        return (f"{super().extra_repr()}, weight={self.weight:.6g}, temperature={self.temperature}, ridge={self.ridge}, "
                f"blocks={self.blocks}")
