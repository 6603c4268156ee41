"""The classifier of CHARM-Xray and MemAug."""

from torch import nn


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
