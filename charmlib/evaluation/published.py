"""Published figures, put only beside runs on the same kind of split."""

from __future__ import annotations

from importlib.resources import files

import pandas as pd

OFFICIAL_IMAGES = 25596


def published_results() -> pd.DataFrame:
    """system, split, metric, value, source of the figures that ship with charmlib."""
    with (files("charmlib.evaluation") / "published_results.csv").open() as file:
        return pd.read_csv(file)


def published_charm_grid() -> pd.DataFrame:
    """momentum, k, threshold, auc of the 26 published cells (scored on a 12.5 % sample of a random-patient split)."""
    with (files("charmlib.evaluation") / "published_charm_grid.csv").open() as file:
        return pd.read_csv(file)


def published_per_class() -> pd.DataFrame:
    """system, split, source, and one column of ROC-AUC for each of the 14 findings (blank where not given)."""
    with (files("charmlib.evaluation") / "published_per_class.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file)


def _kind(metrics: dict) -> tuple[str | None, str]:
    """Which published split a run may stand beside, or None and why not."""
    if metrics["data"]["drawn"]:
        return None, "Drawn phantoms: no published figure belongs beside them."
    if metrics["params"].get("labels") == "shuffled":
        return None, "Shuffled labels, a control: no published figure belongs beside it."
    if metrics.get("quick_check"):
        return None, "A quick check on part of the data: no published figure belongs beside it."
    if len(metrics["classes"]) != 14:
        return None, f"{len(metrics['classes'])} classes: the published means are over the 14 findings."
    name, part = metrics["split"]["name"], metrics["split"]["test"]
    if name == "official":
        remark = "All on the official lists."
        if part["images"] != OFFICIAL_IMAGES:
            remark += (f" The published figures are on all {OFFICIAL_IMAGES:,} test images; this run's {part['images']:,} are "
                       "a part of them, so the comparison is rough.")
        return "official", remark
    if name == "patient":
        return "random patient", ("Random splits by patient: each is another draw of patients, so differences of about 0.01 "
                                  "say nothing, and none may be compared with official-split figures.")
    if name.startswith("fold:"):
        return None, f"Split '{name}' is a part of a cross-validation: no published figure belongs beside it."
    return None, f"Split '{name}' is your own: no published figure belongs beside it."


def per_class_beside(metrics: dict) -> tuple[pd.DataFrame | None, str]:
    """Per-class figures of the same kind of split, a row a system, and the remark that must stand beside them."""
    kind, remark = _kind(metrics)
    if kind is None:
        return None, remark
    table = published_per_class()
    return table[table["split"] == kind].set_index("system").drop(columns=["split", "source"]), remark


def beside_published(metrics: dict) -> tuple[pd.DataFrame | None, str]:
    """A table of published figures with this run in it, and the remark that must stand beside it.

    Official beside official; ``patient`` beside random-patient figures, which are another draw of patients. Lists of
    your own and drawn data have no published counterpart: then the table is None.
    """
    wanted, remark = _kind(metrics)
    if wanted is None:
        return None, remark
    kind, part = metrics["split"]["name"], metrics["split"]["test"]
    table = published_results()
    table = table[(table["metric"] == "mean AUC") & table["split"].str.contains(wanted)]
    ours = pd.DataFrame([{"system": f"THIS RUN: {metrics['cell']}", "split": kind, "value": metrics["test"]["mean_auc"],
                          "source": f"{part['images']:,} images of {part['patients']:,} patients"}])
    out = pd.concat([table[["system", "split", "value", "source"]], ours], ignore_index=True)
    if kind == "patient":
        out.loc[:len(out) - 2, "split"] += ", another draw"
    out = out.sort_values("value", ascending=False, ignore_index=True).rename(columns={"value": "mean AUC"})
    return out, remark
