"""What ``model.json`` and ``metrics.json`` must hold, checked before it is used."""

import math
from collections.abc import Mapping

from charmlib.params import PARAMS, resolve
from charmlib.systems import SYSTEMS

_KINDS = {"text": str, "flag": bool, "count": int, "number": (int, float), "list": list, "mapping": dict}
_FIGURES = "mean_auc:number? mean_ap:number? auc:mapping ap:mapping undefined:list normal_class:text intervals.mean_auc:list " \
           "intervals.mean_ap:list intervals.auc:mapping intervals.ap:mapping micro_auc:number? micro_ap:number?"
METRICS = "cell:text hash:text? params.labels:text params.seed:count data.name:text data.drawn:flag split.name:text " \
          "split.hash:text split.test.images:count split.test.patients:count split.test.positive_share:number? classes:list " \
          "images.all:count train_prevalence:mapping valid:mapping? bank:mapping? test.groups:mapping test.operating:mapping " \
          "test.calibration:mapping seconds.train:number seconds.score:number seconds.overhead:number? device:text " \
          "precision:text versions.torch:text versions.charmlib:text quick_check:flag"
CARD = "format:count classes:list normal_class:text arch:text params.split_hash:text norm.mean:list norm.std:list " \
       "thresholds:mapping chosen_on:mapping temperature:number? vote_weight:number? stage1_lr:number? data.name:text " \
       "data.drawn:flag data.scale:list? sha256:text"
"""Keys, with dots between those inside one another, and the kinds of their values; ``?`` allows null."""


def refuse_misfits(content: Mapping, keys: str, above: str = "") -> None:
    """Raise ValueError, naming the first key that is missing or has a value of another kind."""
    for key, kind in (entry.split(":") for entry in keys.split()):
        value = content
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise ValueError(f"it has no {above}{key}")
            value = value[part]
        if not ((value is None and kind[-1] == "?") or _is(value, kind.rstrip("?"))):
            raise ValueError(f"{above}{key} is {value!r:.60}, wanted a {kind.rstrip('?')}")


def _is(value, kind: str) -> bool:
    return isinstance(value, _KINDS[kind]) and (kind == "flag" or not isinstance(value, bool)) and (
        kind != "number" or math.isfinite(value))


def check_metrics(metrics: Mapping) -> None:
    """Raise ValueError, naming the key, for a ``metrics.json`` without what its readers need."""
    refuse_misfits(metrics, METRICS)
    for part in ("valid", "test") if metrics["valid"] else ("test",):
        refuse_misfits(metrics[part], _FIGURES, f"{part}.")


def check_card(card: Mapping) -> None:
    """Raise ValueError for a ``model.json`` with a missing or unknown key, a value of another kind or range, repeated classes,
    or parameters that :func:`charmlib.params.resolve` refuses."""
    refuse_misfits(card, CARD)
    params, classes = {name: value for name, value in card["params"].items() if name != "split_hash"}, card["classes"]
    for name, p in PARAMS.items():
        wanted = name in params or (p.hashed and (not p.of or params.get("system") in p.of))
        if wanted and type(params.get(name)) is not p.type:
            raise ValueError(f"parameter {name!r} is {params.get(name)!r:.60}, wanted {p.type.__name__}")
    if params["system"] in SYSTEMS:  # another's parameters are not known here, and its network is refused when it is made
        resolve(params)
    rows, norm, scale = [*card["thresholds"].values()], card["norm"], card["data"]["scale"]
    for wrong, right in (
            ("it has unknown keys", card.keys() <= {entry.split(":")[0].split(".")[0] for entry in CARD.split()}),
            ("classes must be one or more names, each once", classes and all(c and _is(c, "text") for c in classes)
             and len({*classes}) == len(classes) and card["normal_class"] in ("", *classes)),
            ("thresholds must be numbers of its classes", all(_is(row, "mapping") and {*row} <= {*classes} and all(
                t is None or _is(t, "number") for t in row.values()) for row in (*rows, card["chosen_on"]))),
            ("norm must be three means and three positive deviations", all(len(v) == 3 and all(_is(x, "number") for x in v)
             for v in norm.values()) and min(norm["std"]) > 0),
            ("temperature must be above 0", card["temperature"] is None or card["temperature"] > 0),
            ("vote_weight must be in 0 to 1", card["vote_weight"] is None or 0 <= card["vote_weight"] <= 1),
            ("scale must be two numbers", scale is None or (len(scale) == 2 and all(_is(x, "number") for x in scale)))):
        if not right:
            raise ValueError(wrong)
