"""The labels of a table: one column of names, one column a class, one row a reader or box.

Names are separated by ``|`` or ``;``, or stand in a Python list, as in PadChest. A column of a class holds 0, 1, words such as
yes and no, blanks, or -1 for uncertain, as in CheXpert (Irvin et al., AAAI 2019, arXiv 1901.07031).
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.tables import COLUMNS, Report, column_of, columns_of, key_of
from charmlib.nih import NIH14, NIH15, NO_FINDING, canonical, is_normal

_IGNORED = {key_of(name) for name in (
    "Follow-up #", "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]", "OriginalImageWidth",
    "OriginalImageHeight", "OriginalImagePixelSpacing_x", "OriginalImagePixelSpacing_y", "split", "fold")}
_BLANK, _UNCERTAIN, _ODD = 2.0, 3.0, 4.0  # beside 0 and 1, while a column is read
_NOTHING = ("", "nan", "na", "n/a", "none", "null", "nil", "<na>", "-", "?", "unknown", "missing", "not mentioned")
_WORDS = {**dict.fromkeys(("true", "yes", "y", "t", "positive", "present"), 1.0),
          **dict.fromkeys(("false", "no", "n", "f", "negative", "absent"), 0.0),
          **dict.fromkeys(_NOTHING, _BLANK), **dict.fromkeys(("uncertain", "u", "equivocal", "maybe", "possible"), _UNCERTAIN)}
_CHEXPERT = {"frontallateral", "appa", "enlargedcardiomediastinum", "lungopacity", "lunglesion", "pleuralother",
             "airspaceopacity"}
_BOX = {"x", "y", "w", "h", "width", "height", "xmin", "ymin", "xmax", "ymax", "x1", "y1", "x2", "y2", "bboxx"}


def read_labels(raw: pd.DataFrame, ids: pd.Series, table: Path, report: Report, *, classes: str = "nih14",
                normal_class: str = "", blank: str = "auto", uncertain: str = "auto") -> pd.DataFrame:
    """One float32 column a class, one row an image: 0, 1 or NaN; the index holds the image's first row in ``raw``.

    The keywords are the parameters of these names. Rows of several readers are joined by majority, where an equal split is
    unknown. Rows of one box each are joined to what any of them says. Of other rows of one image the first is kept. Raises
    ValueError for no labels, a class without column, unclear values, or a class named like a column of our own.
    """
    wanted = {"nih14": list(NIH14), "nih15": list(NIH15)}.get(classes)
    text = next((c for c in columns_of(raw, "findings") if (_parsed(raw[c]) == _ODD).any()), None)
    labels = None if text else _labels_of_columns(raw, table, report, wanted, blank, uncertain)
    if labels is None:
        labels = _labels_of_text(raw[text or column_of(raw, "finding")], ids, report, wanted, normal_class, blank == "unknown")
    if clash := {"id", "path", "patient", "age", "sex", "view"} & set(labels):
        raise ValueError(f"{table}: a class cannot be called {min(clash)!r}, as one of our own columns is: rename it")
    labels = _one_row_an_image(labels, raw, ids, report)
    report.add("classes without a negative label: their AUC is undefined (parameter blank says what empty labels mean)",
               (name for name, column in labels.items() if not (column == 0).any() and (column == 1).any()))
    return labels


def _labels_of_text(column: pd.Series, ids: pd.Series, report: Report, wanted: list[str] | None, named: str, unknown: bool
                    ) -> pd.DataFrame:
    """Labels from one column such as 'Mass|Nodule'; empty cells are NaN if ``unknown``."""
    codes, texts = pd.factorize(column)
    sets = [set(_names(text, r"[|;,]" if wanted else r"[|;]")) for text in texts]
    places = {n for n in set().union(*sets) if n.lower().startswith("loc ")}
    report.add("places among the labels (loc ...), left out", sorted(places))
    sets = [s - places for s in sets]
    normal = {n for n in set().union(*sets) if is_normal(n) or n == named}
    seen = set().union(*sets) - (normal - {named})
    wanted = sorted(seen) if wanted is None else wanted
    said = {f"label {name!r} is not among the classes, its images keep their other labels": [name in s for s in sets]
            for name in sorted(seen - set(wanted) - normal)}
    said |= {f"rows with an empty label, taken as {'unknown' if unknown else 'no finding'}": [not s for s in sets],
             "rows with 'No Finding' beside a finding, finding kept": [bool(s & normal) and bool(s - normal) for s in sets]}
    for kind, chosen in said.items():
        report.add(kind, ids[np.array(chosen, bool)[codes]])
    values = {name: [np.nan if unknown and not s else not s - normal if name in (NO_FINDING, named) else name in s
                     for s in sets] for name in wanted}
    return pd.DataFrame({name: np.array(v, np.float32)[codes] for name, v in values.items()}, column.index)


def _names(text: str, split: str) -> list[str]:
    """The labels in a cell: names with separators between them, or a Python list."""
    if text.strip()[:1] in ("[", "(", "{"):  # not always a literal: numpy prints lists without commas, pandas nan among texts
        parts = [one or other for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)] or text.strip("[](){} ").split(",")
    else:
        parts = re.split(split, text)
    return [canonical(part) for part in parts if part.strip().lower() not in _NOTHING]


def _labels_of_columns(raw: pd.DataFrame, table: Path, report: Report, wanted: list[str] | None, blank: str, uncertain: str
                       ) -> pd.DataFrame | None:
    """Labels from one column a class; None if there is none and a column of names is there instead."""
    others = {column_of(raw, what) for what in COLUMNS if what not in ("findings", "finding")} | _box_columns(raw)
    named = [name for name in raw.columns if name and not name.startswith("Unnamed:")]
    columns: dict[str, pd.Series] = {}
    for name in (name for name in named if name not in others and key_of(name) not in _IGNORED):
        if (label := canonical(name) if wanted else name) in columns:
            raise ValueError(f"{table} has two columns for the class {label!r}: rename or delete one")
        columns[label] = raw[name]
    parsed = {name: _parsed(column) for name, column in columns.items()}
    odd = {name: values == _ODD for name, values in parsed.items()}
    if wanted is None:
        for name in columns:
            if 0 < odd[name].mean() <= 0.1:  # a class with mistakes rather than another kind of column
                shown = ", ".join(f"row {i + 2}: {columns[name].iloc[i].strip()!r}" for i in np.flatnonzero(odd[name])[:3])
                raise ValueError(f"{table}: column {name!r} holds 0, 1 and blanks but for {odd[name].sum()} rows ({shown}). "
                                 "Mend them, or leave the column out if it is no class.")
        wanted = [name for name in columns if not odd[name].any()]
        if not wanted:
            if (names := column_of(raw, "finding")) and pd.to_numeric(raw[names], errors="coerce").isna().any():
                return None
            raise ValueError(f"{table} has neither a 'Finding Labels' column nor columns of 0 and 1: found {', '.join(named)}"
                             + (f" and {unnamed} columns without a name. `python -m charmlib predict` needs no labels."
                                if (unnamed := raw.shape[1] - len(named)) else ""))
        if twice := [name for name in wanted if re.sub(r"\.\d+$", "", name) in {*wanted} - {name}]:  # as pandas names them
            raise ValueError(f"{table} has two columns for the class {twice[0].rpartition('.')[0]!r}: rename or delete one")
        report.add("columns that hold other things than 0, 1 and blanks, not used as classes",
                   (name for name in columns if name not in wanted))
    findings = [name for name in wanted if name != NO_FINDING]
    if absent := [name for name in findings if name not in parsed]:
        raise ValueError(f"{table} has no 'Finding Labels' column and lacks columns for {', '.join(absent)}; "
                         "for classes of your own say classes: own")
    if wrong := [name for name in wanted if name in parsed and odd[name].any()]:
        raise ValueError(f"{table}: column {wrong[0]!r} holds other things than 0, 1 and blanks")
    labels = _decided({name: parsed[name] for name in wanted if name in parsed}, raw, report, blank, uncertain)
    if NO_FINDING in wanted and NO_FINDING not in parsed:
        labels[NO_FINDING] = (labels[findings].max(axis=1) == 0).astype("float32")
    return labels[wanted]


def _decided(parsed: dict[str, np.ndarray], raw: pd.DataFrame, report: Report, blank: str, uncertain: str
             ) -> pd.DataFrame:
    """0, 1 and NaN for the values read, with blanks and -1 as the parameters or the kind of table say."""
    keys = {key_of(name) for name in raw.columns}
    chexpert = len(keys & _CHEXPERT) > 1 or {"subjectid", "studyid"} <= keys
    decoded, default = np.array([0, 1, np.nan, np.nan, np.nan], np.float32), ("unknown", "the default")
    for code, said, parameter, kind, auto in (
            (_BLANK, blank, "blank", "empty labels", ("0", "as in CheXpert") if chexpert else default),
            (_UNCERTAIN, uncertain, "uncertain", "uncertain labels (-1)", default)):
        meaning, why = auto if said == "auto" else (said, "as given")
        decoded[int(code)] = np.nan if meaning == "unknown" else float(meaning)
        report.add(f"classes with {kind}, taken as {meaning} ({why}; parameter {parameter})",
                   (name for name, values in parsed.items() if (values == code).any()))
    return pd.DataFrame({name: decoded[values.astype(int)] for name, values in parsed.items()}, raw.index)


def _parsed(column: pd.Series) -> np.ndarray:
    """(n,) of 0, 1, and the codes for blank, uncertain and odd."""
    codes, texts = pd.factorize(column)
    return np.array([_value(text.strip().lower()) for text in texts])[codes]


def _value(word: str) -> float:
    try:
        return _WORDS[word] if word in _WORDS else {0: 0.0, 1: 1.0, -1: _UNCERTAIN}.get(float(word.replace(",", ".")), _ODD)
    except ValueError:
        return _ODD


def _box_columns(raw: pd.DataFrame) -> set[str]:
    found = {name for name in raw.columns if key_of(name) in _BOX}
    return found if len(found) > 3 else set()


def _one_row_an_image(labels: pd.DataFrame, raw: pd.DataFrame, ids: pd.Series, report: Report) -> pd.DataFrame:
    repeated = ids.duplicated(keep=False)
    if not repeated.any():
        return labels
    reader, first = column_of(raw, "reader"), labels[~ids.duplicated()].copy()
    groups, unique = labels[repeated].groupby(ids[repeated], sort=False), ids[repeated].drop_duplicates()
    if not reader and not _box_columns(raw):
        differ = groups.nunique(dropna=False).max(axis=1) > 1
        report.add("rows given twice, first kept", ids[ids.duplicated()])
        report.add("rows of one image that disagree in their labels, first kept (a column reader_id joins them by majority)",
                   differ.index[differ])
        return first
    joined = groups.max()
    if reader:
        share = labels[repeated].groupby([ids[repeated], raw.loc[repeated, reader]]).max().groupby(level=0).mean()
        joined = (share > 0.5).astype("float32").mask(share.isna() | (share == 0.5))
        report.add("images whose readers split evenly on a class, unknown there", share.index[(share == 0.5).any(axis=1)])
    report.add(f"rows of several readers (column {reader!r}), joined by majority" if reader else
               "rows of several boxes or findings of an image, joined", unique)
    first.loc[unique.index] = joined.loc[unique].to_numpy()
    report.add("classes that no image has by majority", labels.columns[(labels == 1).any() & ~(first == 1).any()])
    return first
