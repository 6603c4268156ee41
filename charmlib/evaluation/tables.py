"""Tables for reading, made from ``metrics.json``; what must stand beside every score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from charmlib.evaluation.runs import valid_auc

MEAN = "mean of classes"


def split_note(metrics: Mapping) -> str:
    """Data, split, images, patients and share of positives: what stands beside every score."""
    part = metrics["split"]["test"]
    shuffled = "SHUFFLED LABELS, a control: " if metrics["params"].get("labels") == "shuffled" else ""
    quick = "QUICK CHECK: " if metrics.get("quick_check") else ""
    who = "a member was " if "members" in metrics else ""
    apart = "" if metrics["valid"] else f"; {who}trained without a validation part"
    return (f"{shuffled}{quick}{metrics['data']['name']}, split '{metrics['split']['name']}' ({metrics['split']['hash'][:8]}): "
            f"{part['images']:,} test images of {part['patients']:,} patients, "
            f"{part['positive_share']:.1%} with a finding{apart}")


def origin_note(metrics: Mapping) -> str:
    """Seed, device, precision and versions of a run."""
    return (f"seed {metrics['params']['seed']}, {metrics['device']}, {metrics['precision']}, "
            f"torch {metrics['versions']['torch']}, charmlib {metrics['versions']['charmlib']}")


def class_table(part: Mapping, positives: Mapping[str, int] | None = None) -> pd.DataFrame:
    """AUC and average precision with their intervals: the means, then the classes from the best AUC down.

    Columns: class, positives, AUC, AUC low, AUC high, AP, AP low, AP high, undefined (the share of resamples that did not
    define the class's figures; in the first row the largest of those of the classes that the mean is over).
    """
    limits = part["intervals"]
    names = sorted(part["auc"], key=lambda name: -_number(part["auc"][name], -1))
    defined = [name for name in names if name not in part["undefined"]]
    mean = MEAN if len(defined) == len(names) else f"mean of {len(defined)} of {len(names)} classes"
    rows = [{"class": mean, "AUC": part["mean_auc"], "AP": part["mean_ap"], **_limits("AUC", limits["mean_auc"]),
             **_limits("AP", limits["mean_ap"]),
             "undefined": max((limits["auc"][name][2] for name in defined), default=float("nan"))}]
    rows += [{"class": group, "AUC": g["mean_auc"], "AP": g["mean_ap"], **_limits("AUC", g["mean_auc_interval"]),
              **_limits("AP", g["mean_ap_interval"])}
             for group, g in (("mean of " + k, v) for k, v in part.get("groups", {}).items())]
    if "micro_auc" in part:
        rows.append({"class": "all pairs (micro)", "AUC": part["micro_auc"], "AP": part["micro_ap"]})
    rows += [{"class": name, "AUC": part["auc"][name], "AP": part["ap"][name], **_limits("AUC", limits["auc"][name]),
              **_limits("AP", limits["ap"][name]), "undefined": limits["auc"][name][2]} for name in names]
    table = pd.DataFrame(rows)
    if positives is not None:
        table["positives"] = table["class"].map(positives).astype("Int64")
    columns = ["class", "positives", "AUC", "AUC low", "AUC high", "AP", "AP low", "AP high", "undefined"]
    return table[[c for c in columns if c in table]].astype({c: float for c in columns[2:]})


def operating_table(part: Mapping, point: str) -> pd.DataFrame:
    """Counts and figures at an operating point, with intervals: class, threshold, TP, FP, FN, TN, sensitivity, low, high ...,
    and the share of resamples without positives, which do not define a sensitivity. Without rows for a run that has no such
    operating point."""
    if point not in part["operating"]:
        return pd.DataFrame(columns=["class"])
    rows = []
    for name, row in part["operating"][point].items():
        rows.append({"class": name, "threshold": row["threshold"], **{k.upper(): row[k] for k in ("tp", "fp", "fn", "tn")}})
        for figure in ("sensitivity", "specificity", "F1"):
            rows[-1] |= {figure: row[figure.lower()], **_limits(figure, row[f"{figure.lower()}_interval"])}
        rows[-1]["undefined"] = row["sensitivity_interval"][2]
    table = pd.DataFrame(rows)
    numbers = [c for c in table if c not in ("class", "TP", "FP", "FN", "TN")]
    return table.astype({c: float for c in numbers})


def point_note(part: Mapping, point: str) -> str:
    """Where an operating point comes from, and the classes that have none; or that there was nothing to choose it on."""
    if point not in part["operating"]:
        return "no operating point: trained without a validation part to choose it on"
    missing = [name for name in part["auc"] if name not in part["operating"][point]]
    return f"operating point '{point}', chosen on validation" + (
        f" (none for {', '.join(missing)}: no positives or no negatives there)" if missing else "")


def groups_note(part: Mapping) -> str:
    """Which classes the frequency groups hold, and their borders."""
    return "By prevalence in the training part: " + "; ".join(
        f"{name} ({border}): {', '.join(part['groups'][name]['classes'])}"
        for name, border in (("head", "above 5 %"), ("medium", "2 to 5 %"), ("tail", "below 2 %")) if name in part["groups"])


def calibration_table(part: Mapping) -> pd.DataFrame:
    """Mean ECE and Brier score as trained and, where there was a validation part, with its temperature."""
    return pd.DataFrame([{"probabilities": name.replace("_", " "), "temperature": c["temperature"], "mean ECE": c["mean_ece"],
                          "mean Brier score": c["mean_brier"]} for name, c in part["calibration"].items()])


def run_table(runs: Sequence[Mapping]) -> pd.DataFrame:
    """One row a run: validation and test mean AUC with its interval, mean AP, and what must stand beside them."""
    rows = []
    for m in runs:
        part = m["split"]["test"]
        rows.append({"run": m["cell"], "valid AUC": valid_auc(m), "test AUC": m["test"]["mean_auc"],
                     **_limits("test AUC", m["test"]["intervals"]["mean_auc"]), "test AP": m["test"]["mean_ap"],
                     "split": f"{m['split']['name']} {m['split']['hash'][:8]}", "images": part["images"],
                     "patients": part["patients"], "positive share": part["positive_share"], "seed": m["params"]["seed"]})
    return pd.DataFrame(rows)


def with_origin(table: pd.DataFrame, metrics: Mapping) -> pd.DataFrame:
    """A table for a file of its own: with split, images, patients and share of positives in every row."""
    part = metrics["split"]["test"]
    return table.assign(split=f"{metrics['split']['name']} {metrics['split']['hash'][:8]}", data=metrics["data"]["name"],
                        images=part["images"], patients=part["patients"], positive_share=part["positive_share"])


def with_intervals(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """For display: 'x low' and 'x high' folded into x as ``0.812 (0.790 to 0.833)``; blank where undefined."""
    out = table.copy()
    for column in [c for c in table if f"{c} low" in table]:
        low, high = table[f"{column} low"], table[f"{column} high"]
        out[column] = [_text(v, a, b, digits) for v, a, b in zip(table[column], low, high)]
        out = out.drop(columns=[f"{column} low", f"{column} high"])
    for column in out.columns:
        if pd.api.types.is_float_dtype(out[column]):
            share = column in ("undefined", "agree", "positive share", "positive_share", "prevalence", "share")
            out[column] = [("" if pd.isna(v) else f"{v:.1%}" if share else f"{v:.{digits}f}") for v in out[column]]
        elif pd.api.types.is_integer_dtype(out[column]):
            out[column] = ["" if pd.isna(v) else f"{v:,}" for v in out[column]]
    return out


def _limits(name: str, limits) -> dict:
    return {f"{name} low": limits[0], f"{name} high": limits[1]}


def _number(value, otherwise: float) -> float:
    return otherwise if value is None or value != value else value


def _text(value, low, high, digits: int) -> str:
    if pd.isna(value):
        return "undefined"
    return f"{value:.{digits}f}" + ("" if pd.isna(low) else f" ({low:.{digits}f} to {high:.{digits}f})")
