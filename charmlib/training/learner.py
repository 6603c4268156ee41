"""``charm_learner``: a fastai Learner around CharmNet, as ``vision_learner`` is one around a ResNet."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from fastai.callback import schedule as _schedule  # noqa: F401  (patches lr_find, fine_tune and fit_one_cycle into Learner)
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.learner import Learner
from fastcore.meta import delegates

from charmlib import session
from charmlib.data.loaders import ChestDataLoaders, GreyToNetwork
from charmlib.data.sampling import prior_shift, shares
from charmlib.models.charm import CharmNet
from charmlib.models.registry import Network, keywords
from charmlib.nn.losses import LDAMLoss, MultiLabelLoss, make_loss
from charmlib.training import cards
from charmlib.training.average import AverageWeights
from charmlib.training.callbacks import LossMode, NetworkHooks, SeedEpoch
from charmlib.training.device import pick_precision, place
from charmlib.training.no_wait import SGD, AdamW, HalfPrecision, MeanAP, MeanAUC, record_on_device

OPTIMIZERS = {"adamw": AdamW, "sgd": SGD, "fastai": partial(AdamW, betas=(0.9, 0.99), eps=1e-5)}


@delegates(CharmNet.__init__, but=["classes"])
def charm_learner(dls: ChestDataLoaders, arch: str = "efficientnet_v2_s", *, net: Network | None = None,
                  loss: str | MultiLabelLoss = "bce", weight_from: float = 0.0, optimizer: str = "adamw",
                  one_group: bool = False, weight_decay: float = 0.01, average: float = 0.0, average_warmup: bool = False,
                  clip_norm: float = 0.0, precision: str = "auto", seed: int | None = None, path: str | Path | None = None,
                  cbs: Sequence = (), **kwargs) -> Learner:
    """A Learner whose ``lr_find``, ``fine_tune``, ``fit_one_cycle``, ``show_results`` and callbacks are fastai's own.

    >>> learn = charm_learner(dls, 'efficientnet_v2_s', bank_size=4096, vote_weight=0.5)           # doctest: +SKIP
    >>> learn.fine_tune(20, learn.lr_find().valley, freeze_epochs=3)                          # doctest: +SKIP

    Parameters
    ----------
    dls : ChestDataLoaders
        From :func:`charmlib.data.loaders.chest_dataloaders`; normalised as the network expects.
    net : Network
        An existing network of any system; by default a :class:`charmlib.models.CharmNet` of ``arch`` and ``kwargs``.
    loss : str or MultiLabelLoss
        'bce', 'focal', 'asl', 'asl_published', 'ldam' or 'db', with the class counts of the training loader's images.
    weight_from : float
        Share of the epochs of a fit before class weights act; 0.8 is deferred re-weighting (Cao et al., NeurIPS 2019), whose
        fall of the learning rate is the end of ``fit_one_cycle``. Validation losses have no class weights.
    optimizer : {'adamw', 'sgd', 'fastai'}
        AdamW; SGD with momentum 0.9; or fastai's Adam: beta2 0.99, epsilon 1e-5, no decay of norm layers and biases.
    one_group : bool
        One parameter group instead of the network's own: ``freeze`` and slices of rates then do nothing.
    average, average_warmup
        If above 0, the decay of a running mean of the weights that is validated, and left in the network, and whether it has a
        warm-up; see :class:`charmlib.training.average.AverageWeights`. By default the network's own ``mean_decay``.
    clip_norm : float
        If above 0, longer gradients are scaled to this Euclidean norm (fastai's ``GradientClip``).
    precision : {'auto', 'fp16', 'fp32'}
        'auto' is fp16 on a GPU.
    seed : int
        Derives every epoch's randomness. The initial weights do not follow it: seed before building the network.
    kwargs
        Arguments of CharmNet and, beyond counts, of :func:`charmlib.nn.make_loss`; the others go to fastai's Learner.

    Raises
    ------
    ValueError
        Network and loaders differ in their number of classes, or in normalisation; or an unknown optimizer; or uneven
        draws with a loss other than those of :mod:`charmlib.nn.losses`; or arguments of the network beside ``net``, or of the
        loss beside a loss of your own, or two scales of LDAM.
    """
    of_network, of_loss = keywords(CharmNet, kwargs), keywords(make_loss, kwargs)
    of_learner = {name: value for name, value in kwargs.items() if name not in {**of_network, **of_loss}}
    no_effect = [] if net is None else [n for n, v in of_network.items() if n not in of_loss or v != getattr(net, n, v)]
    no_effect += [] if isinstance(loss, str) else [n for n in of_loss if n not in of_network]
    if no_effect:
        raise ValueError(f"{', '.join(no_effect)} would have no effect beside a network or loss of your own: give it there")
    if net is None:
        net = CharmNet(arch, len(dls.vocab), **of_network)
    if net.classes != len(dls.vocab):
        raise ValueError(f"the network has {net.classes} classes, the data {len(dls.vocab)}")
    scale = next(t for t in dls.valid.after_batch.fs if isinstance(t, GreyToNetwork))
    if not torch.allclose(scale.mean.flatten().cpu(), torch.tensor(net.mean)):
        raise ValueError(f"the loaders normalise with mean {scale.mean.flatten().tolist()}, the network expects "
                         f"{list(net.mean)}: build them with mean=net.mean, std=net.std")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    device = torch.device(dls.device)
    labels = dls.train.dataset.labels[dls.train.dataset.rows]
    if isinstance(loss, str):
        of_loss |= {"counts": (labels == 1).sum(0), "images": (~np.isnan(labels)).sum(0), "names": dls.vocab,
                    "ldam_scale": getattr(net, "ldam_scale", 1.0)}
        loss = make_loss(loss, **of_loss)
    own = None  # shares of the classes, as the loss adds the prior of uneven draws in training
    if dls.train.expected is not None:
        if not isinstance(loss, MultiLabelLoss):
            raise ValueError(f"loss {type(loss).__name__} cannot take the prior of uneven draws: name a loss of "
                             "charmlib.nn.losses, or sampler natural")
        if loss.weights is not None:
            warnings.warn("class weights and uneven draws of images both raise rare classes, and multiply", stacklevel=2)
        loss.shift, own = (torch.from_numpy(a).float() for a in (prior_shift(labels, dls.train.expected), shares(labels)))
    elif isinstance(loss, MultiLabelLoss):
        loss.shift = None  # that of a learner before
    if (scale := getattr(net, "ldam_scale", 1.0)) != getattr(loss, "scale", scale) and isinstance(loss, LDAMLoss):
        raise ValueError(f"the loss's scale is {loss.scale:g}, the network's ldam_scale {scale:g}: they must be equal")
    if not average:
        average, average_warmup = getattr(net, "mean_decay", 0.0), False
    callbacks = [NetworkHooks(), LossMode(weight_from, own), Callback(after_batch=lambda _: session.alive()), *cbs,
                 *([] if seed is None else [SeedEpoch(seed)]), *([cards.Cards()] if cards.size() > 1 else []),
                 *([AverageWeights(average, average_warmup)] if average else []),
                 *([GradientClip(clip_norm)] if clip_norm else []),
                 *([HalfPrecision()] if pick_precision(precision, device) == "fp16" else [])]
    return record_on_device(Learner(
        dls, place(net, device), loss_func=loss, opt_func=OPTIMIZERS[optimizer], wd=weight_decay,
        splitter=lambda net: [sum(net.parameter_groups(), [])] if one_group else net.parameter_groups(),
        metrics=[MeanAUC(dls.vocab, dls.normal_class), MeanAP(dls.vocab, dls.normal_class)], cbs=callbacks, path=path,
        model_dir=".", **{"wd_bn_bias": optimizer != "fastai", **of_learner}))
