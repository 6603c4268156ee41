import shutil

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from charmlib.data.dataset import find_data, open_dataset
from charmlib.data.index import read_index
from charmlib.data.paths import resolve_data_root
from charmlib.data.splits import SplitError, make_split
from charmlib.nih import NIH14, canonical, same_order


def png(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(path)


def nih_folder(root, rows, *, header=None, images="images_001/images", table="Data_Entry_2017.csv"):
    header = header or ("Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
                        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],")
    root.mkdir(parents=True, exist_ok=True)
    lines = [header, *(f"{name},{labels},0,{int(name[:8])},058Y,M,PA,2000,2000,0.1,0.1," for name, labels in rows)]
    (root / table).write_text("\n".join(lines) + "\n")
    for name, _ in rows:
        png(root / images / name)
    return root


ROWS = [("00000001_000.png", "Cardiomegaly|Emphysema"), ("00000001_001.png", "No Finding"),
        ("00000002_000.png", "Pleural_Thickening"), ("00000003_000.png", "Hernia"), ("00000004_000.png", "No Finding")]


def test_layout_of_the_full_dataset(tmp_path):
    index = read_index(nih_folder(tmp_path / "data", ROWS))
    assert list(index.frame["id"]) == [r[0] for r in ROWS] and index.classes == NIH14
    assert index.frame["patient"].tolist() == ["1", "1", "2", "3", "4"]
    assert index.frame["age"].tolist() == [58] * 5 and index.frame["view"].tolist() == ["PA"] * 5
    row = index.labels()[0]
    assert [c for c, v in zip(NIH14, row) if v] == ["Cardiomegaly", "Emphysema"]
    assert index.has_finding().tolist() == [True, False, True, True, False] and not index.report.found


def test_layout_of_the_resized_copy(tmp_path):
    root = nih_folder(tmp_path / "data", ROWS, images="images-224/images-224")
    (root / "train_val_list_NIH.txt").write_text("\n".join(r[0] for r in ROWS[:3]))
    (root / "test_list_NIH.txt").write_text("\n".join(r[0] for r in ROWS[3:]))
    split = make_split(read_index(root), "official", valid_fraction=0.5)
    assert {p: c["images"] for p, c in split.counts.items()}["test"] == 2


def test_layout_of_the_sample_has_no_lists(tmp_path):
    root = nih_folder(tmp_path / "data", ROWS, images="sample/images", table="sample_labels.csv",
                      header="Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
                             "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y,")
    index = read_index(root)
    assert len(index.frame) == 5
    with pytest.raises(SplitError, match="split: patient"):
        make_split(index, "official")


def test_the_fifteenth_class(tmp_path):
    index = read_index(nih_folder(tmp_path / "data", ROWS), classes="nih15")
    assert index.labels()[:, 14].tolist() == [0, 1, 0, 0, 1]
    assert index.has_finding().tolist() == [True, False, True, True, False]


def test_nothing_odd_passes_silently(tmp_path):
    rows = [*ROWS, ("00000005_000.png", "Mass|Lumpy"), ("00000006_000.png", "mass"), ("00000007_000.png", "")]
    root = nih_folder(tmp_path / "data", rows)
    table = root / "Data_Entry_2017.csv"
    table.write_text(table.read_text() + table.read_text().splitlines()[1] + "\n")
    (root / "images_001/images/00000003_000.png").unlink()
    png(root / "images_002/images/00000002_000.png")
    png(root / "images_001/images/00000099_000.png")
    index = read_index(root)
    said = str(index.report)
    for name in ("rows given twice, first kept: 1 (00000001_000.png)", "rows without image, left out: 1 (00000003_000.png)",
                 "images without row, left out: 1 (00000099_000.png)", "images found twice, first kept: 1",
                 "label 'Lumpy'", "rows with an empty label, taken as no finding: 1 (00000007_000.png)"):
        assert name in said, said
    frame = index.frame.set_index("id")
    assert frame.loc["00000005_000.png", "Mass"] == 1 and frame.loc["00000006_000.png", "Mass"] == 1
    assert "00000003_000.png" not in frame.index


def test_unreadable_images_are_left_out_and_named(phantoms, tmp_path, monkeypatch):
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "cache"))  # a cache of the sound files would serve for their copy, too
    root = tmp_path / "copy"
    shutil.copytree(phantoms, root)
    victim = sorted((root / "images_001/images").iterdir())[5]
    victim.write_bytes(victim.read_bytes()[:200])
    data = open_dataset(data_root=str(root), image_size=32)
    assert len(data.images) == len(data.labels) == len(data.index.frame) == len(data.split.part) == 319
    assert victim.name in str(data.index.report) and victim.name not in set(data.index.frame["id"])
    assert data.images[:].max(axis=(1, 2)).min() > 0  # no black row of the cache came through


