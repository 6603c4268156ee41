"""Multi-scale spatial attention of CHARM-Xray."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1, 3, 5)
FORMS = ("scales", "layers", "filter")
HEADS = 4


class MultiScaleAttention(nn.Module):
    """One attention map from 1x1, 3x3 and 5x5 convolutions of a feature map of D ``channels`` (CHARM-Xray, region attention).

    Each convolution has ``max(channels // 8, 8)`` output channels. A 1x1 convolution reduces their concatenation to one
    channel, and a sigmoid follows. As in the published code, there is no nonlinearity in between.

    The four convolutions therefore equal one 5x5 filter, which ``forward`` multiplies out and applies once. Parameters,
    gradients and outputs equal those of the four layers up to rounding. Differs from the published code, which applies the
    layers one by one and spends more multiplications on them than on the rest of a MobileNetV2.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(channels // 8, 8)
        self.scales = nn.ModuleList(nn.Conv2d(channels, inner, size, padding=size // 2) for size in SCALES)
        self.fuse = nn.Conv2d(len(SCALES) * inner, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 1, H, W) in (0, 1)."""
        with torch.autocast(features.device.type, enabled=False):  # multiplies the weights out in float32
            weight, bias = self.filter()
        return torch.sigmoid(F.conv2d(features, weight, bias, padding=max(SCALES) // 2))

    def filter(self) -> tuple[Tensor, Tensor]:
        """The product of the four convolutions: weight (1, D, 5, 5) and bias (1,)."""
        shares = self.fuse.weight.flatten().split([conv.out_channels for conv in self.scales])
        total, bias = 0, self.fuse.bias
        for conv, share in zip(self.scales, shares):
            size = conv.kernel_size[0]
            taps = conv.weight.permute(0, 2, 3, 1)  # (inner, k, k, D), a view of channels-last weights
            taps = (share @ taps.flatten(1)).view(1, size, size, -1).permute(0, 3, 1, 2)  # (1, D, k, k)
            total = total + F.pad(taps, [(max(SCALES) - size) // 2] * 4)
            bias = bias + share @ conv.bias
        return total, bias


class FilterAttention(nn.Module):
    """:class:`MultiScaleAttention` with the 5x5 filter as its parameters: ``sigmoid(conv(features, weight) + bias)``.

    Both classes represent the same functions. This one trains 25 D + 1 weights instead of about 4.4 D^2 (7.2 million for
    D = 1280), with proportionally smaller optimizer states and checkpoints. The optimizer takes another path, and weight
    decay acts on the filter rather than on its factors.

    The filter is initialised as the product of randomly drawn layers. With equal seeds both classes start as the same
    function and draw equally many random numbers.
    """

    def __init__(self, channels: int):
        super().__init__()
        with torch.no_grad():
            weight, bias = MultiScaleAttention(channels).filter()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)  # (1, D, 5, 5) and (1,)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D, H, W) -> (B, 1, H, W) in (0, 1)."""
        return torch.sigmoid(F.conv2d(features, self.weight, self.bias, padding=max(SCALES) // 2))


class ScaleAttention(nn.Module):
    """Attention over the positions of several maps, whose readings are added to the pooled feature: maps -> (B, D).

    Each map (B, C_i, H_i, W_i) is reduced to ``min(C_i, D // 8)`` channels f by a 1x1 convolution, and read by four heads::

        r_h = sum_x softmax_x(u_h . f(x) + p_h(x)) f(x)         u from 0; p, one value a quarter of the film, from 0 in the
                                                                head's own quarter and -4 in the others

    A batch norm and a linear layer, whose weights start at 0, follow the readings of all maps and heads. So the network starts
    as the one without attention.

    Differs from the published code, which multiplies the last map by a sigmoid (:class:`MultiScaleAttention`), and sees other
    scales only through the sizes of its filters.

    Parameters
    ----------
    widths : sequence of int
        Channels C_i of the maps.
    features : int
        D, the length of the pooled feature.
    """

    def __init__(self, widths: Sequence[int], features: int):
        super().__init__()
        inner = [min(width, max(features // 8, 1)) for width in widths]
        self.reduce = nn.ModuleList(nn.Conv2d(width, to, 1, bias=False) if width > to else nn.Identity()
                                    for width, to in zip(widths, inner))
        self.scores = nn.ModuleList(nn.Conv2d(width, HEADS, 1, bias=False) for width in inner)
        quarters = -4 * (1 - torch.eye(HEADS).view(HEADS, 2, 2))
        self.places = nn.ParameterList(nn.Parameter(quarters.clone()) for _ in widths)
        self.norm = nn.BatchNorm1d(HEADS * sum(inner))
        self.read = nn.Linear(HEADS * sum(inner), features, bias=False)
        for layer in (*self.scores, self.read):
            nn.init.zeros_(layer.weight)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, H_i, W_i) -> (B, D)."""
        maps = [reduce(m) for m, reduce in zip(maps, self.reduce)]
        readings = [torch.einsum("bhn,bcn->bhc", share.flatten(2), m.flatten(2)).flatten(1)
                    for m, share in zip(maps, self.shares(maps))]
        return self.read(self.norm(torch.cat(readings, 1)))

    def shares(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Of each reduced map, what each head takes of each position: (B, heads, H_i, W_i), with the sum 1."""
        scores = [score(m) + F.interpolate(place[None], m.shape[2:], mode="nearest")
                  for m, score, place in zip(maps, self.scores, self.places)]
        return [s.flatten(2).softmax(2).view_as(s) for s in scores]


def make_attention(form: str, channels: int, widths: Sequence[int] = ()) -> nn.Module:
    """:class:`ScaleAttention` over maps of ``widths`` for the form 'scales', :class:`MultiScaleAttention` for 'layers',
    :class:`FilterAttention` for 'filter'.

    Raises
    ------
    ValueError
        Unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"attention must be one of {', '.join(FORMS)}, got {form!r}")
    if form == "scales":
        return ScaleAttention(widths, channels)
    return MultiScaleAttention(channels) if form == "layers" else FilterAttention(channels)
