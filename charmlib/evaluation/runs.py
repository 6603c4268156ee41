"""The folder of a run: the names and contents of its files, read once. A light module: every cell's process imports it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from charmlib import session
from charmlib.evaluation.records import check_card, check_metrics
from charmlib.files import Damaged, read_json, reading, write_json, write_text, write_whole
from charmlib.nih import finding_columns

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from charmlib.evaluation.intervals import Resamples

FORMAT = 7
"""Of ``model.json`` and ``metrics.json``; files of another number are refused."""
NUMBERS = ("train_loss", "valid_loss", "valid_auc", "valid_ap", "lr", "seconds")
HISTORY = ("stage", "epoch", *NUMBERS, "bank_filled", "bank_accepted")
"""Columns of ``history.csv``, and those that are numbers or empty."""
ARRAYS, ABOUT = ("ids", "patients", "labels", "logits"), ("view", "sex", "age")
"""What ``predictions.npz`` holds of each image: always, and as far as known."""


@dataclass(frozen=True)
class Predictions:
    """One part of ``predictions.npz``: ids, patients (n,), labels and logits (n, C), and the names of the C classes.

    ``normal_class`` means "no finding"; '' takes a class by its name. ``about`` holds :data:`ABOUT` (n,), as far as known.
    Raises ValueError for arrays of other shapes, an image that is there twice, and labels other than 0, 1 and NaN; names them.
    """

    ids: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    classes: tuple[str, ...]
    normal_class: str = ""
    about: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self):
        n, shapes = len(self.ids), [getattr(self, key).shape for key in ARRAYS]
        if shapes != [(n,), (n,), (n, len(self.classes)), (n, len(self.classes))] or len({*self.classes}) < len(self.classes):
            raise ValueError(f"arrays of shape {', '.join(map(str, shapes))} for {len(self.classes)} classes")
        if len({*self.ids.tolist()}) < n:
            twice = [name for name, times in Counter(self.ids.tolist()).items() if times > 1]
            raise ValueError(f"{len(twice):,} images are there more than once, such as {twice[0]}")
        refuse_labels(self.labels, self.classes)

    @property
    def findings(self) -> list[int]:
        """Positions of the classes in means: all but the one that means "no finding"."""
        return finding_columns(self.classes, self.normal_class)

    @cached_property
    def auc(self) -> np.ndarray:
        """ROC-AUC (C,) of each class; NaN without positives or negatives."""
        import numpy as np

        from charmlib.evaluation.few import auc

        return np.array([auc(self.labels, self.logits, c) for c in range(len(self.classes))])

    @property
    def positives(self) -> dict[str, int]:
        """Class -> number of positive images."""
        return dict(zip(self.classes, (self.labels == 1).sum(0).tolist()))

    @cached_property
    def by_group(self) -> pd.DataFrame:
        """Scores by view, sex and age group, drawn once: :func:`charmlib.evaluation.groups.group_table`."""
        from charmlib.evaluation.groups import group_table

        return group_table(self)

    def of(self, classes: Sequence[str]) -> Predictions:
        """The predictions for some of the classes."""
        if tuple(classes) == self.classes:
            return self
        columns = [self.classes.index(name) for name in classes]
        return replace(self, labels=self.labels[:, columns], logits=self.logits[:, columns], classes=tuple(classes))

    def take(self, rows) -> Predictions:
        """The images at some positions, or those that a mask (n,) selects."""
        return replace(self, **{key: getattr(self, key)[rows] for key in ARRAYS},
                       about={key: values[rows] for key, values in self.about.items()})


def refuse_labels(labels: np.ndarray, classes: Sequence[str]) -> None:
    """Raise ValueError, naming class and value, for labels (n, C) other than 0, 1 and NaN (unknown)."""
    odd = ~((labels == 0) | (labels == 1) | (labels != labels))
    if odd.any():
        row, column = (int(where[0]) for where in odd.nonzero())
        raise ValueError(f"labels must be 0, 1 or NaN (unknown): {odd.sum():,} are not, the first is {labels[row, column]} of "
                         f"class {classes[column]!r} in row {row}")


class RunFolder:
    """The files of one run. Each is read on first use and cached; a new object reads them again.

    - ``status``: 'done', 'failed', 'started' (has finished epochs to resume from) or 'pending'.
    - ``card``: ``model.json``: classes, architecture, parameters, normalisation, thresholds and temperature.
    - ``metrics``: ``metrics.json``, which marks a finished run.
    - ``history``: rows of ``history.csv``, as text; empty before the first epoch has ended.
    - ``test``, ``valid``: the parts of ``predictions.npz``; ``valid`` is empty for a run without a validation part.
    - ``resamples``: the bootstrap of the test part over patients; None for a single patient.
    - ``heat``: test image -> class -> heat map (h, w) float16, of the images that ``heat.npz`` has.
    - ``choices``: ``thresholds`` and ``temperature``, both chosen on the validation part, and its positives (``chosen_on``).

    On use, raises FileNotFoundError for a missing file, saying which step writes it, and :class:`charmlib.files.Damaged` for
    one that is damaged or of another format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.name = self.path.name
        self.params_file, self.split_file = self.path / "params.yaml", self.path / "split.csv"
        self.weights_file, self.card_file = self.path / "model.safetensors", self.path / "model.json"
        self.resume_file, self.history_file = self.path / "resume.pt", self.path / "history.csv"
        self.bank_file, self.bank_history_file = self.path / "bank.csv", self.path / "bank_history.csv"
        self.predictions_file, self.resamples_file = self.path / "predictions.npz", self.path / "resamples.npz"
        self.branches_file, self.heat_file, self.boxes_file = (self.path / n for n in ("branches.npz", "heat.npz", "boxes.csv"))
        # the scores of the test notebook, from which metrics.json is made when the run is done
        self.scored_file, self.metrics_file = self.path / "scored.json", self.path / "metrics.json"
        self.baselines_file, self.baselines_arrays = self.path / "baselines.json", self.path / "baselines.npz"
        self.log_file, self.error_file = self.path / "log.txt", self.path / "error.txt"

    @classmethod
    def of(cls, run: str | Path | RunFolder) -> RunFolder:
        """A run given as itself, whose files are then not read again, or as the path of its folder."""
        return run if isinstance(run, cls) else cls(run)

    def __fspath__(self) -> str:
        return str(self.path)

    __str__ = __fspath__

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def done(self) -> bool:
        """Whether the run is finished."""
        return self.metrics_file.is_file()

    @property
    def trained(self) -> bool:
        """Whether training has ended."""
        return self.card_file.is_file()

    @property
    def resumable(self) -> bool:
        """Whether there are finished epochs to resume from."""
        return self.resume_file.is_file() or self.trained

    @property
    def status(self) -> str:
        if self.done:
            return "done"
        return "failed" if self.error_file.is_file() else "started" if self.resumable else "pending"

    @cached_property
    def card(self) -> dict:
        return _record(self.card_file, "no checkpoint: {} is not there (was the run trained to its end?)", "card of a network",
                       "delete it and run the same again, which trains what is missing", check_card)

    @cached_property
    def metrics(self) -> dict:
        return _record(self.metrics_file, "no {}: the run is not finished", "record of a finished run",
                       "delete it and run the cell again", check_metrics)

    @cached_property
    def history(self) -> list[dict[str, str]]:
        import csv

        if not self.history_file.is_file():
            return []
        with reading(self.history_file, "history of a training", "delete it; the next epoch writes it whole"), \
                open(self.history_file, newline="") as file:
            table = csv.DictReader(file)
            rows, missing = list(table), {*HISTORY} - {*(table.fieldnames or ())}
            if missing or any(None in row.values() for row in rows):
                raise ValueError(f"without {', '.join(sorted(missing)) or 'the end of a row'}")
            _ = [(int(row["epoch"]), *(float(row[name] or "nan") for name in NUMBERS)) for row in rows]
            return rows

    @cached_property
    def test(self) -> Predictions:
        return self._predictions("test")

    @cached_property
    def valid(self) -> Predictions:
        return self._predictions("valid")

    def _predictions(self, part: str) -> Predictions:
        import numpy as np

        path = self.predictions_file
        if not path.is_file():
            raise FileNotFoundError(f"no {path}: score the run with the test notebook first")
        with reading(path, "file of predictions", "score again with the test notebook"), \
                np.load(path, allow_pickle=False) as file:
            return Predictions(*(file[f"{part}_{key}"] for key in ARRAYS), tuple(map(str, file["classes"].tolist())),
                               str(file["normal_class"]),
                               {key: file[f"{part}_{key}"] for key in ABOUT if f"{part}_{key}" in file})

    @cached_property
    def resamples(self) -> Resamples | None:
        from charmlib.evaluation.intervals import read_resamples

        return read_resamples(self.resamples_file, self.test)

    @cached_property
    def heat(self) -> dict[str, dict[str, np.ndarray]]:
        import numpy as np

        with reading(self.heat_file, "file of heat maps", "score again with the test notebook"), \
                np.load(self.heat_file, allow_pickle=False) as file:
            ids, classes, maps = (file[name] for name in ("ids", "classes", "maps"))
            return {name: dict(zip(classes.tolist(), of, strict=True)) for name, of in zip(ids.tolist(), maps, strict=True)}

    @cached_property
    def choices(self) -> dict:
        if self.trained:
            return {key: self.card[key] for key in ("thresholds", "chosen_on", "temperature")}
        return chosen_on_validation(self.valid.labels, self.valid.logits, self.valid.classes)  # fetched without its checkpoint


