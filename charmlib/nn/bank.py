"""The rare memory bank of CHARM-Xray and MemAug."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charmlib.nn.strategies import STRATEGIES

if TYPE_CHECKING:
    import pandas as pd

RULES = ("rare", "published", "angle")
RETRIEVALS = ("softmax", "cosine", "gated")
NORMS = ("both", "query", "memory", "none")


class RareMemoryBank(nn.Module):
    """Remembered features; a query is answered by its ``k`` most similar slots.

    Called on features ``z`` it returns ``z' = z + sum_j w_j m_j`` (MemAug, ISCIT 2024, eq. 5 and 6) and, in training
    mode, writes some of ``z`` afterwards, so that no sample meets itself. In eval mode it is frozen. An empty bank gives
    z' = z.

    What is written, and over which slots, is the ``strategy``'s to say (:mod:`charmlib.nn.strategies`): by default ('rarity')
    features of odd length go into a ring.

    How slots are weighted: ``softmax`` of the k similarities (MemAug eq. 6), ``cosine`` the raw similarities
    (CHARM's code), or ``gated``: softmax times one learned scalar that starts at 0.

    Differs from the published code: a slot knows which image it holds, and a query's own image is left out by that,
    not by its similarity; slots not yet filled are never retrieved; of a batch with overflow nothing is stored; state lives
    in buffers, so a checkpoint, the learning-rate finder and a resumed run restore it; and neither writing nor reading
    loops over the batch or waits for the GPU.

    Parameters
    ----------
    features : int
        D.
    classes : int
        C, the width of the labels that slots remember.
    size : int
        N slots.
    k : int
        Slots per query, 1 to N.
    threshold : float
        0 or more: of the score for the strategies 'rarity' and 'statistical'; the share of the batch that is kept for
        'entropy', 'diversity' and 'hybrid'; not used by the others.
    strategy : {'rarity', 'statistical', 'entropy', 'diversity', 'hybrid', 'fifo', 'reservoir', 'hard', 'balanced'}
        What a feature is judged by.
    rule : {'rare', 'published', 'angle'}
        Which rarity, and which side of the threshold: see :class:`charmlib.nn.strategies.Rarity`.
    retrieval : {'softmax', 'cosine', 'gated'}
        As above.
    bank_norm : {'both', 'query', 'memory', 'none'}
        What is scaled to unit length before the dot product; 'both' is the cosine.
    normalize_retrieved : bool
        Scale the weighted sum of slots to the query's length (MemAug's code; a gate comes after).
    bank_momentum : float
        Of the running mean that the strategy 'statistical' keeps, 0 to 1; no other strategy uses it. May be set between
        stages.

    Raises
    ------
    ValueError
        A parameter outside its range.
    """

    def __init__(self, features: int, classes: int, *, size: int = 512, k: int = 5, threshold: float = 0.2,
                 strategy: str = "rarity", rule: str = "rare", retrieval: str = "softmax", bank_norm: str = "both",
                 normalize_retrieved: bool = False, bank_momentum: float = 0.9):
        super().__init__()
        for name, value, allowed in (("strategy", strategy, STRATEGIES), ("rule", rule, RULES),
                                     ("retrieval", retrieval, RETRIEVALS), ("bank_norm", bank_norm, NORMS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if size < 1 or not 1 <= k <= size:
            raise ValueError(f"wanted 1 <= k <= size, got k={k}, size={size}")
        if threshold < 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}")
        if not 0 <= bank_momentum <= 1:
            raise ValueError(f"bank_momentum must be in [0, 1], got {bank_momentum}")
        if strategy == "statistical" and rule == "angle":
            raise ValueError("strategy 'statistical' keeps a running mean of lengths and has no rule 'angle'")
        self.size, self.k, self.threshold = size, k, threshold
        self.strategy, self.rule, self.retrieval, self.bank_norm = strategy, rule, retrieval, bank_norm
        self.normalize_retrieved, self.bank_momentum = normalize_retrieved, bank_momentum
        self.policy = STRATEGIES[strategy](classes)
        self.gate = nn.Parameter(torch.zeros(())) if retrieval == "gated" else None

        self.register_buffer("slots", torch.zeros(size, features))
        self.register_buffer("slot_ids", torch.full((size,), -1))
        self.register_buffer("slot_labels", torch.zeros(size, classes, dtype=torch.int8))  # -1 where unknown
        self.register_buffer("slot_steps", torch.full((size,), -1))
        self.register_buffer("slot_scores", torch.zeros(size))
        for counter in ("filled", "pointer", "steps", "seen", "accepted"):
            self.register_buffer(counter, torch.zeros((), dtype=torch.int64))
        self._expected: tuple[Tensor, Tensor | None] | None = None

    def expect(self, ids: Tensor, labels: Tensor | None = None) -> None:
        """Name the images of the next batch: ids (B,) of whole numbers >= 0, labels (B, C) of 0, 1 or NaN.

        Used by the next call only. Without it, slots get id -1 and nothing can be left out as a self-match.
        """
        self._expected = (ids, labels)

    def forward(self, z: Tensor, predict: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """(B, D) -> z' (B, D), in float32: retrieve, then (in training mode) write.

        Parameters
        ----------
        predict : callable
            z' (B, D) -> logits (B, C), such as the head. Given, its logits are returned instead of z', and strategies that
            judge by predictions or losses see them; 'entropy' and 'hard' cannot do without.

        Raises
        ------
        ValueError
            ``expect`` announced a batch of another size; the strategy needs logits or labels and was given none.
        """
        ids, labels = self.announced(z)
        with torch.autocast(device_type=z.device.type, enabled=False):
            z = z.float()
            answer = z + self.answer(z, ids)
        if predict is not None:
            answer = predict(answer)
        if self.training:
            with torch.autocast(device_type=z.device.type, enabled=False):
                self.write(z, ids, labels, None if predict is None else answer)
        return answer

    def announced(self, batch: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What :meth:`expect` was told of this batch, ids on its device and labels; used up by the call.

        Raises
        ------
        ValueError
            It was told of a batch of another size.
        """
        expected, self._expected = self._expected, None
        if expected is None:
            return None, None
        ids, labels = expected
        ids = torch.as_tensor(ids)
        if len(ids) != len(batch):
            raise ValueError(f"expect() announced {len(ids)} images, this batch has {len(batch)}")
        return ids.to(batch.device), labels

    def answer(self, z: Tensor, ids: Tensor | None = None) -> Tensor:
        """What the bank adds to each query, (B, D): the weighted sum of its slots, scaled and gated as set up."""
        _, weights, values = self.retrieve(z, ids)
        found = torch.einsum("bk,bkd->bd", weights, values)
        if self.normalize_retrieved:
            found = F.normalize(found, dim=1) * torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return found if self.gate is None else self.gate * found

    def retrieve(self, z: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The slots that answer each query.

        Returns slot numbers (B, k), best first and -1 where fewer than k slots may answer, their weights (B, k;
        0 there; before the gate) and their features (B, k, D). Gradients flow into the query through the weights.
        """
        query = F.normalize(z, dim=1) if self.bank_norm in ("both", "query") else z
        lengths = None
        if self.bank_norm in ("both", "memory"):
            lengths = torch.linalg.vector_norm(self.slots, dim=1).clamp_(min=1e-12)  # (N,)
        with torch.no_grad():  # which slots answer has no gradient
            similarity = query @ self.slots.T  # (B, N)
            if lengths is not None:
                similarity /= lengths
            banned = torch.arange(self.size, device=z.device) >= self.filled
            if ids is not None:
                banned = banned | ((self.slot_ids == ids[:, None]) & (ids >= 0)[:, None])
            best, index = similarity.masked_fill_(banned, -torch.inf).topk(self.k, dim=1)  # (B, k)
            valid = best > -torch.inf
        values = self.slots[index]  # (B, k, D)
        top = torch.einsum("bd,bkd->bk", query, values)  # the k similarities again, through which gradients flow
        if lengths is not None:
            top = top / lengths[index]
        top = top.masked_fill(~valid, 0.0)
        if self.retrieval == "cosine":
            weights = top
        else:
            weights = torch.softmax(top.masked_fill(~valid, -1e30), dim=1) * valid
        return index.masked_fill(~valid, -1), weights, values

    @torch.no_grad()
    def write(self, z: Tensor, ids: Tensor | None = None, labels: Tensor | None = None, logits: Tensor | None = None) -> None:
        """Offer (B, D) to the strategy and store what it takes; of a batch with infinite or undefined features nothing.

        ``ids`` (B,), ``labels`` (B, C) of 0, 1 or NaN and ``logits`` (B, C) as in :meth:`expect` and :meth:`forward`.

        Raises
        ------
        ValueError
            The strategy needs logits or labels and was given none.
        """
        if self.policy.needs_logits and logits is None:
            raise ValueError(f"strategy '{self.strategy}' judges by predictions: call bank(z, predict=head)")
        if self.policy.needs_labels and labels is None:
            raise ValueError(f"strategy '{self.strategy}' {self.policy.by}: call bank.expect(ids, labels) before the batch, or "
                             "choose one that needs no labels, such as 'rarity'")
        z, batch = z.detach(), len(z)
        if ids is None:
            ids = torch.full((batch,), -1, device=z.device)
        if labels is None:
            labels = torch.full((batch, self.slot_labels.shape[1]), torch.nan, device=z.device)
        labels = torch.as_tensor(labels).to(z.device).as_subclass(Tensor).float()
        if logits is not None:
            logits = logits.detach().float()

        finite = torch.isfinite(z).all()
        score, keep = self.policy.judge(self, z, logits, labels)
        taken, slot = self.policy.place(self, keep & finite & torch.isfinite(score), score, ids)
        renewed = taken & (self.slot_ids[slot] == ids) & (ids >= 0) & self.policy.refreshes

        # Rows that are not stored repeat the first one that is; where none is, they rewrite what their slot holds.
        first = taken.to(torch.uint8).argmax().view(1)
        row = torch.where(taken, torch.arange(batch, device=z.device), first)
        slot = torch.where(taken, slot, slot.index_select(0, first))
        some = taken.any()
        labels = torch.nan_to_num(labels, nan=-1.0)
        for store, new in ((self.slots, z), (self.slot_ids, ids), (self.slot_labels, labels),
                           (self.slot_steps, self.steps.expand(batch)), (self.slot_scores, score)):
            store.index_copy_(0, slot, torch.where(some, new[row].to(store.dtype), store[slot]))
        self.filled.copy_(torch.maximum(self.filled, torch.where(taken, slot + 1, 0).amax()))
        self.steps += 1
        self.seen += batch * finite
        self.accepted += (taken & ~renewed).sum()

    @torch.no_grad()
    def label_counts(self, findings: Sequence[int] | None = None) -> Tensor:
        """How many filled slots hold each class, and how many hold none: (C + 1,) int64, on the bank's device.

        ``findings`` are the columns that count as findings, all by default; a column 'No Finding' is none. The last number
        counts slots none of whose findings is positive, those apart of which no label is known.
        """
        labels = self.slot_labels[:, list(findings)] if findings is not None else self.slot_labels
        filled = torch.arange(self.size, device=labels.device) < self.filled
        positive = (self.slot_labels == 1) & filled[:, None]
        none = filled & ~(labels == 1).any(1) & (labels >= 0).any(1)
        return torch.cat([positive.sum(0), none.sum()[None]])

    def table(self, names: Sequence[str] | None = None, classes: Sequence[str] | None = None) -> pd.DataFrame:
        """The filled slots, one row each, in the order of their numbers.

        Columns: ``slot``; ``image``, its id, or its name where ``names`` gives those of all ids; ``labels``, the positive ones
        as the NIH writes them ('Effusion|Mass', 'No Finding'; blank where all are unknown); ``step``, the training batch that
        wrote it, from 0; ``score``, what it was judged by; then one column a class of 0, 1 or <NA>, named by ``classes``, or
        numbered. An image that nobody announced (see :meth:`expect`) is <NA>.

        Raises
        ------
        ValueError
            As many class names as classes are wanted.
        """
        import pandas as pd

        labels = self.slot_labels[:int(self.filled)].cpu().numpy()
        classes = [str(c) for c in range(labels.shape[1])] if classes is None else [str(c) for c in classes]
        if len(classes) != labels.shape[1]:
            raise ValueError(f"the bank's slots have {labels.shape[1]} labels, {len(classes)} class names were given")
        ids, steps, scores = (store[:len(labels)].tolist() for store in (self.slot_ids, self.slot_steps, self.slot_scores))
        images = [pd.NA if i < 0 else i if names is None else names[i] for i in ids]
        text = ["|".join(c for c, value in zip(classes, row) if value == 1) or ("No Finding" if (row >= 0).any() else "")
                for row in labels]
        values = pd.DataFrame(labels, columns=classes).astype("Int8")
        images = pd.array(images, dtype="Int64" if names is None else "string")
        slots = pd.DataFrame({"slot": range(len(labels)), "image": images, "labels": text, "step": steps, "score": scores})
        return pd.concat([slots, values.mask(values < 0)], axis=1)

    @torch.no_grad()
    def similarity(self, z: Tensor, index: Tensor) -> Tensor:
        """What slots were chosen by: the dot products (B, k) of features (B, D) with slots number ``index`` (B, k), each side
        scaled to unit length as ``bank_norm`` says (so 'both' gives cosines); NaN where ``index`` is -1."""
        slots = self.slots[index.clamp(min=0)]  # (B, k, D)
        if self.bank_norm in ("both", "query"):
            z = F.normalize(z, dim=1)
        if self.bank_norm in ("both", "memory"):
            slots = F.normalize(slots, dim=2)
        return torch.einsum("bd,bkd->bk", z, slots).masked_fill(index < 0, torch.nan)

    def extra_repr(self) -> str:
        return (f"features={self.slots.shape[1]}, size={self.size}, k={self.k}, threshold={self.threshold}, "
                f"strategy={self.strategy}, rule={self.rule}, retrieval={self.retrieval}, bank_norm={self.bank_norm}, "
                f"normalize_retrieved={self.normalize_retrieved}")
