"""Backbones split into a trunk and a final block, with ImageNet weights, weights from a file, or random weights."""

import difflib
import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from charmlib.nn.refine import attach

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
XRV = ((0.5, 0.5, 0.5), (1 / 2048, 1 / 2048, 1 / 2048))
"""torchxrayvision's input scale: -1024 to 1024."""


@dataclass
class Backbone:
    """A network in two parts: ``final(trunk(x))`` is its last feature map (B, features, H, W).

    ``mean`` and ``std`` are the normalisation of RGB inputs in [0, 1] that the weights expect. Both are None for weights from
    a file, which does not record them, but for weights of one grey channel, torchxrayvision's.
    """

    name: str
    trunk: nn.Module
    final: nn.Module
    features: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None

    def scale(self, norm: str, weights: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std for the parameter ``norm``: 'imagenet', 'half', 'xrv' (torchxrayvision's), or 'auto', which ValueError
        refuses for a file of three channels; one of a single grey channel takes 'xrv' alone."""
        scales = {"imagenet": IMAGENET, "half": HALF, "xrv": XRV, "auto": (self.mean, self.std)}
        if norm not in scales:
            raise ValueError(f"norm must be auto, imagenet, half or xrv, got {norm!r}")
        if (self.mean, self.std) == XRV and norm not in ("auto", "xrv"):
            raise ValueError(f"{weights} has one grey channel, as torchxrayvision's: say norm: xrv, not {norm}")
        if scales[norm][0] is None:
            raise ValueError(f"norm 'auto' cannot know what {weights} was trained on: say norm: imagenet, or norm: half "
                             "for inputs in [-1, 1]")
        return scales[norm]


def _efficientnet(net):
    return net.features[:-1], net.features[-1]


def _resnet(net):
    stem = OrderedDict((n, getattr(net, n)) for n in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"))
    return nn.Sequential(stem), net.layer4


def _densenet(net):
    # Differs from the published code, whose final block is norm5 alone and holds no convolution.
    trunk, final = net.features[:-2], net.features[-2:]  # from denseblock4 on
    final.add_module("relu", nn.ReLU(inplace=True))  # torchvision applies it in DenseNet.forward
    return trunk, final


def _vgg16(net):
    cut = 24 if len(net.features) == 31 else 34  # with batch norms; the final block is conv5_1 to the last pool
    return net.features[:cut], net.features[cut:]


TORCHVISION = {
    "efficientnet_v2_s": (_efficientnet, 1280), "efficientnet_v2_m": (_efficientnet, 1280),
    "efficientnet_v2_l": (_efficientnet, 1280), "efficientnet_b0": (_efficientnet, 1280),
    "efficientnet_b1": (_efficientnet, 1280), "mobilenet_v2": (_efficientnet, 1280),
    "resnet18": (_resnet, 512), "resnet50": (_resnet, 2048),
    "densenet121": (_densenet, 1024), "vgg16": (_vgg16, 512), "vgg16_bn": (_vgg16, 512),
}
CLASSIFIERS = ("classifier.", "fc.", "head.")
NORMS = ("norm_pre", "norm", "head.norm")
"""Where timm models keep the norm between the last stage and the classifier."""


def split_backbone(name: str, weights: str | Path = "imagenet", drop_path: float = 0.0, *, refine: str = "none",
                   refine_start: str = "identity") -> Backbone:
    """A named network, split into trunk and final block.

    The final block is ``features[-1]`` of EfficientNets and MobileNetV2, ``layer4`` of ResNets, the last dense block with norm
    and ReLU of DenseNet-121, the conv5 block of VGG16 with or without batch norms, and the last stage of a timm model, with
    the norm that its pretrained classifier was trained on (``head.norm`` of ConvNeXt, ConvNeXtV2, EdgeNeXt, RDNet, DaViT and
    MetaFormer, ``norm`` of CoAtNet and MaxViT). timm applies some of these norms after pooling; here each is applied per
    position. timm models must offer their stages in sequence (``features_only``) and give maps (B, D, H, W).

    Parameters
    ----------
    name : str
        A key of ``TORCHVISION``, or ``timm:NAME``.
    weights : str or Path
        'imagenet', 'none' (random), or a .pt, .pth or .safetensors state dict of the whole network. The file must match in
        every layer but the classifier, which may have any number of classes. The first convolution of torchxrayvision's
        DenseNet-121 and ResNet-50 takes one grey channel; here a third of it goes to each of three equal channels.
    drop_path : float
        Stochastic depth of a timm model, in [0, 1): the rate of its last block, which grows linearly from 0 (Huang et al.,
        ECCV 2016). 0 keeps timm's default.
    refine, refine_start
        Attention behind the last blocks at strides 4, 8 and 16, new beside loaded weights: see :mod:`charmlib.nn.refine`.

    Raises
    ------
    ValueError
        Unknown name; a timm model without a spatial map; a weight file that does not match (the message lists its keys);
        ``drop_path`` of a network without stochastic depth; ``refine`` of one without blocks at those strides in sequence.
    FileNotFoundError
        Weights are neither cached nor downloadable; the message names the missing file and its folder.
    """
    weights = str(weights)
    if refine != "none":
        backbone = split_backbone(name, weights, drop_path)
        attach([backbone.trunk, backbone.final], refine, refine_start)
        return backbone
    if name.startswith("timm:"):
        return _split_timm(name, weights, drop_path)
    if name not in TORCHVISION:
        near = difflib.get_close_matches(name, TORCHVISION, n=1)
        raise ValueError(f"unknown arch '{name}'." + (f" Did you mean '{near[0]}'?" if near else "")
                         + f" Available are {', '.join(TORCHVISION)}, and timm:NAME.")
    if drop_path:
        raise ValueError(f"drop_path {drop_path:g} is for timm models, not for torchvision's {name}; say arch: timm:NAME")
    cut, features = TORCHVISION[name]
    state, mean, std = None, *IMAGENET
    if weights == "imagenet":
        entry = torchvision.models.get_model_weights(name).DEFAULT
        transforms = entry.transforms()
        mean, std = tuple(transforms.mean), tuple(transforms.std)
        state = _download(entry, name)
    elif weights != "none":
        state, mean, std = read_state_dict(weights), None, None
    net = torchvision.models.get_model(name, weights=None)
    if state is not None:
        source = weights if weights != "imagenet" else f"ImageNet weights of {name}"
        state, first = _without_prefix(net.state_dict(), state), next(iter(net.state_dict()))
        if first in state and state[first].shape[1:2] == (1,):  # torchxrayvision's: one channel
            state[first] = state[first].expand(-1, 3, -1, -1) / 3
            state, (mean, std) = {k: v for k, v in state.items() if k != "op_threshs"}, XRV
        _check_fit(net.state_dict(), state, f"{source} does not fit {type(net).__name__}")
        net.load_state_dict({k: v for k, v in state.items() if not k.startswith(CLASSIFIERS)}, strict=False)
    trunk, final = cut(net)
    return Backbone(name, trunk, final, features, mean, std)


def _download(entry, name: str) -> Mapping[str, Tensor]:
    """torchvision's weights, from its cache or the network."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    try:
        return entry.get_state_dict(progress=False, check_hash=not target.exists(), weights_only=True)
    except OSError as error:  # URLError, HTTPError and TimeoutError are OSErrors
        raise FileNotFoundError(
            f"the ImageNet weights of {name} are not at {target} and could not be downloaded ({error}). Put "
            f"{target.name} there (on Kaggle: attach a dataset that holds it and copy it), or set weights: none or "
            "weights: /path/to/a/file.pt") from error


def read_state_dict(path: str | Path) -> Mapping[str, Tensor]:
    """A state dict from a .safetensors file, or from a .pt or .pth file without unpickling objects.

    An enclosing ``state_dict``, ``model`` or ``model_state`` entry is removed. Names of DenseNet layers of before PyTorch 0.4
    (``norm.1``) become those of today (``norm1``).

    Raises
    ------
    FileNotFoundError
        No such file.
    ValueError
        The file is damaged, holds no state dict, or needs unpickling.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}: give 'imagenet', 'none', or the path of a state dict")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read safely as a state dict ({type(error).__name__}). Damaged: copy or download it "
                         "again. A whole pickled module, as torchxrayvision's: it runs code when it is loaded; where you trust "
                         f"it, torch.save(torch.load({str(path)!r}, weights_only={False}).state_dict(), "
                         f"{str(path.with_name(path.stem + '-state.pt'))!r}) converts it.") from error
    for key in ("state_dict", "model_state", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} holds no state dict (a mapping of names to tensors)")
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", k): v for k, v in state.items()}


def _without_prefix(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` without what its names have before those of ``own``: ``module.`` (DataParallel), or the members of a module
    that the network was part of."""
    first = next(iter(own))
    prefix = next((k.removesuffix(first) for k in state if k.endswith(first)), "")
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _check_fit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], complaint: str) -> None:
    """Refuse a state with missing, unknown or misshapen keys compared with ``own``, classifiers excluded."""
    own, state = ({k: v for k, v in each.items() if k.startswith(NORMS) or not k.startswith(CLASSIFIERS)}
                  for each in (own, state))
    missing = sorted(k for k in own.keys() - state.keys() if not k.endswith("num_batches_tracked"))  # new in PyTorch 0.4.1
    shapes = [f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
              for k in sorted(own.keys() & state.keys()) if own[k].shape != state[k].shape]
    lines = [f"{len(found)} {what}: {', '.join(found[:5])}" + (f" and {len(found) - 5} more" if len(found) > 5 else "")
             for what, found in (("missing", missing), ("not in the network", sorted(state.keys() - own.keys())),
                                 ("of another shape", shapes)) if found]
    if lines:
        raise ValueError(f"{complaint}: {'; '.join(lines)}")