def run_folders(paths: Iterable[str | Path]) -> list[RunFolder]:
    """Finished runs: the given folders, or those that they hold (a grid's cells; a folder of grids).

    Raises FileNotFoundError for a folder that is neither.
    """
    out = []
    for path in map(Path, paths):
        cells = sorted(p.parent for depth in ("[!.]*", "[!.]*/[!.]*") for p in path.glob(f"{depth}/metrics.json"))
        if RunFolder(path).done:
            cells = [path]
        elif not cells:
            raise FileNotFoundError(f"{path} is neither a finished run (it has no metrics.json) nor a folder that holds some")
        out += cells
    return [RunFolder(path) for path in dict.fromkeys(out)]


def run_names(runs: Sequence[RunFolder]) -> list[str]:
    """A short name for each run: the last parts of its path, as many as distinguish all; ValueError for a run named twice."""
    parts = [run.path.resolve().parts for run in runs]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(p[-length:]).lstrip("/") for p in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError("the same run was named twice")


def _record(path: Path, missing: str, what: str, remedy: str, check: Callable[[Mapping], None]) -> dict:
    if not path.is_file():
        raise FileNotFoundError(missing.format(path))
    content = read_json(path, what, remedy)
    if content.get("format") != FORMAT:
        raise Damaged(f"{path}: format {content.get('format')!r:.20}, this charmlib reads {FORMAT}; {remedy}")
    with reading(path, what, remedy):
        check(content)
    return content


