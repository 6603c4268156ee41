"""Building blocks of networks, with tensors as inputs and outputs and without files or fastai."""

from charmlib.nn.attention import FilterAttention, MultiScaleAttention, make_attention
from charmlib.nn.backbone import Backbone, split_backbone
from charmlib.nn.bank import RareMemoryBank
from charmlib.nn.head import ClassifierHead, CSRAHead, StandardHead, make_head
from charmlib.nn.losses import AsymmetricLoss, BCELoss, DistributionBalancedLoss, FocalLoss, LDAMLoss, make_loss
from charmlib.nn.momentum import MomentumEncoder
from charmlib.nn.recompute import recompute
from charmlib.nn.scales import find_scales
from charmlib.nn.votes import VotingBank

__all__ = ["AsymmetricLoss", "BCELoss", "Backbone", "CSRAHead", "ClassifierHead", "DistributionBalancedLoss",
           "FilterAttention", "FocalLoss", "LDAMLoss", "MomentumEncoder", "MultiScaleAttention", "RareMemoryBank",
           "StandardHead", "VotingBank", "find_scales", "make_attention", "make_head", "make_loss", "recompute",
           "split_backbone"]
