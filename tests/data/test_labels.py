"""What the labels of other people's tables mean."""

import numpy as np
import pytest

from charmlib.data.index import read_index
from charmlib.nih import NIH15, normal_class
from tests.data.drawn import LABELS, nih, own

CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Cardiomegaly\n"


def read(root, text, **how):
    names = list(dict.fromkeys(line.split(",")[0] for line in text.splitlines()[1:]))
    return read_index(**{**own(root, text, [n if "." in n else f"{n}.png" for n in names]), **how})


def column(index, name) -> list:
    return [None if np.isnan(v) else v for v in index.frame[name]]


@pytest.mark.parametrize(("words", "values"), [
    ("1 0 1 0", [1, 0, 1, 0]), ("1.0 0.0 -1.0 nan", [1, 0, None, None]), ("True False NA N/A", [1, 0, None, None]),
    ("yes no None null", [1, 0, None, None]), ("positive negative uncertain unknown", [1, 0, None, None]),
    ("Y n ? -", [1, 0, None, None])])
def test_words_and_numbers(tmp_path, words, values):
    index = read(tmp_path, "image,patient,A,B\n" + "".join(f"x{i},{i},{w},{i % 2}\n" for i, w in enumerate(words.split())))
    assert index.classes == ("A", "B") and column(index, "A") == values


@pytest.mark.parametrize(("blank", "uncertain", "values"), [
    ("auto", "auto", [1, 0, 0, None]), ("unknown", "0", [1, None, 0, 0]), ("0", "1", [1, 0, 0, 1]),
    ("1", "unknown", [1, 1, 0, None])])
def test_blank_and_uncertain_of_a_chexpert_table(tmp_path, blank, uncertain, values):
    rows = [f"patient0{i}/v.jpg,F,40,Frontal,AP,{i % 2},{v}\n" for i, v in enumerate(("1.0", "", "0.0", "-1.0"))]
    index = read(tmp_path, CHEXPERT + "".join(rows), blank=blank, uncertain=uncertain)
    assert column(index, "Cardiomegaly") == values
    assert index.normal_class == "No Finding" and index.findings == ("Cardiomegaly",)
    meant = {"auto": "0 (as in CheXpert"}.get(blank, f"{blank} (as given")
    assert f"classes with empty labels, taken as {meant}; parameter blank): 1 (Cardiomegaly)" in str(index.report)
    assert "uncertain labels (-1), taken as" in str(index.report)


def test_blanks_of_other_tables_stay_unknown_and_classes_with_positives_alone_are_named(tmp_path):
    index = read(tmp_path, "image,patient,A,B\na,1,1,0\nb,2,,1\n")
    assert column(index, "A") == [1, None]
    assert "taken as unknown (the default; parameter blank): 1 (A)" in str(index.report)
    assert "classes without a negative label" in str(index.report)
    assert column(read(tmp_path, "image,patient,A,B\na,1,1,0\nb,2,,1\n", blank="0"), "A") == [1, 0]


@pytest.mark.parametrize("cells", [
    ("['pleural effusion', 'mass']", "['normal']", "[]"), ('["pleural effusion", "mass"]', "['Normal']", "nan"),
    ("['pleural effusion' 'mass']", "('normal',)", ""), ("[pleural effusion, mass]", "normal", "None"),
    ("pleural effusion|mass", "No Finding", ""), ("pleural effusion;mass", "no_findings", "n/a"),
    ("['pleural effusion', 'mass', 'loc basal', 'LOC left']", "normal", "")])
def test_lists_of_names(tmp_path, cells):
    index = read(tmp_path, "ImageID,PatientID,Labels\n" + "".join(f'x{i},{i},"{c.replace(chr(34), chr(34) * 2)}"\n'
                                                                  for i, c in enumerate(cells)))
    assert index.classes == ("Mass", "pleural effusion") and index.labels().tolist() == [[1, 1], [0, 0], [0, 0]]
    assert index.has_finding().tolist() == [True, False, False]


def test_an_empty_cell_of_names_is_unknown_on_request(tmp_path):
    index = read(tmp_path, "ImageID,PatientID,Labels\na,1,Mass\nb,2,\n", blank="unknown")
    assert column(index, "Mass") == [1, None] and "taken as unknown: 1 (b)" in str(index.report)


def test_one_word_an_image(tmp_path):
    index = read(tmp_path, "filename,patientid,label\na,1,COVID\nb,2,normal\nc,3,Pneumonia\n")
    assert index.classes == ("COVID", "Pneumonia") and index.labels().sum() == 2
    index = read(tmp_path, "filename,patientid,label,normal\na,1,COVID,0\nb,2,normal,1\n", normal_class="normal")
    assert index.classes == ("normal",) and index.findings == ()


@pytest.mark.parametrize(("classes", "named", "expected"), [
    (NIH15, "", "No Finding"), (("A", "Normal"), "", "Normal"), (("no_findings", "B"), "", "no_findings"), (("A", "B"), "", ""),
    (("unchanged", "B"), "unchanged", "unchanged"), (("Normal", "normal"), "normal", "normal"), (("A",), "No Finding", "")])
