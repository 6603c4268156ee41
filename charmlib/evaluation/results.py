"""The result files of a run: ``predictions.npz`` and ``metrics.json``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from charmlib.evaluation.calibration import fit_temperature
from charmlib.evaluation.finish import FORMAT
from charmlib.evaluation.intervals import SEED, Resamples, bootstrap, enough_patients
from charmlib.evaluation.operating import POINTS, choose_thresholds
from charmlib.files import write_whole


@dataclass(frozen=True)
class Predictions:
    """One part of ``predictions.npz``: ids, patients (n,), labels and logits (n, C), and the classes' names."""

    ids: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]

    @property
    def positives(self) -> dict[str, int]:
        """Class -> images with it."""
        return dict(zip(self.classes, (self.labels == 1).sum(0).tolist()))


def save_predictions(path: str | Path, parts: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str]) -> None:
    """Write ``{valid,test}_{ids,patients,labels,logits}`` and ``classes``; no pickles. Valid may be empty arrays."""
    arrays = {f"{part}_{key}": value for part, values in parts.items() for key, value in values.items()}

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, classes=np.array(list(classes)), **arrays)

    write_whole(path, write)


def load_predictions(run: str | Path, part: str = "test") -> Predictions:
    """A part of a run's predictions; the validation part of a run that had none is empty.

    Raises
    ------
    FileNotFoundError, ValueError
        The run has not been scored; the file is damaged.
    """
    path = Path(run)
    path = path / "predictions.npz" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: score the run with the test notebook first")
    try:
        with np.load(path, allow_pickle=False) as file:
            return Predictions(*(file[f"{part}_{key}"] for key in ("ids", "patients", "labels", "logits")),
                               tuple(str(c) for c in file["classes"]))
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged or no prediction file ({type(error).__name__}); score the run again") from error


def save_resamples(run: str | Path, samples: Resamples | None) -> None:
    """Keep the bootstrap of the test part (``resamples.npz``), so that a leaderboard need not make it again."""
    if samples is None:
        return

    def write(temporary):
        with open(temporary, "wb") as file:
            np.savez_compressed(file, auc=samples.auc, ap=samples.ap, seed=SEED)

    write_whole(Path(run) / "resamples.npz", write)


def load_resamples(run: str | Path) -> Resamples | None:
    """The bootstrap of a run's test part: kept, or made from its predictions; None for a single patient."""
    path = Path(run) / "resamples.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as file:
            if file["seed"] == SEED:
                return Resamples(file["auc"], file["ap"])
    test = load_predictions(run)
    return bootstrap(test.labels, test.logits, test.patients) if enough_patients(test.patients) else None


def load_card(folder: str | Path) -> dict:
    """``model.json`` of a trained run.

    Raises
    ------
    FileNotFoundError, ValueError
        Not there, or of another format.
    """
    path = Path(folder) / "model.json"
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint: {path} is not there (was the run trained to its end?)")
    card = json.loads(path.read_text())
    if card.get("format") != FORMAT:
        raise ValueError(f"{path}: format {card.get('format')!r}, this charmlib reads {FORMAT}")
    return card


def has_valid(card: Mapping) -> bool:
    """Whether a run, by its ``model.json`` or ``metrics.json``, was trained with a validation part."""
    return card["params"].get("valid_fraction") != 0


def choices(run: str | Path, valid: Predictions) -> dict:
    """``thresholds`` and ``temperature`` of a trained run; chosen anew, on the same validation predictions, where its
    ``model.json`` is from before both were kept or was not brought along. As :func:`chosen_on_validation` without any."""
    card = load_card(run) if (Path(run) / "model.json").is_file() else {"thresholds": {}}
    if card.get("temperature") is not None and set(POINTS) <= set(card["thresholds"]):
        return {"thresholds": card["thresholds"], "temperature": card["temperature"]}
    return chosen_on_validation(valid.labels, valid.logits, valid.classes)


def chosen_on_validation(labels, logits, classes: Sequence[str]) -> dict:
    """What ``model.json`` keeps of the validation part: ``thresholds`` at each operating point, and the ``temperature``.

    Of an empty one, that of a run without validation: no operating point, and None.
    """
    if not len(labels):
        return {"thresholds": {}, "temperature": None}
    return {"thresholds": choose_thresholds(labels, logits, classes, POINTS), "temperature": fit_temperature(labels, logits)}


def valid_auc(metrics: Mapping) -> float:
    """Mean AUC on the validation part; NaN where it is undefined, or there was no such part."""
    auc = (metrics["valid"] or {}).get("mean_auc")
    return float("nan") if auc is None else auc


def load_metrics(run: str | Path) -> dict:
    """A finished run's ``metrics.json``.

    Raises
    ------
    FileNotFoundError, ValueError
        Not finished; damaged or of another format.
    """
    path = Path(run) / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: the run is not finished")
    try:
        metrics = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and run the cell again") from error
    if metrics.get("format") != FORMAT:
        raise ValueError(f"{path}: format {metrics.get('format')!r}, this charmlib reads {FORMAT}")
    return metrics
