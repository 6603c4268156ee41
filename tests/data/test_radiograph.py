import numpy as np
import pytest
from PIL import Image, ImageDraw

from charmlib.data.radiograph import NotARadiograph, find_radiographs, read_radiograph


def save(path, array, mode=None):
    Image.fromarray(array).convert(mode).save(path) if mode else Image.fromarray(array).save(path)
    return path


def test_grey_pictures_of_all_kinds_are_read_alike(tmp_path, grey):
    plain = read_radiograph(save(tmp_path / "a.png", grey), 32)
    assert plain.shape == (32, 32) and plain.dtype == np.uint8
    for name, mode in (("b.png", "RGB"), ("c.png", "RGBA"), ("d.png", "LA")):
        np.testing.assert_array_equal(read_radiograph(save(tmp_path / name, grey, mode), 32), plain)
    jpeg = read_radiograph(save(tmp_path / "e.jpg", grey, "RGB"), 32)
    assert np.abs(jpeg.astype(int) - plain).mean() < 4


def test_what_is_no_radiograph_is_refused_by_name(tmp_path, grey):
    colour = np.stack([grey, np.roll(grey, 20), 255 - grey], 2)
    page = Image.new("L", (300, 200), 255)
    ImageDraw.Draw(page).text((20, 20), "not a radiograph " * 3, fill=0)
    page.save(tmp_path / "page.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    Image.fromarray(grey).save(tmp_path / "film.png", save_all=True, append_images=[Image.fromarray(255 - grey)])
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    cases = {save(tmp_path / "noise.png", noise): "as in noise",
             save(tmp_path / "colour.png", colour): "colour picture", save(tmp_path / "blank.png", grey * 0 + 9): "blank",
             tmp_path / "page.png": "bright grey value|grey values", tmp_path / "broken.png": "cannot be read",
             save(tmp_path / "tiny.png", grey[:20, :20]): "too small", tmp_path / "film.png": "2 frames",
             save(tmp_path / "long.png", np.tile(grey, (1, 4))): "shape",
             save(tmp_path / "drawing.png", (grey > 128).astype(np.uint8) * 120): "only 2 grey values"}
    for path, why in cases.items():
        with pytest.raises(NotARadiograph, match=why) as caught:
            read_radiograph(path, 32)
        assert str(path) in str(caught.value)


def test_dicom_is_read_as_the_picture_it_shows(tmp_path, grey, dicom):
    plain = read_radiograph(save(tmp_path / "a.png", grey), 32).astype(float)
    assert np.corrcoef(read_radiograph(dicom("a.dcm"), 32).ravel(), plain.ravel())[0, 1] > 0.999
    inverted = dicom("b.dcm", (255 - grey).astype(np.uint16) * 16, PhotometricInterpretation="MONOCHROME1")
    assert np.corrcoef(read_radiograph(inverted, 32).ravel(), plain.ravel())[0, 1] > 0.999
    windowed = read_radiograph(dicom("c.dcm", WindowCenter=2048, WindowWidth=400), 32)
    assert (windowed == 0).mean() + (windowed == 255).mean() > 0.4  # the window clips what lies outside it


def test_dicom_without_window_or_suffix(tmp_path, grey, dicom):
    """A marker once set the scale of the whole picture, and a file without suffix was skipped."""
    values = grey.astype(np.uint16) * 8
    plain = read_radiograph(dicom("a.dcm", values), 32)
    values[0, 0] = 4095
    assert np.abs(read_radiograph(dicom("b.dcm", values), 32).astype(int) - plain)[1:, 1:].max() <= 2
    (tmp_path / "in").mkdir()
    dicom("in/IM0001"), dicom("in/1.2.840.1")
    (tmp_path / "in/README").write_text("x")
    assert [p.name for p in find_radiographs([tmp_path / "in"])] == ["1.2.840.1", "IM0001"]
    assert read_radiograph(tmp_path / "in/IM0001", 32).shape == (32, 32)


def test_a_jpeg_stored_lying_is_set_upright(tmp_path, grey):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    Image.fromarray(np.rot90(grey)).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = read_radiograph(save(tmp_path / "plain.png", grey), 32)
    assert np.abs(read_radiograph(tmp_path / "turned.jpg", 32).astype(int) - upright).mean() < 3


def test_dicom_of_another_kind_is_refused(tmp_path, dicom):
    with pytest.raises(NotARadiograph, match="modality CT"):
        read_radiograph(dicom("ct.dcm", Modality="CT"), 32)
    (tmp_path / "no.dcm").write_bytes(b"x" * 200)
    with pytest.raises(NotARadiograph, match="no.dcm: cannot be read"):
        read_radiograph(tmp_path / "no.dcm", 32)


def test_folders_are_searched_and_missing_ones_named(tmp_path, grey):
    (tmp_path / "in/deep").mkdir(parents=True)
    a, b = save(tmp_path / "in/a.png", grey), save(tmp_path / "in/deep/b.JPG", grey)
    (tmp_path / "in/notes.txt").write_text("x")
    assert find_radiographs([tmp_path / "in", a]) == [a, b]
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        find_radiographs([tmp_path / "nowhere"])
    (tmp_path / "links").mkdir()
    (tmp_path / "links/folder").symlink_to(tmp_path / "in/deep")
    (tmp_path / "links/gone.png").symlink_to(tmp_path / "gone.png")  # to be refused by name
    assert find_radiographs([tmp_path / "links"]) == [tmp_path / "links/folder/b.JPG", tmp_path / "links/gone.png"]


def test_all_real_radiographs_pass(shared):
    for path in [*sorted((shared / "nih_full").glob("*.png")), *sorted((shared / "nih64").rglob("*.png"))[::40]]:
        assert read_radiograph(path, 64).shape == (64, 64)


def test_what_systems_leave_in_folders_is_skipped(tmp_path):
    picture = tmp_path / "a b \u00e9.png"
    Image.fromarray(np.arange(64 * 64).reshape(64, 64).astype(np.uint8)).save(picture)
    for name in ("._a b \u00e9.png", "__MACOSX/._x.png", "__MACOSX/x.png", "Thumbs.db", ".DS_Store", "desktop.ini", "README",
                 ".trash/old.png", "sub/._y.dcm", "sub/.DS_Store"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7" + b"\0" * 200)
    assert find_radiographs([tmp_path]) == [picture]
    assert find_radiographs(sorted(p for p in tmp_path.iterdir() if p.name not in ("README", "sub", ".trash"))
                            ) == [picture]  # as the shell's * names them