def test_the_class_that_means_no_finding(classes, named, expected):
    assert normal_class(classes, named) == expected


@pytest.mark.parametrize(("classes", "named", "why"), [(("A", "B"), "C", "'C' is none of"),
                                                       (("Normal", "normal"), "", "normal_class")])
def test_no_or_several_normal_classes_are_refused(classes, named, why):
    with pytest.raises(ValueError, match=why):
        normal_class(classes, named)


def test_the_normal_class_is_no_finding(tmp_path):
    index = read(tmp_path, "image,patient,Normal,A\na,1,1,0\nb,2,0,1\n")
    assert index.normal_class == "Normal" and index.has_finding().tolist() == [False, True]
    nih(tmp_path / "nih")
    index = read_index(tmp_path / "nih", classes="nih15")
    assert index.findings == NIH15[:14] and index.has_finding().mean() == np.mean([name != "No Finding" for name in LABELS])


def test_readers_are_joined_by_majority(tmp_path):
    rows = [f"x{i},R{r},{i},{int(r <= i)},{int(r == 0)}\n" for i in range(4) for r in range(3)]
    index = read(tmp_path, "image_id,rad_id,patient_id,A,B\n" + "".join(rows))
    assert index.labels().tolist() == [[0, 0], [1, 0], [1, 0], [1, 0]]
    assert "'rad_id'), joined by majority: 4" in str(index.report)
    tie = read(tmp_path, "image_id,reader,patient,A,B\na,1,1,1,1\na,2,1,0,\nb,1,2,0,1\nb,2,2,0,0\nc,1,3,1,0\n")
    assert column(tie, "A") == [None, 0, 1] and column(tie, "B") == [1, None, 0] and "split evenly" in str(tie.report)


def test_boxes_are_joined_and_other_rows_that_disagree_are_named(tmp_path):
    rows = "a,1,Mass,1,2,3,4\na,1,Nodule,1,2,3,4\nb,2,Mass,1,2,3,4\n"
    index = read(tmp_path, "Image Index,Patient ID,Finding Label,Bbox [x,y,w,h]\n" + rows)
    assert index.labels().tolist() == [[1, 1], [1, 0]]
    index = read(tmp_path, "image,patient,A,B\na,1,1,0\na,1,0,0\nb,2,0,1\nb,2,0,1\n")
    assert index.labels().tolist() == [[1, 0], [0, 1]]
    assert "rows given twice, first kept: 2 (a, b)" in str(index.report) and "disagree" in str(index.report)
    assert index.report.found[next(k for k in index.report.found if "disagree" in k)] == ["a"]


@pytest.mark.parametrize(("header", "values", "why"), [
    ("image,patient_id,id,A", "1,0", "cannot be called 'id'"), ("image,patient_id,path,A", "1,0", "cannot be called 'path'"),
    ("image,patient_id,Normal,normal", "1,0", "normal_class"),
    ("image,patient_id,note,size", "7,9", "neither a 'Finding Labels'"),
    ("image,patient_id,A,A", "1,0", "two columns for the class 'A'")])
def test_classes_that_cannot_be_are_refused_by_name(tmp_path, header, values, why):
    with pytest.raises(ValueError, match=why):
        read(tmp_path, f"{header}\n" + "".join(f"p{i},{i},{values}\n" for i in range(20)))


def test_two_columns_of_one_nih_class_are_refused(tmp_path):
    header = ",".join(["image", *NIH15, "Pleural Thickening"])
    with pytest.raises(ValueError, match="two columns for the class 'Pleural_Thickening'"):
        read(tmp_path, header + "\na" + ",0" * 16 + "\n", classes="nih14")


def test_ages_views_and_sexes(tmp_path):
    ages = ("058Y", "018M", "003W", "010D", "61", "60.0", "", "413Y", "-1", "?")
    index = read(tmp_path, "image,patient,Age,Sex,Frontal/Lateral,AP/PA,A\n" + "".join(
        f"x{i},{i},{age},F,{('Frontal', 'Lateral')[i % 2]},{('AP', '')[i % 2]},{i % 2}\n" for i, age in enumerate(ages)))
    years = [58, 1.5, 3 / 52.18, 10 / 365.25, 61, 60, np.nan, 413, np.nan, np.nan]
    np.testing.assert_allclose(index.frame["age"], years, rtol=1e-6)
    assert index.frame["view"].tolist() == ["AP", "Lateral"] * 5 and "ages above 120, kept as they are: 1" in str(index.report)
    said = str(read(tmp_path, "image,patient,age,A\n" + "".join(f"x{i},{i},{i % 2},{i // 2 % 2}\n" for i in range(8))).report)
    assert "columns of 0 and 1 that are read as age or view, not as a class: 1 (age)" in said