def about(frame) -> dict[str, np.ndarray]:
    """Ids, patients and :data:`ABOUT` of the rows of an index's frame: text, but age in years or NaN."""
    return {name: frame[column].to_numpy("float32" if column == "age" else str)
            for name, column in (("ids", "id"), ("patients", "patient"), *zip(ABOUT, ABOUT))}


def save_predictions(path: str | Path, parts: Mapping[str, Mapping[str, np.ndarray]], classes: Sequence[str],
                     normal_class: str = "") -> None:
    """Write :data:`ARRAYS` and :data:`ABOUT` of 'valid' and 'test', ``classes`` and ``normal_class``; no pickles. Valid may be
    empty arrays."""
    import numpy as np

    arrays = {f"{part}_{key}": values[key] for part, values in parts.items() for key in (*ARRAYS, *ABOUT) if key in values}
    write_arrays(path, classes=np.array(list(classes)), normal_class=np.array(normal_class), **arrays)


def write_arrays(path: str | Path, *, compress: bool = True, **arrays) -> None:
    """An .npz file, whole or not at all."""
    import numpy as np

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            (np.savez_compressed if compress else np.savez)(file, **arrays)

    write_whole(path, write)


def chosen_on_validation(labels, logits, classes: Sequence[str]) -> dict:
    """From validation data: ``thresholds`` (operating point -> class -> threshold), the number of positives of each class that
    they were ``chosen_on``, and the calibration's ``temperature``.

    ``labels`` and ``logits`` are (n_samples, n_classes). Without samples there are no thresholds and the temperature is None.
    """
    from charmlib.evaluation.calibration import fit_temperature
    from charmlib.evaluation.operating import choose_thresholds

    if not len(labels):
        return {"thresholds": {}, "chosen_on": {}, "temperature": None}
    return {"thresholds": choose_thresholds(labels, logits, classes),
            "chosen_on": dict(zip(map(str, classes), (labels == 1).sum(0).tolist())),
            "temperature": fit_temperature(labels, logits)}


