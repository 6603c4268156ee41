import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from charmlib.data import cache as cache_module
from charmlib.data.cache import cached_images
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


def test_sixteen_bit_files_that_use_eight_keep_their_values(tmp_path, ramp):
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "x.png")
    assert np.array_equal(read_grey(tmp_path / "x.png"), ramp)


def test_twelve_bits_and_floats_within_0_1(tmp_path, ramp):
    Image.fromarray((ramp / 255 * 4095).round().astype(np.uint16)).save(tmp_path / "x.png")
    assert np.abs(read_grey(tmp_path / "x.png").astype(int) - ramp).max() <= 1
    Image.fromarray((ramp / 255).astype(np.float32)).save(tmp_path / "x.tif")
    assert np.abs(read_grey(tmp_path / "x.tif").astype(int) - ramp).max() <= 1


def write(tmp_path, n=12):
    paths = []
    for i in range(n):
        path = tmp_path / f"{i}.png"
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 40), dtype=np.uint8)).save(path)
        paths.append(str(path))
    return paths


def test_cache_holds_what_reading_gives_and_opens_no_file_again(tmp_path, monkeypatch):
    paths = write(tmp_path)
    images, bad = cached_images(paths, 24, cache_dir=tmp_path / "c")
    assert bad == {} and all(np.array_equal(images[i], read_grey(p, 24)) for i, p in enumerate(paths))
    monkeypatch.setattr(cache_module, "read_grey", lambda *a: pytest.fail("decoded again"))
    again, _ = cached_images(paths, 24, cache_dir=tmp_path / "c")
    assert np.array_equal(again, images) and not again.flags.writeable


def test_cache_notices_changed_files_other_sizes_and_other_lists(tmp_path):
    paths = write(tmp_path)
    first, _ = cached_images(paths, 24, cache_dir=tmp_path / "c")
    Image.fromarray(np.zeros((41, 41), np.uint8)).save(paths[3])
    changed, _ = cached_images(paths, 24, cache_dir=tmp_path / "c")
    assert changed[3].max() == 0 and first[3].max() > 0
    assert cached_images(paths, 16, cache_dir=tmp_path / "c")[0].shape == (12, 16, 16)
    assert len(cached_images(paths[:5], 24, cache_dir=tmp_path / "c")[0]) == 5


def test_damaged_files_are_named_not_hidden(tmp_path):
    paths = write(tmp_path)
    truncated = Path(paths[2])
    truncated.write_bytes(truncated.read_bytes()[:600])
    Path(paths[7]).write_bytes(b"no image")
    Path(paths[8]).write_bytes(b"")
    images, bad = cached_images(paths, 24, cache_dir=tmp_path / "c")
    assert set(bad) == {paths[2], paths[7], paths[8]} and images[2].max() == 0
    assert cached_images(paths, 24, cache_dir=tmp_path / "c")[1] == bad


def test_a_kill_while_building_leaves_no_cache_that_opens(tmp_path, monkeypatch):
    paths = write(tmp_path)

    def killed(*a):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_images(paths, 24, cache_dir=tmp_path / "c")
    monkeypatch.undo()
    assert not list((tmp_path / "c").glob("*.json")) and not list((tmp_path / "c").glob("*.tmp"))
    images, _ = cached_images(paths, 24, cache_dir=tmp_path / "c")
    assert np.array_equal(images[0], read_grey(paths[0], 24))
    kept = next((tmp_path / "c").glob("*.json"))
    assert json.loads(kept.read_text())["images"] == 12


def test_too_little_room_is_refused_with_numbers(tmp_path, monkeypatch):
    paths = write(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda p: type("U", (), {"free": 100})())
    with pytest.raises(OSError, match=r"12 images at 24 pixels needs"):
        cached_images(paths, 24, cache_dir=tmp_path / "c")
