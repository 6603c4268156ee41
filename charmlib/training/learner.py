"""``charm_learner``: a fastai Learner around CharmNet, as ``vision_learner`` is one around a ResNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from fastai.callback import schedule as _schedule  # noqa: F401  (patches lr_find, fine_tune and fit_one_cycle into Learner)
from fastai.learner import Learner

from charmlib.data.loaders import ChestDataLoaders, GreyToNetwork
from charmlib.models.charm import CharmNet
from charmlib.nn.losses import MultiLabelLoss, make_loss
from charmlib.training.callbacks import BankFeed, FollowStep, HalfPrecision, RefreshBank, SeedEpoch, SignOfLife
from charmlib.training.device import pick_precision, place
from charmlib.training.optimizer import AdamW
from charmlib.training.recording import MeanAUC, record_on_device


def charm_learner(dls: ChestDataLoaders, arch: str = "efficientnet_v2_s", *, net: CharmNet | None = None,
                  weights: str | Path = "imagenet", norm: str = "auto", use_momentum: bool = False,
                  use_attention: bool = False, use_bank: bool = True, attention: str = "layers", momentum: float = 0.99,
                  k: int = 5, threshold: float = 0.2, bank_size: int = 3072, strategy: str = "balanced",
                  rule: str = "rare", answer: str = "votes", keys: str = "scales", vote_weight: float = 0.5,
                  vote_temperature: float = 0.8, vote_ridge: float = 3.0, retrieval: str = "softmax",
                  bank_norm: str = "both", normalize_retrieved: bool = False, bank_momentum: float = 0.9,
                  dropout: float = 0.3, hidden: int = 512, grad_checkpointing: bool = False,
                  loss: str | MultiLabelLoss = "bce", weight_decay: float = 0.01, precision: str = "auto",
                  seed: int | None = None, path: str | Path | None = None, cbs: Sequence = (), **learner) -> Learner:
    """A Learner whose ``lr_find``, ``fine_tune``, ``fit_one_cycle``, ``show_results`` and callbacks are fastai's own.

    >>> learn = charm_learner(dls, 'efficientnet_v2_s', bank_size=4096, vote_weight=0.5)           # doctest: +SKIP
    >>> learn.fine_tune(20, learn.lr_find().valley, freeze_epochs=3)                          # doctest: +SKIP

    Parameters
    ----------
    dls : ChestDataLoaders
        From :func:`charmlib.data.loaders.chest_dataloaders`; normalised as the network expects.
    arch ... grad_checkpointing
        See :class:`charmlib.models.CharmNet`. ``net`` is one that is there already, and makes these unused.
    loss : str or MultiLabelLoss
        'bce', 'focal' or 'asl'.
    precision : {'auto', 'fp16', 'fp32'}
        'auto' is fp16 on a GPU.
    seed : int
        Given, every epoch's randomness derives from it. The weights' own start does not: seed before building.
    learner
        Further arguments of fastai's Learner.

    Raises
    ------
    ValueError
        Network and loaders differ in their number of classes, or in normalisation.
    """
    if net is None:
        net = CharmNet(arch, len(dls.vocab), weights=weights, norm=norm, use_momentum=use_momentum,
                       use_attention=use_attention, use_bank=use_bank, attention=attention, momentum=momentum, k=k,
                       threshold=threshold, bank_size=bank_size, strategy=strategy, rule=rule, answer=answer, keys=keys,
                       vote_weight=vote_weight, vote_temperature=vote_temperature, vote_ridge=vote_ridge, retrieval=retrieval,
                       bank_norm=bank_norm, normalize_retrieved=normalize_retrieved, bank_momentum=bank_momentum,
                       dropout=dropout, hidden=hidden, grad_checkpointing=grad_checkpointing)
    if net.classes != len(dls.vocab):
        raise ValueError(f"the network has {net.classes} classes, the data {len(dls.vocab)}")
    scale = next(t for t in dls.valid.after_batch.fs if isinstance(t, GreyToNetwork))
    if not torch.allclose(scale.mean.flatten().cpu(), torch.tensor(net.mean)):
        raise ValueError(f"the loaders normalise with mean {scale.mean.flatten().tolist()}, the network expects "
                         f"{list(net.mean)}: build them with mean=net.mean, std=net.std")
    callbacks = [BankFeed(), RefreshBank(), FollowStep(), SignOfLife(), *cbs]
    if seed is not None:
        callbacks.append(SeedEpoch(seed))
    if pick_precision(precision, torch.device(dls.device)) == "fp16":
        callbacks.append(HalfPrecision())
    place(net, torch.device(dls.device))
    learn = Learner(dls, net, loss_func=make_loss(loss) if isinstance(loss, str) else loss, opt_func=AdamW,
                    splitter=lambda net: net.parameter_groups(), metrics=[MeanAUC(dls.vocab)], cbs=callbacks, wd=weight_decay,
                    path=path, model_dir=".", **learner)
    return record_on_device(learn)
