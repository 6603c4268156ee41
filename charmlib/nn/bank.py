"""The rare memory bank of CHARM-Xray and MemAug, whose slots answer with features."""

from collections.abc import Callable, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charmlib.nn.strategies import STRATEGIES

RULES = ("rare", "published", "angle")
RETRIEVALS = ("softmax", "cosine", "gated", "published")
NORMS = ("both", "query", "memory", "none")


class Slots(nn.Module):
    """The slots of a memory bank: what each holds, of which image, and with which labels.

    Parameters
    ----------
    features, classes, size : int
        D; C, the number of labels per slot; N, the number of slots.
    k : int
        Slots that answer, 1 to N.
    threshold : float
        0 or more.

    Raises
    ------
    ValueError
        ``k`` or ``threshold`` outside its range.
    """

    def __init__(self, features: int, classes: int, size: int, k: int, threshold: float):
        super().__init__()
        if not 1 <= k <= size:
            raise ValueError(f"expected 1 <= k <= size, got k={k}, size={size}")
        if threshold < 0:
            raise ValueError(f"threshold must be 0 or more, got {threshold}")
        self.size, self.k, self.threshold = size, k, threshold
        for name, start in (
                ("slots", torch.zeros(size, features)), ("slot_ids", torch.full((size,), -1)),
                ("slot_labels", torch.zeros(size, classes, dtype=torch.int8)),  # -1 where unknown
                ("slot_steps", torch.full((size,), -1)), ("slot_scores", torch.zeros(size)),
                *((count, torch.zeros((), dtype=torch.int64)) for count in ("filled", "pointer", "steps", "seen", "accepted"))):
            self.register_buffer(name, start)
        self._expected: tuple[Tensor | None, Tensor | None] = None, None

    def expect(self, ids: Tensor, labels: Tensor | None = None) -> None:
        """Announce the images of the next batch: integer ids (B,) of 0 or more, and labels (B, C) of 0, 1 or NaN (unknown).

        The announcement holds for one call. Without it slots get the id -1 and self-matches are not excluded.
        """
        self._expected = ids, labels

    def announced(self, batch: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Ids (B,) on the batch's device, and labels (B, C), from :meth:`expect`, whose announcement this call consumes; raises
        ValueError if it was of a batch of another size."""
        (ids, labels), self._expected = self._expected, (None, None)
        if ids is not None and len(ids) != len(batch):
            raise ValueError(f"expect() announced {len(ids)} images, this batch has {len(batch)}")
        return ids if ids is None else torch.as_tensor(ids).to(batch.device), labels

    @torch.no_grad()
    def label_counts(self, findings: Sequence[int] | None = None) -> Tensor:
        """Numbers of filled slots with each class positive, then without a finding: (C + 1,) int64 on the bank's device.

        ``findings`` are the columns of findings, by default all; 'No Finding' is no finding. Slots whose findings are all
        unknown are excluded from the last number.
        """
        labels = self.slot_labels[:, list(findings)] if findings is not None else self.slot_labels
        filled = torch.arange(self.size, device=labels.device) < self.filled
        none = filled & ~(labels == 1).any(1) & (labels >= 0).any(1)
        return torch.cat([((self.slot_labels == 1) & filled[:, None]).sum(0), none.sum()[None]])

    def table(self, names: Sequence[str] | None = None, classes: Sequence[str] | None = None) -> pd.DataFrame:
        """One row for each filled slot, by index.

        ``image`` is the id, or its entry in ``names``, and <NA> without an announcement (:meth:`expect`). ``labels`` joins the
        positive classes as the NIH does ('Effusion|Mass', 'No Finding') and is empty if all are unknown. ``step`` is the
        training batch that wrote the slot, from 0; ``score`` is the strategy's. One column for each class follows, with values
        0, 1 or <NA>, named by ``classes`` or numbered.

        Raises
        ------
        ValueError
            The number of names in ``classes`` is not C.
        """
        labels = self.slot_labels[:int(self.filled)].cpu().numpy()
        classes = [str(c) for c in range(labels.shape[1])] if classes is None else [str(c) for c in classes]
        if len(classes) != labels.shape[1]:
            raise ValueError(f"the bank's slots have {labels.shape[1]} labels, {len(classes)} class names were given")
        ids, steps, scores = (store[:len(labels)].tolist() for store in (self.slot_ids, self.slot_steps, self.slot_scores))
        images = pd.array([pd.NA if i < 0 else i if names is None else names[i] for i in ids],
                          dtype="Int64" if names is None else "string")
        text = ["|".join(c for c, value in zip(classes, row) if value == 1) or ("No Finding" if (row >= 0).any() else "")
                for row in labels]
        values = pd.DataFrame(labels, columns=classes).astype("Int8")
        return pd.concat([pd.DataFrame({"slot": range(len(labels)), "image": images, "labels": text, "step": steps,
                                        "score": scores}), values.mask(values < 0)], axis=1)


class RareMemoryBank(Slots):
    """Adds the ``k`` most similar stored features to each query: ``z' = z + sum_j w_j m_j`` (MemAug, ISCIT 2024, eq. 5, 6).

    In training mode the bank stores features of the batch after retrieval. The ``strategy`` selects them and their slots
    (:mod:`charmlib.nn.strategies`). In eval mode the bank is frozen. An empty bank returns z' = z.

    A query's own image is excluded by its id, and empty slots are never retrieved. With ``retrieval='published'`` it is as in
    CHARM's code: a batch is stored before it retrieves, so that an image meets itself; empty slots compete with a similarity
    of 0; a batch that passes the ring's last slot is cut there. Differs from that code in three points. It excludes
    similarities that round to 1.0, in float32 some of the images' own slots and in float16 all; here an image always meets
    itself. A batch with overflow is not stored. Nothing loops over the batch or waits for the GPU.

    Parameters
    ----------
    features, classes, size : int
        D; C, the number of labels per slot; N, the number of slots.
    k : int
        Slots per query, 1 to N.
    threshold : float
        0 or more. The threshold of the score for 'rarity' and 'statistical'; the fraction of the batch to store for
        'entropy', 'diversity' and 'hybrid'; unused by the other strategies.
    strategy : {'rarity', 'statistical', 'entropy', 'diversity', 'hybrid', 'fifo', 'reservoir', 'hard'}
        A key of :data:`charmlib.nn.strategies.STRATEGIES`.
    rule : {'rare', 'published', 'angle'}
        The rarity score and the side of the threshold, see :class:`charmlib.nn.strategies.Rarity`.
    retrieval : {'softmax', 'cosine', 'gated', 'published'}
        The weights w: the softmax of the k similarities (MemAug eq. 6), the similarities themselves, the softmax times a
        learned scalar with initial value 0, or the similarities with order and rules of CHARM's code (above).
    bank_norm : {'both', 'query', 'memory', 'none'}
        The sides scaled to unit length before the dot product; 'both' gives cosine similarity.
    normalize_retrieved : bool
        Scale the weighted sum of slots to the length of the query, before the gate (MemAug's first code).
    bank_momentum : float
        Momentum of the running mean of 'statistical', 0 to 1; unused by the other strategies. It may be changed between
        stages.

    Raises
    ------
    ValueError
        A parameter outside its range.
    """

    def __init__(self, features: int, classes: int, *, size: int = 512, k: int = 5, threshold: float = 0.2,
                 strategy: str = "rarity", rule: str = "rare", retrieval: str = "softmax", bank_norm: str = "both",
                 normalize_retrieved: bool = False, bank_momentum: float = 0.9):
        super().__init__(features, classes, size, k, threshold)
        for name, value, allowed in (("strategy", strategy, STRATEGIES), ("rule", rule, RULES),
                                     ("retrieval", retrieval, RETRIEVALS), ("bank_norm", bank_norm, NORMS)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= bank_momentum <= 1:
            raise ValueError(f"bank_momentum must be in [0, 1], got {bank_momentum}")
        if strategy == "statistical" and rule == "angle":
            raise ValueError("strategy 'statistical' keeps a running mean of lengths and has no rule 'angle'")
        self.policy = STRATEGIES[strategy](classes)
        self.strategy, self.rule, self.retrieval, self.bank_norm = strategy, rule, retrieval, bank_norm
        self.normalize_retrieved, self.bank_momentum = normalize_retrieved, bank_momentum
        self.gate = nn.Parameter(torch.zeros(())) if retrieval == "gated" else None

    def forward(self, z: Tensor, predict: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Features (B, D) -> z' (B, D) in float32: retrieve, then write in training mode; 'published' writes first.

        Parameters
        ----------
        predict : callable
            z' (B, D) -> logits (B, C), such as the head. If given, its logits are returned instead of z' and passed to the
            strategy; 'entropy' and 'hard' require it.

        Raises
        ------
        ValueError
            ``expect`` announced a batch of another size, or logits or labels that the strategy needs are missing.
        """
        ids, labels = self.announced(z)
        with torch.autocast(device_type=z.device.type, enabled=False):
            z = z.float()
            if self.training and self.retrieval == "published":
                self.write(z, ids, labels)
            answer = z + self.answer(z, ids)
        if predict is not None:
            answer = predict(answer)
        if self.training and self.retrieval != "published":
            with torch.autocast(device_type=z.device.type, enabled=False):
                self.write(z, ids, labels, None if predict is None else answer)
        return answer

    def answer(self, z: Tensor, ids: Tensor | None = None) -> Tensor:
        """The term that the bank adds to each query (B, D): the weighted sum of its slots, scaled and gated."""
        _, weights, values = self.retrieve(z, ids)
        found = torch.einsum("bk,bkd->bd", weights, values)
        if self.normalize_retrieved:
            found = F.normalize(found, dim=1) * torch.linalg.vector_norm(z, dim=1, keepdim=True)
        return found if self.gate is None else self.gate * found

    def retrieve(self, z: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The k slots most similar to each query (B, D).

        Returns slot indices (B, k), the most similar first and -1 where fewer than k slots are eligible; weights (B, k) before
        the gate, 0 for index -1; and features (B, k, D). Gradients flow into the query through the weights.
        """
        query = F.normalize(z, dim=1) if self.bank_norm in ("both", "query") else z
        lengths = None
        if self.bank_norm in ("both", "memory"):
            lengths = torch.linalg.vector_norm(self.slots, dim=1).clamp_(min=1e-12)  # (N,)
        with torch.no_grad():  # the selection of slots has no gradient
            similarity = query @ self.slots.T  # (B, N)
            if lengths is not None:
                similarity /= lengths
            index, valid, _ = self.nearest(similarity, ids)
        values = self.slots[index]  # (B, k, D)
        top = torch.einsum("bd,bkd->bk", query, values)  # the k similarities, with gradient
        if lengths is not None:
            top = top / lengths[index]
        top = top.masked_fill(~valid, 0.0)
        raw = self.retrieval in ("cosine", "published")
        weights = top if raw else torch.softmax(top.masked_fill(~valid, -1e30), dim=1) * valid
        return index.masked_fill(~valid, -1), weights, values

    def nearest(self, similarity: Tensor, ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Index, eligibility and similarity (B, k) of the most similar slots, from similarities (B, N), changed in place."""
        if self.retrieval == "published":
            best, index = similarity.topk(self.k, dim=1)
            return index, index < self.filled, best
        banned = torch.arange(self.size, device=similarity.device) >= self.filled
        if ids is not None:
            banned = banned | ((self.slot_ids == ids[:, None]) & (ids >= 0)[:, None])
        best, index = similarity.masked_fill_(banned, -torch.inf).topk(self.k, dim=1)
        return index, best > -torch.inf, best

    @torch.no_grad()
    def write(self, z: Tensor, ids: Tensor | None = None, labels: Tensor | None = None, logits: Tensor | None = None) -> None:
        """Store the features (B, D) that the strategy selects; none of a batch with infinite or NaN features.

        ``ids`` (B,), ``labels`` (B, C) and ``logits`` (B, C) are those of :meth:`expect` and :meth:`forward`.

        Raises
        ------
        ValueError
            Logits or labels that the strategy needs are missing.
        """
        if self.policy.needs_logits and logits is None:
            raise ValueError(f"strategy '{self.strategy}' needs logits: call bank(z, predict=head), and not 'published'")
        if self.policy.needs_labels and labels is None:
            raise ValueError(f"strategy '{self.strategy}' needs labels: call bank.expect(ids, labels) before the batch, or "
                             "choose a strategy without labels, such as 'rarity'")
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

        # Rejected rows repeat the first accepted row. Without accepted rows the slots are rewritten with their own content.
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
    def similarity(self, z: Tensor, index: Tensor) -> Tensor:
        """Similarities (B, k) of features (B, D) and slots of index (B, k): dot products, with ``bank_norm`` applied.

        The range is [-1, 1] for 'both' (cosines). Index -1 gives NaN.
        """
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
