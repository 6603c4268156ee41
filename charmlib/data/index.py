"""The table of images: id, path, patient, age, sex, view, labels. Reads three Kaggle layouts and other tables.

- ``nih-chest-xrays/data``: ``images_001..012/images/*.png``, ``Data_Entry_2017.csv``, two official lists;
- ``khanfashee/nih-chest-x-ray-14-224x224-resized``: ``images-224/images-224/*.png``, lists named ``*_NIH.txt``;
- ``nih-chest-xrays/sample``: ``sample/images/*.png``, ``sample_labels.csv``, no lists.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib import nih
from charmlib.nih import NIH14, NIH15, NO_FINDING, PHANTOM_MARK, TABLES, canonical

SUFFIXES = (".png", ".jpg", ".jpeg")
_COLUMNS = {"id": ("Image Index", "ImageID", "image_id", "image", "id", "path", "filename"),
            "patient": ("Patient ID", "PatientID", "patient_id", "patient"),
            "age": ("Patient Age", "PatientAge", "age"),
            "sex": ("Patient Gender", "Patient Sex", "PatientSex", "sex", "gender"),
            "view": ("View Position", "ViewPosition", "view"),
            "findings": ("Finding Labels", "labels", "findings")}
_IGNORED = ("Follow-up #", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]", "OriginalImageWidth",
            "OriginalImageHeight", "OriginalImagePixelSpacing_x", "OriginalImagePixelSpacing_y", "split", "fold")


@dataclass
class Report:
    """Irregularities of the data: kind -> names. Whatever is left out of a data set is named here."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names: Iterable) -> None:
        """Note names under a kind; without names nothing is noted."""
        if names := [str(n) for n in names]:
            self.found.setdefault(kind, []).extend(names)

    def __str__(self) -> str:
        lines = [f"{kind}: {len(names)} ({', '.join(names[:5])}"
                 + (f" ... and {len(names) - 5} more)" if len(names) > 5 else ")") for kind, names in self.found.items()]
        return "\n".join(lines) or "nothing odd found"


@dataclass
class Index:
    """The table of images (``frame``: id, path, patient, age, sex, view, one float32 column a class) and its report.

    Labels are 0, 1, or NaN where a table leaves them open.
    """

    root: Path
    frame: pd.DataFrame
    classes: tuple[str, ...]
    report: Report
    drawn: bool
    table: Path
    normal_class: str = ""
    patients_from: str = ""

    @property
    def findings(self) -> tuple[str, ...]:
        """The classes other than the one that means "no finding"."""
        return tuple(name for name in self.classes if name != self.normal_class)

    def labels(self) -> np.ndarray:
        """(n, classes) float32."""
        return self.frame[list(self.classes)].to_numpy(np.float32)

    def has_finding(self) -> np.ndarray:
        """(n,) bool: at least one class other than ``normal_class`` is positive."""
        return (self.frame[list(self.findings)].to_numpy(np.float32) == 1).any(1)


def read_index(root: str | Path, *, classes: str = "nih14", csv: str | Path = "", normal_class: str = "", blank: str = "auto",
               uncertain: str = "auto", patients: str = "") -> Index:
    """Read the table and find its images.

    Parameters
    ----------
    root : path
        The data folder (see :func:`charmlib.data.paths.resolve_data_root`).
    classes : {'nih14', 'nih15', 'own'}
        'own' takes the classes from the table: the 0/1 columns, or all labels of a ``Finding Labels`` column.
    csv : path
        A table other than the NIH's: an image column (``Image Index``, ``ImageID``, ``id``, ``path`` ...), labels as above,
        and preferably a patient column.

    Returns
    -------
    Index
        Its report names rows without image, images without row, duplicates and unknown labels. Of duplicate rows the first is
        kept; rows without an image are left out.

    Raises
    ------
    FileNotFoundError, ValueError
        No table, a column missing, no image at all; the message names the file and the remedy.
    """
    root, report = Path(root), Report()
    table = _find_table(root, csv)
    raw = pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    id_column = _column(raw, "id")
    if id_column is None:
        raise ValueError(f"{table} has no image column: wanted one of {', '.join(_COLUMNS['id'])}, "
                         f"found {', '.join(raw.columns)}")
    ids = raw[id_column].str.strip()
    # NIH file names are unique; in another table the folders may tell images apart
    frame = pd.DataFrame({"id": ids.str.removeprefix("./") if csv else ids.map(os.path.basename)})
    frame.loc[~frame["id"].str.lower().str.endswith(SUFFIXES), "id"] += ".png"
    _read_meta(raw, frame, table, report)
    names = _read_labels(raw, frame, table, report, classes)

    twice = frame["id"].duplicated()
    report.add("rows given twice, first kept", frame.loc[twice, "id"])
    frame = frame[~twice]
    files = _files_of(frame["id"], root, report)
    missing = ~frame["id"].isin(files.keys())
    report.add("rows without image, left out", frame.loc[missing, "id"])
    known = set(frame["id"])
    report.add("images without row, left out", (n for n in files if n not in known))
    if missing.all():
        raise FileNotFoundError(f"none of the {len(missing)} images that {table} lists is under {root}: "
                                f"looked {len(files)} image files through, for example for {next(iter(known), '?')}")
    frame = frame[~missing]
    frame = frame.assign(path=frame["id"].map(files))[["id", "path", "patient", "age", "sex", "view", *names]]
    return Index(root, frame.reset_index(drop=True), tuple(names), report, is_drawn(root), table,
                 nih.normal_class(names, normal_class), "")


