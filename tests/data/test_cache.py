import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from charmlib.data import cache_build
from charmlib.data.cache import open_images
from charmlib.data.cache_file import IDS, MANIFEST, PIXELS, ROWS
from charmlib.data.images import read_grey
from charmlib.data.paths import default_cache_dir


def write(folder, n=12, side=40, seed=0):
    """Noise pictures ``0.png ...``; returns ids and paths."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(n):
        Image.fromarray(generator.integers(0, 256, (side, side), dtype=np.uint8)).save(folder / f"{i}.png")
    ids = [f"{i}.png" for i in range(n)]
    return ids, [str(folder / name) for name in ids]


@pytest.fixture
def pictures(tmp_path):
    return write(tmp_path / "images")


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


@pytest.fixture
def never_decode(monkeypatch):
    def forbid():
        monkeypatch.setattr(cache_build, "open_picture", lambda *a: pytest.fail("decoded again"))

    return forbid


def built(home):
    return sorted(p.parent for p in home.glob(f"*/{MANIFEST}"))


def assert_right(images, paths, size=24):
    for i, path in enumerate(paths):
        assert np.array_equal(images[i], read_grey(path, size)), path


def test_it_holds_what_reading_gives_and_opens_no_picture_to_decode_it_again(pictures, home, never_decode):
    ids, paths = pictures
    images = open_images(ids, paths, 24)
    assert images.shape == (12, 24, 24) and len(images) == 12 and images.bad == {}
    assert_right(images, paths)
    never_decode()
    again = open_images(ids, paths, 24)
    assert np.array_equal(again[:], images[:]) and again.folder == images.folder
    with pytest.raises((ValueError, TypeError)):
        again.pixels[0, 0, 0] = 1


def test_batches_are_gathered_into_a_given_array_and_rows_outside_are_refused(pictures, home):
    ids, paths = pictures
    images = open_images(ids, paths, 24)
    out = np.empty((4, 24, 24), np.uint8)
    assert images.take(np.array([3, 0, 3, 11]), axis=0, out=out) is out
    assert np.array_equal(out, images[:][[3, 0, 3, 11]])
    for wrong in (12, -1):
        with pytest.raises(IndexError, match="cache of 12 images"):
            images.take(np.array([0, wrong]), axis=0, out=out[:2])


def test_other_sizes_rules_and_lists_have_their_own_and_parts_of_a_list_use_the_whole(pictures, home, never_decode):
    ids, paths = pictures
    open_images(ids, paths, 24)
    assert open_images(ids, paths, 16).shape == (12, 16, 16)
    open_images(ids, paths, 24, aspect="pad")
    assert len(built(home)) == 3
    never_decode()
    some = [7, 2, 9]
    part = open_images([ids[i] for i in some], [paths[i] for i in some], 24)
    assert part.shape == (3, 24, 24) and len(built(home)) == 3
    assert_right(part, [paths[i] for i in some])
    out = np.empty((2, 24, 24), np.uint8)
    assert np.array_equal(part.take(np.array([2, 0]), axis=0, out=out), part[np.array([2, 0])])
    assert np.array_equal(part.only(np.array([False, True, True]))[:], part[np.array([1, 2])])


@pytest.mark.parametrize("aspect", ["stretch", "pad", "crop"])
def test_pictures_that_are_not_square(tmp_path, home, aspect):
    ramp = np.linspace(0, 255, 60 * 30).reshape(60, 30).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    got = open_images(["a.png"], [str(tmp_path / "a.png")], 20, aspect=aspect)[0]
    if aspect == "stretch":
        want = np.asarray(Image.fromarray(ramp).resize((20, 20), Image.Resampling.BILINEAR))
    elif aspect == "crop":
        want = np.asarray(Image.fromarray(ramp[15:45]).resize((20, 20), Image.Resampling.BILINEAR))
    else:
        want = np.zeros((20, 20), np.uint8)
        want[:, 5:15] = np.asarray(Image.fromarray(ramp).resize((10, 20), Image.Resampling.BILINEAR))
    assert np.abs(got.astype(int) - want).max() <= 1


def test_another_data_set_with_the_same_names_gets_another_cache(tmp_path, home):
    ids, paths = write(tmp_path / "full", side=40)
    _, resized = write(tmp_path / "resized", side=30, seed=1)
    first, second = open_images(ids, paths, 24), open_images(ids, resized, 24)
    assert first.folder != second.folder
    assert_right(first, paths), assert_right(second, resized)
    assert_right(open_images(ids, paths, 24), paths), assert_right(open_images(ids, resized, 24), resized)


def test_changed_pictures_are_noticed_in_the_sample_and_all_are_then_checked(tmp_path, home, capsys):
    ids, paths = write(tmp_path / "images", n=60)
    open_images(ids, paths, 24)
    for i in (0, 33):  # 0 is in the sample, 33 is found by the check that follows
        Image.fromarray(np.full((41, 41), i, np.uint8)).save(paths[i])
    images = open_images(ids, paths, 24)
    assert_right(images, paths)
    said = capsys.readouterr().err
    assert "such as 0.png" in said and "2 changed (0.png, 33.png)" in said and len(built(home)) == 1


def test_verify_finds_what_the_sample_cannot_and_decodes_only_that(tmp_path, home, monkeypatch, capsys):
    ids, paths = write(tmp_path / "images", n=60)
    images = open_images(ids, paths, 24)
    same_size = Path(paths[7]).stat().st_size
    Image.fromarray(np.random.default_rng(99).integers(0, 256, (40, 40), dtype=np.uint8)).save(paths[7])
    assert Path(paths[7]).stat().st_size == same_size and not np.array_equal(images[7], read_grey(paths[7], 24))
    decoded = []
    real = cache_build.open_picture
    monkeypatch.setattr(cache_build, "open_picture", lambda source: decoded.append(1) or real(source))
    images = open_images(ids, paths, 24, verify=True)
    assert_right(images, paths)
    assert len(decoded) == 1 and "1 changed (7.png)" in capsys.readouterr().err
    open_images(ids, paths, 24, verify=True)
    assert len(decoded) == 1 and "0 changed" in capsys.readouterr().err


def test_verify_mends_pixels_that_rotted(tmp_path, home):
    ids, paths = write(tmp_path / "images", n=60)
    folder = open_images(ids, paths, 24).folder
    pixels = np.load(folder / PIXELS, mmap_mode="r+")
    pixels[41] ^= 1
    pixels.flush()
    assert not np.array_equal(open_images(ids, paths, 24)[41], read_grey(paths[41], 24))  # not in the sample
    assert_right(open_images(ids, paths, 24, verify=True), paths)


def test_sources_that_are_gone_leave_the_cache_as_it_is(pictures, home, capsys):
    ids, paths = pictures
    images = open_images(ids, paths, 24)
    before = images[:].copy()
    for path in paths:
        os.unlink(path)
    assert np.array_equal(open_images(ids, paths, 24)[:], before)
    assert np.array_equal(open_images(ids, paths, 24, verify=True)[:], before)
    assert "12 source files are gone" in capsys.readouterr().err


def test_damaged_pictures_are_named_not_hidden(pictures, home):
    ids, paths = pictures
    truncated = Path(paths[2])
    truncated.write_bytes(truncated.read_bytes()[:600])
    Path(paths[7]).write_bytes(b"no image")
    Path(paths[8]).write_bytes(b"")
    os.unlink(paths[9])
    images = open_images(ids, paths, 24)
    assert set(images.bad) == {"2.png", "7.png", "8.png", "9.png"} and images[2].max() == 0
    assert open_images(ids, paths, 24).bad == images.bad
    assert set(open_images(ids[:5], paths[:5], 24).bad) == {"2.png"}


def test_a_picture_that_is_mended_is_noticed_at_the_next_opening(tmp_path, home, capsys):
    ids, paths = write(tmp_path / "images", n=60)
    good = Path(paths[33]).read_bytes()  # not in the sample
    Path(paths[33]).write_bytes(b"no image")
    assert set(open_images(ids, paths, 24).bad) == {"33.png"}
    assert set(open_images(ids, paths, 24).bad) == {"33.png"} and "checking" not in capsys.readouterr().err
    Path(paths[33]).write_bytes(good)
    images = open_images(ids, paths, 24)
    assert images.bad == {} and "checked 1 images" in (said := capsys.readouterr().err)
    assert "1 of the unreadable images are no longer what they were" in said
    assert_right(images, paths)


@pytest.mark.parametrize("damage", ["shorter pixels", "no pixels", "empty pixels", "shorter rows", "empty rows", "other rows",
                                    "empty ids", "sampled pixels", "manifest", "empty manifest", "another manifest"])
def test_a_damaged_cache_is_said_to_be_and_mended(pictures, home, damage, capsys):
    ids, paths = pictures
    folder = open_images(ids, paths, 24).folder
    if damage == "shorter pixels":
        os.truncate(folder / PIXELS, 3000)
    elif damage == "no pixels":
        (folder / PIXELS).unlink()
    elif damage.startswith("empty"):
        files = {"pixels": PIXELS, "rows": ROWS, "manifest": MANIFEST, "ids": IDS}
        (folder / files[damage.split()[1]]).write_bytes(b"")
    elif damage == "another manifest":
        (folder / MANIFEST).write_text("[]")
    elif damage == "shorter rows":
        np.save(folder / ROWS, np.load(folder / ROWS)[:5])
    elif damage == "other rows":
        rows = np.load(folder / ROWS)
        rows["pixel_crc"][3] += 1
        np.save(folder / ROWS, rows)
    elif damage == "sampled pixels":
        pixels = np.load(folder / PIXELS, mmap_mode="r+")
        pixels[:] = 0
        pixels.flush()
    else:
        (folder / MANIFEST).write_text("{")
    assert_right(open_images(ids, paths, 24), paths)
    assert damage == "sampled pixels" or f"{folder} is not used" in capsys.readouterr().err
    assert built(home) == [folder]
    assert_right(open_images(ids, paths, 24), paths)


def test_a_named_folder_gets_the_cache_where_another_one_fits(pictures, home, tmp_path):
    """It was ignored, and a cache that somebody meant to carry elsewhere was not there."""
    ids, paths = pictures
    open_images(ids, paths, 24)
    named = open_images(ids, paths, 24, cache_dir=tmp_path / "named")
    assert named.folder.parent == tmp_path / "named"
    assert open_images(ids, paths, 24, cache_dir=tmp_path / "named").folder == named.folder


def test_a_cache_that_cannot_be_written_is_used_where_it_is(pictures, home, tmp_path, never_decode, monkeypatch):
    ids, paths = pictures
    folder = open_images(ids, paths, 24).folder
    elsewhere = tmp_path / "attached" / "my-cache"
    elsewhere.parent.mkdir()
    folder.rename(elsewhere)
    for path in [*elsewhere.iterdir(), elsewhere, elsewhere.parent]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    real = os.access
    monkeypatch.setattr(cache_build.os, "access", lambda p, mode: "attached" not in str(p) and real(p, mode))  # root may all
    try:
        Image.fromarray(np.zeros((39, 39), np.uint8)).save(paths[5])
        changed = open_images(ids, paths, 24, cache_dir=elsewhere)  # one changed: a new one where one can write
        assert changed.folder.parent == home and changed[5].max() == 0
        assert open_images(ids, paths, 24, cache_dir=elsewhere).folder == changed.folder  # and from then on that one
        write(tmp_path / "images")
        never_decode()
        assert open_images(ids, paths, 24, cache_dir=elsewhere).folder == elsewhere
        assert open_images(ids, paths, 24, cache_dir=elsewhere.parent).folder == elsewhere
    finally:
        elsewhere.parent.chmod(0o755), elsewhere.chmod(0o755)


def test_caches_attached_on_kaggle_are_found_without_listing_images(tmp_path):
    from charmlib.data.paths import kaggle_caches

    wanted = [tmp_path / where for where in ("datasets/me/nih224/grey224", "datasets/me/flat", "old/grey64",
                                             "old2/cache/grey64",
                                             "notebooks/me/prepare/cache/grey64")]
    for folder in wanted:
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
    deep = tmp_path / "data/images_001/images/x"
    deep.mkdir(parents=True)
    (deep / MANIFEST).write_text("{}")
    assert sorted(kaggle_caches(MANIFEST, tmp_path)) == sorted(wanted)


def test_a_repair_leaves_what_others_have_open_as_it_was(tmp_path, home):
    ids, paths = write(tmp_path / "images", n=60)
    before = open_images(ids, paths, 24)
    seen = before[:].copy()
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(paths[7])
    after = open_images(ids, paths, 24, verify=True)
    assert np.array_equal(before[:], seen) and after[7].max() == 0 and len(built(home)) == 1
    assert [p.name for p in home.iterdir() if p.is_dir()] == [after.folder.name]


def test_a_repair_without_room_for_a_copy_is_done_in_place(tmp_path, home, monkeypatch, capsys):
    ids, paths = write(tmp_path / "images", n=60)
    open_images(ids, paths, 24)
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(paths[7])
    monkeypatch.setattr(cache_build.shutil, "disk_usage", lambda p: type("U", (), {"free": 100})())
    assert_right(open_images(ids, paths, 24, verify=True), paths)
    assert "mending in place" in capsys.readouterr().err and len(built(home)) == 1


def test_a_copy_beside_the_original_does_not_stand_in_the_way_of_a_repair(tmp_path, home):
    import shutil

    ids, paths = write(tmp_path / "images", n=60)
    folder = open_images(ids, paths, 24).folder
    shutil.copytree(folder, home / "aaa_copy")
    source = Path(paths[0]).read_bytes()
    Path(paths[0]).write_bytes(Path(paths[1]).read_bytes())  # in the sample; noise of one size makes files of one size
    assert len(source) == Path(paths[0]).stat().st_size
    assert_right(open_images(ids, paths, 24), paths)
    assert_right(open_images(ids, paths, 24), paths)


def test_a_source_that_is_there_and_cannot_be_opened_is_not_checked_anew_each_time(tmp_path, home, capsys):
    ids, paths = write(tmp_path / "images", n=60)
    os.unlink(paths[33])
    os.mkdir(paths[33])
    assert list(open_images(ids, paths, 24).bad) == ["33.png"]
    capsys.readouterr()
    assert list(open_images(ids, paths, 24).bad) == ["33.png"] and capsys.readouterr().err == ""


def test_file_names_that_are_not_text(tmp_path, home):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(np.full((30, 30), 9, np.uint8)).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", tmp_path / name)
    for ids in ([name], [name, name]):
        assert open_images(ids, [str(tmp_path / name)] * len(ids), 24)[0].max() == 9


def test_too_little_room_is_refused_with_numbers_and_leaves_nothing(pictures, home, monkeypatch):
    ids, paths = pictures
    monkeypatch.setattr(cache_build.shutil, "disk_usage", lambda p: type("U", (), {"free": 100})())
    with pytest.raises(OSError, match=r"12 images at 24 pixels needs 0.0 MB, .* has 0.0 MB free: name another cache_dir"):
        open_images(ids, paths, 24)
    assert [p.name for p in home.iterdir() if not p.name.endswith(".lock")] == []


def test_a_quota_that_the_free_space_does_not_show_is_refused_with_numbers_too(pictures, home, monkeypatch):
    def full(*_):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(cache_build.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"does not take the 0.0 MB .* 12 images at 24 pixels needs \(Disk quota exceeded\)"):
        open_images(*pictures, 24)
    assert not list(home.glob("*.partial"))


def test_a_repair_that_was_killed_goes_on_under_the_name_that_is_looked_for(tmp_path, home, monkeypatch):
    ids, paths = write(tmp_path / "images", n=60)
    open_images(ids, paths, 24)
    Image.fromarray(np.zeros((41, 41), np.uint8)).save(paths[0])  # in the sample, and of another size
    real = cache_build._fill
    monkeypatch.setattr(cache_build, "_fill", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_images(ids, paths, 24)
    decoded = []
    monkeypatch.setattr(cache_build, "_fill", real)
    decode = cache_build.open_picture
    monkeypatch.setattr(cache_build, "open_picture", lambda source: decoded.append(1) or decode(source))
    assert_right(open_images(ids, paths, 24), paths)
    assert len(decoded) == 1 and len(built(home)) == 1 and not list(home.glob("*.partial"))


def test_an_interrupt_keeps_what_is_decoded(pictures, home, monkeypatch, capsys):
    ids, paths = pictures
    real, decoded = cache_build.open_picture, []

    def interrupted(source):
        if len(decoded) == 5:
            raise KeyboardInterrupt
        decoded.append(1)
        return real(source)

    monkeypatch.setattr(cache_build, "open_picture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_images(ids, paths, 24, workers=1)
    assert built(home) == []
    monkeypatch.setattr(cache_build, "open_picture", lambda source: decoded.append(1) or real(source))
    assert_right(open_images(ids, paths, 24), paths)
    assert len(decoded) == 12 and "5 of 12 images are there" in capsys.readouterr().err


def test_rows_that_say_done_without_their_pixels_are_decoded_again(pictures, home):
    """As after a power cut, when the disk has one file's pages and not the other's."""
    ids, paths = pictures
    folder = open_images(ids, paths, 24).folder
    (folder / MANIFEST).unlink()
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    pixels = np.load(partial / PIXELS, mmap_mode="r+")
    pixels[4:9] = 0
    pixels.flush()
    assert_right(open_images(ids, paths, 24), paths)


def test_a_finished_build_that_lacks_its_last_rename_is_never_opened(pictures, home, never_decode):
    ids, paths = pictures
    folder = open_images(ids, paths, 24).folder
    folder.rename(folder.with_name(folder.name + ".partial"))  # with its manifest, as after a kill between the two
    never_decode()
    assert open_images(ids, paths, 24).folder == folder


BUILD = """
import sys
from pathlib import Path
from charmlib.data.cache import open_images
paths = sorted(Path(sys.argv[1]).iterdir())
images = open_images([p.name for p in paths], [str(p) for p in paths], 48, workers=2)
print("built", images.folder)
"""


def test_killed_anywhere_it_goes_on_and_never_opens_wrong(tmp_path, home):
    folder = tmp_path / "images"
    write(folder, n=1500, side=160)
    paths = sorted(folder.iterdir())
    ids = [p.name for p in paths]
    environment = {**os.environ, "CHARM_CACHE": str(home)}
    kills = 0
    for delay in (0.0, 0.05, 0.15, 0.3, 0.6):
        child = subprocess.Popen([sys.executable, "-c", BUILD, str(folder)], env=environment, stdout=subprocess.PIPE,
                                 stderr=subprocess.DEVNULL)
        while child.poll() is None and not list(home.glob("*.partial/rows.npy")):
            time.sleep(0.005)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
        for whole in built(home):  # whatever has a manifest and its name must be right
            if whole.suffix != ".partial":
                assert_right(open_images(ids, [str(p) for p in paths], 48), paths, 48)
    assert kills >= 3
    assert_right(open_images(ids, [str(p) for p in paths], 48), paths, 48)
    assert [p.suffix for p in home.iterdir() if p.is_dir()] == [""]


def test_two_at_once_one_builds_and_the_other_waits(tmp_path, home):
    folder = tmp_path / "images"
    write(folder, n=600, side=160)
    environment = {**os.environ, "CHARM_CACHE": str(home)}
    children = [subprocess.Popen([sys.executable, "-c", BUILD, str(folder)], env=environment, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(2)]
    out = [child.communicate(timeout=120) for child in children]
    assert all(child.returncode == 0 for child in children), out
    assert len({o for o, _ in out}) == 1 and len(built(home)) == 1
    paths = sorted(folder.iterdir())
    assert_right(open_images([p.name for p in paths], [str(p) for p in paths], 48), paths, 48)


def test_processes_and_threads_give_the_same_and_both_name_what_is_damaged(tmp_path, home, monkeypatch):
    ids, paths = write(tmp_path / "images", n=40)
    Path(paths[3]).write_bytes(b"no image")
    threads = open_images(ids, paths, 24)
    monkeypatch.setattr(cache_build, "_WORTH_PROCESSES", 0)
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "third"))
    processes = open_images(ids, paths, 24)
    assert processes.folder != threads.folder and np.array_equal(processes[:], threads[:])
    assert processes.bad == threads.bad and list(processes.bad) == ["3.png"]
    assert np.array_equal(np.load(processes.folder / ROWS), np.load(threads.folder / ROWS))


def test_a_file_that_crashes_the_decoder_is_named_and_the_rest_is_decoded(tmp_path, home, monkeypatch):
    ids, paths = write(tmp_path / "images", n=40)
    crashing = tmp_path / "crash"
    crashing.mkdir()
    (crashing / "sitecustomize.py").write_text(
        "import os, pathlib\nread = pathlib.Path.read_bytes\n"
        "pathlib.Path.read_bytes = lambda p: os.abort() if p.name == '21.png' else read(p)\n")
    monkeypatch.setenv("PYTHONPATH", str(crashing))
    monkeypatch.setattr(cache_build, "_WORTH_PROCESSES", 0)
    images = open_images(ids, paths, 24)
    assert images.bad == {"21.png": "the decoder crashed on it"} and images[21].max() == 0
    for i, path in enumerate(paths):
        assert i == 21 or np.array_equal(images[i], read_grey(path, 24))


def test_who_waits_says_so_and_finds_it_built(pictures, home, never_decode):
    ids, paths = pictures
    folder = open_images(ids, paths, 24).folder
    hidden = folder.rename(folder.parent.parent / "hidden")
    lines = []
    with cache_build.lock(folder, lines.append):
        waiter = threading.Thread(target=lambda: lines.append(open_images(ids, paths, 24, say=lines.append).folder))
        waiter.start()
        while not any("waiting for it" in str(line) for line in lines):
            time.sleep(0.01)
        hidden.rename(folder)
        never_decode()
    waiter.join(30)
    assert lines[-1] == folder


def test_the_whole_nih_set_opens_in_a_fifth_of_a_second(tmp_path, home):
    """112,120 rows at 224 pixels; the file of pixels is a hole of 5.6 GB."""
    from benchmarks.open_cache import synthetic_cache

    _, (source,) = write(tmp_path / "images", n=1)
    ids = [f"{i // 4:08}_{i % 4:03}.png" for i in range(112_120)]
    paths = [source] * len(ids)
    synthetic_cache(ids, paths, 224, home / "grey224")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        images = open_images(ids, paths, 224)
        seconds.append(time.perf_counter() - start)
    assert images.folder == home / "grey224" and images.shape == (112_120, 224, 224)
    assert min(seconds) < 0.2, seconds


def test_the_manifest_names_what_the_sources_were(tmp_path, home):
    from charmlib.data.cache import content_of

    ids, paths = write(tmp_path / "images", n=5)
    Image.fromarray(np.zeros((30, 50), np.uint8)).save(paths[2])
    images = open_images(ids, paths, 24)
    content = content_of(images.folder)
    assert content["sizes"] == {(40, 40): 4, (50, 30): 1} and content["filter"] == "bilinear" and content["images"] == 5
    assert (images.folder / IDS).read_text().split("\n") == ids
    assert json.loads((images.folder / MANIFEST).read_text())["aspect"] == "stretch"


def test_a_script_without_a_main_guard_may_build_in_processes(tmp_path, home):
    write(tmp_path / "images", n=40)
    script = tmp_path / "script.py"
    script.write_text(f"from charmlib.data import cache_build\ncache_build._WORTH_PROCESSES = 0\n{BUILD}")
    environment = {**os.environ, "CHARM_CACHE": str(home), "PYTHONPATH": str(Path(cache_build.__file__).parents[2])}
    done = subprocess.run([sys.executable, script, tmp_path / "images"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("built") == 1, done.stderr


def deep(folder, n=20, side=40, shift=6):
    """Pictures of 14 bits, each brighter than the last, and one of 8 bits."""
    folder.mkdir()
    ramp = np.linspace(40, 200, side * side).reshape(side, side)
    for i in range(n):
        Image.fromarray((ramp + i).astype(np.uint16) << shift).save(folder / f"{i}.png")
    Image.fromarray(ramp.astype(np.uint8)).save(folder / "eight.png")
    ids = [*(f"{i}.png" for i in range(n)), "eight.png"]
    return ids, [str(folder / name) for name in ids]


def test_deep_pictures_have_one_scale_from_the_training_images(tmp_path, home):
    ids, paths = deep(tmp_path / "deep")
    said = []
    images = open_images(ids, paths, 40, train=lambda: range(10, 15), say=said.append)
    values = np.concatenate([np.asarray(Image.open(paths[i])).ravel() for i in range(10, 15)])
    assert images.scale == pytest.approx(np.percentile(values, (0.5, 99.5)), abs=32)
    assert "20 pictures of more than 8 bits: values from" in said[0]
    for i in (0, 12, 19):
        assert np.array_equal(images[i], read_grey(paths[i], 40, scale=images.scale))
    assert images[19].mean() > images[12].mean() + 8  # a brighter picture stays brighter
    assert np.array_equal(images[20], read_grey(paths[20], 40))  # 8 bits are taken as they are
    again = open_images(ids, paths, 40, train=lambda: range(3), say=said.append)
    assert again.folder == images.folder and again.scale == images.scale and len(said) == 1


def test_a_killed_build_and_a_repair_keep_the_common_scale(tmp_path, home, monkeypatch):
    ids, paths = deep(tmp_path / "deep")
    whole = open_images(ids, paths, 40, cache_dir=tmp_path / "whole")
    real, calls = cache_build.fit, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(cache_build, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        open_images(ids, paths, 40, cache_dir=tmp_path / "killed", workers=1)
    monkeypatch.setattr(cache_build, "fit", real)
    images = open_images(ids, paths, 40, cache_dir=tmp_path / "killed", workers=1, train=lambda: pytest.fail("scaled anew"))
    assert images.scale == whole.scale and np.array_equal(images[:], whole[:])
    Image.fromarray(np.asarray(Image.open(paths[0])) // 2).save(paths[0])
    mended = open_images(ids, paths, 40, cache_dir=tmp_path / "killed", verify=True, train=lambda: pytest.fail("scaled anew"))
    assert mended.scale == whole.scale and np.array_equal(mended[0], read_grey(paths[0], 40, scale=whole.scale))


def test_blank_pictures_and_strips_are_named(tmp_path, home):
    ids, paths = write(tmp_path / "images")
    strip = np.random.default_rng(0).integers(0, 255, (40, 120))
    for i, array in ((2, np.zeros((40, 40))), (5, np.full((40, 40), 128)), (7, strip)):
        Image.fromarray(array.astype(np.uint8)).save(paths[i])
    images = open_images(ids, paths, 24)
    assert images.odd == {"2.png": "nearly blank", "5.png": "nearly blank",
                          "7.png": "120 x 40 pixels is no chest radiograph's shape"} and not images.bad
    assert open_images(ids[4:], paths[4:], 24).odd.keys() == {"5.png", "7.png"}


def test_contrast_has_a_cache_of_its_own(tmp_path, home):
    ids, paths = write(tmp_path / "images")
    try:
        read_grey(paths[0], 24, contrast="clahe")
    except ImportError as error:
        pytest.skip(str(error))
    plain, clahe = open_images(ids, paths, 24), open_images(ids, paths, 24, contrast="clahe")
    assert plain.folder != clahe.folder and np.array_equal(clahe[3], read_grey(paths[3], 24, contrast="clahe"))
    assert open_images(ids, paths, 24).folder == plain.folder


def test_a_user_without_a_home_that_can_be_written_has_a_temporary_folder(tmp_path, monkeypatch):
    for name in ("CHARM_CACHE", "XDG_CACHE_HOME", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home/.cache/charmlib"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    own = tmp_path / f"charmlib-{os.getuid()}"
    assert default_cache_dir() == own and own.stat().st_mode & 0o777 == 0o700
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CHARM_CACHE", raising=False)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a home on a read-only disk
    assert default_cache_dir() == own
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(PermissionError, match="belongs to another user: set HOME or CHARM_CACHE"):
        default_cache_dir()
