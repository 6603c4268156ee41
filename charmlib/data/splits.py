"""Training, validation and test parts, always disjoint by patient."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.index import Index, read_list
from charmlib.nih import PARTS, TEST_LISTS, TRAIN_LISTS

SPLIT_SEED = 85
"""Splits do not follow the run's seed, so that runs of several seeds share one test set and can be compared."""


class SplitError(ValueError):
    """A split that cannot be made or is not disjoint by patient; the message says what to do."""


@dataclass(frozen=True)
class Split:
    """``part`` (n,) holds 'train', 'valid', 'test' or '' for each row of the index."""

    name: str
    part: np.ndarray
    hash: str
    counts: dict[str, dict[str, float]]

    @property
    def has_valid(self) -> bool:
        """Whether there is a validation part; one is missing by request only (``valid_fraction`` 0)."""
        return self.counts["valid"]["images"] > 0

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of a part in the index, ascending."""
        return np.flatnonzero(self.part == part)

    def frame(self, index: Index) -> pd.DataFrame:
        """id, patient, part: what ``split.csv`` holds."""
        used = self.part != ""
        return pd.DataFrame({"id": index.frame["id"], "patient": index.frame["patient"], "part": self.part})[used]

    def __str__(self) -> str:
        lines = [f"split '{self.name}' ({self.hash})"]
        lines += [f"  {part}: {c['images']} images of {c['patients']} patients, {c['positive_share']:.1%} with a finding"
                  if c["images"] else f"  {part}: none, its patients are in the training part (valid_fraction 0)"
                  for part, c in self.counts.items()]
        return "\n".join(lines)


def make_split(index: Index, name: str = "official", *, valid_fraction: float = 0.1, limit: int = 0) -> Split:
    """Assign every image a part.

    Parameters
    ----------
    name : str
        'official': the NIH lists, with ``valid_fraction`` of the train_val patients as validation. 'patient': 70 / 10
        / 20 per cent of the patients at random. 'fold:2/5': the second of five test parts that hold each patient once, for
        cross-validation over all images, with ``valid_fraction`` of the other patients as validation. All of these use seed
        85 whatever the run's seed. Otherwise a folder with ``train.txt``, ``valid.txt`` and ``test.txt``.
    valid_fraction : float
        Of 'official' and folds, at most 0.5. 0 puts the validation part of any split (the patients that 'patient' would draw,
        the images of ``valid.txt`` where there is one) into the training part; the test part stays as it is.
    limit : int
        At most so many images a part, drawn at random; 0 for all.

    Raises
    ------
    SplitError
        Lists missing or overlapping, a patient in two parts, an empty part (validation may be empty by request alone).
    """
    frame = index.frame
    if name == "official":
        part = _official(index, valid_fraction)
    elif name == "patient":
        part = _by_patient(frame["patient"], (0.7, 0.1, 0.2))
    elif fold := parse_fold(name):
        part = _fold(frame["patient"], *fold, valid_fraction)
    else:
        part = _own_lists(index, Path(name), optional=("valid",) if valid_fraction == 0 else ())
        name = Path(name).name
    wanted = PARTS
    if valid_fraction == 0:
        part[part == "valid"] = "train"
        wanted = ("train", "test")
    if limit:
        generator = np.random.default_rng(SPLIT_SEED)
        for p in PARTS:
            rows = np.flatnonzero(part == p)
            if len(rows) > limit:
                part[np.setdiff1d(rows, generator.choice(rows, limit, replace=False))] = ""
    assert_disjoint(frame["patient"], part)
    for p in wanted:
        if not (part == p).any():
            raise SplitError(f"split '{name}': the {p} part is empty; check the lists against {index.table.name}")
    positive = index.has_finding()
    counts = {p: {"images": int((part == p).sum()), "patients": int(frame["patient"][part == p].nunique()),
                  "positive_share": float(positive[part == p].mean()) if (part == p).any() else float("nan")} for p in PARTS}
    return Split(name, part, _hash(frame["id"], part), counts)


def _official(index: Index, valid_fraction: float) -> np.ndarray:
    train, test = read_list(index.root, TRAIN_LISTS), read_list(index.root, TEST_LISTS)
    if train is None or test is None:
        raise SplitError(f"split 'official' needs {TRAIN_LISTS[0]} and {TEST_LISTS[0]} in {index.root}; "
                         "without them say split: patient")
    both = sorted(train & test)
    if both:
        raise SplitError(f"{len(both)} images are in both official lists of {index.root}: {', '.join(both[:5])}")
    ids = index.frame["id"]
    part = np.full(len(ids), "", dtype=object)
    in_train = ids.isin(train).to_numpy()
    part[in_train] = "train"
    part[ids.isin(test).to_numpy()] = "test"
    index.report.add("images in neither official list, left out", ids[part == ""])
    patients = np.array(sorted(set(index.frame["patient"][in_train])), dtype=object)
    count = max(1, round(valid_fraction * len(patients)))
    chosen = np.random.default_rng(SPLIT_SEED).permutation(patients)[:count]
    part[in_train & index.frame["patient"].isin(chosen).to_numpy()] = "valid"
    return part


def _by_patient(patients: pd.Series, shares: tuple[float, float, float]) -> np.ndarray:
    unique = np.random.default_rng(SPLIT_SEED).permutation(np.array(sorted(set(patients)), dtype=object))
    edges = np.round(np.cumsum(shares) * len(unique)).astype(int)
    names = np.repeat(PARTS, np.diff([0, *edges]))
    return patients.map(dict(zip(unique, names))).to_numpy(object)


def parse_fold(name: str) -> tuple[int, int] | None:
    """``'fold:2/5'`` as (2, 5); None for another split.

    Raises
    ------
    SplitError
        A fold that there is not, such as 'fold:6/5'.
    """
    if not str(name).startswith("fold:"):
        return None
    found = re.fullmatch(r"fold:(\d+)/(\d+)", name)
    if not found or not 1 <= int(found[1]) <= int(found[2]) or int(found[2]) < 2:
        raise SplitError(f"split {name!r}: wanted fold:I/N such as fold:2/5, with 1 <= I <= N and N at least 2")
    return int(found[1]), int(found[2])


def _fold(patients: pd.Series, number: int, folds: int, valid_fraction: float) -> np.ndarray:
    unique = np.random.default_rng(SPLIT_SEED).permutation(np.array(sorted(set(patients)), dtype=object))
    if len(unique) < folds:
        raise SplitError(f"split 'fold:{number}/{folds}': {len(unique)} patients do not make {folds} folds")
    test = np.array_split(unique, folds)[number - 1]
    others = unique[~np.isin(unique, test)]
    valid = np.random.default_rng([SPLIT_SEED, number]).permutation(others)[:max(1, round(valid_fraction * len(others)))]
    parts = dict.fromkeys(others, "train") | dict.fromkeys(valid, "valid") | dict.fromkeys(test, "test")
    return patients.map(parts).to_numpy(object)


def _own_lists(index: Index, folder: Path, optional: Sequence[str] = ()) -> np.ndarray:
    if not folder.is_dir():
        raise SplitError(f"split: no folder {folder}; wanted 'official', 'patient', fold:I/N or a folder with "
                         "train.txt, valid.txt and test.txt")
    part = np.full(len(index.frame), "", dtype=object)
    for p in PARTS:
        listed = read_list(folder, (f"{p}.txt",))
        if listed is None and p in optional:
            continue
        if listed is None:
            raise SplitError(f"split: {folder} has no {p}.txt")
        here = index.frame["id"].isin(listed).to_numpy()
        clash = here & (part != "")
        if clash.any():
            raise SplitError(f"split: {index.frame['id'][clash].iloc[0]} is in two lists of {folder}")
        index.report.add(f"listed in {p}.txt but not in the data", sorted(listed - set(index.frame["id"])))
        part[here] = p
    index.report.add("images in none of your lists, left out", index.frame["id"][part == ""])
    return part


def assert_disjoint(patients: pd.Series, part: np.ndarray) -> None:
    """Refuse a split in which a patient is in two parts.

    Raises
    ------
    SplitError
        Names some of the patients and their parts.
    """
    used = part != ""
    pairs = pd.DataFrame({"patient": patients[used].to_numpy(), "part": part[used]}).drop_duplicates()
    twice = pairs[pairs["patient"].duplicated(keep=False)].sort_values(["patient", "part"])
    bad = twice.groupby("patient")["part"].agg(tuple)
    if len(bad):
        shown = ", ".join(f"{patient} in {' and '.join(p)}" for patient, p in bad.iloc[:3].items())
        raise SplitError(f"{len(bad)} patients are in more than one part ({shown}): scores would be inflated. "
                         "Split by patient, not by image.")


def _hash(ids: pd.Series, part: np.ndarray) -> str:
    lines = sorted(f"{p}\t{i}" for p, i in zip(part, ids) if p)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
