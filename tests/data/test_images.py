import sys

import numpy as np
import pytest
from PIL import Image

from charmlib.data import images
from charmlib.data.images import read_grey


@pytest.fixture
def ramp():
    return np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "I;16", "I", "F"])
def test_one_grey_channel_from_anything(tmp_path, ramp, mode):
    path = tmp_path / ("x.tif" if mode == "F" else "x.png")
    if mode in ("I;16", "I"):
        Image.fromarray(ramp.astype(np.uint16) * 257).save(path)
    elif mode == "F":
        Image.fromarray(ramp.astype(np.float32) * 257).save(path)
    else:
        Image.fromarray(ramp).convert(mode).save(path)
    got = read_grey(path)
    assert got.dtype == np.uint8 and got.shape == (64, 64)
    deep = 2 * (mode in ("I;16", "I", "F"))  # black and white at percentiles
    assert np.abs(got.astype(int) - ramp).max() <= deep
    want = np.asarray(Image.fromarray(ramp).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(read_grey(path, 32).astype(int) - want).max() <= deep


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_fast_png_decoder_gives_pillows_pixels(tmp_path, ramp, mode):
    if images._decode_png is None:
        pytest.skip("kornia-rs is not installed")
    picture = Image.merge("RGBA", [Image.fromarray(np.roll(ramp, i * 9, 0)) for i in range(4)]).convert(mode)
    picture.save(tmp_path / "x.png")
    source = (tmp_path / "x.png").read_bytes()
    fast = images._plain_png(source)
    assert fast.mode == "L" and np.array_equal(np.asarray(fast), np.asarray(picture.convert("L")))
    assert np.array_equal(read_grey(source), read_grey(tmp_path / "x.png"))


def test_all_other_files_and_damaged_ones_are_pillows(tmp_path, ramp, monkeypatch):
    for name, picture, options in (("p", Image.fromarray(ramp).convert("P"), {}),
                                   ("la", Image.fromarray(ramp).convert("LA"), {}),
                                   ("16", Image.fromarray(ramp.astype(np.uint16) * 257), {}),
                                   ("see-through", Image.fromarray(ramp), {"transparency": 3}),
                                   ("1", Image.fromarray(ramp).convert("1"), {})):
        picture.save(tmp_path / f"{name}.png", **options)
        source = (tmp_path / f"{name}.png").read_bytes()
        assert images._plain_png(source) is None, name
        assert np.array_equal(read_grey(source), read_grey(tmp_path / f"{name}.png")), name
    Image.fromarray(ramp).save(tmp_path / "x.png")
    source = (tmp_path / "x.png").read_bytes()
    for broken in (source[:-40], source[:60] + b"xx" + source[62:], source[:20], b""):
        assert images._plain_png(broken) is None
        with pytest.raises((OSError, SyntaxError)):
            read_grey(broken)
    monkeypatch.setattr(images, "_decode_png", None)
    assert images._plain_png(source) is None and np.array_equal(read_grey(source), ramp)


@pytest.mark.parametrize("largest", [4000, 4200, 16383, 65535])
def test_the_largest_value_of_a_deep_picture_never_sets_its_scale(tmp_path, ramp, largest):
    values = (ramp.astype(np.uint16) << 4)
    values[0, 0] = largest  # a dead pixel
    Image.fromarray(values).save(tmp_path / "x.png")
    with pytest.warns(UserWarning, match="more than 8 bits"):
        assert np.abs(read_grey(tmp_path / "x.png").astype(int) - ramp)[1:].max() <= 2
    common = read_grey(tmp_path / "x.png", scale=(0, 255 << 4))
    assert np.array_equal(common[1:], ramp[1:])


@pytest.mark.parametrize("low, high", [(0, 1), (-1024, 1024), (0, 255)])
def test_float_pictures_of_any_range_read_alike(tmp_path, ramp, low, high):
    Image.fromarray((ramp / 255 * (high - low) + low).astype(np.float32)).save(tmp_path / "x.tif")
    assert np.array_equal(read_grey(tmp_path / "x.tif", scale=(low, high)), ramp)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_pictures_are_turned_as_their_exif_says(tmp_path, ramp, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    how = {"lossless": True} if suffix == "webp" else {}
    Image.fromarray(np.rot90(ramp)).save(tmp_path / f"x.{suffix}", exif=exif, **how)
    assert np.abs(read_grey(tmp_path / f"x.{suffix}").astype(int) - ramp).max() <= 12


def test_what_is_no_picture_is_named(tmp_path, monkeypatch):
    for content, words in ((b"", "an empty file"), (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
                           (b"\n<!DOCTYPE html><html>", "a web page"), (b"%!PS-Adobe-3.0", "neither PNG"),
                           (b"GIF89a", "neither PNG")):
        (tmp_path / "x.png").write_bytes(content)
        with pytest.raises(OSError, match=words):
            read_grey(tmp_path / "x.png")
    Image.new("1", (images.LARGEST + 1, 40)).save(tmp_path / "x.png")
    with pytest.raises(OSError, match="10001 x 40 pixels, more than 10,000 a side"):
        read_grey(tmp_path / "x.png")
    monkeypatch.setattr(images, "LARGEST", 63)
    Image.new("L", (64, 40)).save(tmp_path / "x.png")
    with pytest.raises(OSError, match="64 x 40"):
        read_grey(tmp_path / "x.png")


def test_clahe_equals_opencv_or_names_what_to_install(ramp, monkeypatch):
    dull = ramp // 8 + 100
    picture = Image.fromarray(dull)
    try:
        import cv2
    except ImportError:
        cv2 = None
    try:
        from kornia_rs.imgproc import clahe
    except ImportError:
        clahe = None
    if clahe or cv2:
        found = images.fit(picture, 64, contrast="clahe")
        assert found.shape == (64, 64) and found.std() > 1.05 * dull.std()
    if clahe and cv2:
        assert np.array_equal(found, cv2.createCLAHE(2.0, (8, 8)).apply(dull))
    monkeypatch.setitem(sys.modules, "kornia_rs.imgproc", None)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="kornia_rs.*OpenCV"):
        images.fit(picture, 64, contrast="clahe")
