"""The table of images: id, path, patient, age, sex, view, labels. Reads three Kaggle layouts and other tables.

- ``nih-chest-xrays/data``: ``images_001..012/images/*.png``, ``Data_Entry_2017.csv``, two official lists;
- ``khanfashee/nih-chest-x-ray-14-224x224-resized``: ``images-224/images-224/*.png``, lists named ``*_NIH.txt``;
- ``nih-chest-xrays/sample``: ``sample/images/*.png``, ``sample_labels.csv``, no lists.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib import nih
from charmlib.data.find import DICOM_SUFFIXES, SUFFIXES, find_files, has_suffix, match
from charmlib.data.labels import read_labels
from charmlib.data.patients import read_patients
from charmlib.data.tables import Report, column_of, columns_of, images_of_studies, last_part, read_table, removed_names
from charmlib.files import read_json


@dataclass
class Index:
    """The table of images (``frame``: id, path, patient, age, sex, view, one float32 column a class) and its report.

    Labels are 0, 1, or NaN where a table leaves them open. ``normal_class`` is the class that means "no finding", '' without
    one. ``patients_from`` says what a patient is, ``why_unknown`` why none is known: '' where ``patients: none`` says so.
    """

    root: Path
    frame: pd.DataFrame
    classes: tuple[str, ...]
    report: Report
    drawn: bool
    table: Path
    normal_class: str = ""
    patients_from: str = ""
    why_unknown: str = ""

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


def read_index(root: str | Path, *, csv: str | Path = "", patients: str = "", **reading) -> Index:
    """Read the table and find its images in the data folder ``root`` (:func:`charmlib.data.paths.resolve_data_root`).

    ``csv`` is a table other than the NIH's: an image column (``Image Index``, ``ImageID``, ``dicom_id``, ``path`` ...), labels
    (:mod:`charmlib.data.labels`), and preferably a patient column. ``patients`` is a column, or 'none' for each image as a
    patient of its own; '' looks for them (:mod:`charmlib.data.patients`). ``classes`` is 'nih14', 'nih15', or 'own' for those
    of the table; it goes to :func:`charmlib.data.labels.read_labels` with ``normal_class``, ``blank`` and ``uncertain``.

    The report names rows without image, which are left out, images without row, duplicates and unknown labels. Raises
    FileNotFoundError or ValueError for no table, a column missing, or no image at all; names the file and the remedy.
    """
    root, report = Path(root), Report()
    table = _find_table(root, csv)
    raw = images_of_studies(read_table(table), table)
    ids, found, why_none = _find(raw, table, root, bool(csv), report)
    removed, source = removed_names(table)
    if removed:
        gone = ids.map(last_part).isin(removed)
        report.add(f"rows that {source} lists, left out", ids[gone])
        raw, ids = raw[~gone], ids[~gone]
    labels = read_labels(raw, ids, table, report, **reading)
    if why_none:
        raise FileNotFoundError(why_none)
    raw, ids = raw.loc[labels.index], ids[labels.index]
    files = ids.map(found)
    kept = files.notna()
    report.add("rows without image, left out", ids[~kept])
    if not kept.any():
        raise FileNotFoundError(f"no image of {table} is left:\n{report}")
    raw, ids, files, labels = raw[kept], ids[kept], files[kept], labels[kept]
    patient, patients_from, why_unknown = read_patients(raw, ids, files, patients)
    if (unnamed := ~ids.map(has_suffix)).any():
        ids = ids.mask(unnamed & files.map(has_suffix), ids + "." + files.str.rpartition(".")[2])
    report.add("no patient known, each image counted as one of its own", ids[patient == ""])
    frame = pd.DataFrame({"id": ids, "path": f"{root}/" + files, "patient": patient.mask(patient == "", "image:" + ids),
                          **_meta(raw, ids, report)})
    frame = pd.concat([frame, labels], axis=1).reset_index(drop=True)
    return Index(root, frame, tuple(labels), report, is_drawn(root), table,
                 nih.normal_class(labels, reading.get("normal_class", "")), patients_from, why_unknown)


def is_drawn(root: str | Path) -> bool:
    """Whether the folder holds drawn phantoms rather than radiographs (its mark is ``PHANTOM.json``)."""
    mark = Path(root) / nih.PHANTOM_MARK
    return mark.is_file() and bool(read_json(mark, "mark of drawn phantoms", "draw the phantoms again").get("drawn"))


def _find_table(root: Path, csv: str | Path) -> Path:
    """The label table: ``csv`` (also relative to ``root``), or the NIH's in ``root``."""
    places = (Path(csv).expanduser(), root / csv) if csv else [f / name for name in nih.TABLES for f in (root, root / "sample")]
    if found := next(filter(Path.is_file, places), None):
        return found
    deeper = next((path.parent for name in nih.TABLES for path in sorted(root.glob(f"*/{name}"))), None)
    raise FileNotFoundError(f"csv: no file {csv} (nor {root / csv})" if csv else
                            f"{root} holds none of {', '.join(nih.TABLES)}: "
                            + (f"say data_root: {deeper}" if deeper else "is it the data folder? A table of your own goes into "
                               "the parameter csv."))


