"""Label tables and lists as text files: any usual encoding, separator and compression; the names of their columns.

Files beside the table in public data sets: MIMIC-CXR-JPG's metadata, and the images that CXR-LT removes.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import re
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pandas as pd

from charmlib.data.find import kind_of, plain
from charmlib.files import first_line

COLUMNS = {what: tuple(names.split()) for what, names in {
    "id": "imageindex imageid image id path filename imagename imagefile imagefilename imagepath img imgid imgname imgpath "
          "fname dicomid file filepath fpath pathtoimage jpgpath pngpath relativepath sopinstanceuid uid",
    "patient": "patientid patient subjectid subject studypatientid anonpatientid deidpatientid empianon patientnumber "
               "patientno participantid personid ptid pid mrn",
    "age": "patientage age ageatstudy ageyears", "sex": "patientgender patientsex sex gender patientsexdicom",
    "view": "viewposition view projection appa viewpositiondicom", "plane": "frontallateral", "study": "studyid",
    "findings": "findinglabels labels findings findinglabel classname",
    "finding": "finding label class diagnosis disease target",
    "reader": "radid readerid reader raterid rater annotatorid annotator radiologistid radiologist"}.items()}
"""What a column holds -> its names, in small letters and digits alone, the most telling first."""
_PACKED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_LARGEST = 2**30  # bytes that a packed table may unpack to; one of 400,000 images with 14 labels has some 5e7
_EXCEL = "an Excel workbook: save it as CSV (UTF-8), with the ids as text"


@dataclass
class Report:
    """What is odd about a data set: kind -> names. Whatever is left out of a data set is named here."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, kind: str, names: Iterable) -> None:
        """Note names under a kind; without names nothing is noted."""
        if names := [str(n) for n in names]:
            self.found.setdefault(kind, []).extend(names)

    def __str__(self) -> str:
        return "\n".join(
            f"{kind}: {len(names)} ({', '.join(names[:5])}" + (f" ... and {len(names) - 5} more)" if len(names) > 5 else ")")
            for kind, names in self.found.items()) or "nothing odd found"


def key_of(name: str) -> str:
    """A column's name in small letters and digits alone: 'Patient ID', 'patient_id' and 'PatientID' are one."""
    return re.sub(r"[\W_]+", "", name.lower())


def columns_of(raw: pd.DataFrame, what: str) -> list[str]:
    """The columns that may hold the image ``id``, the ``patient`` ... (:data:`COLUMNS`), the most telling first."""
    there = {key_of(column): column for column in raw.columns[::-1]}  # the first of two of one name
    return [there[key] for key in COLUMNS[what] if key in there]


