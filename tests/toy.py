"""A system outside the package: two parts, two phases, one parameter. ``CHARM_SYSTEMS=tests.toy`` registers it."""

import torch
from torch import nn

from charmlib.params import Param
from charmlib.systems import System, register
from charmlib.training.recipes import Phase


class ToyNet(nn.Module):
    """One convolution and a linear head."""

    def __init__(self, classes: int, toy_width: int = 8):
        super().__init__()
        self.arch, self.classes, self.mean, self.std = "toy", classes, (0.5,) * 3, (0.5,) * 3
        self.body = nn.Sequential(nn.Conv2d(3, toy_width, 5, stride=2), nn.BatchNorm2d(toy_width), nn.ReLU())
        self.head = nn.Linear(toy_width, classes)

    def parts(self):
        return {"body": self.body, "head": self.head}

    def parameter_groups(self):
        return [list(part.parameters()) for part in self.parts().values()]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(x)[0]

    def read(self, x):
        features = self.body(x)  # (B, toy_width, H, W)
        return self.head(features.mean((2, 3))), {"final": features}


def recipe(params, rate):
    """The head alone, the body frozen with its norms, then everything."""
    common = {"lr": rate, "batch": params["stage1_batch"]}
    return [Phase("head", "head", params["stage1_epochs"], trains=("head",), train_norms=False, **common),
            Phase("all", "all", params["stage2_epochs"], **common)]


register(System("toy", "tests.toy:ToyNet", "tests.toy:recipe",
                (Param("network", "toy_width", int, 8, "channels of the toy's convolution", low=1, of=("toy",)),)))
