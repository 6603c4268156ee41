"""Training, validation and test parts, always disjoint by patient."""

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.find import match
from charmlib.data.index import Index
from charmlib.data.tables import Report, listed_names, read_text
from charmlib.nih import PARTS, TEST_LISTS, TRAIN_LISTS, people

SPLIT_SEED = 85
"""Splits are independent of the run's seed, so that runs of several seeds share one test set and can be compared."""


class SplitError(ValueError):
    """A split that cannot be made or is not disjoint by patient; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """``part`` (n,) holds 'train', 'valid', 'test' or '' for each row of the index; ``patients_from``: what a patient is."""

    name: str
    part: np.ndarray
    hash: str
    counts: dict[str, dict[str, float]]
    patients_from: str = ""

    def record(self) -> dict:
        """What ``metrics.json`` keeps: name, hash, patients_from, and the counts of each part."""
        return {"name": self.name, "hash": self.hash, "patients_from": self.patients_from, **self.counts}

    @property
    def has_valid(self) -> bool:
        """Whether there is a validation part; only ``valid_fraction`` 0 leaves it out."""
        return self.counts["valid"]["images"] > 0

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of a part in the index, ascending."""
        return np.flatnonzero(self.part == part)

    def frame(self, index: Index) -> pd.DataFrame:
        """The content of ``split.csv``: id, patient, part."""
        return index.frame[["id", "patient"]].assign(part=self.part)[self.part != ""]

    def __str__(self) -> str:
        lines = [f"split '{self.name}' ({self.hash}), a patient is: {self.patients_from}"]
        lines += [f"  {part}: {c['images']} images of {people(c['patients'], self.patients_from)}, "
                  f"{c['positive_share']:.1%} with a finding"
                  if c["images"] else f"  {part}: none, its patients are in the training part (valid_fraction 0)"
                  for part, c in self.counts.items()]
        return "\n".join(lines)


def make_split(index: Index, name: str = "official", *, valid_fraction: float = 0.1, limit: int = 0, never_test: str = ""
               ) -> Split:
    """Assign every image a part.

    - 'official': the NIH lists, with ``valid_fraction`` (at most 0.5) of the train_val patients as validation;
    - 'patient': 70 / 10 / 20 per cent of the patients at random;
    - 'fold:2/5': the second of five test parts that hold each patient once, ``valid_fraction`` of the others as validation;
    - otherwise a folder with ``train.txt``, ``valid.txt`` and ``test.txt``.

    All draws use seed 85 whatever the run's seed. ``valid_fraction`` 0 puts the validation part of any split into the training
    part (a folder then needs no ``valid.txt``). ``limit`` draws at most so many images a part; 0 takes all. ``never_test`` is a
    file of patients, one a line, whom the test parts of a cross-validation leave out: choices that their images decided then
    cannot flatter a test score.

    Raises SplitError for lists missing or overlapping, a patient in two parts, an empty part (``valid_fraction`` 0 allows an
    empty validation), or a split by patient of data whose patients are unknown.
    """
    patients, fold = index.frame["patient"], parse_fold(name)
    if index.why_unknown:
        if name == "patient" or fold:
            raise SplitError(f"split '{name}' keeps the images of a patient together, and {index.why_unknown}; or say "
                             "patients: none, which counts each image as a patient and cannot rule out leaks")
        index.report.add("a patient in two parts would not be noticed", [index.why_unknown])
    if name == "official":
        part = _official(index, valid_fraction)
    elif name == "patient":
        order = _shuffled(patients)
        part = _assign(patients, *np.split(order, np.round(np.cumsum((0.7, 0.1)) * len(order)).astype(int)))
    elif fold:
        part = _fold(patients, *fold, valid_fraction, _listed_patients(index, never_test) if never_test else set())
    else:
        part, name = _own_lists(index, Path(name), optional=("valid",) if valid_fraction == 0 else ()), Path(name).name
    if valid_fraction == 0:
        part[part == "valid"] = "train"
    generator = np.random.default_rng(SPLIT_SEED)
    for rows in (np.flatnonzero(part == p) for p in PARTS):
        if limit and len(rows) > limit:
            part[np.setdiff1d(rows, generator.choice(rows, limit, replace=False))] = ""
    assert_disjoint(patients, part)
    counts, positive = {}, index.has_finding()
    for p in PARTS:
        rows = part == p
        if not rows.any() and (p != "valid" or valid_fraction):
            raise SplitError(f"split '{name}': the {p} part is empty; " + (
                _too_few(patients.nunique()) if name == "patient" or fold else f"check the lists against {index.table.name}"))
        counts[p] = {"images": int(rows.sum()), "patients": int(patients[rows].nunique()),
                     "positive_share": float(positive[rows].mean()) if rows.any() else float("nan")}
    lines = sorted(f"{p}\t{i}" for p, i in zip(part, index.frame["id"]) if p)
    return Split(name, part, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16], counts, index.patients_from)


def training_rows(index: Index, name: str, **options) -> np.ndarray:
    """Rows of the training part of :func:`make_split`, which adds nothing to the index's report here."""
    return make_split(replace(index, report=Report()), name, **options).rows("train")


def _too_few(patients: int) -> str:
    if patients < 2:
        return "all images are of one patient, and parts need different patients"
    instead = f"split: fold:1/{min(patients, 5)}" + (" with valid_fraction: 0" if patients == 2 else "")
    return f"{patients} patients are too few for it: say {instead}, or make lists of your own"


