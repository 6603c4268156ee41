"""The table of parameters (:mod:`charmlib.param_rows`), and what checks values against it.

All sources of parameters (:mod:`charmlib.param_sources`) go through :func:`resolve`. It coerces values to the declared type
and refuses unknown names, naming the nearest valid one. Nothing here imports torch.
"""

import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from charmlib.param_rows import ABOVE_0, ROWS, Param


class ParameterError(ValueError):
    """A parameter, axis or YAML key that cannot be used; the message names it and the remedy. A long message is cut."""

    def __init__(self, message: str):
        super().__init__(message if len(message) <= 2000 else f"{message[:1000]} ... {message[-500:]}")


PARAMS: dict[str, Param] = {p.name: p for p in ROWS}
DEFAULTS: dict[str, Any] = {name: p.default for name, p in PARAMS.items()}
READING = ("classes", "csv", "normal_class", "blank", "uncertain", "patients")  # they say how a table is read
UNHASHED = tuple(name for name, p in PARAMS.items() if not p.hashed)  # they say where and how a run happens
# The torchvision backbones; any other is named timm:NAME.
ARCHS = ("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l", "efficientnet_b0", "efficientnet_b1", "mobilenet_v2",
         "resnet18", "resnet50", "densenet121", "vgg16", "vgg16_bn")


def add_rows(rows: Iterable[Param]) -> None:
    """Add the parameters of a system (:mod:`charmlib.systems`); ParameterError if the table has one of that name already."""
    for p in rows:
        if p.name in PARAMS and PARAMS[p.name] != p:
            raise ParameterError(f"parameter '{p.name}' is declared twice; give the one of {', '.join(p.of)} another name")
        PARAMS[p.name], DEFAULTS[p.name] = p, p.default


