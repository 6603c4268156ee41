"""One row an image: id, path, patient, age, sex, view, labels. Reads all three Kaggle layouts and tables of your own.

- ``nih-chest-xrays/data``: ``images_001..012/images/*.png``, ``Data_Entry_2017.csv``, two official lists;
- ``khanfashee/nih-chest-x-ray-14-224x224-resized``: ``images-224/images-224/*.png``, lists named ``*_NIH.txt``;
- ``nih-chest-xrays/sample``: ``sample/images/*.png``, ``sample_labels.csv``, no lists.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.nih import NIH14, NIH15, NO_FINDING, PHANTOM_MARK, TABLES, canonical

SUFFIXES = (".png", ".jpg", ".jpeg")
_META = {"id": ("Image Index", "ImageID", "image_id", "image", "id", "path", "filename"),
         "patient": ("Patient ID", "PatientID", "patient_id", "patient"),
         "age": ("Patient Age", "PatientAge", "age"),
         "sex": ("Patient Gender", "Patient Sex", "PatientSex", "sex", "gender"),
         "view": ("View Position", "ViewPosition", "view")}
_FINDINGS = ("Finding Labels", "labels", "findings")
_IGNORED = ("Follow-up #", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]", "OriginalImageWidth",
            "OriginalImageHeight", "OriginalImagePixelSpacing_x", "OriginalImagePixelSpacing_y", "split", "fold")


@dataclass
class Report:
    """What was odd about the data: a count and the names for each kind, so that nothing is dropped silently."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names) -> None:
        names = [str(n) for n in names]
        if names:
            self.found.setdefault(kind, []).extend(names)

    def __str__(self) -> str:
        if not self.found:
            return "nothing odd found"
        lines = []
        for kind, names in self.found.items():
            shown = ", ".join(names[:5]) + (f" ... and {len(names) - 5} more" if len(names) > 5 else "")
            lines.append(f"{kind}: {len(names)} ({shown})")
        return "\n".join(lines)


@dataclass
class Index:
    """The table of images (``frame``: id, path, patient, age, sex, view, one float32 column a class) and its report.

    Labels are 0, 1, or NaN where a table of your own leaves them open.
    """

    root: Path
    frame: pd.DataFrame
    classes: tuple[str, ...]
    report: Report
    drawn: bool
    table: Path

    def labels(self) -> np.ndarray:
        """(n, classes) float32."""
        return self.frame[list(self.classes)].to_numpy(np.float32)

    def has_finding(self) -> np.ndarray:
        """(n,) bool: at least one class other than 'No Finding' is positive."""
        findings = [c for c in self.classes if c != NO_FINDING]
        return (self.frame[findings].to_numpy(np.float32) == 1).any(1)


def find_images(root: str | Path, *, depth: int = 5) -> list[str]:
    """Image files under ``root``, sorted folder by folder; paths as text, for a hundred thousand of them take a while."""
    files, above = [], os.fspath(root).rstrip(os.sep).count(os.sep)
    for folder, subfolders, names in os.walk(os.fspath(root).rstrip(os.sep)):
        level = folder.count(os.sep) - above
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".")) if level < depth else []
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                files.append(os.path.join(folder, name))
    return files


def _by_name(ids: pd.Series, root: Path, report: Report) -> dict[str, str]:
    """Image id -> file: by file name, or by the end of the path where a table of one's own names folders too."""
    files: dict[str, str] = {}
    folders = int(ids.str.count("/").max()) if len(ids) else 0
    top = len(os.path.join(os.fspath(root), ""))
    for path in find_images(root):
        inside = path[top:].split(os.sep)
        for length in range(1, min(folders + 1, len(inside)) + 1):
            name = "/".join(inside[-length:])
            if files.setdefault(name, path) is not path and folders == 0:
                report.add("images found twice, first kept", [name])
    if folders == 0:
        return files
    # a table may also count folders from above root: 'archive/train/p1/x.png' for root/train/p1/x.png
    wanted = {}
    for name in ids:
        parts = name.split("/")
        tails = ["/".join(parts[i:]) for i in range(len(parts) - 1)] or [name]
        found = next((files[t] for t in tails if t in files), None)
        if found is not None:
            wanted[name] = found
    used = set(wanted.values())
    wanted.update({p[top:].replace(os.sep, "/"): p for p in files.values() if p not in used})
    return wanted


def find_table(root: Path, csv: str | Path = "") -> Path:
    """The label table: ``csv`` (also relative to ``root``), or the NIH one in ``root``.

    Raises
    ------
    FileNotFoundError
        Names where it was looked for.
    """
    if csv:
        for path in (Path(csv).expanduser(), root / csv):
            if path.is_file():
                return path
        raise FileNotFoundError(f"csv: no file {csv} (nor {root / csv})")
    for name in TABLES:
        for path in (root / name, root / "sample" / name):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{root} holds none of {', '.join(TABLES)}: is it the data folder? "
                            "A table of your own goes into the parameter csv.")


