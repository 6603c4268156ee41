"""Tables for reading, made from ``metrics.json``, and the notes on data and origin that belong to every score."""

from collections.abc import Mapping, Sequence

import pandas as pd

from charmlib.evaluation.runs import valid_auc
from charmlib.nih import EACH_ITS_OWN, people

MEAN = "mean of classes"
FEW = 10
"""Positives of the validation part, below which a threshold that was chosen on them is marked."""
SHARES = ("undefined", "agree", "positive share", "positive_share", "prevalence", "share")
"""Columns that are shown in percent."""


def split_note(metrics: Mapping, of: str = "test") -> str:
    """Data, split, images, patients and share of positives of a part: the note on every score and picture."""
    part = metrics["split"][of]
    shuffled = "SHUFFLED LABELS, a control: " if metrics["params"]["labels"] == "shuffled" else ""
    quick = "QUICK CHECK: " if metrics["quick_check"] else ""
    who = "a member was " if "members" in metrics else ""
    apart = "" if metrics["valid"] else f"; {who}trained without a validation part"
    return (f"{shuffled}{quick}{metrics['data']['name']}, split '{metrics['split']['name']}' ({metrics['split']['hash'][:8]}): "
            f"{part['images']:,} {of} images of {people(part['patients'], metrics['split']['patients_from'])}, "
            f"{part['positive_share']:.1%} with a finding{apart}{_seen_note(metrics)}{_leak_note(metrics['split'])}")


def _seen_note(metrics: Mapping) -> str:
    seen = metrics.get("seen")  # of scores on another data set
    return f"; WARNING: {seen:,} have names of images that the run was trained or validated on" if seen else ""


def _leak_note(split: Mapping) -> str:
    return "; LEAK: the start weights have seen images of this data set" if split.get("leak") else ""


def origin_note(metrics: Mapping) -> str:
    """Seed, device, precision and versions of a run."""
    return (f"seed {metrics['params']['seed']}, {metrics['device']}, {metrics['precision']}, "
            f"torch {metrics['versions']['torch']}, charmlib {metrics['versions']['charmlib']}")


def class_table(part: Mapping, positives: Mapping[str, int] | None = None) -> pd.DataFrame:
    """AUC and average precision with their intervals: the means, then the classes in the data's order.

    Columns: class, positives, AUC, AUC low, AUC high, AP, AP low, AP high, undefined. The last is the share of resamples
    that do not define the class's metrics; in the first row, the largest of these shares among the classes in the mean.
    """
    table = pd.DataFrame(class_rows(part))
    if positives is not None:
        table.insert(1, "positives", table["class"].map(positives).astype("Int64"))
    return table.astype({c: float for c in table if c not in ("class", "positives")})


def class_rows(part: Mapping) -> list[dict]:
    """The rows of :func:`class_table` without positives."""
    limits, names = part["intervals"], list(part["auc"])
    findings = [name for name in names if name != part["normal_class"]]
    defined = [name for name in findings if name not in part["undefined"]]

    def row(name: str, auc, ap, auc_interval=(None, None), ap_interval=(None, None), **more) -> dict:
        return {"class": name, "AUC": auc, **limits_of("AUC", auc_interval), "AP": ap, **limits_of("AP", ap_interval), **more}

    rows = [row(mean_name(len(defined), len(findings), part["normal_class"]), part["mean_auc"],
                part["mean_ap"], limits["mean_auc"], limits["mean_ap"],
                undefined=max((limits["auc"][name][2] for name in defined), default=float("nan")))]
    rows += [row(f"mean of {group}", g["mean_auc"], g["mean_ap"], g["mean_auc_interval"], g["mean_ap_interval"])
             for group, g in part["groups"].items()]
    rows.append(row("all pairs (micro)", part["micro_auc"], part["micro_ap"]))
    return rows + [row(name, part["auc"][name], part["ap"][name], limits["auc"][name], limits["ap"][name],
                       undefined=limits["auc"][name][2]) for name in names]


def mean_name(defined: int, findings: int, normal_class: str) -> str:
    """What a mean is over, in words: all classes, some of them, or the findings without the class that means "no finding"."""
    if normal_class:
        return f"mean of {f'{defined} of {findings}' if defined < findings else findings} findings (without {normal_class})"
    return MEAN if defined == findings else f"mean of {defined} of {findings} classes"


def means_note(metrics: Mapping) -> str:
    """A line that names the class which no mean counts; empty if all classes are findings."""
    normal = metrics["test"]["normal_class"]
    return f"\nThe means are over the findings, without {normal}." if normal else ""