def column_of(raw: pd.DataFrame, what: str) -> str | None:
    """The first of :func:`columns_of`; None without any."""
    return next(iter(columns_of(raw, what)), None)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, UTF-16, UTF-32 or Windows' Latin-1, perhaps packed with gzip, bz2, xz or zip.

    Raises ValueError for a damaged file, a workbook, a web page, a Git LFS pointer ..., or an archive of several files; names
    file and remedy.
    """
    source = path.read_bytes()
    try:
        source = _unzipped(path, source) if source.startswith(b"PK\3\4") else source
        for mark, unpack in _PACKED.items():
            source = _bounded(path, unpack(io.BytesIO(source))) if source.startswith(mark) else source
    except ValueError:
        raise
    except Exception as error:  # of the libraries' own classes; RuntimeError for a password
        raise ValueError(f"{path} is a damaged archive ({first_line(error)}): copy or download it again") from error
    # an empty file may be an empty list
    if what := _EXCEL if source.startswith(b"\xd0\xcf\x11\xe0") else kind_of(source) if source.strip() else "":
        raise ValueError(f"{path} is {what}")
    marks = ((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    wide = [name for mark, name in marks if source.startswith(mark)]
    wide += [name for name, start in (("utf-16-le", 1), ("utf-16-be", 0))  # without a mark: half of the bytes are 0
             if source[start:4096:2].count(0) > len(source[:4096]) / 4]
    for encoding in wide[:1] or ("utf-8-sig", "cp1252", "latin-1"):
        with contextlib.suppress(UnicodeDecodeError):
            return source.decode(encoding)
    raise ValueError(f"{path} is no text: save it as CSV (UTF-8)")


def _unzipped(path: Path, source: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(source)) as archive:
        names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")]
        if len(names) != 1:
            raise ValueError(f"{path} is {_EXCEL}" if "[Content_Types].xml" in names else
                             f"{path} holds {len(names)} files ({', '.join(names[:3])} ...): unpack it and name one")
        return _bounded(path, archive.open(names[0]))


def _bounded(path: Path, unpacked: IO[bytes]) -> bytes:
    if len(content := unpacked.read(_LARGEST + 1)) > _LARGEST:
        raise ValueError(f"{path} unpacks to more than {_LARGEST / 2**20:,.0f} MB, too much for a table: unpack it "
                         "yourself if you trust it")
    return content


def read_table(path: Path) -> pd.DataFrame:
    """A table as text cells, blanks as '': separated by commas, semicolons, tabs or ``|``, or a workbook (with openpyxl).

    Raises ValueError if it is empty, without rows, has a row with more fields than the header, or is what :func:`read_text`
    refuses; names the file.
    """
    if path.suffix.lower() in (".xlsx", ".xlsm", ".xls", ".ods"):
        try:
            raw = pd.read_excel(path, dtype=str, keep_default_na=False)
        except Exception as error:  # openpyxl ends in errors of many classes on damaged files
            raise ValueError(f"{path} is {_EXCEL} ({first_line(error)})") from error
    else:
        raw = _parsed(path, read_text(path))
    raw.columns = [str(column).strip() for column in raw.columns]
    if raw.empty:
        raise ValueError(f"{path} has a header and no rows: wanted one row an image")
    return raw.fillna("") if raw.iloc[:, -1].isna().any() else raw


def _parsed(path: Path, text: str) -> pd.DataFrame:
    text = re.sub(r"\Asep=.\s+", "", text).lstrip("\r\n ")  # Excel's note of the separator
    if not text:
        raise ValueError(f"{path} is empty: wanted a header and one row an image")
    head = text.split("\n", 1)[0]
    separator = max(",;\t|", key=head.count)
    options = {"sep": separator, "dtype": str, "keep_default_na": False, "skipinitialspace": separator in ",;"}
    try:
        raw = pd.read_csv(io.StringIO(text), **options)
        if isinstance(raw.index, pd.RangeIndex):
            return raw
        extra = raw.index.nlevels
        if (raw.iloc[:, -extra:] == "").all(axis=None):  # separators at the end of the rows alone
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pd.errors.ParserWarning)
                return pd.read_csv(io.StringIO(text), index_col=False, **options)
        if extra == 1:  # row names, as R writes them
            return raw.reset_index(drop=True)
        raise pd.errors.ParserError(f"rows have {extra} fields more than the header")
    except pd.errors.ParserError as error:
        raise ValueError(f"{path}: {str(error).strip()}. Put quotes around cells with {separator!r} in them") from error


def listed_names(path: Path) -> list[str]:
    """The image names of a list, backslashes as slashes: one a line, perhaps with labels behind, or a table's image column."""
    text = read_text(path).replace("\\", "/")
    lines = list(filter(None, map(str.strip, text.splitlines())))
    if lines and {key_of(cell) for cell in re.split(r"[,;\t|]", lines[0])} & set(COLUMNS["id"]):
        raw = read_table(path) if len(lines) > 1 else pd.DataFrame(columns=["id"])
        return raw[column_of(raw, "id")].str.strip().str.replace("\\", "/").tolist()
    return [_name(line) for line in lines] if re.search(r"[ ,;|\t\"']", text) else lines


def _name(line: str) -> str:
    """The name at the start of a line, up to a separator or behind its suffix; the whole line if that ends in a suffix."""
    if re.search(r"\.(png|jpe?g)$", line, re.IGNORECASE):
        return line
    cell = re.split(r"[,;\t|]", line)[0].strip().strip("\"'")
    found = re.match(r"(.+?\.(?:png|jpe?g|tiff?|bmp|webp|dcm|dicom))\s", cell, re.IGNORECASE)
    labelled = re.match(r"(\S+)(?:\s+-?[\d.]+)+$", cell)
    return found[1] if found else labelled[1] if labelled else cell


def images_of_studies(raw: pd.DataFrame, table: Path) -> pd.DataFrame:
    """A table of studies, as MIMIC-CXR-JPG's chexpert.csv, with one row an image by the metadata table beside it.

    A table with an image column is returned as it is. Raises ValueError for studies without metadata; names both.
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
