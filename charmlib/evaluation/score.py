"""The scores of a run: metrics, intervals, operating points and calibration of a part, and of finished runs anew from their
prediction files (no images, no network, no GPU)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from charmlib import nih
from charmlib.evaluation.calibration import calibration
from charmlib.evaluation.combine import mean_ensemble
from charmlib.evaluation.few import mean_interval, patients_with, widened, widened_by_class
from charmlib.evaluation.intervals import (
    LEVEL,
    RESAMPLES,
    SEED,
    Interval,
    Resamples,
    bootstrap,
    enough_patients,
    intervals_by_class,
    operating_resamples,
)
from charmlib.evaluation.leaks import refuse_leaks
from charmlib.evaluation.metrics import frequency_groups, mean_auc, mean_over_classes, micro, summarize
from charmlib.evaluation.operating import at_thresholds, choose_thresholds
from charmlib.evaluation.runs import Predictions, RunFolder, chosen_on_validation, run_names


def score_part(values: Mapping[str, np.ndarray], classes: Sequence[str], *,
               thresholds: Mapping[str, Mapping[str, float | None]] | None = None, chosen_on: Mapping[str, int] | None = None,
               temperature: float | None = None, prevalence: Mapping[str, float] | None = None, normal_class: str = "",
               resamples: int = RESAMPLES, seed: int = SEED) -> tuple[dict, Resamples | None]:
    """What ``metrics.json`` holds of a part, and the bootstrap behind its intervals (None for a single patient).

    ``values`` are ``labels`` and ``logits`` (n, classes) and ``patients`` (n,). ``thresholds`` (operating point -> class ->
    threshold) and ``temperature`` were chosen on validation data, with ``chosen_on`` positives of each class. Calibration is
    given as trained and, with a temperature, at it too. Empty thresholds say that the run has no validation part.
    ``prevalence`` (class -> share of positives in the training part) makes the frequency groups. ``normal_class`` means "no
    finding", which no mean counts; '' takes one by name.
    """
    labels, logits, patients = values["labels"], values["logits"], values["patients"]
    findings, normal = nih.finding_columns(classes, normal_class), nih.normal_class(classes, normal_class)
    out = {**summarize(labels, logits, classes, normal), "normal_class": normal,
           **{f"micro_{name}": value for name, value in micro(labels[:, findings], logits[:, findings]).items()}}
    samples = bootstrap(labels, logits, patients, resamples=resamples, seed=seed) if enough_patients(patients) else None
    found = {figure: getattr(samples, figure, np.full((1, len(classes)), np.nan)) for figure in ("auc", "ap")}
    held = patients_with(labels, patients, classes)
    out["intervals"] = {"level": LEVEL, "resamples": resamples, "seed": seed, "clustered_by": "patient", "patients": held}
    for figure, drawn in found.items():
        out["intervals"][figure] = widened_by_class(drawn, figure, out[figure], held)
        out["intervals"][f"mean_{figure}"] = _mean_interval(out, figure, drawn, findings)
    out["mean_auc_low"], out["mean_auc_high"], _ = out["intervals"]["mean_auc"]
    if prevalence is not None:
        groups = frequency_groups({name: share for name, share in prevalence.items() if name != normal})
        out["groups"] = {group: _group(out, members, found, classes) for group, members in groups.items() if members}
    if thresholds is not None:
        out["operating"] = {point: _operating(values, classes, chosen, chosen_on or {}, held, resamples, seed)
                            for point, chosen in thresholds.items()}
    if thresholds is not None or temperature is not None:
        out["calibration"] = {"as_trained": calibration(labels, logits, classes, normal_class=normal)}
    if temperature is not None:
        out["calibration"]["scaled"] = calibration(labels, logits, classes, temperature, normal)
    return out, samples


def _group(scores: dict, members: list[str], found: Mapping[str, np.ndarray], classes: Sequence[str]) -> dict:
    columns = [list(classes).index(name) for name in members]
    out: dict = {"classes": members}
    for figure, drawn in found.items():
        out[f"mean_{figure}"] = mean_over_classes({name: scores[figure][name] for name in members}, what=figure)
        out[f"mean_{figure}_interval"] = _mean_interval(scores, figure, drawn, columns)
    return out


def _mean_interval(scores: Mapping, figure: str, drawn: np.ndarray, columns: Sequence[int]) -> Interval:
    names = [list(scores[figure])[c] for c in columns]
    return mean_interval(drawn[:, columns], [scores[figure][name] for name in names],
                         [scores["intervals"][figure][name] for name in names])


def _operating(values, classes, thresholds: Mapping[str, float | None], chosen_on: Mapping[str, int], held: Mapping[str, int],
               resamples: int, seed: int) -> dict[str, dict]:
    out = at_thresholds(values["labels"], values["logits"], classes, thresholds)
    found = operating_resamples(values["labels"], values["logits"], values["patients"],
                                [thresholds.get(str(name)) for name in classes], resamples=resamples, seed=seed)
    limits = {rate: intervals_by_class(drawn, classes) for rate, drawn in found.items()}
    limits["sensitivity"] = {name: widened(limits["sensitivity"][name], "sensitivity", out[name]["sensitivity"], held[name])
                             for name in out}
    return {name: {**row, "chosen_on": chosen_on.get(name), **{f"{rate}_interval": limits[rate][name] for rate in found}}
            for name, row in out.items()}


def evaluate_run(run: str | Path | RunFolder, *, points: Sequence[str] = ()) -> tuple[dict, Predictions]:
    """A finished run's metrics with its test part scored anew, and its test predictions.

    ``points`` are further operating points (such as 'sensitivity_0.95'), chosen on the run's validation predictions.
    """
    run = RunFolder.of(run)
    return {**run.metrics, "test": _test(run.test, run.valid, run.choices, points, run.metrics["train_prevalence"])}, run.test


def evaluate_ensemble(runs: Sequence[str | Path | RunFolder], *, points: Sequence[str] = ()) -> tuple[dict, Predictions]:
    """The mean of several runs, in the form of :func:`evaluate_run`; see :func:`evaluate_merged`."""
    return evaluate_merged(runs, points=points)[:2]


def evaluate_merged(runs: Sequence[str | Path | RunFolder], *, points: Sequence[str] = (), how: str = "mean",
                    weights: Sequence[float] | None = None) -> tuple[dict, Predictions, Predictions]:
    """Several runs as one: metrics in the form of :func:`evaluate_run`, test and validation predictions; ``members`` names the
    runs. ``how`` and ``weights`` as in :func:`charmlib.evaluation.combine.merge`.

    Thresholds and temperature come from their merged validation predictions. There are none if a member has no
    validation part, because it was trained on those images of the others. Raises ValueError for runs that differ in images,
    classes or labels, and LeakError as :func:`charmlib.evaluation.leaks.refuse_leaks`.
    """
    members = [RunFolder.of(run) for run in runs]
    refuse_leaks(members)
    test = mean_ensemble([member.test for member in members], how, weights)
    unvalidated = [member.valid for member in members if not len(member.valid.ids)]
    valid = unvalidated[0] if unvalidated else mean_ensemble([member.valid for member in members], how, weights)
    chosen = chosen_on_validation(valid.labels, valid.logits, valid.classes)
    each = [member.metrics for member in members]

    def together(values) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    leak = {"leak": True} if any(m["split"].get("leak") for m in each) else {}
    return {**each[0], "bank": None, "split": each[0]["split"] | leak, "members": run_names(members),
            "cell": f"{how.replace('_', ' ')} of {len(members)} runs",
            "params": {**each[0]["params"], "seed": together(m["params"]["seed"] for m in each)},
            "device": together(m["device"] for m in each), "precision": together(m["precision"] for m in each),
            "valid": {"mean_auc": mean_auc(valid.labels, valid.logits, valid.classes, valid.normal_class)}
            if len(valid.ids) else None,
            "test": _test(test, valid, chosen, points, each[0]["train_prevalence"])}, test, valid


def thresholds_at(run: str | Path | RunFolder, point: str) -> dict[str, float | None]:
    """A run's thresholds at any operating point: stored by training, or chosen now on its validation predictions. Empty for a
    run without a validation part."""
    run = RunFolder.of(run)
    return _with_points(run.choices["thresholds"], run.valid, [point]).get(point, {})


def _with_points(thresholds: dict, valid: Predictions, points: Sequence[str]) -> dict:
    """The stored thresholds, and those of further points; none without validation predictions."""
    missing = [point for point in points if point not in thresholds]
    further = choose_thresholds(valid.labels, valid.logits, valid.classes, missing)  # also refuses unknown points
    return thresholds | further if len(valid.ids) else {}


def _test(test: Predictions, valid: Predictions, chosen: dict, points: Sequence[str], prevalence) -> dict:
    return score_part(vars(test), test.classes, thresholds=_with_points(chosen["thresholds"], valid, points),
                      chosen_on=valid.positives, temperature=chosen["temperature"], prevalence=prevalence,
                      normal_class=test.normal_class)[0]