def number(value: float | None, otherwise: float = float("nan")) -> float:
    """A metric as a float, whether in memory or read from JSON, where null is NaN; ``otherwise`` in place of NaN."""
    return otherwise if value is None or value != value else float(value)


def monitored(row: Mapping, monitor: str) -> float:
    """The figure of an epoch whose smallest value is the best: 'valid_loss' (also for 'last'), or minus 'valid_auc' or
    'valid_ap'."""
    return -number(row[monitor]) if monitor in ("valid_auc", "valid_ap") else number(row["valid_loss"])


def kept_epoch(rows: Sequence[Mapping], monitor: str) -> int:
    """Position of the kept epoch among the rows of ``history.csv`` of one stage: the best by 'valid_loss', 'valid_auc' or
    'valid_ap', the last for 'last' and without a validation part."""
    values = [] if monitor == "last" else [monitored(row, monitor) for row in rows]
    return min((i for i, value in enumerate(values) if value == value), key=values.__getitem__, default=len(rows) - 1)


def valid_auc(metrics: Mapping) -> float:
    """Mean AUC on the validation part; NaN if it is undefined or there is no such part."""
    return number(metrics["valid"] and metrics["valid"]["mean_auc"])


def finish(run: str | Path, *, cell: str | None = None, hash: str | None = None, code: str | None = None,
           wall: float | None = None, shares: str | None = None) -> Path | None:
    """Turn the scores of the test notebook into ``metrics.json``, the mark of a finished run, and remove ``resume.pt``.

    In a grid the runner calls this with the cell's name and hash, the hash of the notebooks' code, the wall time in seconds and
    the name of the cell whose training it ``shares``, kept as ``shares_training_with``; the notebook's own call then returns
    None. Raises FileNotFoundError for a run that has not been scored.
    """
    folder = RunFolder(run)
    if session.in_grid() and hash is None:
        print("scored; the grid's runner writes metrics.json")
        return None
    if not folder.scored_file.is_file():
        raise FileNotFoundError(f"no {folder.scored_file}: score the run with the test notebook first")
    metrics = read_json(folder.scored_file, "record of scores", "delete it and score again with the test notebook")
    if wall is not None:
        metrics["seconds"]["overhead"] = round(wall - metrics["seconds"]["train"] - metrics["seconds"]["score"], 3)
    if hash is None and folder.done:  # a finished cell that is scored again stays one
        cell, hash, code, shares = map(folder.metrics.get, ("cell", "hash", "code", "shares_training_with"))
        metrics["seconds"]["overhead"] = folder.metrics["seconds"]["overhead"]
    write_json(folder.metrics_file, {"format": FORMAT, "cell": cell or folder.name, "hash": hash, "code": code, **metrics,
                                     **({"shares_training_with": shares} if shares else {})})
    from charmlib.evaluation.card import card_text

    write_text(folder / "card.md", card_text(RunFolder(run).metrics))
    folder.scored_file.unlink()
    folder.resume_file.unlink(missing_ok=True)
    return folder.metrics_file
