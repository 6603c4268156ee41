"""ROC-AUC and average precision by class and their means. Labels may be NaN; means name the classes that they leave out."""

import warnings
from collections.abc import Sequence

import numpy as np

from charmlib.evaluation.runs import number, refuse_labels
from charmlib.nih import finding_columns


class NotFinite(ValueError):
    """Scores that are no numbers, as of a training that diverged."""


def checked(labels, scores, classes) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Labels and scores (n_samples, n_classes) as arrays, and the names of their classes.

    Raises ValueError for other shapes and labels other than 0, 1 and NaN, and NotFinite.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 2 or labels.shape != scores.shape:
        raise ValueError(f"labels {labels.shape} and scores {scores.shape} must both be (n_samples, n_classes)")
    classes = [str(c) for c in classes] if classes is not None else [f"class {i}" for i in range(labels.shape[1])]
    if len(classes) != labels.shape[1]:
        raise ValueError(f"{len(classes)} class names for {labels.shape[1]} columns")
    if not np.isfinite(scores).all():
        raise NotFinite(f"{(~np.isfinite(scores)).any(1).sum()} samples have scores that are not finite")
    refuse_labels(labels, classes)
    return labels, scores, classes


def known(labels: np.ndarray, scores: np.ndarray, c: int, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Labels and scores of class ``c`` at the samples whose label is known; then those samples' rows, or the entries of
    ``others`` (n_samples,) at them."""
    there = ~np.isnan(labels[:, c]) if labels.dtype.kind == "f" else np.ones(len(labels), bool)
    return labels[there, c], scores[there, c], *(o[there] for o in others or (np.arange(len(labels)),))


def _by_class(metric, labels, scores, classes) -> dict[str, float]:
    labels, scores, classes = checked(labels, scores, classes)
    found = ((name, *known(labels, scores, c)) for c, name in enumerate(classes))
    return {name: float(metric(y, score)) if 0 < y.sum() < len(y) else float("nan") for name, y, score, _ in found}


def auc_by_class(labels, scores, classes: Sequence[str] | None = None) -> dict[str, float]:
    """ROC-AUC of each class by scikit-learn; NaN for a class without positives or without negatives.

    ``labels`` (0, 1, or NaN for unknown, left out class by class) and ``scores`` (logits or probabilities) are of shape
    (n_samples, n_classes). Raises as :func:`checked`.
    """
    from sklearn.metrics import roc_auc_score  # half a second, which reading finished runs does not need

    return _by_class(roc_auc_score, labels, scores, classes)


def ap_by_class(labels, scores, classes: Sequence[str] | None = None) -> dict[str, float]:
    """Average precision of each class by scikit-learn; otherwise as :func:`auc_by_class`."""
    from sklearn.metrics import average_precision_score

    return _by_class(average_precision_score, labels, scores, classes)


def mean_over_classes(by_class: dict[str, float], *, normal_class: str = "", what: str = "AUC",
                      why: str = "no positives or no negatives") -> float:
    """Unweighted mean over the defined findings; warns of the others by name; NaN if none is defined.

    The class that means "no finding" is left out: ``normal_class``, or by its name (:func:`charmlib.nih.normal_class`).
    """
    by_class = {list(by_class)[c]: list(by_class.values())[c] for c in finding_columns(by_class, normal_class)}
    values = [v for v in by_class.values() if not np.isnan(v)]
    if len(values) < len(by_class):
        left_out = ", ".join(name for name, value in by_class.items() if np.isnan(value))
        warnings.warn(f"{what} is undefined for {left_out} ({why}) and left out of the mean over "
                      f"{len(by_class)} classes", stacklevel=2)
    return float(np.mean(values)) if values else float("nan")


def mean_auc(labels, scores, classes: Sequence[str] | None = None, normal_class: str = "") -> float:
    """Mean ROC-AUC over the findings, as the published figures are; see :func:`mean_over_classes`."""
    return mean_over_classes(auc_by_class(labels, scores, classes), normal_class=normal_class)


def micro(labels, scores) -> dict[str, float]:
    """ROC-AUC and average precision over all (sample, finding) pairs together; NaN without positives or negatives.

    It requires scores that are comparable between classes, and common findings dominate it.
    """
    labels, scores, _ = checked(labels, scores, None)
    pairs = labels.reshape(-1, 1), scores.reshape(-1, 1)
    return {"auc": auc_by_class(*pairs, ["all"])["all"], "ap": ap_by_class(*pairs, ["all"])["all"]}


def frequency_groups(prevalence: dict[str, float]) -> dict[str, list[str]]:
    """'head', 'medium' and 'tail' classes: prevalence in the training part above 5 %, 2 to 5 %, below 2 %."""
    groups: dict[str, list[str]] = {"head": [], "medium": [], "tail": []}
    for name, share in prevalence.items():
        if np.isfinite(number(share)):  # a class without any known label is in no group
            groups["head" if share > 0.05 else "medium" if share >= 0.02 else "tail"].append(name)
    return groups


def prevalence(labels, classes: Sequence[str]) -> dict[str, float]:
    """Share of positives among the known labels of each class; NaN where none is known."""
    labels = np.asarray(labels, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return dict(zip(map(str, classes), np.nanmean(labels, axis=0).tolist()))


def summarize(labels, scores, classes: Sequence[str], normal_class: str = "") -> dict:
    """The metrics of a part as in ``metrics.json``: mean_auc, mean_ap, auc and ap by class, undefined classes."""
    auc, ap = auc_by_class(labels, scores, classes), ap_by_class(labels, scores, classes)
    return {"mean_auc": mean_over_classes(auc, normal_class=normal_class),
            "mean_ap": mean_over_classes(ap, normal_class=normal_class, what="average precision"),
            "auc": auc, "ap": ap, "undefined": [name for name, value in auc.items() if np.isnan(value)]}