def parse_fold(name: str) -> tuple[int, int] | None:
    """``'fold:2/5'`` as (2, 5); None for another split; raises SplitError for a fold outside its range, such as 'fold:6/5'."""
    if not str(name).startswith("fold:"):
        return None
    found = re.fullmatch(r"fold:(\d+)/(\d+)", name)
    if not found or not 1 <= int(found[1]) <= int(found[2]) or int(found[2]) < 2:
        raise SplitError(f"split {name!r}: wanted fold:I/N such as fold:2/5, with 1 <= I <= N and N at least 2")
    return int(found[1]), int(found[2])


def assert_disjoint(patients: pd.Series, part: np.ndarray) -> None:
    """Refuse a split in which a patient is in two parts: SplitError names some of the patients and their parts."""
    pairs = pd.DataFrame({"patient": patients.to_numpy(), "part": part})[part != ""].drop_duplicates()
    pairs = pairs[pairs["patient"].duplicated(keep=False)]
    if len(bad := pairs.sort_values("part").groupby("patient")["part"].agg(tuple)):
        shown = ", ".join(f"{patient} in {' and '.join(p)}" for patient, p in bad.iloc[:3].items())
        raise SplitError(f"{len(bad)} patients are in more than one part ({shown}): scores would be inflated. "
                         "Split by patient, not by image.")


def _shuffled(patients: pd.Series) -> np.ndarray:
    return np.random.default_rng(SPLIT_SEED).permutation(np.array(sorted(set(patients)), dtype=object))


def _assign(patients: pd.Series, *parts: np.ndarray) -> np.ndarray:
    """The part of each image, given the patients of training, validation and test."""
    return patients.map({patient: name for name, some in zip(PARTS, parts) for patient in some}).to_numpy(object)


def _official(index: Index, valid_fraction: float) -> np.ndarray:
    lists = [_find_list(index.root, names) for names in (TRAIN_LISTS, TEST_LISTS)]
    if None in lists:
        raise SplitError(f"split 'official' needs {TRAIN_LISTS[0]} and {TEST_LISTS[0]} in {index.root}; "
                         "without them say split: patient")
    train, test = (_read_list(index, path) for path in lists)
    if both := sorted(train & test):
        raise SplitError(f"{len(both)} images are in both official lists of {index.root}: {', '.join(both[:5])}")
    ids, patients = index.frame["id"], index.frame["patient"]
    in_train = ids.isin(train)
    order = _shuffled(patients[in_train])
    valid = in_train & patients.isin(order[:max(1, round(valid_fraction * len(order)))])
    part = np.select([valid, in_train, ids.isin(test)], ["valid", "train", "test"], "").astype(object)
    index.report.add("images in neither official list, left out", ids[part == ""])
    return part


def _find_list(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_list(index: Index, path: Path, *, say: bool = False) -> set[str]:
    """The ids that a list names, as written or by the ends of paths and plain names (:func:`charmlib.data.find.match`)."""
    names = dict.fromkeys(listed_names(path))
    listed = set(index.frame["id"]) & names.keys()
    if others := [name for name in names if name not in listed]:
        found, _ = match(others, [name for name in index.frame["id"] if name not in listed])
        listed |= set(found.values())
        if say:
            index.report.add(f"listed in {path.name} but not in the data", sorted(set(others) - found.keys()))
    if names and not listed:
        raise SplitError(f"split: none of the {len(names)} images that {path} lists is in {index.table.name}: it lists "
                         f"{next(iter(names))!r}, the data holds {index.frame['id'].iloc[0]!r}")
    return listed


def _listed_patients(index: Index, file: str) -> set[str]:
    listed, known = {line.strip() for line in read_text(Path(file)).splitlines()} - {""}, set(index.frame["patient"])
    if not listed & known:
        raise SplitError(f"never_test: none of the {len(listed)} patients that {file} lists is in {index.table.name}, whose "
                         f"first patient is {index.frame['patient'].iloc[0]!r}")
    index.report.add(f"patients listed in {Path(file).name} but not in the data", sorted(listed - known))
    return listed


def _fold(patients: pd.Series, number: int, folds: int, valid_fraction: float, never: set[str]) -> np.ndarray:
    order = _shuffled(patients)
    tested = order[~np.isin(order, list(never))]
    if len(tested) < folds:
        raise SplitError(f"split 'fold:{number}/{folds}': {len(tested)} patients do not make {folds} folds")
    test = np.array_split(tested, folds)[number - 1]
    others = order[~np.isin(order, test)]
    valid = np.random.default_rng([SPLIT_SEED, number]).permutation(others)[:max(1, round(valid_fraction * len(others)))]
    return _assign(patients, others, valid, test)  # validation overrides training


def _own_lists(index: Index, folder: Path, optional: tuple[str, ...]) -> np.ndarray:
    if not folder.is_dir():
        raise SplitError(f"split: no folder {folder}; wanted 'official', 'patient', fold:I/N or a folder with "
                         "train.txt, valid.txt and test.txt")
    ids, part = index.frame["id"], np.full(len(index.frame), "", dtype=object)
    for p in PARTS:
        stems = (p, "val", "validation") if p == "valid" else (p,)
        path = _find_list(folder, tuple(stem + end for stem in stems for end in (".txt", ".csv", ".tsv")))
        if path is None and p not in optional:
            raise SplitError(f"split: {folder} has no {p}.txt")
        here = ids.isin(_read_list(index, path, say=True) if path else ()).to_numpy()
        if (clash := here & (part != "")).any():
            raise SplitError(f"split: {ids[clash].iloc[0]} is in two lists of {folder}")
        part[here] = p
    index.report.add("images in none of your lists, left out", ids[part == ""])
    return part