def _find(raw: pd.DataFrame, table: Path, root: Path, own: bool, report: Report) -> tuple[pd.Series, dict[str, str], str]:
    """The ids of all rows, id -> file below ``root``, and why no file was found or ''; the first column of files decides."""
    columns = columns_of(raw, "id") or columns_of(raw, "patient")  # as in RSNA's, where each patient has one image
    if not columns:
        raise ValueError(f"{table} has no image column: wanted Image Index, image_id, path, filename, dicom_id or the like, "
                         f"found {', '.join(raw.columns)}")
    files, others = find_files(root)
    for column in columns:
        names = [name.strip().replace("\\", "/") for name in raw[column]]
        # NIH file names are unique; in another table the folders may tell images apart
        names = [name.removeprefix("./") if own else name.rpartition("/")[2] for name in names]
        found, further = match(names, files)
        if found:
            break
    else:
        return raw[columns[0]].str.strip(), {}, _nothing_found(raw[columns[0]], table, root, files, others)
    if column != columns[0]:
        report.add("columns whose names are no image files", columns[:columns.index(column)])
    folders, known = any("/" in name for name in names), {*found.values(), *further}
    for kind, some in (("images found twice, first kept", further),
                       ("images without row, left out", (file for file in files if file not in known))):
        report.add(kind, (file if folders else file.rpartition("/")[2] for file in some))
    return pd.Series(names, raw.index, dtype="str"), found, ""


def _nothing_found(names: pd.Series, table: Path, root: Path, files: list[str], others: Counter) -> str:
    """Why none of the images of a table was found, with an example of each side and the likely remedy."""
    start = f"none of the {len(names)} images that {table} lists ({names.name}: {names.iloc[0]!r} ...) is under {root}"
    if files:
        return (f"{start}. The {len(files)} images there have other names, such as {files[0]!r}. Is data_root the folder of "
                "these images, and does the column hold their names?")
    if packed := [suffix for suffix in (".zip", ".gz", ".tar", ".tgz", ".7z", ".rar") if others[suffix]]:
        return f"{start}. There are archives ({', '.join(packed)}) and no images: unpack them."
    kinds = ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in others.most_common(4))
    return (f"{start}. No file there ends in {', '.join(SUFFIXES + DICOM_SUFFIXES)}{f' (but {kinds})' if kinds else ''}: "
            "name another data_root.")


def _meta(raw: pd.DataFrame, ids: pd.Series, report: Report) -> dict[str, pd.Series]:
    """Age in years, sex and view."""
    columns = {what: column_of(raw, what) for what in ("age", "sex", "view", "plane")}
    texts = {what: raw[c].str.strip() if c else pd.Series("", raw.index) for what, c in columns.items()}
    report.add("columns of 0 and 1 that are read as age or view, not as a class",
               (columns[what] for what in ("age", "view") if len(raw) > 2 and set(texts[what].unique()) == {"0", "1"}))
    years = pd.to_numeric(texts["age"], errors="coerce").astype("float64")
    other = texts["age"][years.isna() & (texts["age"] != "")]
    parts = other.str.extract(r"^(\d+)\s*([DWMdwm]?)")  # '060Y' in the sample layout, '018M' in DICOM files
    per_year = parts[1].str.upper().map({"D": 365.25, "W": 52.18, "M": 12.0}).fillna(1.0)
    years.loc[other.index] = parts[0].astype("float64") / per_year.astype("float64")
    report.add("ages above 120, kept as they are", ids[years > 120])
    view = texts["view"].mask(texts["view"] == "", texts["plane"])  # CheXpert's laterals have no AP/PA
    return {"age": years.where(years >= 0).astype("float32"), "sex": texts["sex"], "view": view}
