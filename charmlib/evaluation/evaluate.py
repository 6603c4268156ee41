"""Score runs anew from their prediction files: no images, no network, no GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from charmlib.evaluation.ensemble import mean_ensemble
from charmlib.evaluation.leaks import refuse_leaks
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.operating import choose_thresholds
from charmlib.evaluation.runs import Predictions, RunFolder, chosen_on_validation
from charmlib.evaluation.score import score_part


def run_folders(paths: Iterable[str | Path]) -> list[Path]:
    """Finished runs: the given folders, or those that they hold (a grid's cells; a folder of grids).

    Raises
    ------
    FileNotFoundError
        A folder that is neither; names it.
    """
    out = []
    for path in map(Path, paths):
        cells = sorted(p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/metrics.json"))
        if (path / "metrics.json").is_file():
            out.append(path)
        elif cells:
            out += cells
        else:
            raise FileNotFoundError(f"{path} is neither a finished run (it has no metrics.json) nor a folder that holds some")
    return list(dict.fromkeys(out))


def run_names(folders: Sequence[Path]) -> list[str]:
    """A short name for each folder: its last parts, as many as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]).lstrip("/") for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run was named twice")


def evaluate_run(run: str | Path, *, points: Sequence[str] = ()) -> tuple[dict, Predictions]:
    """A finished run's metrics with its test part scored anew, and its test predictions.

    ``points`` are further operating points (such as 'sensitivity_0.95'), chosen on the run's validation predictions.
    """
    run = RunFolder(run)
    return {**run.metrics, "test": _score(run.test, run.valid, run.choices, points, run.metrics["train_prevalence"])}, run.test


def evaluate_ensemble(runs: Sequence[str | Path], *, points: Sequence[str] = ()) -> tuple[dict, Predictions]:
    """The mean of several runs as :func:`evaluate_run` gives one; thresholds and temperature come from the mean of their
    validation predictions, and there are none where a member was trained without a validation part (on those images of the
    others, that is). ``members`` names the runs.

    Raises
    ------
    charmlib.evaluation.leaks.LeakError
        A run's test images were in another's training part.
    ValueError
        The runs are not of the same images, classes and labels.
    """
    refuse_leaks(runs)
    members = [RunFolder(run) for run in runs]
    test, valids = mean_ensemble([member.test for member in members]), [member.valid for member in members]
    valid = next((v for v in valids if not len(v.ids)), None) or mean_ensemble(valids)
    chosen = chosen_on_validation(valid.labels, valid.logits, valid.classes)
    each = [member.metrics for member in members]

    def together(values) -> str:
        return ", ".join(dict.fromkeys(map(str, values)))

    return {**each[0], "bank": None, "cell": f"mean of {len(runs)} runs", "members": run_names([Path(run) for run in runs]),
            "params": {**each[0]["params"], "seed": together(m["params"]["seed"] for m in each)},
            "device": together(m["device"] for m in each), "precision": together(m["precision"] for m in each),
            "valid": {"mean_auc": mean_auc(valid.labels, valid.logits, valid.classes)} if len(valid.ids) else None,
            "test": _score(test, valid, chosen, points, each[0]["train_prevalence"])}, test


def thresholds_at(run: str | Path, point: str) -> dict[str, float | None]:
    """A run's thresholds at any operating point: stored by training, or chosen now on its validation predictions. Empty for a
    run that was trained without a validation part."""
    run = RunFolder(run)
    return _with_points(run.choices["thresholds"], run.valid, [point]).get(point, {})


def _with_points(thresholds: dict, valid: Predictions, points: Sequence[str]) -> dict:
    """The stored thresholds, and those of further points; none without validation predictions."""
    missing = [point for point in points if point not in thresholds]
    further = choose_thresholds(valid.labels, valid.logits, valid.classes, missing)  # also refuses unknown points
    return thresholds | further if len(valid.ids) else {}


def _score(test: Predictions, valid: Predictions, chosen: dict, points: Sequence[str], prevalence) -> dict:
    part, _ = score_part(vars(test), test.classes, thresholds=_with_points(chosen["thresholds"], valid, points),
                         temperature=chosen["temperature"], prevalence=prevalence)
    return part
