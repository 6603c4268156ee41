"""Table files and lists as people save them."""

import bz2
import gzip
import lzma
import zipfile

import pytest

from charmlib.data import tables
from charmlib.data.index import read_index
from charmlib.data.splits import SplitError, make_split
from charmlib.data.tables import read_table, read_text
from tests.data.drawn import nih, own

PLAIN = "image,patient_id,Nódulo\na.png,1,1\nb.png,2,0\n"


def zipped(text: bytes, names=("mine.csv",)) -> bytes:
    import io

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in (*names, "__MACOSX/._mine.csv"):
            archive.writestr(zipfile.ZipInfo(name), text)  # without the time, as test names must not differ
    return out.getvalue()


@pytest.mark.parametrize("source", [
    PLAIN.encode("utf-8-sig"), PLAIN.encode("utf-16"), PLAIN.encode("utf-16-le"), PLAIN.encode("utf-16-be"),
    PLAIN.encode("utf-32"), PLAIN.encode("latin-1"), PLAIN.replace("\n", "\r\n").encode(), PLAIN.replace("\n", "\r").encode(),
    gzip.compress(PLAIN.encode(), mtime=0), bz2.compress(PLAIN.encode()), lzma.compress(PLAIN.encode("utf-16")),
    zipped(PLAIN.encode()),
    PLAIN.replace(",", ";").encode(), PLAIN.replace(",", "\t").encode(), PLAIN.replace(",", "|").encode(),
    ("sep=;\n" + PLAIN.replace(",", ";")).encode(), PLAIN.replace(",", ", ").encode(), ("\n" + PLAIN).encode(),
    "\n".join(",".join(f'"{cell}"' for cell in line.split(",")) for line in PLAIN.split()).encode(),
    PLAIN.replace("0\n", "0,\n").replace("1\n", "1,\n").encode()])
def test_any_encoding_packing_and_separator(tmp_path, source):
    index = read_index(**own(tmp_path, source, ["a.png", "b.png"]))
    assert index.classes == ("Nódulo",) and index.labels()[:, 0].tolist() == [1, 0] and not index.report.found


def test_row_names_as_r_writes_them_are_no_column(tmp_path):
    index = read_index(**own(tmp_path, '"image","patient","A"\n"1","a.png","x",1\n"2","b.png","y",0\n', ["a.png", "b.png"]))
    assert index.frame["id"].tolist() == ["a.png", "b.png"] and index.frame["patient"].tolist() == ["x", "y"]


