"""Published results, shown only beside runs on the same kind of split."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from charmlib.nih import EACH_ITS_OWN, finding_columns

OFFICIAL_IMAGES = 25596
_FOLDER = Path(__file__).parent


def published_results() -> pd.DataFrame:
    """system, split, metric, value and source of the results that ship with charmlib.

    Images or patients of the test part of a split 'random, leaking' were trained or chosen on: it stands beside no run.
    """
    return pd.read_csv(_FOLDER / "published_results.csv")


def published_charm_grid() -> pd.DataFrame:
    """momentum, k, threshold and auc of the 26 published cells: on a 12.5 % sample of the test part, of whose images with a
    finding stage 1 was trained on 78 %."""
    return pd.read_csv(_FOLDER / "published_charm_grid.csv")


def published_per_class() -> pd.DataFrame:
    """system, split, source, and one column of ROC-AUC for each of the 14 findings (blank if unpublished)."""
    return pd.read_csv(_FOLDER / "published_per_class.csv")


def _kind(metrics: Mapping) -> tuple[str | None, str]:
    """The kind of published split that a run is comparable with and a remark on it, or None and the reason."""
    name, images = metrics["split"]["name"], metrics["split"]["test"]["images"]
    findings = len(finding_columns(metrics["classes"], metrics["normal_class"]))
    reasons = (
        (metrics["data"]["drawn"], "Drawn phantoms: no published figure belongs beside them."),
        (metrics["params"]["labels"] == "shuffled", "Shuffled labels, a control: no published figure belongs beside it."),
        (metrics["quick_check"], "A quick check on part of the data: no published figure belongs beside it."),
        (findings != 14, f"{findings} findings: the published means are over the 14 findings."),
        (metrics["split"]["patients_from"] == EACH_ITS_OWN, "The patients are unknown, so the split is another."),
        (name.startswith("fold:"), f"Split '{name}' is a part of a cross-validation: no published figure belongs beside it."),
        (name not in ("official", "patient"), f"Split '{name}' is your own: no published figure belongs beside it."))
    if reason := next((reason for incomparable, reason in reasons if incomparable), ""):
        return None, reason
    if name == "patient":
        return "random patient", ("Random splits by patient: each is another draw of patients, so differences of about 0.01 "
                                  "say nothing, and none may be compared with official-split figures.")
    return "official", "All on the official lists." + ("" if images == OFFICIAL_IMAGES else (
        f" The published figures are on all {OFFICIAL_IMAGES:,} test images; this run's {images:,} are "
        "a part of them, so the comparison is rough."))


def per_class_beside(metrics: Mapping) -> tuple[pd.DataFrame | None, str]:
    """Published results by class on the same kind of split, one row per system, and a remark to show with them."""
    kind, remark = _kind(metrics)
    table = published_per_class()
    return (table[table["split"] == kind].set_index("system").drop(columns=["split", "source"]) if kind else None), remark


def beside_published(metrics: Mapping) -> tuple[pd.DataFrame | None, str]:
    """A table of published mean AUCs with this run among them, best first, and a remark to show with it.

    Runs on the official split are compared with official results, runs on ``patient`` with random-patient results, which
    are on another draw of patients. For your own lists and drawn data there is no published counterpart, and no table.
    """
    kind, remark = _kind(metrics)
    if kind is None:
        return None, remark
    name, part = metrics["split"]["name"], metrics["split"]["test"]
    table = published_results()
    table = table[(table["metric"] == "mean AUC") & table["split"].str.contains(kind)][["system", "split", "value", "source"]]
    if name == "patient":
        table["split"] += ", another draw"
    ours = pd.DataFrame([{"system": f"THIS RUN: {metrics['cell']}", "split": name, "value": metrics["test"]["mean_auc"],
                          "source": f"{part['images']:,} images of {part['patients']:,} patients"}])
    table = pd.concat([table, ours], ignore_index=True).sort_values("value", ascending=False, ignore_index=True)
    return table.rename(columns={"value": "mean AUC"}), remark