def _column(frame: pd.DataFrame, key: str) -> str | None:
    lower = {str(c).strip().lower(): c for c in frame.columns}
    return next((lower[n.lower()] for n in _META[key] if n.lower() in lower), None)


def _patient_of(ids: pd.Series) -> pd.Series:
    return ids.str.extract(r"^(\d{8})_\d{3}\.", expand=False)


def read_index(root: str | Path, *, classes: str = "nih14", csv: str | Path = "") -> Index:
    """Read the table and find its images.

    Parameters
    ----------
    root : path
        The data folder (see :func:`charmlib.data.paths.resolve_data_root`).
    classes : {'nih14', 'nih15', 'own'}
        'own' takes the classes from the table: the 0/1 columns, or all labels of a ``Finding Labels`` column.
    csv : path
        A table other than the NIH one: an image column (``Image Index``, ``ImageID``, ``id``, ``path`` ...), labels as
        above, and preferably a patient column.

    Returns
    -------
    Index
        Its report names what was odd: rows without image, images without row, duplicates, unknown labels. Duplicate
        rows keep the first; rows without an image are left out.

    Raises
    ------
    FileNotFoundError, ValueError
        No table, a column missing, no image at all; the message names the file and the remedy.
    """
    root = Path(root)
    table = find_table(root, csv)
    raw = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    report = Report()

    id_column = _column(raw, "id")
    if id_column is None:
        raise ValueError(f"{table} has no image column: wanted one of {', '.join(_META['id'])}, "
                         f"found {', '.join(map(str, raw.columns))}")
    ids = raw[id_column].str.strip()
    # NIH file names are unique; in a table of one's own the folders may be what tells images apart
    frame = pd.DataFrame({"id": ids.str.removeprefix("./") if csv else ids.map(os.path.basename)})
    if not frame["id"].str.lower().str.endswith(SUFFIXES).all():
        bare = ~frame["id"].str.lower().str.endswith(SUFFIXES)
        frame.loc[bare, "id"] += ".png"
    _read_meta(raw, frame, table, report)
    names = _read_labels(raw, frame, table, report, classes)

    twice = frame["id"].duplicated()
    report.add("rows given twice, first kept", frame.loc[twice, "id"])
    frame = frame[~twice]
    files = _by_name(frame["id"], root, report)
    missing = ~frame["id"].isin(files.keys())
    report.add("rows without image, left out", frame.loc[missing, "id"])
    known = set(frame["id"])
    report.add("images without row, left out", (n for n in files if n not in known))
    frame = frame[~missing].copy()
    if frame.empty:
        raise FileNotFoundError(f"none of the {len(missing)} images that {table} lists is under {root}: "
                                f"looked {len(files)} image files through, for example for {next(iter(known), '?')}")
    frame["path"] = [files[i] for i in frame["id"]]
    frame = frame[["id", "path", "patient", "age", "sex", "view", *names]].reset_index(drop=True)
    return Index(root, frame, tuple(names), report, is_drawn(root), table)


def _read_meta(raw: pd.DataFrame, frame: pd.DataFrame, table: Path, report: Report) -> None:
    """Fill patient, age, sex and view of ``frame``."""
    patient = _column(raw, "patient")
    if patient is not None:
        frame["patient"] = raw[patient].str.strip().str.removesuffix(".0")
    else:
        frame["patient"] = _patient_of(frame["id"])
        report.add("no patient column; taken from NIH file names", [table.name] * bool(frame["patient"].notna().any()))
    unknown = frame["patient"].isna() | (frame["patient"] == "")
    report.add("no patient known, each image counted as one of its own", frame.loc[unknown, "id"])
    frame["patient"] = frame["patient"].str.lstrip("0").mask(unknown, "image:" + frame["id"])
    age = _column(raw, "age")
    digits = raw[age].str.extract(r"^\s*(\d+)", expand=False) if age is not None else pd.Series(np.nan, frame.index)
    frame["age"] = pd.to_numeric(digits, errors="coerce").astype("float32")  # '060Y' in the sample layout
    report.add("ages above 120, kept as they are", frame.loc[frame["age"] > 120, "id"])
    for key in ("sex", "view"):
        column = _column(raw, key)
        frame[key] = raw[column].str.strip() if column is not None else ""