def operating_table(part: Mapping, point: str) -> pd.DataFrame:
    """Counts and rates at an operating point, with intervals: class, threshold, TP, FP, FN, TN, sensitivity, low, high ...

    Last come the share of resamples without positives, which do not define a sensitivity, and a ``note`` on thresholds that
    were chosen on fewer than :data:`FEW` positives. There are no rows for a run without this operating point.
    """
    rows: list[dict] = []
    for name, row in part["operating"].get(point, {}).items():
        rows.append({"class": name, "threshold": row["threshold"], **{k.upper(): row[k] for k in ("tp", "fp", "fn", "tn")}})
        for rate in ("sensitivity", "specificity", "F1"):
            rows[-1] |= {rate: row[rate.lower()], **limits_of(rate, row[f"{rate.lower()}_interval"])}
        rows[-1] |= {"undefined": row["sensitivity_interval"][2],
                     "note": f"chosen on {row['chosen_on']} positives" if _few(row) else ""}
    table = pd.DataFrame(rows, columns=None if rows else ["class"])
    return table.astype({c: float for c in table if c not in ("class", "TP", "FP", "FN", "TN", "note")})


def _few(row: Mapping) -> bool:
    return row.get("chosen_on") is not None and row["chosen_on"] < FEW


def point_note(part: Mapping, point: str) -> str:
    """The origin of an operating point and the classes without one, or the reason why the run has none."""
    if point not in part["operating"]:
        return "no operating point: trained without a validation part to choose it on"
    rows = part["operating"][point]
    missing, few = [name for name in part["auc"] if name not in rows], [name for name in rows if _few(rows[name])]
    return f"operating point '{point}', chosen on validation" + (
        f" (none for {', '.join(missing)}: no positives or no negatives there)" if missing else "") + (
        f"; on fewer than {FEW} positives, so by chance, for {', '.join(few)}" if few else "")


def groups_note(part: Mapping) -> str:
    """The classes in each frequency group, and its limits."""
    return "By prevalence in the training part: " + "; ".join(
        f"{name} ({border}): {', '.join(part['groups'][name]['classes'])}"
        for name, border in (("head", "above 5 %"), ("medium", "2 to 5 %"), ("tail", "below 2 %")) if name in part["groups"])


def calibration_table(part: Mapping) -> pd.DataFrame:
    """Mean ECE and Brier score as trained and, for a run with a validation part, at its temperature."""
    return pd.DataFrame([{"probabilities": name.replace("_", " "), "temperature": c["temperature"], "mean ECE": c["mean_ece"],
                          "mean Brier score": c["mean_brier"]} for name, c in part["calibration"].items()])


def run_table(runs: Sequence[Mapping]) -> pd.DataFrame:
    """One row per run: validation and test mean AUC with its interval, mean AP, split, images, patients and seed."""
    return pd.DataFrame([{
        "run": m["cell"], "valid AUC": valid_auc(m), "test AUC": m["test"]["mean_auc"],
        **limits_of("test AUC", m["test"]["intervals"]["mean_auc"]), "test AP": m["test"]["mean_ap"],
        "split": split_label(m["split"]), "images": m["split"]["test"]["images"], "patients": m["split"]["test"]["patients"],
        "positive share": m["split"]["test"]["positive_share"], "seed": m["params"]["seed"]} for m in runs])


def with_origin(table: pd.DataFrame, metrics: Mapping) -> pd.DataFrame:
    """A table for a file of its own: with split, images, patients and share of positives in every row."""
    part = metrics["split"]["test"]
    return table.assign(split=split_label(metrics["split"]), data=metrics["data"]["name"], images=part["images"],
                        patients=part["patients"], positive_share=part["positive_share"])


def with_intervals(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """For display: 'x low' and 'x high' joined with x as ``0.812 (0.790 to 0.833)``; blank if undefined."""
    out = table.copy()
    for column in [c for c in table if f"{c} low" in table]:
        limits = [f"{column} low", f"{column} high"]
        out[column] = ["undefined" if pd.isna(v) else f"{v:.{digits}f}" if pd.isna(low) else
                       f"{v:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
                       for v, low, high in table[[column, *limits]].itertuples(index=False)]
        out = out.drop(columns=limits)
    for column in out.select_dtypes("number"):
        form = ",d" if pd.api.types.is_integer_dtype(out[column]) else ".1%" if column in SHARES else f".{digits}f"
        out[column] = ["" if pd.isna(v) else f"{v:{form}}" for v in out[column]]
    return out


def limits_of(name: str, interval: Sequence[float | None]) -> dict[str, float | None]:
    """The limits of an interval as the columns 'NAME low' and 'NAME high' that :func:`with_intervals` reads."""
    return {f"{name} low": interval[0], f"{name} high": interval[1]}


def clusters(split: Mapping) -> str:
    """What a bootstrap draws: patients, or images where the patients are unknown."""
    return "images, since the patients are unknown" if split["patients_from"] == EACH_ITS_OWN else "patients"


def split_label(split: Mapping) -> str:
    """Name and hash of ``metrics['split']`` for the cell of a table; says so where patients are unknown."""
    unknown = " (patients unknown)" if split["patients_from"] == EACH_ITS_OWN else ""
    return f"{split['name']} {split['hash'][:8]}{unknown}{_leak_note(split)}"
