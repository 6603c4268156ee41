"""The classifier of CHARM-Xray and MemAug."""

import torch
from torch import Tensor, nn


class ClassifierHead(nn.Sequential):
    """BatchNorm1d, Linear to ``hidden``, ReLU, Dropout, Linear to the classes: (B, D) -> logits (B, C)."""

    def __init__(self, features: int, classes: int, *, hidden: int = 512, dropout: float = 0.3):
        super().__init__(
            nn.BatchNorm1d(features),
            nn.Linear(features, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )

    @torch.no_grad()
    def start_at(self, log_odds: Tensor) -> None:
        """Set the last bias (C,), so that training starts at given probabilities (Lin et al., RetinaNet, 2017, section 4.1).

        With one sigmoid a class, this is the logit adjustment in training of Menon et al. (2021).
        """
        self[-1].bias.copy_(log_odds)