def test_missing_columns_and_files_are_named(tmp_path):
    root = nih_folder(tmp_path / "data", ROWS)
    (root / "Data_Entry_2017.csv").write_text("Image,Diagnosis\na.png,x\n")
    with pytest.raises(ValueError, match="columns for Atelectasis"):
        read_index(root)
    (root / "Data_Entry_2017.csv").write_text("Name,Finding Labels\na.png,x\n")
    with pytest.raises(ValueError, match=r"Data_Entry_2017\.csv has no image column"):
        read_index(root)
    with pytest.raises(FileNotFoundError, match=r"Data_Entry_2017\.csv"):
        read_index(tmp_path)
    (root / "Data_Entry_2017.csv").write_text("Image Index,Finding Labels\na.png,Mass\n")
    with pytest.raises(FileNotFoundError, match=r"none of the 1 images"):
        read_index(root)


def test_a_table_of_ones_own_with_other_classes(tmp_path):
    for i in range(4):
        png(tmp_path / "pics" / f"p{i}.png")
    (tmp_path / "mine.csv").write_text("path,patient_id,age,Covid,Tube,note\npics/p0.png,a,50,1,0,x\npics/p1.png,a,50,0,1,y\n"
                                       "pics/p2.png,b,61,,0,z\npics/p3.png,c,7,-1,1,w\n")
    index = read_index(tmp_path, classes="own", csv="mine.csv")
    assert index.classes == ("Covid", "Tube")
    np.testing.assert_array_equal(index.labels(), [[1, 0], [0, 1], [np.nan, 0], [np.nan, 1]])
    assert "not used as classes: 1 (note)" in str(index.report)


def test_folders_tell_images_of_a_table_of_ones_own_apart(tmp_path):
    """As in CheXpert, where every study holds a view1.png."""
    names = [f"train/p{p}/s{s}/view1.png" for p in range(3) for s in range(2)]
    for name in names:
        png(tmp_path / name)
    for above in ("", "archive/"):
        (tmp_path / "mine.csv").write_text("path,patient_id,A\n" + "".join(f"{above}{n},{n[6:8]},{n[10]}\n" for n in names))
        index = read_index(tmp_path, classes="own", csv="mine.csv")
        assert len(index.frame) == 6 and not index.report.found
        assert [p.removeprefix(str(tmp_path) + "/") for p in index.frame["path"]] == names


def test_a_class_with_a_few_wrong_values_is_refused_not_dropped(tmp_path):
    for i in range(20):
        png(tmp_path / f"p{i}.png")
    rows = [f"p{i},{i},{i % 2},{2 if i == 7 else 1}\n" for i in range(20)]
    (tmp_path / "mine.csv").write_text("id,patient,A,B\n" + "".join(rows))
    with pytest.raises(ValueError, match="column 'B' holds 0, 1 and blanks but for 1 rows .row 9: '2'"):
        read_index(tmp_path, classes="own", csv="mine.csv")


def test_a_table_with_image_ids_without_suffix_and_without_patients(tmp_path):
    for i in range(2):
        png(tmp_path / f"p{i}.png")
    (tmp_path / "mine.csv").write_text("ImageID,A\np0,1\np1,0\n")
    index = read_index(tmp_path, classes="own", csv=tmp_path / "mine.csv")
    assert index.frame["id"].tolist() == ["p0.png", "p1.png"]
    assert "each image counted as one of its own: 2" in str(index.report)


def test_splits_are_disjoint_seeded_and_counted(phantoms):
    index = read_index(phantoms)
    for name in ("official", "patient"):
        split = make_split(index, name, valid_fraction=0.2)
        again = make_split(read_index(phantoms), name, valid_fraction=0.2)
        assert split.hash == again.hash and len(split.hash) == 16
        by_part = {p: set(index.frame["patient"][split.rows(p)]) for p in ("train", "valid", "test")}
        assert not by_part["train"] & by_part["valid"] and not by_part["test"] & (by_part["train"] | by_part["valid"])
        assert sum(c["images"] for c in split.counts.values()) == len(index.frame)
        assert split.counts["test"]["positive_share"] == pytest.approx(index.has_finding()[split.rows("test")].mean())
        assert split.hash in str(split)
    assert set(index.frame["id"][make_split(index, "official").rows("test")]) == \
        set((phantoms / "test_list.txt").read_text().split())
    shares = [make_split(index, "patient").counts[p]["patients"] for p in ("train", "valid", "test")]
    np.testing.assert_allclose(np.array(shares) / sum(shares), (0.7, 0.1, 0.2), atol=0.01)


