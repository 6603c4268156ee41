"""Attention behind feature maps: CBAM, and large-kernel attention."""

from torch import Tensor, nn

from charmlib.nn.scales import STRIDES, find_scales

REFINES, STARTS = ("none", "cbam", "lka"), ("identity", "published")


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., arXiv 1807.06521), timm's with biases as the authors have: (B, D, H, W) kept.

    ``start='identity'`` returns the input to the bit at first: both gates are a half, and the result is times 4. The authors'
    spatial gate takes maximum before mean, so its two input channels are swapped, and its norm has momentum 0.01, timm's 0.1.
    """

    def __init__(self, features: int, start: str = "identity"):
        from timm.layers.cbam import CbamModule  # takes a second, which networks without it do without

        super().__init__()
        self.gates, self.scale = CbamModule(features, rd_ratio=1 / 16, mlp_bias=True), 4.0 if start == "identity" else 1.0
        if start == "identity":
            for p in (*self.gates.channel.fc2.parameters(), self.gates.spatial.conv.bn.weight):
                nn.init.zeros_(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.gates(x) * self.scale


class LKA(nn.Module):
    """Large-kernel attention (Guo et al., arXiv 2202.09741, equation 3): x * PW(DWD(DW(x))), (B, D, H, W) kept.

    Depthwise 5 x 5, depthwise 7 x 7 of dilation 3, and 1 x 1, with biases, without a sigmoid. The paper puts it between 1 x 1
    convolutions in a scaled residual branch. ``start='identity'`` returns the input to the bit at first.
    """

    def __init__(self, features: int, start: str = "identity"):
        super().__init__()
        self.near = nn.Conv2d(features, features, 5, padding=2, groups=features)
        self.far = nn.Conv2d(features, features, 7, padding=9, dilation=3, groups=features)
        self.point = nn.Conv2d(features, features, 1)
        if start == "identity":
            nn.init.zeros_(self.point.weight)
            nn.init.ones_(self.point.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.point(self.far(self.near(x)))


def make_refine(refine: str, features: int, start: str = "identity") -> nn.Module:
    """:class:`CBAM`, :class:`LKA` or, for 'none', the identity; ValueError for another name."""
    if refine not in REFINES or start not in STARTS:
        raise ValueError(f"refine must be one of {', '.join(REFINES)} and refine_start one of {', '.join(STARTS)}, got "
                         f"{refine!r} and {start!r}")
    return nn.Identity() if refine == "none" else (CBAM if refine == "cbam" else LKA)(features, start)


def attach(parts: list[nn.Module], refine: str, start: str) -> None:
    """Put attention behind the last blocks at strides 4, 8 and 16 of a network of ``nn.Sequential`` parts, in place; in VGG16
    these are in front of its last three pools. ValueError if the parts do not offer such blocks."""
    homes = [(part, name) for part in parts if type(part) is nn.Sequential for name in part._modules]
    ends, widths = find_scales(nn.Sequential(*(getattr(part, name) for part, name in homes))) if homes else ([], [])
    if len(ends) < len(STRIDES):
        raise ValueError(f"refine {refine} needs maps at strides 4, 8, 16, which this arch does not offer in sequence: say "
                         "refine: none, or another arch")
    for end, features in zip(ends, widths):
        part, name = homes[end - 1]
        setattr(part, name, nn.Sequential(getattr(part, name), make_refine(refine, features, start)))
