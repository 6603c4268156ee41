"""Everything that is said of one part of a run: metrics, intervals, operating points, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from charmlib.evaluation.calibration import calibration
from charmlib.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    SEED,
    Interval,
    Resamples,
    bootstrap,
    enough_patients,
    interval,
    intervals_by_class,
    mean_of_defined,
    operating_resamples,
    thresholds_of,
)
from charmlib.evaluation.metrics import frequency_groups, mean_over_classes, micro, summarize
from charmlib.evaluation.operating import at_thresholds


def score_part(values: Mapping[str, np.ndarray], classes: Sequence[str], *,
               thresholds: Mapping[str, Mapping[str, float | None]] | None = None, temperature: float | None = None,
               prevalence: Mapping[str, float] | None = None, resamples: int = RESAMPLES, seed: int = SEED
               ) -> tuple[dict, Resamples | None]:
    """What ``metrics.json`` holds of a part, and the bootstrap behind its intervals (None for a single patient).

    Parameters
    ----------
    values : mapping
        ``labels`` and ``logits`` (n, classes), ``patients`` (n,).
    thresholds : mapping
        Operating point -> class -> probability, chosen on validation data; empty where there was none.
    temperature : float
        Fitted on validation data; calibration is then given with and without it. With empty thresholds and no temperature
        it is given as trained.
    prevalence : mapping
        Class -> share of positives in the training part, for the frequency groups.
    """
    labels, logits, patients = values["labels"], values["logits"], values["patients"]
    out = summarize(labels, logits, classes)
    both = micro(labels, logits)
    out |= {"micro_auc": both["auc"], "micro_ap": both["ap"]}
    samples = bootstrap(labels, logits, patients, resamples=resamples, seed=seed) if enough_patients(patients) else None
    out["intervals"] = {"level": LEVEL, "resamples": resamples, "seed": seed, "clustered_by": "patient"}
    for figure in ("auc", "ap"):
        found = getattr(samples, figure) if samples else np.full((1, len(classes)), np.nan)
        out["intervals"] |= {f"mean_{figure}": interval(mean_of_defined(found)),
                             figure: intervals_by_class(found, classes)}
    out["mean_auc_low"], out["mean_auc_high"], _ = out["intervals"]["mean_auc"]
    if prevalence is not None:
        out["groups"] = {group: _group(out, members, samples, classes)
                         for group, members in frequency_groups(dict(prevalence)).items() if members}
    if thresholds is not None:
        out["operating"] = {point: _operating(values, classes, chosen, resamples, seed)
                            for point, chosen in thresholds.items()}
    if thresholds is not None or temperature is not None:
        out["calibration"] = {"as_trained": calibration(labels, logits, classes)}
    if temperature is not None:
        out["calibration"]["scaled"] = calibration(labels, logits, classes, temperature)
    return out, samples


def _group(scores: dict, members: list[str], samples: Resamples | None, classes: Sequence[str]) -> dict:
    columns = [list(classes).index(name) for name in members]
    out: dict = {"classes": members}
    for figure in ("auc", "ap"):
        out[f"mean_{figure}"] = mean_over_classes({name: scores[figure][name] for name in members}, what=figure)
        found = getattr(samples, figure)[:, columns] if samples else np.full((1, 1), np.nan)
        out[f"mean_{figure}_interval"] = interval(mean_of_defined(found))
    return out


def _operating(values, classes, thresholds: Mapping[str, float | None], resamples: int, seed: int) -> dict[str, dict]:
    out = at_thresholds(values["labels"], values["logits"], classes, thresholds)
    if not enough_patients(values["patients"]):
        nothing = Interval(float("nan"), float("nan"), 1.0)
        return {name: {**row, **{f"{f}_interval": nothing for f in ("sensitivity", "specificity", "precision", "f1")}}
                for name, row in out.items()}
    found = operating_resamples(values["labels"], values["logits"], values["patients"], thresholds_of(thresholds, classes),
                                resamples=resamples, seed=seed)
    for figure, samples in found.items():
        for name, limits in intervals_by_class(samples, classes).items():
            if name in out:
                out[name][f"{figure}_interval"] = limits
    return out
