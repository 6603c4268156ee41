"""Building blocks: tensors in, tensors out. Nothing here knows files or fastai."""

from charmlib.nn.attention import MultiScaleAttention
from charmlib.nn.backbone import Backbone, split_backbone
from charmlib.nn.bank import RareMemoryBank
from charmlib.nn.head import ClassifierHead
from charmlib.nn.losses import AsymmetricLoss, BCELoss, FocalLoss, make_loss
from charmlib.nn.momentum import MomentumEncoder

__all__ = ["AsymmetricLoss", "BCELoss", "Backbone", "ClassifierHead", "FocalLoss", "MomentumEncoder",
           "MultiScaleAttention", "RareMemoryBank", "make_loss", "split_backbone"]