def is_drawn(root: str | Path) -> bool:
    """Whether the folder holds drawn phantoms rather than radiographs (its mark is ``PHANTOM.json``)."""
    mark = Path(root) / PHANTOM_MARK
    return mark.is_file() and bool(json.loads(mark.read_text()).get("drawn"))


def read_list(folder: Path, names: Sequence[str]) -> set[str] | None:
    """The image names of the first of the lists that is in the folder; None without any."""
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    return None if path is None else {os.path.basename(line.strip()) for line in path.read_text().splitlines() if line.strip()}


def _find_table(root: Path, csv: str | Path) -> Path:
    """The label table: ``csv`` (also relative to ``root``), or the NIH's in ``root``."""
    places = (Path(csv).expanduser(), root / csv) if csv else [f / name for name in TABLES for f in (root, root / "sample")]
    for path in places:
        if path.is_file():
            return path
    raise FileNotFoundError(f"csv: no file {csv} (nor {root / csv})" if csv else
                            f"{root} holds none of {', '.join(TABLES)}: is it the data folder? "
                            "A table of your own goes into the parameter csv.")


def _find_images(root: Path, depth: int = 5) -> list[str]:
    """Image files under ``root``, sorted folder by folder; as text, because 100,000 ``Path`` objects take a while."""
    files: list[str] = []
    for folder, subfolders, names in os.walk(root):
        level = len(Path(folder).relative_to(root).parts)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith(".") and level < depth)
        files += [os.path.join(folder, n) for n in sorted(names) if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    return files


def _files_of(ids: pd.Series, root: Path, report: Report) -> dict[str, str]:
    """Image id -> file: by file name, or by the end of the path if the table names folders."""
    files: dict[str, str] = {}
    depth, top = int(ids.str.count("/").max()) + 1 if len(ids) else 1, len(os.path.join(root, ""))
    for path in _find_images(root):
        parts = path[top:].split(os.sep)
        for length in range(1, min(depth, len(parts)) + 1):
            name = "/".join(parts[-length:])
            if files.setdefault(name, path) is not path and depth == 1:
                report.add("images found twice, first kept", [name])
    if depth == 1:
        return files
    found = {}
    for name in ids:
        # a table may also count folders from above root: 'archive/train/p1/x.png' for root/train/p1/x.png
        parts = name.split("/")
        ends = ("/".join(parts[i:]) for i in range(max(len(parts) - 1, 1)))
        if path := next((files[end] for end in ends if end in files), None):
            found[name] = path
    others = sorted(set(files.values()) - set(found.values()))
    return found | {path[top:].replace(os.sep, "/"): path for path in others}


def _column(raw: pd.DataFrame, key: str) -> str | None:
    lower = {c.strip().lower(): c for c in raw.columns}
    return next((lower[n.lower()] for n in _COLUMNS[key] if n.lower() in lower), None)


def _read_meta(raw: pd.DataFrame, frame: pd.DataFrame, table: Path, report: Report) -> None:
    """Fill patient, age, sex and view of ``frame``."""
    if column := _column(raw, "patient"):
        patient = raw[column].str.strip().str.removesuffix(".0")
    else:
        patient = frame["id"].str.extract(r"^(\d{8})_\d{3}\.", expand=False)
        report.add("no patient column; taken from NIH file names", [table.name] * bool(patient.notna().any()))
    unknown = patient.isna() | (patient == "")
    report.add("no patient known, each image counted as one of its own", frame.loc[unknown, "id"])
    frame["patient"] = patient.str.lstrip("0").mask(unknown, "image:" + frame["id"])
    age, sex, view = (raw[c] if (c := _column(raw, key)) else pd.Series("", raw.index) for key in ("age", "sex", "view"))
    years = age.str.extract(r"^\s*(\d+)", expand=False)  # '060Y' in the sample layout
    frame["age"] = pd.to_numeric(years, errors="coerce").astype("float32")
    report.add("ages above 120, kept as they are", frame.loc[frame["age"] > 120, "id"])
    frame["sex"], frame["view"] = sex.str.strip(), view.str.strip()


def _read_labels(raw: pd.DataFrame, frame: pd.DataFrame, table: Path, report: Report, classes: str) -> list[str]:
    """Fill one column a class of ``frame`` and return their names."""
    wanted = {"nih14": list(NIH14), "nih15": list(NIH15)}.get(classes)
    if _column(raw, "findings"):
        return _labels_of_text(raw, frame, report, wanted)
    return _labels_of_columns(raw, frame, table, report, wanted)


def _labels_of_text(raw: pd.DataFrame, frame: pd.DataFrame, report: Report, wanted: list[str] | None) -> list[str]:
    """Labels from one column such as 'Mass|Nodule'."""
    sets = [{canonical(part) for part in text.split("|") if part.strip()} for text in raw[_column(raw, "findings")]]
    seen = set().union(*sets) - {NO_FINDING}
    for name in sorted(seen - set(wanted or seen)):
        report.add(f"label {name!r} is not among the classes, its images keep their other labels",
                   (i for i, s in zip(frame["id"], sets) if name in s))
    report.add("rows with an empty label, taken as no finding", (i for i, s in zip(frame["id"], sets) if not s))
    if wanted is not None:
        report.add("rows with 'No Finding' beside a finding, finding kept",
                   (i for i, s in zip(frame["id"], sets) if NO_FINDING in s and len(s) > 1))
    wanted = sorted(seen) if wanted is None else wanted
    for name in wanted:
        frame[name] = np.array([not s - {name} if name == NO_FINDING else name in s for s in sets], dtype=np.float32)
    return wanted


def _labels_of_columns(raw: pd.DataFrame, frame: pd.DataFrame, table: Path, report: Report, wanted: list[str] | None
                       ) -> list[str]:
    """Labels from one column of 0, 1 and blanks for each class."""
    others = {_column(raw, key) for key in _COLUMNS} | set(_IGNORED)
    columns = {canonical(c) if wanted else c: raw[c] for c in raw.columns if c not in others and not c.startswith("Unnamed:")}
    parsed = {name: _binary(column) for name, column in columns.items()}
    if wanted is None:
        for name, (_, odd) in parsed.items():
            if 0 < odd.mean() <= 0.1:  # a class with mistakes rather than another kind of column
                shown = ", ".join(f"row {i + 2}: {columns[name][i].strip()!r}" for i in odd.index[odd][:3])
                raise ValueError(f"{table}: column {name!r} holds 0, 1 and blanks but for {odd.sum()} rows ({shown}). Mend "
                                 "them, or leave the column out if it is no class.")
        wanted = [name for name, (_, odd) in parsed.items() if not odd.any()]
        report.add("columns that hold other things than 0, 1 and blanks, not used as classes",
                   (name for name in parsed if name not in wanted))
        if not wanted:
            raise ValueError(f"{table} has neither a 'Finding Labels' column nor columns of 0 and 1: "
                             f"found {', '.join(raw.columns)}")
    findings = [name for name in wanted if name != NO_FINDING]
    if absent := [name for name in findings if name not in parsed]:
        raise ValueError(f"{table} has no 'Finding Labels' column and lacks columns for {', '.join(absent)}; "
                         "for classes of your own say classes: own")
    for name in wanted:
        if name not in parsed:  # 'No Finding'
            frame[name] = (frame[findings].max(axis=1) == 0).astype("float32")
            continue
        frame[name], odd = parsed[name]
        if odd.any():
            raise ValueError(f"{table}: column {name!r} holds other things than 0, 1 and blanks")
    return wanted


def _binary(column: pd.Series) -> tuple[pd.Series, pd.Series]:
    """0, 1 and NaN (for blank, nan, and -1 for uncertain) as float32, and where the column holds anything else."""
    text = column.str.strip().str.lower()
    numbers = pd.to_numeric(text.replace({"true": "1", "false": "0"}), errors="coerce")
    return numbers.where(numbers.isin([0, 1])).astype("float32"), ~(numbers.isin([-1, 0, 1]) | text.isin(["", "nan"]))
