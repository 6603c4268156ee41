"""Every parameter of the suite, declared once: name, type, default, allowed values, reason.

The notebooks' ``parameters`` cells, the YAML files under ``params/``, a grid's axes and the command line's
``-p name=value`` all go through :func:`resolve`, which coerces by the declared type and refuses what it does not
know, naming the nearest valid name. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


class ParameterError(ValueError):
    """A parameter, axis or YAML key that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Param:
    """One parameter: ``choices`` are the only allowed values, ``also`` describes free values beside them."""

    group: str
    name: str
    type: type
    default: Any
    reason: str
    choices: tuple = ()
    also: str = ""
    low: float = -math.inf
    high: float = math.inf


_DECLARED = [
    # data
    Param("data", "data_root", str, "",
          "folder of the images and CSVs; '' looks on Kaggle's mounts and in ./data, else draws phantoms"),
    Param("data", "classes", str, "nih14", "which labels: the 14 findings, 'No Finding' as a 15th, or those of `csv`",
          ("nih14", "nih15", "own")),
    Param("data", "csv", str, "", "a label table of your own instead of the NIH one; '' finds the NIH one"),
    Param("data", "labels", str, "real", "shuffled is a control that must score 0.5; never ranked", ("real", "shuffled")),
    Param("data", "split", str, "official",
          "official lists, random by patient, fold:2/5 of a cross-validation, or a folder with train/valid/test.txt",
          ("official", "patient"), also="fold:I/N or a folder"),
    Param("data", "valid_fraction", float, 0.1, "share of the train_val patients kept for validation; 0 trains on them all",
          low=0, high=0.5),
    Param("data", "image_size", int, 224, "pixels a side; the published runs use 224", low=16, high=1024),
    Param("data", "aspect", str, "stretch", "pictures that are not square: stretch, pad with black, or crop about the middle",
          ("stretch", "pad", "crop")),
    Param("data", "cache_dir", str, "", "where decoded images are kept; '' is a scratch folder of this machine"),
    Param("data", "limit", int, 0, "0 = all; N images a part makes a quick check, never ranked", low=0),
    # network
    Param("network", "arch", str, "efficientnet_v2_s", "a torchvision name, or timm:NAME"),
    Param("network", "weights", str, "imagenet", "where the backbone starts", ("imagenet", "none"), also="a file"),
    Param("network", "norm", str, "auto", "input scale; auto asks the weights, half is [-1, 1]",
          ("auto", "imagenet", "half")),
    Param("network", "use_momentum", bool, False, "the momentum branch of CHARM; it buys nothing in our measurements"),
    Param("network", "use_attention", bool, False, "the multi-scale attention of CHARM; it costs accuracy in short training"),
    Param("network", "use_bank", bool, True, "the rare memory bank of CHARM and MemAug"),
    Param("network", "attention", str, "layers", "weights of the attention: four convolutions, or their one filter directly",
          ("layers", "filter")),
    Param("network", "momentum", float, 0.99, "m of the momentum encoder, and of nothing else", low=0, high=1),
    Param("network", "k", int, 5, "slots whose features answer an image, 2 to 5 as published; slots with votes are all asked, "
          "and k of them named", low=1),
    Param("network", "threshold", float, 0.2,
          "rarity above (rule published: below) which a feature is stored; share of the batch where scores are ranked", low=0),
    Param("network", "bank_size", int, 3072, "slots in the bank; 512 as published", low=1, high=65536),
    Param("network", "strategy", str, "balanced", "what the bank judges an image by; rarity as published",
          ("rarity", "statistical", "entropy", "diversity", "hybrid", "fifo", "reservoir", "hard", "balanced")),
    Param("network", "answer", str, "votes", "what slots give: their labels, as votes on the scores, or features, as published",
          ("votes", "features")),
    Param("network", "keys", str, "scales", "what voting slots are compared by: maps at strides 4, 8 and 16, or the feature z",
          ("scales", "features")),
    Param("network", "vote_weight", float, 0.5, "share of the bank's opinion in the logits, the head's being the rest", low=0,
          high=1),
    Param("network", "vote_temperature", float, 0.8, "of similarities; a small one lets only near slots vote", low=1e-3),
    Param("network", "vote_ridge", float, 3.0, "of the regression that votes come from; a large one trusts single slots less",
          low=1e-3),
    Param("network", "rule", str, "rare", "rare keeps the odd ones, published the usual ones, angle by direction",
          ("rare", "published", "angle")),
    Param("network", "retrieval", str, "softmax", "weights of the slots: softmax of cosines, raw cosines, or gated from 0",
          ("softmax", "cosine", "gated")),
    Param("network", "bank_norm", str, "both", "what is scaled to unit length before the similarity",
          ("both", "query", "memory", "none")),
    Param("network", "normalize_retrieved", bool, False, "scale what was retrieved to the query's length, as MemAug does"),
    Param("network", "bank_momentum", float, 0.9, "of the running mean that strategy statistical keeps, in stage 1",
          low=0, high=1),
    Param("network", "stage2_bank_momentum", float, 0.9999, "the same in stage 2", low=0, high=1),
    Param("network", "dropout", float, 0.3, "dropout of the head", low=0, high=0.99),
    Param("network", "hidden", int, 512, "hidden width of the head", low=1),
    # training
    Param("training", "stage1_images", str, "findings", "images of stage 1: those with a finding, or all",
          ("findings", "all")),
    Param("training", "stage1_frozen_epochs", int, 3, "stage 1: head alone first", low=0),
    Param("training", "stage1_epochs", int, 20, "then the whole network, at most so many epochs", low=0),
    Param("training", "stage1_batch", int, 64, "batch of stage 1", low=2),
    Param("training", "stage1_lr", float, 0.0, "0 asks the learning-rate finder; grids pin a number", low=0),
    Param("training", "stage1_loss", str, "bce", "loss of stage 1", ("bce", "focal", "asl")),
    Param("training", "stage2_epochs", int, 5, "stage 2 (all images), one cycle", low=0),
    Param("training", "stage2_batch", int, 128, "batch of stage 2, and of scoring", low=2),
    Param("training", "stage2_lr_min", float, 2e-5, "stage 2 learning rate of the first layers", low=0),
    Param("training", "stage2_lr_max", float, 8e-5, "stage 2 learning rate of the head", low=0),
    Param("training", "stage2_loss", str, "asl", "loss of stage 2", ("bce", "focal", "asl")),
    Param("training", "weight_decay", float, 0.01, "AdamW's decoupled weight decay", low=0),
    Param("training", "patience", int, 5, "epochs without improvement before a stage ends; 0 never ends it early", low=0),
    Param("training", "monitor", str, "valid_loss", "what early stopping and the best checkpoint look at",
          ("valid_loss", "valid_auc")),
    # run
    Param("run", "run_dir", str, "runs/notebook", "where this run's files go"),
    Param("run", "seed", int, 85, "all randomness of the run derives from it (85 as published)", low=0),
    Param("run", "precision", str, "auto", "auto is fp16 on a GPU and fp32 on a CPU", ("auto", "fp16", "fp32")),
    Param("run", "workers", int, 2, "processes that decode images for the cache", low=0),
    Param("run", "preload", bool, False, "hold the training images as uint8 on the GPU: 50 KB an image at 224"),
    Param("run", "grad_checkpointing", bool, False,
          "compute activations again in the backward pass instead of keeping them: less GPU memory, same result, slower"),
    Param("run", "compile", bool, False, "torch.compile of the backbone; needs a card of sm_70 or newer (a T4), not a P100"),
    Param("run", "device", str, "auto", "auto takes the GPU if this torch has kernels for it", ("auto", "cpu", "cuda")),
    Param("run", "resume", bool, True, "continue from the last finished epoch of run_dir"),
]