def nearest(name: str, valid) -> str:
    """`` Did you mean 'x'?`` for the closest of ``valid``, or an empty text."""
    close = difflib.get_close_matches(str(name), [str(v) for v in valid], n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def coerce(name: str, value: Any, source: str = "") -> Any:
    """``value`` as the declared type of ``name``.

    YAML reads ``2e-5`` as text and ``off`` as False, the command line hands over text only; both come out right
    where the meaning is plain and are refused where it is not (a bool for a number, 2.5 for an int). Raises ParameterError for
    an unknown name, a wrong type, and a value outside the allowed ones.
    """
    where = f"'{name}' ({source})" if source else f"'{name}'"
    if name not in PARAMS:
        raise ParameterError(f"unknown parameter {where}.{nearest(name, PARAMS)} `python -m charmlib params` lists them all.")
    p = PARAMS[name]
    try:
        return (_flag if p.type is bool else _text if p.type is str else _number)(p, value)
    except ValueError as error:
        raise ParameterError(f"parameter {where}: {error}") from None


def _flag(p: Param, value) -> bool:
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    found = words.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(found, bool):
        raise ValueError(f"{value!r} is not true or false.")
    return found


def _number(p: Param, value) -> int | float:
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is true or false, wanted {p.type.__name__}.")
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a number, wanted {p.type.__name__}.") from None
    if not math.isfinite(number):
        raise ValueError(f"{value!r} is not finite.")
    if p.type is int and not number.is_integer():
        raise ValueError(f"{value!r} is not a whole number.")
    if not p.low <= number <= p.high:
        raise ValueError(f"{p.type(number)!r} is outside {p.low:g} to {p.high:g}.")
    if p.choices and number not in p.choices:
        raise ValueError(f"{p.type(number)!r} is none of {', '.join(map(str, p.choices))}.")
    return p.type(number)


def _text(p: Param, value) -> str:
    if value is None or (value is False and "none" in p.choices):
        value = "none" if "none" in p.choices else ""
    if value == "" and p.default:
        words = f", or say {', '.join(p.choices)}" if p.choices else ""
        raise ValueError(f"is empty; leave it out for {p.default!r}{words}.")
    if str(value) not in p.choices and not isinstance(value, str | Path):
        raise ValueError(f"{value!r} is not text (put it in quotes).")
    value = str(Path(value).expanduser()) if str(value).startswith("~") else str(value)
    free = p.also and (any(c in value for c in "/\\.") or Path(value).exists())  # a path in place of a named choice
    if p.choices and value not in p.choices and not free:
        raise ValueError(f"{value!r} is none of {', '.join(p.choices)}{f', or {p.also}' if p.also else ''}."
                         f"{nearest(value, p.choices)}")
    return value


def resolve(*layers: Mapping[str, Any], sources: tuple[str, ...] = ()) -> dict[str, Any]:
    """All parameters: the defaults with each of ``layers`` laid over them in turn, coerced and checked together.

    Raises ParameterError as :func:`coerce`, and for values that contradict each other.
    """
    out = dict(DEFAULTS)
    for i, layer in enumerate(layers):
        source = sources[i] if i < len(sources) else ""
        for name, value in layer.items():
            out[name] = coerce(name, value, source)
    charmlib.systems.find(out["system"])
    contradictions = {
        f"parameter 'k': {out['k']} is more than bank_size {out['bank_size']}; lower k.":
            out["use_bank"] and out["k"] > out["bank_size"],
        "parameter 'average': the momentum encoder is a mean of the weights already; say use_momentum: false, momentum_form: "
        "branch, or average: 0.": out["average"] and out["use_momentum"] and out["momentum_form"] == "weights"
            and out["system"] == "charm",
        f"parameter 'arch': {out['arch']!r} is none of {', '.join(ARCHS)}, nor timm:NAME.{nearest(out['arch'], ARCHS)}":
            out["arch"] not in ARCHS and not out["arch"].startswith("timm:"),
        f"parameter 'drop_path': {out['drop_path']:g} is for timm models, not for torchvision's {out['arch']}; say "
        "drop_path: 0, or arch: timm:NAME.": out["drop_path"] and not out["arch"].startswith("timm:"),
        "parameter 'head': csra reads a map, and the momentum branch, attention scales and answer features add to a pooled "
        "feature; say momentum_form: weights, use_attention: false and answer: votes, or head: charm.":
            out["head"] == "csra" and ((out["use_momentum"] and out["momentum_form"] == "branch")
                                       or (out["use_attention"] and out["attention"] == "scales")
                                       or (out["use_bank"] and out["answer"] == "features")),
        f"parameter 'norm': auto cannot know what {out['weights']} was trained on; say norm: imagenet, norm: half for "
        "inputs in [-1, 1], or norm: xrv for torchxrayvision's.":
            out["norm"] == "auto" and out["weights"] not in ("imagenet", "none"),
        "parameters 'stage2_frozen' and 'one_group' contradict each other: one_group freezes nothing; switch one off.":
            out["stage2_frozen"] and out["one_group"] and out["stage2_epochs"] > 0,
        "parameter 'schedule': plateau looks at the validation part, and valid_fraction 0 leaves none; say schedule: steps.":
            out["valid_fraction"] == 0 and out["schedule"] == "plateau",
        f"parameter 'input_size': {out['input_size']} is more than the {out['crop'] or out['image_size']} pixels of the image; "
        "lower it, or raise image_size or crop.": out["input_size"] > (out["crop"] or out["image_size"]),
        f"parameter 'crop': {out['crop']} is more than image_size {out['image_size']}; lower it.":
            out["crop"] > out["image_size"],
        "parameter 'heat_stride': heat cam reads a map that the last layer reads; say heat_stride: 32, or neck: laterals.":
            out["heat"] == "cam" and out["heat_stride"] != 32 and out["neck"] == "none",
        "parameters 'grad_checkpointing' and 'compile' cannot be used together; switch one off.":
            out["grad_checkpointing"] and out["compile"],
        "parameter 'rule': 'angle' has no running mean of norms; with strategy statistical say rare or published.":
            out["use_bank"] and out["answer"] == "features" and (out["strategy"], out["rule"]) == ("statistical", "angle"),
        f"parameter 'retrieval': published stores a batch before its logits are known, which strategy {out['strategy']} needs; "
        "say cosine.": out["use_bank"] and out["answer"] == "features" and out["retrieval"] == "published"
            and out["strategy"] in ("entropy", "hard"),
        f"parameter 'never_test': split {out['split']!r} has a test part of its own; say split: fold:I/N.":
            out["never_test"] and not out["split"].startswith("fold:"),
        f"parameter 'patience': {out['patience']} looks at the validation part, and valid_fraction 0 leaves none; "
        "say patience: 0.":
            out["valid_fraction"] == 0 and out["patience"],
        f"parameter 'patience': {out['patience']} looks at the validation part, and monitor last does not; say patience: 0.":
            out["monitor"] == "last" and out["patience"],
        f"parameter 'weight_from': monitor {out['monitor']} might keep an epoch from before the weights, at "
        f"{out['weight_from']:g}; say monitor: last and patience: 0.":
            out["class_weight"] != "none" and 0 < out["weight_from"] < 1 and out["monitor"] != "last" and out["valid_fraction"],
        "parameter 'schedule': plateau looks at the validation part, and monitor last does not; say schedule: steps.":
            out["monitor"] == "last" and out["schedule"] == "plateau",
        f"parameter 'vote_weight': {out['vote_weight']:g} is neither -1 (chosen on the validation part) nor in 0 to 1.":
            -1 < out["vote_weight"] < 0,
        "parameter 'classes': 'own' needs 'csv', the table that holds your labels.": out["classes"] == "own" and not out["csv"]}
    if found := [words for words, wrong in contradictions.items() if wrong]:
        raise ParameterError(found[0])
    return out


def mean_of(params: Mapping[str, Any]) -> tuple[float, bool]:
    """The running mean of the weights that is scored: its decay, 0 for none, and whether it has a warm-up."""
    if params["system"] == "charm" and params["use_momentum"] and params["momentum_form"] == "weights":
        return params["momentum"], False
    return params["average"], params["average_warmup"]


def changes(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Names of the hashed parameters whose values differ."""
    return [name for name in ours if name not in UNHASHED and ours[name] != theirs.get(name)]


def missing_need(name: str, params: Mapping[str, Any]) -> str:
    """What would give a parameter an effect, such as ``'answer: features'``; empty if it has one."""
    p = PARAMS[name]
    if params["system"] in p.not_of:
        return f"another system than {params['system']}"
    if p.of and params["system"] not in p.of:
        return f"system: {' or '.join(p.of)}"
    for others, values in p.needs.items():
        names = others.split("|")
        deeper = [missing_need(other, params) for other in names]
        if all(deeper):
            if all(params["system"] in PARAMS[n].not_of for n in names):
                continue  # what a system does without asks for nothing
            return deeper[0]
        if not any(params[n] > 0 if values == ABOVE_0 else params[n] in values for n, off in zip(names, deeper) if not off):
            return need_text("|".join(n for n, off in zip(names, deeper) if not off), values)
    return ""


def need_text(others: str, values) -> str:
    """A condition of :class:`Param` in words: ``'answer: votes or features'``."""
    wanted = values if values == ABOVE_0 else " or ".join(str(v).lower() if isinstance(v, bool) else str(v) for v in values)
    return f"{others.replace('|', ' or ')}: {wanted}"


def effective(params: Mapping[str, Any], steps: int | None = None) -> dict[str, Any]:
    """The hashed parameters as they act: None without effect, else the value that each amounts to after so many steps.

    Two sets of parameters that agree here give the same run.
    """
    return {name: None if missing_need(name, params) else PARAMS[name].effective(value, params, steps)
            if PARAMS[name].effective else value for name, value in params.items() if name in PARAMS and PARAMS[name].hashed}


def no_effect(needs: Mapping[str, str]) -> str:
    """One line on the parameters without effect among ``needs`` (name -> its :func:`missing_need`); empty if all have one."""
    named = {need: ", ".join(name for name in needs if needs[name] == need) for need in needs.values() if need}
    return f"without effect: {'; '.join(f'{names} (needs {need})' for need, names in named.items())}" if named else ""


import charmlib.systems  # noqa: E402  (adds the rows of systems, and so needs the table)
