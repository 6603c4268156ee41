"""Necks: maps of several strides on the same number of channels, with or without a top-down path."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

NECKS, WIDTH = ("none", "laterals", "fpn"), 256


class Neck(nn.Module):
    """Maps (B, D_i, H_i, W_i), the finest first -> as many maps (B, 256, H_i, W_i).

    'fpn' is torchvision's feature pyramid (Lin et al., arXiv 1612.03144, section 3): a 1 x 1 convolution at each level, plus
    the level above enlarged to it, then a 3 x 3 convolution. 'laterals' are the same without the path from above.
    """

    def __init__(self, neck: str, channels: Sequence[int]):
        super().__init__()
        groups = [list(channels)] if neck == "fpn" else [[n] for n in channels]
        self.levels = nn.ModuleList(FeaturePyramidNetwork(group, WIDTH) for group in groups)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        groups = [maps] if len(self.levels) == 1 else [[m] for m in maps]
        return [out for net, group in zip(self.levels, groups)
                for out in net(OrderedDict((str(i), m) for i, m in enumerate(group))).values()]
