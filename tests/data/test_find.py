"""Which file a name in a table means."""

import os
import unicodedata

import pytest

from charmlib.data.dataset import open_dataset
from charmlib.data.find import find_files, match
from charmlib.data.index import read_index
from tests.data.drawn import nih, own, png


def table(root, names, files=(), **how):
    text = "path,patient,A\n" + "".join(f"{n},{i},{i % 2}\n" for i, n in enumerate(names))
    return read_index(**{**own(root, text, files), **how})


@pytest.mark.parametrize(("name", "file"), [
    ("x{}.png", "a/x{}.PNG"), ("X{}.PNG", "x{}.png"), ("x{}", "x{}.jpg"), ("x{}", "deep/er/x{}.jpeg"), ("x{}.dcm", "x{}.png"),
    ("x{}.dicom", "x{}.webp"), ("x{}.jpg", "x{}.png"), ("1.2.840.{}", "1.2.840.{}.png"), ("images\\x{}.png", "images/x{}.png"),
    ("a\\x{}.png", "im/a\\x{}.png"), ("a/x{}", "a\\x{}.png"),
    ("C:\\data\\images\\x{}.png", "images/x{}.png"), ("/content/drive/x{}.png", "y/x{}.png"), ("./x{}.png", "x{}.png"),
    (unicodedata.normalize("NFC", "radiografía_{}.png"), unicodedata.normalize("NFD", "radiografía_{}.png")),
    (unicodedata.normalize("NFD", "ñ{}"), unicodedata.normalize("NFC", "ñ{}.png")), ("a/b/x{}.jpg", "b/x{}.JPG"),
    ("x{}.png", "1/2/3/4/5/6/7/8/9/x{}.png"), ("train/p{}/s/v.png", "archive/train/p{}/s/v.png"), 
    ("a b#{}%20.png", "a b#{}%20.png")])
def test_names_that_mean_a_file(tmp_path, name, file):
    files = [file.format(i) for i in range(12)]
    index = table(tmp_path, [name.format(i) for i in range(12)], files)
    assert [p.removeprefix(f"{tmp_path}/") for p in index.frame["path"]] == files and not index.report.found


def test_names_take_the_suffix_of_their_file(tmp_path):
    assert table(tmp_path, ["a", "b.dcm"], ["a.JPG", "b.png"]).frame["id"].tolist() == ["a.JPG", "b.dcm"]


def test_the_longest_common_end_decides_and_a_file_serves_once():
    files = ["a/p1/v.png", "b/p1/v.png", "b/p2/v.png", "c/w.jpg"]
    assert match(["b/p1/v.png", "x/a/p1/v.png", "p2/v.png"], files)[0] == {
        "b/p1/v.png": files[1], "x/a/p1/v.png": files[0], "p2/v.png": files[2]}
    assert match(["w.png", "W.jpg"], files)[0] == {} and match(["y/z/v.png"], files)[0] == {}
    assert match(["p1/v.png"], files) == ({"p1/v.png": files[0]}, [files[1]])
    assert match(["w", "w.jpg"], files)[0] == {"w.jpg": files[3]}


def test_latin_1_bytes_in_a_files_name(tmp_path):
    how = own(tmp_path, "image,patient,A\nmamá,1,1\nb,2,0\n", ["b.png"])
    try:
        os.rename(tmp_path / "b.png", os.fsencode(tmp_path) + b"/mam\xe1.png")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    assert len(read_index(**how).frame) == 1


def test_linked_folders_are_followed_once(tmp_path):
    names = nih(tmp_path / "data")
    (tmp_path / "data/images").rename(tmp_path / "disk")
    os.symlink(tmp_path / "disk", tmp_path / "data/images")
    for link, target in (("again", "disk"), ("loop", "data"), ("up", ""), ("dangling", "nothing")):
        os.symlink(tmp_path / target, tmp_path / "data" / link)
    os.symlink(tmp_path / "disk", tmp_path / "disk/inner")
    index = read_index(tmp_path / "data")
    assert index.frame["id"].tolist() == names and not index.report.found