def _read_labels(raw, frame, table, report, classes) -> list[str]:
    """Fill one column a class of ``frame`` and return their names."""
    lower = {str(c).strip().lower(): c for c in raw.columns}
    findings = next((lower[n.lower()] for n in _FINDINGS if n.lower() in lower), None)
    wanted = {"nih14": list(NIH14), "nih15": list(NIH15)}.get(classes)
    if findings is not None:
        sets = [{canonical(part) for part in text.split("|") if part.strip()} for text in raw[findings]]
        seen = set().union(*sets) if sets else set()
        if wanted is None:
            wanted = sorted(seen - {NO_FINDING})
        unknown = seen - set(wanted) - {NO_FINDING}
        for name in sorted(unknown):
            report.add(f"label {name!r} is not among the classes, its images keep their other labels",
                       (i for i, s in zip(frame["id"], sets) if name in s))
        report.add("rows with an empty label, taken as no finding", (i for i, s in zip(frame["id"], sets) if not s))
        if classes != "own":
            report.add("rows with 'No Finding' beside a finding, finding kept",
                       (i for i, s in zip(frame["id"], sets) if NO_FINDING in s and len(s) > 1))
        for name in wanted:
            positive = np.array([name in s for s in sets], dtype=np.float32)
            if name == NO_FINDING:
                positive = np.array([not (s - {NO_FINDING}) for s in sets], dtype=np.float32)
            frame[name] = positive
        return wanted
    meta = {_column(raw, key) for key in _META} | {c for c in raw.columns if str(c) in _IGNORED}
    columns = [c for c in raw.columns if c not in meta and not str(c).startswith("Unnamed:")]
    by_name = {canonical(str(c)): c for c in columns}
    if wanted is None:
        wanted = [str(c) for c in columns if _binary(raw[c]) is not None]
        _refuse_nearly_binary(raw, [c for c in columns if str(c) not in wanted], table)
        report.add("columns that hold other things than 0, 1 and blanks, not used as classes",
                   (c for c in columns if str(c) not in wanted))
        by_name = {str(c): c for c in columns}
        if not wanted:
            raise ValueError(f"{table} has neither a 'Finding Labels' column nor columns of 0 and 1: "
                             f"found {', '.join(map(str, raw.columns))}")
    absent = [c for c in wanted if c not in by_name and c != NO_FINDING]
    if absent:
        raise ValueError(f"{table} has no 'Finding Labels' column and lacks columns for {', '.join(absent)}; "
                         "for classes of your own say classes: own")
    for name in wanted:
        if name == NO_FINDING and name not in by_name:
            frame[name] = (frame[[c for c in wanted if c != NO_FINDING]].max(axis=1) == 0).astype("float32")
            continue
        values = _binary(raw[by_name[name]])
        if values is None:
            raise ValueError(f"{table}: column {name!r} holds other things than 0, 1 and blanks")
        frame[name] = values
    return list(wanted)


def _refuse_nearly_binary(raw: pd.DataFrame, columns, table: Path) -> None:
    """A column of 0 and 1 with a few other values is a class with mistakes in it, not another kind of column."""
    for name in columns:
        values = raw[name].str.strip().str.lower()
        odd = ~values.isin(["0", "1", "0.0", "1.0", "-1", "-1.0", "", "nan", "true", "false"])
        if 0 < odd.mean() <= 0.1:
            shown = ", ".join(f"row {i + 2}: {values[i]!r}" for i in values.index[odd][:3])
            raise ValueError(f"{table}: column {name!r} holds 0, 1 and blanks but for {odd.sum()} rows ({shown}). Mend them, "
                             "or leave the column out if it is no class.")


def _binary(column: pd.Series) -> np.ndarray | None:
    """0, 1 and NaN (blank, nan, -1 for uncertain) as float32; None if anything else is there."""
    text = column.str.strip().str.lower()
    numbers = pd.to_numeric(text.replace({"": "nan", "true": "1", "false": "0"}), errors="coerce")
    odd = numbers.isna() & ~text.isin(["", "nan"])
    numbers = numbers.mask(numbers == -1)
    if odd.any() or not numbers.dropna().isin([0, 1]).all():
        return None
    return numbers.to_numpy(np.float32)


def is_drawn(root: str | Path) -> bool:
    """Whether the folder holds drawn phantoms rather than radiographs (its mark is ``PHANTOM.json``)."""
    mark = Path(root) / PHANTOM_MARK
    return mark.is_file() and bool(json.loads(mark.read_text()).get("drawn"))


def read_list(root: Path, names: Sequence[str]) -> set[str] | None:
    """The image names of the first list that is there, or None."""
    for name in names:
        path = Path(root) / name
        if path.is_file():
            return {os.path.basename(line.strip()) for line in path.read_text().splitlines() if line.strip()}
    return None
