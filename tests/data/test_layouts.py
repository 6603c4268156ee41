"""Public data sets, drawn in their layouts, by data_root and csv alone."""

import gzip

import numpy as np
import pytest

from charmlib.data.dataset import open_dataset
from charmlib.data.index import read_index
from tests.data.drawn import own, png

CHEXPERT = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation",
            "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices")
VINDR = ("Aortic enlargement", "Cardiomegaly", "Nodule/Mass", "No finding")


def opened(root, table, **how):
    """The data set with its patients kept apart, which open_dataset would refuse otherwise."""
    data = open_dataset({"classes": "own", "split": "patient", "image_size": 16, "workers": 1, **how}, data_root=str(root),
                        csv=table)
    assert len(data.index.frame) == len(data.images)
    return data


@pytest.mark.parametrize("below", ["", "CheXpert-v1.0-small/"])
@pytest.mark.parametrize("part", ["train", "valid"])
def test_chexpert(tmp_path, below, part):
    names = [f"CheXpert-v1.0-small/{part}/patient{i // 4 + 1:05d}/study{i // 2 % 2 + 1}/view{i % 2 + 1}.jpg" for i in range(48)]
    rows = [f"{n},Female,{30 + i},{('Frontal', 'Lateral')[i % 2]},{('AP', '')[i % 2]}," + ",".join(
        ("1.0", "", "0.0", "-1.0")[(i * 7 + c) % 4] for c in range(14)) for i, n in enumerate(names)]
    own(tmp_path, "", names)
    own(tmp_path / "CheXpert-v1.0-small", "\n".join(["Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(CHEXPERT), *rows]), (),
        f"{part}.csv")
    data = opened(tmp_path / below, f"{'' if below else 'CheXpert-v1.0-small/'}{part}.csv")
    assert data.classes == CHEXPERT and data.index.frame["patient"].nunique() == 12 and data.index.normal_class == "No Finding"
    assert data.split.patients_from == "patientNNNN in the path" and set(data.index.frame["view"]) == {"AP", "Lateral"}
    assert np.isnan(data.labels).mean() == 0.25 and "taken as 0 (as in CheXpert; parameter blank): 14" in str(data.index.report)


@pytest.mark.parametrize("labeller", ["chexpert", "negbio"])
def test_mimic_cxr_jpg(tmp_path, labeller):
    files = [(f"1000{i // 4:04d}", f"5000{i // 2:04d}", f"{i:08x}-{i:08x}") for i in range(48)]
    for subject, study, dicom in files:
        png(tmp_path / f"files/p10/p{subject}/s{study}/{dicom}.jpg")
    studies = sorted({(subject, study) for subject, study, _ in files})
    tables = {f"mimic-cxr-2.0.0-{labeller}.csv.gz": "subject_id,study_id,Atelectasis,Edema,No Finding\n" + "".join(
                  f"{subject},{study},{('1.0', '')[i % 2]},{('-1.0', '0.0')[i % 2]},{('', '1.0')[i % 2]}\n"
                  for i, (subject, study) in enumerate(studies)),
              "mimic-cxr-2.0.0-metadata.csv.gz": "dicom_id,subject_id,study_id,ViewPosition,Rows\n" + "".join(
                  f"{dicom},{subject},{study},{('PA', 'LATERAL')[i % 2]},3056\n"
                  for i, (subject, study, dicom) in enumerate(files))}
    for name, text in tables.items():
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    data = opened(tmp_path, f"mimic-cxr-2.0.0-{labeller}.csv.gz")
    assert len(data.index.frame) == 48 and data.index.frame["patient"].nunique() == 12
    assert data.split.patients_from == "column 'subject_id'" and set(data.index.frame["view"]) == {"PA", "LATERAL"}
    assert data.index.frame.groupby("patient")["id"].count().eq(4).all() and data.labels[:, 0].mean() == 0.5
    (tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(ValueError, match="lists studies .study_id. rather than images.*metadata"):
        read_index(tmp_path, classes="own", csv=f"mimic-cxr-2.0.0-{labeller}.csv.gz")


def test_vindr_boxes(tmp_path):
    names = [f"{i:032x}" for i in range(20)]
    said = {0: ("Cardiomegaly", "Cardiomegaly", "No finding"), 1: ("Nodule/Mass", "No finding", "No finding"),
            2: ("No finding",) * 3, 3: ("Aortic enlargement",) * 3}
    rows = [f"{n},{c},{VINDR.index(c)},R{r + 8},{'' if c == 'No finding' else '1.5,2.5,30,40'}" for i, n in enumerate(names)
            for r, c in enumerate(said[i % 4])]
    rows.append(f"{names[3]},Cardiomegaly,3,R8,1,2,3,4")
    how = own(tmp_path, "\n".join(["image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", *rows]),
              [f"train/{n}.png" for n in names], "train.csv")
    index = read_index(**how)
    assert index.classes == ("Aortic enlargement", "Cardiomegaly", "Nodule/Mass")
    assert index.labels()[:4].tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]]
    data = opened(tmp_path, "train.csv", patients="none")
    assert "patients (unknown: each image counts as one)" in data.note("test")


def test_vindr_image_labels(tmp_path):
    names = [f"{i:032x}" for i in range(20)]
    rows = [f"{n},R{r}," + ",".join(str(int(c == (i + (r == 2)) % 4)) for c in range(4))
            for i, n in enumerate(names) for r in range(3)]
    own(tmp_path, "\n".join(["image_id,rad_id," + ",".join(VINDR), *rows]), [f"train/{n}.png" for n in names],
        "image_labels_train.csv")
    data = opened(tmp_path, "image_labels_train.csv", patients="none")
    assert data.classes == VINDR and data.index.normal_class == "No finding"
    np.testing.assert_array_equal(data.labels, np.eye(4)[np.arange(20) % 4])
    assert data.index.has_finding().mean() == 0.75


def test_padchest(tmp_path):
    labels = ("\"['pleural effusion', 'costophrenic angle blunting']\"", "['normal']", "\"['pneumonia', 'loc basal']\"", "",
              "['unchanged']")
    names = [f"{21684011136696 + i}_{i:03d}_{i}.png" for i in range(40)]
    own(tmp_path, ",ImageID,ImageDir,StudyDate_DICOM,StudyID,PatientID,PatientBirth,PatientSex_DICOM,ViewPosition_DICOM,"
        "Projection,MethodProjection,Pediatric,Labels\n" + "".join(
            f"{i},{n},{i % 3},20140915,{i}_2,8456{i // 4}_04-014-084,1930,F,POSTEROANTERIOR,PA,Manual,No,{labels[i % 5]}\n"
            for i, n in enumerate(names)), [f"{i % 3}/{n}" for i, n in enumerate(names)], "PADCHEST_chest_x_ray.csv")
    data = opened(tmp_path, "PADCHEST_chest_x_ray.csv")
    assert data.classes == ("Pneumonia", "costophrenic angle blunting", "pleural effusion", "unchanged")
    assert data.index.frame["patient"].nunique() == 10 and set(data.index.frame["view"]) == {"PA"}
    assert set(data.index.frame["sex"]) == {"F"} and data.labels.sum() == 8 * (2 + 1 + 1)


@pytest.mark.parametrize(("year", "classes"), [(2023, 26), (2024, 40), (2024, 45), (2026, 30)])
def test_cxr_lt(tmp_path, year, classes):
    names = [f"{i:08x}-{i:08x}" for i in range(60)]
    found = [("Normal", *(f"finding {c}" for c in range(classes - 1)))[(c + 3) % classes] for c in range(classes)]
    labels = [",".join(str(int(c == i % classes)) for c in range(classes)) for i in range(60)]
    if year == 2026:
        rows = [f"{n}.png,20140915,P{i // 3},{labels[i]}" for i, n in enumerate(names)]
        header, files = "ImageID,StudyDate_DICOM,PatientID", [f"images/{n}.png" for n in names]
    else:
        files = [f"files/p10/p1000{i // 3:04d}/s5000{i:04d}/{n}.jpg" for i, n in enumerate(names)]
        rows = [f"{n},1000{i // 3:04d},5000{i:04d},{files[i]},PA,{labels[i]}" for i, n in enumerate(names)]
        header = "dicom_id,subject_id,study_id,fpath,ViewPosition"
    own(tmp_path, "\n".join([f"{header},{','.join(found)}", *rows]), files, "train.csv")
    if year == 2026:
        (tmp_path / "Removal.csv").write_text("ImageID,StudyDate_DICOM,PatientID\n" + "".join(
            f"{n}.png,20140915,P{i // 3}\n" for i, n in enumerate(names[:4])))
    data = opened(tmp_path, "train.csv")
    assert data.classes == tuple(found) and data.index.normal_class == "Normal" and len(data.index.findings) == classes - 1
    assert len(data.index.frame) == 60 - 4 * (year == 2026) and data.index.frame["patient"].nunique() == 20 - (year == 2026)
    assert ("rows that Removal.csv lists, left out: 4" in str(data.index.report)) == (year == 2026)


def test_a_test_table_without_labels_says_what_to_do(tmp_path):
    how = own(tmp_path, "ImageID,StudyDate_DICOM,PatientID" + "," * 30 + "\n" + "".join(
        f"x{i}.png,20140915,P{i}" + "," * 30 + "\n" for i in range(9)), [f"x{i}.png" for i in range(9)])
    with pytest.raises(ValueError, match="30 columns without a name.*charmlib predict"):
        read_index(**how)


def test_unnamed_empty_columns_behind_the_labels_are_no_classes(tmp_path):
    how = own(tmp_path, "ImageID,PatientID,A,B,,,\n" + "".join(f"x{i}.png,P{i},{i % 2},0,,,\n" for i in range(9)),
              [f"x{i}.png" for i in range(9)])
    assert read_index(**how).classes == ("A", "B")


def test_rsna_has_patients_for_images(tmp_path):
    names = [f"{i:08x}-aaaa" for i in range(12)]
    rows = [f"{n},{'1,2,3,4' if i % 3 == 0 else ',,,'},{int(i % 3 == 0)}" for i, n in enumerate(names)]
    rows.append(f"{names[0]},5,6,7,8,1")
    index = read_index(**own(tmp_path, "\n".join(["patientId,x,y,width,height,Target", *rows]), [f"{n}.png" for n in names]))
    assert index.classes == ("Target",) and index.labels()[:, 0].tolist() == [1, 0, 0] * 4
    assert index.frame["patient"].nunique() == 12


def test_a_removal_of_every_image_is_refused(tmp_path):
    how = own(tmp_path, "ImageID,PatientID,A\nx.png,P1,1\ny.png,P2,0\n", ["x.png", "y.png"])
    (tmp_path / "removal.csv").write_text("ImageID\nx\ny\n")
    with pytest.raises(FileNotFoundError, match=r"no image of .*mine\.csv is left:\nrows that removal\.csv lists, left out: 2"):
        read_index(**how)
