"""Heat maps of a network: Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from charmlib.nn.scales import ends_of


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
        ends, _ = ends_of(trunk)
        if stride not in ends or type(trunk) is not nn.Sequential:
            there = ", ".join(map(str, sorted({*ends, 32}))) if type(trunk) is nn.Sequential else "32"
            raise ValueError(f"the network has maps at the strides {there}, not at {stride}")
        blocks, end = list(trunk), ends[stride][0] - 1
        net.trunk = nn.Sequential(*blocks[:end], nn.Sequential(blocks[end], leaf), *blocks[end + 1:])
    try:
        yield leaf
    finally:
        net.trunk, net.final = trunk, final
