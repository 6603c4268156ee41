"""Scores by view, sex and age group: mean AUC over the findings, with intervals over patients."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd

from charmlib.evaluation.few import mean_interval, patients_with, widened_by_class
from charmlib.evaluation.intervals import bootstrap, mean_of_defined
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.tables import limits_of

FEW = 50
"""Patients in a group, below which it is marked as small."""
AGES = (18, 40, 60, 80)
"""Limits of the age groups in years."""


def groups_of(predictions: Predictions) -> Iterator[tuple[str, np.ndarray]]:
    """Name and mask (n,) of each group. A column that is unknown for all images, or has one value, gives none."""
    for column, values in predictions.about.items():
        names = np.array([_name(column, value) for value in values.tolist()], dtype=object)
        counts = Counter(names[names != "unknown"].tolist())
        if len(counts) < 2:
            continue
        common = sorted(name for name, _ in counts.most_common(6))
        names[~np.isin(names, [*common, "unknown"])] = "other"
        for name in (*common, "other", "unknown"):
            if (names == name).any():
                yield f"{column} {name}", names == name


def group_table(predictions: Predictions, resamples: int = 300) -> pd.DataFrame:
    """One row a group: group, images, patients, positives (labels of findings), mean AUC with low and high, undefined, note.

    ``undefined`` names the findings without positives or negatives in the group, which its mean leaves out. So means over
    different findings are not comparable. ``note`` marks groups of fewer than :data:`FEW` patients.
    """
    columns, rows = predictions.findings, []
    findings = [predictions.classes[c] for c in columns]
    for name, mask in groups_of(predictions):
        part = predictions.take(mask)
        labels, logits, patients = part.labels[:, columns], part.logits[:, columns], len(np.unique(part.patients))
        auc = auc_by_class(labels, logits, findings)
        missing = [finding for finding, value in auc.items() if np.isnan(value)]
        drawn = np.full((1, len(auc)), np.nan)
        if patients > 1:
            drawn = bootstrap(labels, logits, part.patients, resamples=resamples).auc
        limits = widened_by_class(drawn, "auc", auc, patients_with(labels, part.patients, findings))
        rows.append({"group": name, "images": len(part.ids), "patients": patients, "positives": int((labels == 1).sum()),
                     "mean AUC": mean_of_defined(np.array([list(auc.values())]))[0],
                     **limits_of("mean AUC", mean_interval(drawn, list(auc.values()), list(limits.values()))),
                     "undefined in it": f"{len(missing)} of {len(findings)}: {', '.join(missing)}" if missing else "",
                     "note": f"small: fewer than {FEW} patients" if patients < FEW else ""})
    return pd.DataFrame(rows)


def column_scores(train_values: Sequence, train_labels, values: Sequence) -> np.ndarray:
    """Scores (n, n_classes) from one column alone, such as the view position: each value scores the share of positives that it
    has in the training part. A value without known labels there scores the class's prevalence."""
    labels = pd.DataFrame(np.asarray(train_labels, dtype=np.float64))
    shares = labels.groupby(np.asarray(train_values, dtype=str)).mean()
    return shares.reindex(np.asarray(values, dtype=str)).fillna(labels.mean()).to_numpy()


def _name(column: str, value) -> str:
    if column == "age":
        low = max((age for age in (0, *AGES) if age <= value), default=None)  # NaN is in no group
        return "unknown" if low is None else next((f"{low} to {age - 1}" for age in AGES if age > low), f"{low} and older")
    text = " ".join(str(value).upper().split())
    return {"F": "female", "W": "female", "M": "male"}.get(text[:1], "unknown") if column == "sex" else text or "unknown"