PARAMS: dict[str, Param] = {p.name: p for p in _DECLARED}
DEFAULTS: dict[str, Any] = {p.name: p.default for p in _DECLARED}

UNHASHED = ("run_dir", "cache_dir", "data_root", "workers", "device", "resume", "preload", "grad_checkpointing")
"""Parameters that say where and how a run happens, not what it is; they stay out of a cell's hash."""

EARLIER: dict[str, Any] = {"answer": "features", "keys": "features"}
"""What parameters were, by another name or none, in runs stored before they were declared, where that is not the default."""

ARCHS = ("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l", "efficientnet_b0", "efficientnet_b1", "mobilenet_v2",
         "resnet18", "resnet50", "densenet121", "vgg16")
"""The torchvision backbones; any other goes by ``timm:NAME``."""


def nearest(name: str, valid) -> str:
    """`` Did you mean 'x'?`` for the closest of ``valid``, or an empty text."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def _refuse(p: Param, value, why: str, source: str):
    where = f" ({source})" if source else ""
    raise ParameterError(f"parameter '{p.name}'{where}: {value!r} {why}.")


def coerce(name: str, value: Any, source: str = "") -> Any:
    """``value`` as the declared type of ``name``.

    YAML reads ``2e-5`` as text and ``off`` as False, the command line hands over text only; both come out right
    where the meaning is plain and are refused where it is not (a bool for a number, 2.5 for an int).

    Raises
    ------
    ParameterError
        Unknown name, wrong type, a value outside the allowed ones.
    """
    if name not in PARAMS:
        where = f" ({source})" if source else ""
        raise ParameterError(f"unknown parameter '{name}'{where}.{nearest(name, PARAMS)} "
                             "`python -m charmlib params` lists them all.")
    p = PARAMS[name]
    if p.type is bool:
        if isinstance(value, str) and value.strip().lower() in ("true", "yes", "on", "1"):
            value = True
        elif isinstance(value, str) and value.strip().lower() in ("false", "no", "off", "0"):
            value = False
        if not isinstance(value, bool):
            _refuse(p, value, "is not true or false", source)
    elif p.type in (int, float):
        if isinstance(value, bool):
            _refuse(p, value, f"is true or false, wanted {p.type.__name__}", source)
        try:
            number = float(value)
        except (TypeError, ValueError):
            _refuse(p, value, f"is not a number, wanted {p.type.__name__}", source)
        if not math.isfinite(number):
            _refuse(p, value, "is not finite", source)
        if p.type is int and number != int(number):
            _refuse(p, value, "is not a whole number", source)
        value = p.type(number)
        if not p.low <= value <= p.high:
            _refuse(p, value, f"is outside {p.low:g} to {p.high:g}", source)
    else:
        if isinstance(value, Path):
            value = str(value)
        if value is None or (value is False and "none" in p.choices):
            value = "none" if "none" in p.choices else ""
        if not isinstance(value, str):
            _refuse(p, value, "is not text (put it in quotes)", source)
        if p.choices and value not in p.choices and not (p.also and _looks_free(value)):
            allowed = ", ".join(p.choices) + (f", or {p.also}" if p.also else "")
            raise ParameterError(f"parameter '{p.name}'{f' ({source})' if source else ''}: {value!r} is none of "
                                 f"{allowed}.{nearest(value, p.choices)}")
    return value


def _looks_free(value: str) -> bool:
    """A path in place of one of the named choices: has a separator or a suffix, or is there."""
    return any(c in value for c in "/\\.") or Path(value).exists()


def resolve(*layers: Mapping[str, Any], sources: tuple[str, ...] = ()) -> dict[str, Any]:
    """All parameters: the defaults with each of ``layers`` laid over them in turn, coerced and checked together.

    Raises
    ------
    ParameterError
        As :func:`coerce`; also for values that contradict each other.
    """
    out = dict(DEFAULTS)
    for i, layer in enumerate(layers):
        source = sources[i] if i < len(sources) else ""
        for name, value in layer.items():
            out[name] = coerce(name, value, source)
    if out["use_bank"] and out["answer"] == "features" and out["k"] > out["bank_size"]:
        raise ParameterError(f"parameter 'k': {out['k']} is more than bank_size {out['bank_size']}; lower k.")
    if out["arch"] not in ARCHS and not out["arch"].startswith("timm:"):
        raise ParameterError(f"parameter 'arch': {out['arch']!r} is none of {', '.join(ARCHS)}, nor timm:NAME."
                             f"{nearest(out['arch'], ARCHS)}")
    if out["norm"] == "auto" and out["weights"] not in ("imagenet", "none"):
        raise ParameterError(f"parameter 'norm': auto cannot know what {out['weights']} was trained on; say norm: imagenet, "
                             "or norm: half for inputs in [-1, 1].")
    if out["grad_checkpointing"] and out["compile"]:
        raise ParameterError("parameters 'grad_checkpointing' and 'compile' cannot be used together; switch one off.")
    if out["use_bank"] and out["strategy"] == "statistical" and out["rule"] == "angle":
        raise ParameterError("parameter 'rule': 'angle' has no running mean of norms; with strategy statistical say rare or "
                             "published.")
    if out["valid_fraction"] == 0 and out["patience"]:
        raise ParameterError(f"parameter 'patience': {out['patience']} looks at the validation part, and valid_fraction 0 "
                             "leaves none; say patience: 0.")
    if out["classes"] == "own" and not out["csv"]:
        raise ParameterError("parameter 'classes': 'own' needs 'csv', the table that holds your labels.")
    if out["stage1_epochs"] + out["stage1_frozen_epochs"] + out["stage2_epochs"] == 0:
        raise ParameterError("parameters 'stage1_epochs', 'stage1_frozen_epochs', 'stage2_epochs' are all 0: "
                             "nothing would be trained.")
    return out


def stored(params: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a run as it stored them: one that it is too old to have is what such a run was."""
    return {**DEFAULTS, **EARLIER, **params}


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Names of the parameters that decide a result and differ; one that ``theirs`` does not know yet does not, unless it is
    known what such a run was."""
    return [name for name in ours if name not in UNHASHED and ours[name] != theirs.get(name, EARLIER.get(name, ours[name]))]


def with_absolute_paths(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the files and folders that they name as absolute paths, ``~`` expanded.

    Raises
    ------
    ParameterError
        A weight file or a folder of lists that is not there.
    """
    out = dict(params)
    for name, words in (("weights", ("imagenet", "none")), ("split", ("official", "patient"))):
        if out[name] not in words and not (name == "split" and out[name].startswith("fold:")):
            path = Path(out[name]).expanduser()
            if not path.exists():
                raise ParameterError(f"parameter '{name}': nothing at {path}; wanted {', '.join(words)} or an existing path.")
            out[name] = str(path.resolve())
    for name in ("csv", "cache_dir", "run_dir"):
        path = Path(out.get(name) or "").expanduser()
        if out.get(name) and (name != "csv" or path.exists()):  # a csv may also be relative to data_root
            out[name] = str(path.resolve())
    return out


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file as a dict; an empty file is an empty dict.

    Raises
    ------
    ParameterError
        No such file, not YAML, not a mapping; names the file.
    """
    path = find_file(path)
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ParameterError(f"no file {path}.{nearest(path.name, there)}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ParameterError(f"{path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ParameterError(f"{path}: wanted 'name: value' lines, found {type(content).__name__}.")
    return content


def find_file(path: str | Path) -> Path:
    """``path`` if it is there, else the file of that name that ships with charmlib (``params/charm.yaml`` anywhere)."""
    path = Path(path)
    parts = path.parts[path.parts.index("params") + 1:] if "params" in path.parts else path.parts
    package = Path(__file__).parent
    for folder in () if path.is_file() else (package.parent / "params", package / "shipped" / "params"):
        if folder.joinpath(*parts).is_file():
            return folder.joinpath(*parts)
    return path


def load_params(path: str | Path, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A parameter file, checked: only what it sets, coerced. A ``base`` beside it (and that one's) is laid below.

    Raises
    ------
    ParameterError
        As :func:`read_yaml` and :func:`coerce`; files that are each other's base.
    """
    path = find_file(path)
    content = read_yaml(path)
    base = content.pop("base", None)
    own = {name: coerce(name, value, str(path)) for name, value in content.items()}
    if base is None:
        return own
    if not isinstance(base, str):
        raise ParameterError(f"{path}: base is {base!r}, wanted the name of a file beside it.")
    chain = (*above, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ParameterError(f"{path}: its base {base} is based on this file itself.")
    return {**load_params(path.parent / base, above=chain), **own}


def parse_assignments(pairs, source: str = "-p") -> dict[str, Any]:
    """``['k=3', 'weights=none']`` as checked parameters.

    Raises
    ------
    ParameterError
        A pair without ``=``, or as :func:`coerce`.
    """
    out = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise ParameterError(f"{source} {pair!r}: wanted name=value.")
        out[name.strip()] = coerce(name.strip(), value.strip(), source)
    return out


def cell_source(names=None) -> str:
    """The text of a notebook's ``parameters`` cell: flat, typed, grouped, each line with its reason."""
    names = list(PARAMS) if names is None else list(names)
    lines, group = [], None
    for name in names:
        p = PARAMS[name]
        if p.group != group:
            lines.append(("" if group is None else "\n") + f"# {p.group}")
            group = p.group
        allowed = f" [{', '.join(p.choices)}{f', {p.also}' if p.also else ''}]" if p.choices else ""
        lines.append(f"{name}: {p.type.__name__} = {p.default!r}  # {p.reason}{allowed}")
    return "\n".join(lines)
