"""Networks of the benchmarks and a plain PyTorch loop around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from charmlib.models import CharmNet
from charmlib.nn import MultiScaleAttention

PARTS = ("use_momentum", "use_attention", "use_bank")
PUBLISHED = {"momentum_form": "branch", "answer": "features", "strategy": "rarity", "bank_size": 512, "k": 5}
"""The published parts, whose costs are measured."""


class LayeredAttention(MultiScaleAttention):
    """The published form: four convolutions one after another."""

    def forward(self, features):
        return torch.sigmoid(self.fuse(torch.cat([conv(features) for conv in self.scales], dim=1)))


def network(arch: str, *, on: tuple[str, ...] = (), layered: bool = False, attention: str = "layers") -> CharmNet:
    """The network with the parts of ``PARTS`` that are on; ``layered`` computes the attention as it was published."""
    torch.manual_seed(0)
    net = CharmNet(arch, 14, weights="none", norm="imagenet", attention=attention, **{part: part in on for part in PARTS},
                   **PUBLISHED)
    if layered and net.attention is not None:
        net.attention.__class__ = LayeredAttention
    return net


class BareLoop:
    """A step as one writes it without a library."""

    def __init__(self, net: CharmNet, size: int, batch: int, device: torch.device, precision: str, layout: torch.memory_format):
        self.net = net.to(device, memory_format=layout).train()
        self.optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)
        self.x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
        self.y = (torch.rand(batch, 14, device=device) < 0.1).float()
        self.kind, self.half = device.type, precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.half)

    def __call__(self) -> None:
        with torch.autocast(self.kind, torch.float16, enabled=self.half):
            logits = self.net(self.x)
        loss = F.binary_cross_entropy_with_logits(logits.float(), self.y)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.net.follow()
