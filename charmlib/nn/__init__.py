"""Building blocks of networks, with tensors as inputs and outputs and without files or fastai."""

from charmlib.nn.attention import FilterAttention, MultiScaleAttention, ScaleAttention, make_attention
from charmlib.nn.backbone import Backbone, split_backbone
from charmlib.nn.bank import RareMemoryBank
from charmlib.nn.head import ClassifierHead, CSRAHead, LinearHead, StandardHead, make_head
from charmlib.nn.losses import AsymmetricLoss, BCELoss, DistributionBalancedLoss, FocalLoss, LDAMLoss, make_loss
from charmlib.nn.momentum import MomentumEncoder
from charmlib.nn.pyramid import Neck
from charmlib.nn.recompute import recompute
from charmlib.nn.refine import CBAM, LKA, make_refine
from charmlib.nn.scales import find_scales
from charmlib.nn.votes import VotingBank

__all__ = ["CBAM", "LKA", "AsymmetricLoss", "BCELoss", "Backbone", "CSRAHead", "ClassifierHead", "DistributionBalancedLoss",
           "FilterAttention", "FocalLoss", "LDAMLoss", "LinearHead", "MomentumEncoder", "MultiScaleAttention", "Neck",
           "RareMemoryBank", "ScaleAttention", "StandardHead", "VotingBank", "find_scales", "make_attention", "make_head",
           "make_loss", "make_refine", "recompute", "split_backbone"]
