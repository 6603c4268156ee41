"""Heat maps of a network: Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391), and those that it makes for itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from charmlib.nn.attention import ScaleAttention
from charmlib.nn.scales import ends_of, maps_of

KINDS = ("evidence", "attention", "crop")
"""Kinds of maps: :func:`grad_cam` of a class, and :func:`own_map` of a network."""


def grad_cam(net: nn.Module, x: Tensor, classes: Sequence[int], stride: int = 32) -> Tensor:
    """Where the evidence for some classes lies: (n_classes, B, h, w), 0 or more, for normalised images (B, 3, H, W).

    ``relu(sum_k w_k f_k)`` of the map f at a ``stride``, with the weights ``w_k``: the mean over positions of the slope of the
    logit along f_k. Stride 32 is the final block's output; smaller ones are the trunk's. Behind average pooling and a linear
    head it is the class activation map, divided by h w. The logit is the head's own: votes of a memory bank have no part in
    it. Of two paths it is the first's, on the image as that path sees it. The network is read in eval mode, without gradients
    of its weights, and left as it was.

    Raises
    ------
    ValueError
        The trunk has no map of that stride; names those that it has.
    """
    was = {module: module.training for module in net.modules()}
    frozen = [p for p in net.parameters() if p.requires_grad]
    try:
        net.eval()
        for p in frozen:
            p.requires_grad_(False)
        with _leaf(getattr(net, "global_path", net), stride) as leaf, torch.enable_grad():
            logits, seen = net.read(x)
            logits, out = seen.get("head", seen.get("global", logits)), []
            for c in classes:
                slope, = torch.autograd.grad(logits[:, c].sum(), leaf.map, retain_graph=True)
                out.append((slope.mean((2, 3), keepdim=True) * leaf.map).sum(1).relu().detach().float())
        return torch.stack(out)
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for module, mode in was.items():
            module.training = mode


def strides_of(net: nn.Module) -> list[int]:
    """The strides of the maps that :func:`grad_cam` reads, in rising order; none for a network without a ``trunk``."""
    trunk = getattr(getattr(net, "global_path", net), "trunk", None)
    return sorted({*(ends_of(trunk)[0] if type(trunk) is nn.Sequential else ()), 32}) if trunk is not None else []


@torch.no_grad()
def own_map(net: nn.Module, x: Tensor, kind: str, stride: int = 32) -> Tensor:
    """A map of no class that a network in eval mode makes for itself: (B, h, w) for normalised images (B, 3, H, W).

    'attention' is the weight of each position at a ``stride`` in CHARM's attention, in the mean over its heads; 'crop' is the
    heat that the second of two paths is cut by, at its own stride.

    Raises
    ------
    ValueError
        The network has no such map, or none of that stride; names those that it has.
    """
    if kind == "crop":
        if getattr(net, "local", "") not in ("attention", "other"):
            raise ValueError("no crop of this network follows a map: that needs system two_path with local: attention")
        return net.read(x)[1]["heat"]
    attention = getattr(net, "attention", None)
    if attention is None:
        raise ValueError("the network has no attention: that needs system charm with use_attention: true")
    shared, maps = maps_of(net.trunk, net.ends, x, nn.Module.__call__) if net.ends else (net.trunk(x), [])
    found = [*maps[-2:], net.final(shared)]
    if isinstance(attention, ScaleAttention):
        weights = attention.shares([reduce(m) for m, reduce in zip(found, attention.reduce)])
    else:
        weights = [attention(found[-1])]
    by_stride = dict(zip((8, 16, 32)[-len(weights):], (w.mean(1) for w in weights)))
    if stride not in by_stride:
        raise ValueError(f"the attention has maps at the strides {', '.join(map(str, by_stride))}, not at {stride}")
    return by_stride[stride]


class _Leaf(nn.Module):
    """Passes a map on and keeps it; gradients end here."""

    def forward(self, x: Tensor) -> Tensor:
        self.map = x.detach().requires_grad_()
        return self.map


@contextmanager
def _leaf(net: nn.Module, stride: int) -> Iterator[_Leaf]:
    leaf, trunk, final = _Leaf(), net.trunk, net.final
    if stride == 32:
        net.final = nn.Sequential(final, leaf)
    else:
        if stride not in (there := strides_of(net)):
            raise ValueError(f"the network has maps at the strides {', '.join(map(str, there))}, not at {stride}")
        blocks, end = list(trunk), ends_of(trunk)[0][stride][0] - 1
        net.trunk = nn.Sequential(*blocks[:end], nn.Sequential(blocks[end], leaf), *blocks[end + 1:])
    try:
        yield leaf
    finally:
        net.trunk, net.final = trunk, final