@pytest.mark.parametrize(("source", "why"), [
    (b"", "is empty"), (b"\n \n", "is empty"), (b"image,A\n", "no rows"),
    (b"image,A\na.png,1\nb.png,1,0,1\n", "line 3"),
    (b"image,A\na.png,1,2,3\n", "fields more than the header"), (zipped(b"x", ("a.csv", "b.csv")), "holds 2 files"),
    (zipped(b"", ("[Content_Types].xml", "xl/workbook.xml")), "Excel workbook: save it as CSV"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"x" * 600, "Excel workbook"),
    (gzip.compress(PLAIN.encode(), mtime=0)[:30], "damaged archive"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"), (b"<!DOCTYPE html><html>", "web page")])
def test_what_is_no_table_is_refused_by_name(tmp_path, source, why):
    with pytest.raises(ValueError, match=rf"mine\.csv.*{why}"):
        read_index(**own(tmp_path, source, ["a.png"]))


@pytest.mark.parametrize("packed", [lambda b: gzip.compress(b, mtime=0), bz2.compress, lzma.compress, zipped])
def test_a_table_that_unpacks_without_end_is_refused(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(tables, "_LARGEST", 10**6)
    (tmp_path / "mine.csv").write_bytes(packed(b"image,A\n" + b"\n" * 10**6))
    with pytest.raises(ValueError, match=r"mine\.csv unpacks to more than 1 MB.*unpack it yourself"):
        read_text(tmp_path / "mine.csv")
    (tmp_path / "mine.csv").write_bytes(packed(b"x" * 10**6))
    assert read_text(tmp_path / "mine.csv") == "x" * 10**6


def test_a_workbook_is_refused_without_a_reader(tmp_path, monkeypatch):
    monkeypatch.setattr("pandas.read_excel", lambda *a, **k: (_ for _ in ()).throw(ImportError("Missing openpyxl")))
    (tmp_path / "t.xlsx").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"t\.xlsx is an Excel workbook.*CSV.*openpyxl"):
        read_table(tmp_path / "t.xlsx")


def test_short_rows_end_in_blanks(tmp_path):
    (tmp_path / "t.csv").write_text("image,A,B\na.png,1\nb.png,0,1\n")
    assert read_table(tmp_path / "t.csv")["B"].tolist() == ["", "1"]
    (tmp_path / "t.txt").write_bytes("año\n".encode("cp1252"))
    assert read_text(tmp_path / "t.txt") == "año\n"


def write_lists(root, names, write):
    (root / "train_val_list.txt").write_bytes(write(names[:16]))
    (root / "test_list.txt").write_bytes(write(names[16:]))


@pytest.mark.parametrize("write", [
    lambda n: "\n".join(n).encode("utf-8-sig"), lambda n: "\r\n".join(n).encode("utf-16"),
    lambda n: "\r\n".join("images_001/" + x for x in n).encode(),
    lambda n: "\n".join("C:\\nih\\images\\" + x for x in n).encode(),
    lambda n: "\n".join(x[:-4] for x in n).encode(), lambda n: "\n".join(x.upper() for x in n).encode(),
    lambda n: "".join(f"{x} 0 1 0\n" for x in n).encode(), lambda n: "".join(f"{x},0,1,0\n" for x in n).encode(),
    lambda n: "".join(f"{x[:-4]} 0 1 0\n" for x in n).encode(), lambda n: ("Image Index\n" + "\n".join(n)).encode(),
    lambda n: ("patient;Image Index;A\n" + "".join(f"1;{x};0\n" for x in n)).encode(),
    lambda n: "".join(f'"{x}"\n' for x in n).encode(),
    lambda n: "".join(f"./{x}\n" for x in n).encode(), lambda n: "".join(f"images, old/{x}\n" for x in n).encode()])
def test_lists_as_people_save_them(tmp_path, write):
    names = nih(tmp_path)
    write_lists(tmp_path, names, lambda n: "\n".join(n).encode())
    usual = make_split(read_index(tmp_path), valid_fraction=0.2)
    write_lists(tmp_path, names, write)
    index = read_index(tmp_path)
    assert make_split(index, valid_fraction=0.2).hash == usual.hash and not index.report.found


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_lists_of_ones_own_keep_folders_and_names_with_blanks(tmp_path, suffix):
    names = [f"train/p {i // 2}/s{i % 2}/view1.png" for i in range(20)]
    how = own(tmp_path, "path,patient_id,A\n" + "".join(f"{n},{i // 2},{i % 2}\n" for i, n in enumerate(names)), names)
    for part, some in (("train", names[:12]), ("val", names[12:16]), ("test", names[16:])):
        (tmp_path / f"{part}.{suffix}").write_text("\n".join(f"/data/x/{n}" for n in some))
    split = make_split(read_index(**how), str(tmp_path))
    assert [c["images"] for c in split.counts.values()] == [12, 4, 4]


def test_a_list_of_other_images_shows_both_sides(tmp_path):
    write_lists(tmp_path, ["x.png"] * 24 if nih(tmp_path) else [], lambda n: "\n".join(n).encode())
    with pytest.raises(SplitError, match=r"train_val_list\.txt.*'x\.png'.*'00000001_000\.png'"):
        make_split(read_index(tmp_path))


@pytest.mark.parametrize(("patients", "why"), [(1, "one patient"), (2, "valid_fraction: 0"), (3, "fold:1/3"), (8, "fold:1/5")])
def test_too_few_patients_for_a_split(tmp_path, patients, why):
    names = [f"p{i}.png" for i in range(16)]
    text = "image,patient_id,A\n" + "".join(f"{n},{i % patients},{i % 2}\n" for i, n in enumerate(names))
    index = read_index(**own(tmp_path, text, names))
    with pytest.raises(SplitError, match=why):
        make_split(index, "patient")
