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
    assert np.abs(got.astype(int) - ramp).max() <= 1
    want = np.asarray(Image.fromarray(ramp).resize((32, 32), Image.Resampling.BILINEAR))
    assert np.abs(read_grey(path, 32).astype(int) - want).max() <= 1


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


def test_sixteen_bit_files_that_use_eight_keep_their_values(tmp_path, ramp):
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "x.png")
    assert np.array_equal(read_grey(tmp_path / "x.png"), ramp)


def test_twelve_bits_and_floats_within_0_1(tmp_path, ramp):
    Image.fromarray((ramp / 255 * 4095).round().astype(np.uint16)).save(tmp_path / "x.png")
    assert np.abs(read_grey(tmp_path / "x.png").astype(int) - ramp).max() <= 1
    Image.fromarray((ramp / 255).astype(np.float32)).save(tmp_path / "x.tif")
    assert np.abs(read_grey(tmp_path / "x.tif").astype(int) - ramp).max() <= 1
