"""A small Learner on phantoms."""

import pytest
import torch

from charmlib import charm_learner
from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import chest_dataloaders

HALF = (0.5, 0.5, 0.5)
NET = {"arch": "timm:test_resnet", "weights": "none", "norm": "half", "momentum_form": "branch", "attention": "layers",
       "bank_size": 16, "k": 2, "hidden": 16}


@pytest.fixture
def learn(phantoms, tmp_path):
    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)
    torch.manual_seed(0)
    return charm_learner(chest_dataloaders(data, bs=16, mean=HALF, std=HALF, path=tmp_path), seed=1, path=tmp_path, **NET)