def test_lists_of_ones_own(phantoms, tmp_path):
    index = read_index(phantoms)
    split = make_split(index, "patient")
    for p in ("train", "valid", "test"):
        (tmp_path / f"{p}.txt").write_text("\n".join(index.frame["id"][split.rows(p)]))
    assert make_split(index, str(tmp_path)).hash == split.hash
    moved = index.frame["id"][split.rows("test")].iloc[0]
    (tmp_path / "train.txt").write_text((tmp_path / "train.txt").read_text() + f"\n{moved}")
    with pytest.raises(SplitError, match="two lists"):
        make_split(index, str(tmp_path))
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(SplitError):
        make_split(index, str(tmp_path))


def test_a_patient_in_two_parts_is_refused_by_name(tmp_path):
    rows = [(f"{p:08d}_{v:03d}.png", "Mass") for p in range(1, 5) for v in range(2)]
    root = nih_folder(tmp_path / "data", rows)
    (root / "train_val_list.txt").write_text("\n".join(r[0] for r in rows[:5]))
    (root / "test_list.txt").write_text("\n".join(r[0] for r in rows[5:]))
    with pytest.raises(SplitError, match="3 in test and"):
        make_split(read_index(root), "official", valid_fraction=0.4)


@pytest.mark.parametrize("name", ["official", "patient", "lists"])
def test_without_validation_the_training_part_is_exactly_the_union(phantoms, tmp_path, name):
    index = read_index(phantoms)
    if name == "lists":
        usual = make_split(index, "patient")
        for p in ("train", "valid", "test"):
            (tmp_path / f"{p}.txt").write_text("\n".join(index.frame["id"][usual.rows(p)]))
        name = str(tmp_path)
    usual, all_of_it = (make_split(index, name, valid_fraction=share) for share in (0.2, 0))
    assert set(all_of_it.rows("train")) == set(usual.rows("train")) | set(usual.rows("valid"))
    assert len(all_of_it.rows("train")) == usual.counts["train"]["images"] + usual.counts["valid"]["images"]
    np.testing.assert_array_equal(all_of_it.rows("test"), usual.rows("test"))
    assert all_of_it.hash != usual.hash and usual.has_valid and not all_of_it.has_valid
    assert all_of_it.counts["valid"]["images"] == all_of_it.counts["valid"]["patients"] == 0
    assert "valid: none, its patients are in the training part" in str(all_of_it) and "nan" not in str(all_of_it)
    assert set(all_of_it.frame(index)["part"]) == {"train", "test"}


def test_validation_is_empty_by_request_alone(phantoms, tmp_path):
    index = read_index(phantoms)
    usual = make_split(index, "patient")
    for p in ("train", "test"):
        (tmp_path / f"{p}.txt").write_text("\n".join(index.frame["id"][usual.rows(p)]))
    with pytest.raises(SplitError, match="has no valid.txt"):
        make_split(index, str(tmp_path))
    assert make_split(index, str(tmp_path), valid_fraction=0).counts["train"] == usual.counts["train"]
    (tmp_path / "valid.txt").write_text("")
    with pytest.raises(SplitError, match="the valid part is empty"):
        make_split(index, str(tmp_path))
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(SplitError, match="the test part is empty"):
        make_split(index, str(tmp_path), valid_fraction=0)


def test_a_data_set_without_validation_is_shown_and_shuffled(phantoms, tmp_path):
    from charmlib.viz.dataset_page import finding_table, part_table, write_dataset_page

    data, shuffled = (open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0, labels=which)
                      for which in ("real", "shuffled"))
    assert part_table(data)["part"].tolist() == ["train", "test"] and "valid" not in finding_table(data).columns
    assert data.note("valid").endswith("no validation part") and "test images of" in data.note("test")
    page = write_dataset_page(tmp_path / "data.html", data).read_text()
    assert "no validation part" in page and "nan" not in page.split("<img")[0] and page.count("data:image/png") == 4
    rows = data.rows("train")
    assert sorted(map(tuple, data.labels[rows])) == sorted(map(tuple, shuffled.labels[rows]))


def test_limit_takes_so_many_a_part(phantoms):
    index = read_index(phantoms)
    split = make_split(index, "official", limit=20)
    assert [split.counts[p]["images"] for p in ("train", "valid", "test")] == [20, 20, 20]
    assert split.hash != make_split(index, "official").hash


