"""Who the patient is, and what happens where nobody can tell."""

import pytest

from charmlib.data.dataset import open_dataset
from charmlib.data.index import read_index
from charmlib.data.splits import SplitError, make_split
from charmlib.nih import EACH_ITS_OWN
from tests.data.drawn import own

N = 24


def table(root, rows: dict, folder="", names=None, **how):
    """``rows``: column -> value of each of the images ``x0.png`` ..."""
    names = names or [f"{folder}x{i}.png" for i in range(N)]
    lines = [",".join(["path", *rows, "A"])]
    lines += [",".join([name, *(str(f(i)) for f in rows.values()), str(i % 2)]) for i, name in enumerate(names)]
    return read_index(**{**own(root, "\n".join(lines), names), **how})


def groups(index) -> list[int]:
    """The patient of each image as a number."""
    return index.frame["patient"].factorize()[0].tolist()


@pytest.mark.parametrize("column", ["Patient ID", "PatientID", "patient_id", "subject_id", "SubjectID", "StudyPatientId",
                                    "patient", "empi_anon", "deid_patient_id", "MRN"])
def test_usual_columns(tmp_path, column):
    index = table(tmp_path, {column: lambda i: i // 4})
    assert groups(index) == [i // 4 for i in range(N)] and index.patients_from == f"column '{column}'"
    assert index.frame["patient"].iloc[0] == "0"


@pytest.mark.parametrize(("name", "what"), [
    ("CheXpert-v1.0-small/train/patient{:05d}/study{}/view1_frontal.jpg", "patientNNNN in the path"),
    ("patient{:05d}_study{}_view1.png", "patientNNNN in the path"), ("files/p10/p1000{:04d}/s50{}/a.jpg", "pNNNN in the path"),
    ("sub-S{:05d}/ses-E{}/mod-rx/x.png", "sub-NNNN in the path"), ("{:08d}_{:03d}.png", "eight digits of NIH")])
def test_patients_in_the_path(tmp_path, name, what):
    index = table(tmp_path, {}, names=[name.format(i // 4 + 1, i % 4) for i in range(N)])
    assert groups(index) == [i // 4 for i in range(N)] and what in index.patients_from
    split = make_split(index, "patient")
    assert split.patients_from == split.record()["patients_from"] == index.patients_from and index.patients_from in str(split)


def test_the_folders_on_the_disk_name_patients_as_well(tmp_path):
    names = [f"files/p10/p1000{i // 4:04d}/s{i}/{i:08x}.jpg" for i in range(N)]
    how = own(tmp_path, "dicom_id,A\n" + "".join(f"{i:08x},{i % 2}\n" for i in range(N)), names)
    assert groups(read_index(**how)) == [i // 4 for i in range(N)]


@pytest.mark.parametrize(("ids", "people"), [
    (("0", "1", "2"), 3), (("NA", "x", "y"), 3), (("0A1", "A1", "B"), 3), (("007", "7", "12"), 3),
    (("00012", "12.0", "00013"), 2), (("12", "12.0", "13"), 2), (("1.20", "1.2", "x"), 3),
    (("p01", "p1", "P1"), 3), (("1e5", "100000", "x"), 3),
    (("216840111366964012819207061112010307142602253_04-014-084", "21684011136696401281", "21684011136696401282"), 3)])
def test_ids_that_look_alike_stay_apart_unless_they_are_one_number(tmp_path, ids, people):
    index = table(tmp_path, {"patient_id": lambda i: ids[i % 3]})
    assert index.frame["patient"].nunique() == people and (index.frame["patient"] != "").all()


@pytest.mark.parametrize("ids", ["1.9E+38", "1.90E+38", "2e+10", "\"1,9E+12\""])
def test_excels_scientific_notation_is_no_patient(tmp_path, ids):
    index = table(tmp_path, {"PatientID": lambda i: ids})
    with pytest.raises(SplitError, match="'PatientID' holds 24 ids in Excel.*original table.*patients: none"):
        make_split(index, "patient")
    assert make_split(table(tmp_path, {"PatientID": lambda i: ids, "study": lambda i: i // 4}, patients="study"), "patient")


@pytest.mark.parametrize("split", ["patient", "fold:1/3"])
def test_unknown_patients_are_refused_unless_none_is_said(tmp_path, split):
    how = {"classes": "own", "csv": "mine.csv", "image_size": 16, "split": split, "data_root": str(tmp_path), "workers": 1}
    table(tmp_path, {"age": lambda i: 50})
    with pytest.raises(SplitError, match="no patient is known.*patients: COLUMN.*patients: none"):
        open_dataset(how)
    data = open_dataset(how, patients="none")
    assert data.split.patients_from == data.split.record()["patients_from"] == EACH_ITS_OWN
    assert "unknown: each image counts as one" in data.note("test") and EACH_ITS_OWN in str(data.split)


def test_lists_of_ones_own_serve_without_patients_and_say_so(tmp_path):
    index = table(tmp_path, {})
    for part, rows in (("train", range(12)), ("valid", range(12, 18)), ("test", range(18, N))):
        (tmp_path / f"{part}.txt").write_text("".join(f"x{i}.png\n" for i in rows))
    split = make_split(index, str(tmp_path))
    assert split.patients_from == EACH_ITS_OWN and "would not be noticed" in str(index.report)


def test_some_unknown_patients_are_named(tmp_path):
    index = table(tmp_path, {"patient_id": lambda i: "" if i < 4 else i // 4})
    assert index.frame["patient"].nunique() == 4 + 5 and "4 images without one count as one patient each" in index.patients_from
    assert "each image counted as one of its own: 4" in str(index.report)


def test_a_column_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no column 'person'.*patients: none"):
        table(tmp_path, {}, patients="person")
    assert table(tmp_path, {"Person Nr": lambda i: i // 2}, patients="person_nr").patients_from == "column 'Person Nr'"
