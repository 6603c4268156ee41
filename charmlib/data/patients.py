"""Who the patient of an image is: a column, NIH file names, or the folders of CheXpert, MIMIC-CXR and BIDS."""

import pandas as pd

from charmlib.data.tables import column_of, key_of
from charmlib.nih import EACH_ITS_OWN

_PATHS = {"the first eight digits of NIH file names": r"(?:^|/)(\d{8})_\d{3}(?:\.\w+)?$",
          "patientNNNN in the path": r"(?i)(?:^|[/_-])(patient[-_ ]?\d+)(?=[/_.-]|$)",
          "pNNNN in the path": r"(?:^|/)(p\d{4,})(?=/)",
          "sub-NNNN in the path": r"(?i)(?:^|/)((?:sub|subject|subj)[-_][a-z]*\d+)(?=[/_]|$)"}
_MISSING = ("", "nan", "none", "null", "n/a", "<na>")


def read_patients(raw: pd.DataFrame, ids: pd.Series, files: pd.Series, named: str = "") -> tuple[pd.Series, str, str]:
    """The patient of each image, '' where it is unknown; what a patient is; and why patients are unknown, or ''.

    ``ids`` and ``files`` are the image's name in the table and its file below the data folder. ``named`` is the parameter
    ``patients``: a column, 'none', or '' to look for the patients. Raises ValueError if there is no column of that name.
    """
    nobody = pd.Series("", raw.index)
    if named == "none":
        return nobody, EACH_ITS_OWN, ""
    column = next((c for c in raw.columns if key_of(c) == key_of(named)), None) if named else column_of(raw, "patient")
    if named and column is None:
        raise ValueError(f"patients: the table has no column {named!r}, it has {', '.join(raw.columns)}; or say patients: none")
    if column:
        text = raw[column].str.strip()
        if (spoiled := text.str.fullmatch(r"\d([.,]\d+)?E\+\d+", case=False)).any():
            return nobody, EACH_ITS_OWN, (
                f"column {column!r} holds {spoiled.sum():,} ids in Excel's scientific notation (as {text[spoiled].iloc[0]}), "
                "where many patients have one: take the ids from the original table, or name another column (patients: COLUMN)")
        known = ~text.str.lower().isin(_MISSING)
        if known.any():
            unknown = f"; {(~known).sum():,} images without one count as one patient each" if not known.all() else ""
            return _numbers(text).where(known, ""), f"column {column!r}{unknown}", ""
    for what, pattern in _PATHS.items():
        for names in (ids, files):
            who = names.str.extract(pattern, expand=False)
            if who.notna().all():
                return _numbers(who.str.lower()), what, ""
    return nobody, EACH_ITS_OWN, (
        "no patient is known: the table has no column such as patient_id or subject_id, and the paths name none (as in "
        f"{ids.iloc[0]}): add such a column, or name it (patients: COLUMN)")


def _numbers(text: pd.Series) -> pd.Series:
    """Ids that are all plain numbers, padded to one width or made floats ('00012', '12.0'), as numbers: '12'; else as they are.

    In all other columns '007' and '7', or '0A1' and 'A1', stay two patients.
    """
    some_id = text.drop_duplicates().loc[lambda ids: ids != ""]
    written = some_id[~some_id.str.contains(".", regex=False)]
    padded = written.str.match(r"0\d").any()
    if not some_id.str.fullmatch(r"\d+(\.0*)?").all() or (padded and written.str.len().nunique() > 1):
        return text
    number = text.str.replace(r"\.0*$", "", regex=True).str.lstrip("0")
    return number.mask((number == "") & (text != ""), "0")