def _split_timm(name: str, weights: str, drop_path: float) -> Backbone:
    import timm
    from timm.layers import DropPath

    short = name.removeprefix("timm:")
    if not timm.is_model(short):
        near = difflib.get_close_matches(short, timm.list_models(), n=1)
        raise ValueError(f"timm has no model '{short}'." + (f" Did you mean 'timm:{near[0]}'?" if near else ""))
    config, options = timm.get_pretrained_cfg(short), {}
    if weights == "imagenet":
        options = {"pretrained": True}
    elif weights != "none":
        state = {k.removeprefix("module."): v for k, v in read_state_dict(weights).items()}
        _check_fit(timm.create_model(short).state_dict(), state, f"{weights} does not fit {name}")
        options = {"pretrained": True, "pretrained_cfg_overlay": {"file": weights}}
    depth = {"drop_path_rate": drop_path} if drop_path else {}
    try:
        with torch.random.fork_rng(devices=[]):  # the second network leaves the random numbers of the first as they are
            whole = timm.create_model(short, num_classes=0, **options)
        net = timm.create_model(short, features_only=True, **options, **depth)
    except TypeError as error:
        if not drop_path:
            raise
        raise ValueError(f"{name} has no stochastic depth (timm: {error}); set drop_path: 0") from error
    except (AttributeError, NotImplementedError, RuntimeError, AssertionError) as error:
        if weights == "imagenet" and "pretrained" in str(error).lower():
            raise FileNotFoundError(f"timm has no ImageNet weights for {name}: {error}") from error
        raise ValueError(f"{name} offers no feature maps (timm: {error}); choose a model with feature_info") from error
    except Exception as error:  # without a network the hub's client raises errors of several classes
        raise FileNotFoundError(
            f"the weights of {name} are not in timm's cache and could not be downloaded ({type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}). Download the model's file elsewhere and set weights: "
            "/path/to/model.safetensors or weights: none") from error

    if drop_path and not any(isinstance(m, DropPath) and m.drop_prob for m in net.modules()):
        raise ValueError(f"{name} has no stochastic depth; set drop_path: 0")
    if weights == "imagenet":
        print(f"{name}: weights {config.tag or 'without a tag'}, licence {config.license or 'not stated'} (timm)", flush=True)
    named = OrderedDict((f"blocks_{n}" if child == "blocks" else child, part) for child, module in net.named_children()
                        for n, part in (module.named_children() if child == "blocks" else [(child, module)]))
    stages, marks = nn.Sequential(named), [f["module"].replace(".", "_") for f in net.feature_info.get_dicts()]
    if not set(marks) <= set(named):
        raise ValueError(f"{name} does not offer its stages in sequence; choose a convolutional model with feature_info")
    for mark in reversed(marks[:-1]):  # the last stage with weights: a pool alone is no final block
        cut = list(named).index(mark) + 1
        if any(p.dim() > 1 for p in stages[cut:].parameters()):
            break
    with torch.no_grad():
        last = stages.eval()(torch.zeros(1, 3, 224, 224))
    features = net.feature_info.channels()[-1]
    if last.dim() != 4 or last.shape[1] != features:
        raise ValueError(f"{name} gives features of shape {tuple(last.shape)}, expected (B, {features}, H, W): "
                         "no spatial map to attend to")
    for norm in NORMS:
        module = dict(whole.named_modules()).get(norm)
        if norm not in named and module is not None and _takes(module, last):
            stages.add_module(norm.replace(".", "_"), module)
    stages.train()
    scale = IMAGENET if weights == "none" or config is None else (tuple(config.mean), tuple(config.std))
    return Backbone(name, stages[:cut], stages[cut:], features, *(scale if weights in ("imagenet", "none") else (None, None)))


def _takes(norm: nn.Module, features: Tensor) -> bool:
    """Whether a norm has weights for a map (1, D, H, W) of channels first; one behind a hidden layer has another width."""
    try:
        with torch.no_grad():
            return any(p.numel() == features.shape[1] for p in norm.parameters()) \
                and norm.eval()(features).shape == features.shape
    except RuntimeError:
        return False