def test_kaggle_mounts_of_today_and_before(tmp_path):
    new = tmp_path / "a" / "datasets" / "nih-chest-xrays" / "data"
    old = tmp_path / "b" / "data"
    other = tmp_path / "c" / "datasets" / "someone" / "my-copy" / "nih"
    for folder in (new, old, other):
        nih_folder(folder, ROWS)
        assert resolve_data_root("", kaggle_input=tmp_path / folder.relative_to(tmp_path).parts[0]) == folder
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nih-chest-xrays/data"):
        resolve_data_root("", kaggle_input=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        resolve_data_root(tmp_path / "nothing")


@pytest.mark.slow
@pytest.mark.once
def test_without_any_data_the_embedded_phantoms_are_taken_and_named(tmp_path, monkeypatch, capsys):
    from charmlib.data.index import is_drawn

    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert resolve_data_root("", kaggle_input=tmp_path / "nothing") is None
    root = find_data("", kaggle_input=tmp_path / "nothing")
    assert is_drawn(root) and "DRAWN PHANTOMS" in capsys.readouterr().out
    nih_folder(tmp_path / "data", ROWS)
    assert resolve_data_root("", kaggle_input=tmp_path / "nothing").resolve() == tmp_path / "data"


def test_label_names():
    assert canonical(" pleural thickening") == "Pleural_Thickening" and canonical("no finding") == "No Finding"
    with pytest.raises(ValueError, match="class 0 is 'A' here and 'B' there"):
        same_order(["A", "B"], ["B", "A"], "x")
    with pytest.raises(ValueError, match="2 classes here, 1 there"):
        same_order(["A", "B"], ["A"], "x")


def test_phantom_boxes_and_tables(phantoms):
    boxes = pd.read_csv(phantoms / "BBox_List_2017.csv")
    index = read_index(phantoms)
    assert not index.report.found and index.drawn
    positives = {(r.id, c) for r in index.frame.itertuples() for c in NIH14 if getattr(r, c) == 1}
    boxed = {(i, "Infiltration" if c == "Infiltrate" else c) for i, c in zip(boxes["Image Index"], boxes["Finding Label"])}
    assert boxed == positives
    corner = boxes[["Bbox [x", "y"]].to_numpy() + boxes[["w", "h]"]].to_numpy()
    assert (boxes[["Bbox [x", "y"]].to_numpy() >= 0).all() and (corner <= 1024.01).all()


def test_folds_test_every_patient_once_and_never_one_that_they_trained_on(phantoms):
    index = read_index(phantoms)
    tested, hashes = [], set()
    for i in range(1, 6):
        split = make_split(index, f"fold:{i}/5", valid_fraction=0.2)
        parts = {p: set(index.frame["patient"][split.part == p]) for p in ("train", "valid", "test")}
        assert set.union(*parts.values()) == set(index.frame["patient"])
        assert sum(map(len, parts.values())) == index.frame["patient"].nunique()
        assert len(parts["valid"]) == pytest.approx(0.2 * len(parts["train"] | parts["valid"]), abs=1)
        assert split.name == f"fold:{i}/5" and (split.part != "").all()
        again = make_split(index, f"fold:{i}/5", valid_fraction=0.2)
        assert again.hash == split.hash
        tested += sorted(parts["test"])
        hashes.add(split.hash)
    assert sorted(tested) == sorted(set(index.frame["patient"])) and len(hashes) == 5


def test_some_patients_are_in_no_test_part(phantoms, tmp_path):
    patients = sorted(set(read_index(phantoms).frame["patient"]))
    explore, file, tested = set(patients[::3]), tmp_path / "explore.txt", []
    file.write_text("\n".join([*sorted(explore), "nobody"]) + "\n")
    for i in range(1, 6):
        index = read_index(phantoms)
        split = make_split(index, f"fold:{i}/5", valid_fraction=0.2, never_test=str(file))
        parts = {p: set(index.frame["patient"][split.part == p]) for p in ("train", "valid", "test")}
        assert set.union(*parts.values()) == set(patients) and explore & parts["train"] and explore & parts["valid"]
        assert "listed in explore.txt but not in the data: 1 (nobody)" in str(index.report)
        tested += sorted(parts["test"])
    assert sorted(tested) == sorted(set(patients) - explore)
    given = {"data_root": str(phantoms), "image_size": 32, "never_test": str(file)}
    assert open_dataset(given, split="fold:5/5", valid_fraction=0.2).split.hash == split.hash
    with pytest.raises(ValueError, match="never_test: none of the 1 patients .*first patient is"):
        file.write_text("nobody\n")
        make_split(index, "fold:1/5", never_test=str(file))
    with pytest.raises(ValueError, match="'never_test': split 'official' has a test part of its own; say split: fold:I/N"):
        open_dataset(given)


@pytest.mark.parametrize("name", ["fold:0/5", "fold:6/5", "fold:1/1", "fold:2", "fold:a/b", "fold:1/100000"])
def test_folds_that_there_are_not(phantoms, name):
    with pytest.raises(SplitError, match="fold"):
        make_split(read_index(phantoms), name)
