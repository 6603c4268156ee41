"""CHARM-Xray as one network, whose three parts can each be left out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from charmlib.nn import ClassifierHead, MomentumEncoder, RareMemoryBank, make_attention, recompute, split_backbone
from charmlib.nn.backbone import HALF, IMAGENET


class CharmNet(nn.Module):
    """CHARM-Xray: backbone, momentum branch, multi-scale attention, rare memory bank, head.

    ::

        f = trunk(x)                        trunk features
        q = final(f)                        (B, D, H, W)
        r = mean(q * attention(q))          region feature (B, D); mean(q) without attention
        z = r + mean(momentum(f))           fused feature;         r without the momentum branch
        logits = head(z + bank's answer)                           head(z) without the bank

    With all three switched off this is the plain network, with the bank alone it is MemAug. It works in any loop::

        net.bank.expect(ids, labels)        # lets slots know their image; the strategy 'hard' needs it, others do not
        loss(net(x), y).backward(); optimizer.step()
        net.update_momentum()                    # moves the momentum branch; leave it out when the scaler skipped the step

    Everything that training changes is in ``state_dict``.

    Parameters
    ----------
    arch, weights : str
        See :func:`charmlib.nn.split_backbone`.
    classes : int
        C.
    norm : {'auto', 'imagenet', 'half'}
        What the input was normalised with, kept as ``mean`` and ``std`` for the loaders. 'auto' asks the weights.
    attention, momentum, k, threshold, bank_size, strategy, rule, retrieval, bank_norm, normalize_retrieved, bank_momentum,
    dropout, hidden
        See the parts.
    grad_checkpointing : bool
        Training keeps few activations of trunk and final block and computes the others again in the backward pass: less
        memory, more time, the same bits. An attribute of the same name, which may be changed at any time.

    Raises
    ------
    ValueError
        ``norm='auto'`` with a weight file, which cannot tell; or a parameter that a part refuses.
    """

    def __init__(self, arch: str = "efficientnet_v2_s", classes: int = 14, *, weights: str | Path = "imagenet",
                 norm: str = "auto", use_momentum: bool = True, use_attention: bool = True, use_bank: bool = True,
                 attention: str = "layers", momentum: float = 0.99, k: int = 5, threshold: float = 0.2, bank_size: int = 512,
                 strategy: str = "rarity", rule: str = "rare", retrieval: str = "softmax", bank_norm: str = "both",
                 normalize_retrieved: bool = False, bank_momentum: float = 0.9, dropout: float = 0.3,
                 hidden: int = 512, grad_checkpointing: bool = False):
        super().__init__()
        backbone = split_backbone(arch, weights)
        self.grad_checkpointing = grad_checkpointing
        self.arch, self.classes, self.features = arch, classes, backbone.features
        self.mean, self.std = _input_scale(norm, backbone, weights)
        self.trunk, self.final = backbone.trunk, backbone.final
        self.momentum = MomentumEncoder(self.final, momentum) if use_momentum else None
        self.attention = make_attention(attention, self.features) if use_attention else None
        self.bank = RareMemoryBank(self.features, classes, size=bank_size, k=k, threshold=threshold, strategy=strategy,
                                   rule=rule, retrieval=retrieval, bank_norm=bank_norm,
                                   normalize_retrieved=normalize_retrieved, bank_momentum=bank_momentum) if use_bank else None
        self.head = ClassifierHead(self.features, classes, hidden=hidden, dropout=dropout)

    def embed(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> fused features z (B, D), before the bank."""
        again = self.grad_checkpointing and self.training and torch.is_grad_enabled()
        shared = recompute(self.trunk, x) if again else self.trunk(x)
        features = recompute(self.final, shared) if again else self.final(shared)  # (B, D, H, W)
        attended = features if self.attention is None else features * self.attention(features)
        z = attended.mean((2, 3))
        if self.momentum is not None:
            z = z + self.momentum(shared).mean((2, 3))
        return z

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> logits (B, C)."""
        z = self.embed(x)
        return self.head(z) if self.bank is None else self.bank(z, self.head)

    @torch.no_grad()
    def update_momentum(self, skipped: Tensor | None = None) -> None:
        """Follow the optimizer with the momentum branch; to be called after each step.

        ``skipped``: see :meth:`charmlib.nn.MomentumEncoder.update`.
        """
        if self.momentum is not None:
            self.momentum.update(self.final, skipped)

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Trunk, final block, new layers: for discriminative learning rates. The momentum branch is in none."""
        new = [self.attention, self.bank, self.head]
        return [list(self.trunk.parameters()), list(self.final.parameters()),
                [p for part in new if part is not None for p in part.parameters()]]


def _input_scale(norm: str, backbone, weights) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if norm == "auto":
        if backbone.mean is None:
            raise ValueError(f"norm 'auto' cannot know what {weights} was trained on: say norm: imagenet, or norm: half "
                             "for inputs in [-1, 1]")
        return backbone.mean, backbone.std
    scales = {"imagenet": IMAGENET, "half": HALF}
    if norm not in scales:
        raise ValueError(f"norm must be auto, imagenet or half, got {norm!r}")
    return scales[norm]
