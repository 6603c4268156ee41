"""CHARM-Xray as one network; each of its three parts can be switched off."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from charmlib.nn import MomentumEncoder, RareMemoryBank, ScaleAttention, VotingBank, make_attention, recompute, split_backbone
from charmlib.nn.head import CSRAHead, make_head
from charmlib.nn.scales import GRID, cells, find_scales, maps_of

ANSWERS, KEYS, MOMENTA = ("votes", "features"), ("scales", "features"), ("weights", "branch")


class Encoded(NamedTuple):
    """What a network saw in images: the last ``map`` after attention (B, D, H, W), the fused feature ``z`` (B, D), and the
    ``keys`` (B, K) of a voting bank, which carry no gradient; None without one."""

    map: Tensor
    z: Tensor
    keys: Tensor | None


class CharmNet(nn.Module):
    """CHARM-Xray: backbone, momentum branch, multi-scale attention, rare memory bank, head.

    ::

        f = trunk(x)                        trunk features
        q = final(f)                        (B, D, H, W)
        r = mean(q) + attention(maps)       region feature (B, D) with attention 'scales'; mean(q) without attention;
            mean(q * attention(q))          with 'layers' or 'filter', as published
        z = r + mean(momentum(f))           fused feature; r without the momentum branch
        logits = head(z), and the bank's    answer 'votes', in eval mode: its slots vote with their labels
                 head(z + bank's answer)    answer 'features', as published; head(z) without the bank

    The momentum encoder is a running mean of the weights, which scores and makes the memory's keys, or, as published, the
    momentum branch. A head 'csra' reads the map q, or q * attention(q), in place of z. With all three switched off this is the
    plain network; with the bank alone and ``answer='features'`` it is MemAug. It works in any loop::

        net.see(ids, labels)       # which images the batch holds
        loss(net(x), y).backward(); optimizer.step()
        net.follow()               # updates the momentum encoder; leave it out if the scaler skipped the step
        net.bank.choose(ids, labels)   # before scoring: which training images vote
        net.renew(images)              # and their keys

    Everything that training changes is in ``state_dict``.

    Parameters
    ----------
    arch, weights, drop_path, refine, refine_start
        See :func:`charmlib.nn.split_backbone`.
    classes : int
        C.
    norm : {'auto', 'imagenet', 'half', 'xrv'}
        What the input was normalised with, kept as ``mean`` and ``std`` for the loaders. 'auto' asks the weights.
    answer : {'votes', 'features'}
        What slots give: the vote of their labels (:class:`charmlib.nn.VotingBank`) or, as published, their features
        (:class:`charmlib.nn.RareMemoryBank`).
    keys : {'scales', 'features'}
        What slots that vote are compared by: means over a 2 x 2 grid of the trunk's last maps at strides 4, 8 and 16, where
        small and faint findings still show and which training hardly overfits; or the fused feature z.
    momentum_form : {'weights', 'branch'}
        'weights': ``momentum`` is the decay of a running mean of all weights
        (:class:`charmlib.training.average.AverageWeights`), which the network has as ``mean_decay``, and no further part.
        'branch': a :class:`charmlib.nn.MomentumEncoder` of the final block, whose features are added.
    momentum_before_step : bool
        As in the published code, each forward pass of training updates the momentum encoder, and ``follow`` does nothing.
    attention, momentum, momentum_warmup, momentum_batch_norms, k, threshold, bank_size, strategy, rule, retrieval, bank_norm,
    normalize_retrieved, bank_momentum, vote_weight, vote_temperature
        See the parts.
    head, dropout, hidden, csra_lambda, csra_heads, csra_attention
        See :func:`charmlib.nn.make_head`.
    ldam_scale : float
        The head's output is multiplied by it, in training and in scoring; see :class:`charmlib.nn.LDAMLoss`.
    grad_checkpointing : bool
        Training keeps few activations of trunk and final block and computes the others again in the backward pass: less
        memory, more time, the same bits. An attribute of the same name, which may be changed at any time.

    Raises
    ------
    ValueError
        ``norm='auto'`` with a weight file, which cannot tell; head 'csra' with the momentum branch, attention 'scales' or
        ``answer='features'``, whose features have no positions; or a parameter that a part refuses.
    """

    def __init__(self, arch: str = "efficientnet_v2_s", classes: int = 14, *, weights: str | Path = "imagenet",
                 norm: str = "auto", use_momentum: bool = True, use_attention: bool = True, use_bank: bool = True,
                 attention: str = "scales", momentum: float = 0.99, momentum_form: str = "weights",
                 momentum_warmup: bool = True,
                 momentum_before_step: bool = False, momentum_batch_norms: bool = False, k: int = 5, threshold: float = 0.2,
                 bank_size: int = 4096, strategy: str = "rarity", rule: str = "rare", answer: str = "votes",
                 keys: str = "scales", vote_weight: float = -1.0, vote_temperature: float = 0.1,
                 retrieval: str = "softmax", bank_norm: str = "both", normalize_retrieved: bool = False,
                 bank_momentum: float = 0.9, head: str = "charm", dropout: float = 0.3, hidden: int = 512,
                 csra_lambda: float = 0.1, csra_heads: int = 1, csra_attention: str = "scores", drop_path: float = 0.0,
                 refine: str = "none", refine_start: str = "identity", ldam_scale: float = 1.0,
                 grad_checkpointing: bool = False):
        super().__init__()
        if momentum_form not in MOMENTA:
            raise ValueError(f"momentum_form must be one of {', '.join(MOMENTA)}, got {momentum_form!r}")
        branch = use_momentum and momentum_form == "branch"
        self.mean_decay = momentum if use_momentum and not branch else 0.0
        scales = use_attention and attention == "scales"
        if head == "csra" and (branch or scales or (use_bank and answer == "features")):
            raise ValueError("head csra reads a map, and the momentum branch, attention 'scales' and answer 'features' add to "
                             "a pooled feature; switch them off, or say head='charm'")
        backbone = split_backbone(arch, weights, drop_path, refine=refine, refine_start=refine_start)
        self.grad_checkpointing, self.ldam_scale = grad_checkpointing, ldam_scale
        self.arch, self.classes, self.features = arch, classes, backbone.features
        self.mean, self.std = backbone.scale(norm, weights)
        self.trunk, self.final = backbone.trunk, backbone.final
        self.momentum_before_step = momentum_before_step
        self.momentum = MomentumEncoder(self.final, momentum, warmup=momentum_warmup, batch_norms=momentum_batch_norms) \
            if branch else None
        if answer not in ANSWERS or keys not in KEYS:
            raise ValueError(f"answer must be one of {', '.join(ANSWERS)} and keys one of {', '.join(KEYS)}, got {answer!r} "
                             f"and {keys!r}")
        by_scales = use_bank and (answer, keys) == ("votes", "scales")
        self.ends, channels = find_scales(self.trunk) if by_scales or scales else ([], [])
        self.attention = make_attention(attention, self.features, [*channels[-2:], self.features]) if use_attention else None
        common, self.bank = {"size": bank_size, "k": k, "threshold": threshold}, None
        if use_bank and answer == "features":
            self.bank = RareMemoryBank(self.features, classes, strategy=strategy, rule=rule, retrieval=retrieval,
                                       bank_norm=bank_norm, normalize_retrieved=normalize_retrieved,
                                       bank_momentum=bank_momentum, **common)
        elif use_bank:
            self.bank = VotingBank(GRID * GRID * sum(channels) if by_scales else self.features, classes, weight=vote_weight,
                                   temperature=vote_temperature, **common)
        self.keys = (keys if answer == "votes" else "") if use_bank else ""  # of a bank that votes
        self.head = make_head(head, self.features, classes, hidden=hidden, dropout=dropout, csra_lambda=csra_lambda,
                              csra_heads=csra_heads, csra_attention=csra_attention)

    def encode(self, x: Tensor) -> Encoded:
        """Normalised images (B, 3, H, W) -> map, fused features and keys."""
        again = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        run = recompute if again else nn.Module.__call__
        shared, maps = maps_of(self.trunk, self.ends, x, run) if self.ends else (run(self.trunk, x), [])
        features = run(self.final, shared)  # (B, D, H, W)
        by_scales = isinstance(self.attention, ScaleAttention)
        attended = features if self.attention is None or by_scales else features * self.attention(features)
        z = attended.mean((2, 3))
        if by_scales:
            z = z + self.attention([*maps[-2:], features])
        if self.momentum is not None:
            z = z + self.momentum(shared).mean((2, 3))
            if self.training and self.momentum_before_step:
                self.momentum.update(self.final)
        if not isinstance(self.bank, VotingBank):
            return Encoded(attended, z, None)
        return Encoded(attended, z, cells([m.detach() for m in maps]) if self.keys == "scales" else z.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, C)."""
        return self.read(x)[0]

    def read(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits (B, C), and by name: ``final`` (B, D, H, W), the last map after attention; ``z`` (B, D); with a voting bank
        ``keys`` (B, K) and the logits ``head`` (B, C) that it blends with votes."""
        encoded = self.encode(x)
        read = encoded.map if isinstance(self.head, CSRAHead) else encoded.z
        seen = {"final": encoded.map, "z": encoded.z}
        if encoded.keys is not None:
            seen |= {"keys": encoded.keys, "head": self.classify(read)}
            return self.bank(encoded.keys, seen["head"]), seen
        return self.classify(read) if self.bank is None else self.bank(read, self.classify), seen

    def classify(self, features: Tensor) -> Tensor:
        """The head's logits (B, C) of what it reads, times ``ldam_scale``."""
        logits = self.head(features)
        return logits if self.ldam_scale == 1 else logits.float() * self.ldam_scale

    def start_at(self, log_odds: Tensor) -> None:
        """Before training: the last bias (C,) of the head; see :meth:`charmlib.nn.ClassifierHead.start_at`."""
        self.head.start_at(log_odds / self.ldam_scale)

    def enter(self, bank_momentum: float) -> None:
        """Before a phase: the bank's momentum from here on."""
        if isinstance(self.bank, RareMemoryBank):
            self.bank.bank_momentum = bank_momentum

    def see(self, ids: Tensor, labels: Tensor | None) -> None:
        """Before a batch: which images it holds, so that no image retrieves itself; see :meth:`RareMemoryBank.expect`."""
        if self.bank is not None:
            self.bank.expect(ids, labels)

    @torch.no_grad()
    def follow(self, skipped: Tensor | None = None) -> None:
        """After an optimizer step: update the momentum encoder; see :meth:`charmlib.nn.MomentumEncoder.update`."""
        if self.momentum is not None and not self.momentum_before_step:
            self.momentum.update(self.final, skipped)

    @torch.no_grad()
    def renew(self, images: Callable[[Tensor], Tensor], batch: int = 256) -> None:
        """Before scoring: encode the images of a voting bank, in eval mode; does nothing for other banks.

        Parameters
        ----------
        images : callable
            ids (n,) -> normalised images (n, 3, H, W).
        batch : int
            Images at a time.
        """
        if not isinstance(self.bank, VotingBank):
            return
        was, held = self.training, torch.arange(int(self.bank.filled), device=self.bank.slots.device)
        self.eval()
        for some in held.split(batch) if len(held) else ():
            self.bank.renew(some, self.encode(images(self.bank.slot_ids[some])).keys)
        self.bank.calibrate()
        self.train(was)

    def parts(self) -> dict[str, nn.Module]:
        """Trunk, final block, and head: the new layers, with attention and bank. The momentum encoder is in none."""
        new = nn.ModuleList(part for part in (self.attention, self.bank, self.head) if part is not None)
        return {"trunk": self.trunk, "final": self.final, "head": new}

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """The parameters of each part, for discriminative learning rates."""
        return [list(part.parameters()) for part in self.parts().values()]

    def compile_parts(self) -> list[nn.Module]:
        """What ``torch.compile`` takes: the trunk (its blocks, where maps between them are read) and the final block."""
        return [*(self.trunk if self.ends and isinstance(self.trunk, nn.Sequential) else [self.trunk]), self.final]
