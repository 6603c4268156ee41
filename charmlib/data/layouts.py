"""Files beside the table in public data sets: MIMIC-CXR-JPG's metadata, and the images that CXR-LT removes."""

from pathlib import Path

import pandas as pd

from charmlib.data.find import plain
from charmlib.data.tables import column_of, read_table


def images_of_studies(raw: pd.DataFrame, table: Path) -> pd.DataFrame:
    """A table of studies, as MIMIC-CXR-JPG's chexpert.csv, with one row an image by the metadata table beside it.

    A table with an image column is returned as it is.

    Raises
    ------
    ValueError
        A table of studies without the metadata beside it; names both.
    """
    study = column_of(raw, "study")
    if study is None or column_of(raw, "id"):
        return raw
    for path in sorted(table.parent.glob("*metadata*.csv*")):
        meta = read_table(path)
        if column_of(meta, "study") and column_of(meta, "id"):
            wanted = [column for what in ("id", "view") if (column := column_of(meta, what)) and column not in raw.columns]
            meta = meta.assign(**{study: meta[column_of(meta, "study")]})[[study, *wanted]]
            return raw.merge(meta, on=study).reset_index(drop=True)
    raise ValueError(f"{table} lists studies ({study}) rather than images: put the table of their images beside it, such as "
                     "mimic-cxr-2.0.0-metadata.csv.gz with dicom_id and study_id")


def removed_names(table: Path) -> tuple[set[str], str]:
    """The images of ``Removal.csv`` beside the table (CXR-LT 2026) as plain names without folders, and the file's name."""
    for path in sorted(table.parent.glob("[Rr]emov*.csv*")):
        if path != table and (column := column_of(raw := read_table(path), "id")):
            return {last_part(name) for name in raw[column]}, path.name
    return set(), ""


def last_part(name: str) -> str:
    """The plain name of an image without its folders."""
    return plain(name.strip().replace("\\", "/").rpartition("/")[2])