def test_what_a_mac_adds_is_skipped(tmp_path):
    names = nih(tmp_path)
    for name in names:
        for folder in ("images", "__MACOSX/images"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    png(tmp_path / ".hidden/x.png")
    assert len(find_files(tmp_path)[0]) == 24 and not read_index(tmp_path).report.found


@pytest.mark.parametrize(("file", "source", "why"), [
    ("x.dcm", b"", "other names, such as 'x.dcm'"), ("images.zip", b"", "archives .*unpack"),
    ("y.png", b"", "'a.png'.*other names, such as 'y.png'"), ("y.npy", b"", "but 1 .npy"), ("readme", b"", "1 without suffix")])
def test_where_nothing_matches_both_sides_are_shown(tmp_path, file, source, why):
    how = own(tmp_path / "t", "image,patient,A\na.png,1,1\nb.png,2,0\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / file).write_bytes(source)
    with pytest.raises(FileNotFoundError, match=why):
        read_index(tmp_path / "data", classes="own", csv=how["root"] / "mine.csv")


def test_the_column_that_names_files_is_taken(tmp_path):
    index = read_index(**own(tmp_path, "id,patient,file_path,A\n7,1,x/a.png,1\n8,2,x/b.png,0\n", ["x/a.png", "x/b.png"]))
    assert index.frame["id"].tolist() == ["x/a.png", "x/b.png"] and "names are no image files: 1 (id)" in str(index.report)


@pytest.mark.parametrize(("source", "why"), [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"), (b"", "an empty file"),
    (b"\xef\xbb\xbf\n<!DOCTYPE html>", "a web page"), (b"\0" * 128 + b"DICM" + b"\0" * 99, "no picture in it"),
    (b"PK\3\4x", "a zip"),
    (b"junk", "neither PNG, .* nor DICOM")])
def test_where_every_image_is_unreadable_that_is_said(tmp_path, source, why):
    for name in nih(tmp_path):
        (tmp_path / "images" / name).write_bytes(source)
    with pytest.raises(ValueError, match=f"none of the 24 images .* can be read.*{why}"):
        open_dataset(data_root=str(tmp_path), image_size=16, split="patient", workers=1, cache_dir=str(tmp_path / "c"))


def test_the_cache_command_ends_with_2_where_every_image_is_unreadable(tmp_path, monkeypatch, capsys):
    from charmlib.cli import main

    for name in nih(tmp_path):
        (tmp_path / "images" / name).write_bytes(b"<html>")
    monkeypatch.setattr("sys.argv", ["charmlib", "cache", str(tmp_path), "--size", "16", "--split", "patient"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "can be read" in capsys.readouterr().err


def test_constant_pictures_are_named(tmp_path):
    import numpy as np
    from PIL import Image

    names = nih(tmp_path)
    for name, grey in zip(names, (0, 0, 128, 255)):
        Image.fromarray(np.full((8, 8), grey, np.uint8)).save(tmp_path / "images" / name)
    data = open_dataset(data_root=str(tmp_path), image_size=16, split="patient", workers=1, cache_dir=str(tmp_path / "c"))
    assert "no radiographs by their look, kept as they are: 4" in str(data.index.report)


def test_a_root_one_too_high_is_told(tmp_path):
    nih(tmp_path / "NIH")
    with pytest.raises(FileNotFoundError, match=f"say data_root: {tmp_path}/NIH"):
        read_index(tmp_path)


def test_dicom_files_without_suffix_keep_their_names(tmp_path):
    (tmp_path / "sub.x").mkdir()
    for name in ("abc", "sub.x/def"):
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 9)
    (tmp_path / "t.csv").write_text("image,patient,A\nabc,1,1\ndef,2,0\n")
    index = read_index(tmp_path, csv=tmp_path / "t.csv", classes="own")
    assert index.frame["id"].tolist() == ["abc", "def"] and index.frame["path"].tolist() == [
        f"{tmp_path}/abc", f"{tmp_path}/sub.x/def"]


def test_a_table_of_ones_own_needs_a_data_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text("image,patient,A\nabc,1,1\n")
    with pytest.raises(ValueError, match=r"csv: .*t\.csv needs data_root"):
        open_dataset(csv=str(tmp_path / "t.csv"), classes="own", split="patient")
