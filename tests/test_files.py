"""Files that matter are written, synced, renamed and their folder synced, in that order; and lose nothing on a full disk."""

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from charmlib import Run
from charmlib.evaluation.runs import finish
from charmlib.files import DiskFull, first_line, lock, remove_temporaries, write_json, write_text, write_whole


@pytest.fixture
def order(monkeypatch):
    """What is done to which file or folder, in turn: ('sync' or 'rename', name)."""
    done = []
    real_sync, real_replace = os.fsync, os.replace

    def synced(handle):
        done.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        return real_sync(handle)

    def replaced(source, target):
        done.append(("rename", Path(source), Path(target)))
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return done


def renamed(order):
    """Name -> its three steps, of each file that was put in place."""
    steps = {}
    for i, step in enumerate(order):
        if step[0] == "rename":
            _, source, target = step
            steps[target.name] = [order[i - 1], step, order[i + 1]]
            assert order[i - 1] == ("sync", source.resolve()) and order[i + 1] == ("sync", target.parent.resolve())
    return steps


@pytest.mark.slow
def test_every_result_of_a_run_is_synced_renamed_and_its_folder_synced(tiny, order):
    """A real run: no file of it is written in any other way but the log, which is only added to."""
    run = Run.open(tiny)
    run.train()
    Run.load(tiny["run_dir"]).score()
    finish(tiny["run_dir"])
    steps = renamed(order)
    assert {"params.yaml", "resume.pt", "history.csv", "model.safetensors", "model.json", "predictions.npz", "resamples.npz",
            "scored.json", "metrics.json", "bank_history.csv", "bank.csv"} <= set(steps)
    here = {p.name for p in Path(tiny["run_dir"]).iterdir()}
    assert here - set(steps) == {"log.txt"}


def test_shares_that_cannot_flush_a_folder_are_written_all_the_same(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(handle):
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "a.txt", "words")
    assert (tmp_path / "a.txt").read_text() == "words"
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        write_text(tmp_path / "a.txt", "other words")
    assert (tmp_path / "a.txt").read_text() == "words"


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_stands_for_a_lock_where_the_file_system_has_none(tmp_path, monkeypatch, code):
    def flock(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path / "x.lock"), pytest.raises(filelock.Timeout):
        lock(tmp_path / "x.lock", timeout=0)
    with lock(tmp_path / "x.lock", timeout=0):
        pass


def test_a_full_disk_keeps_the_file_that_was_there(tmp_path):
    write_text(tmp_path / "a.txt", "old")

    def full(temporary):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(DiskFull, match="no space left to write a.txt; make room and start the same command again") as error:
        write_whole(tmp_path / "a.txt", full)
    assert error.value.errno == errno.ENOSPC and str(tmp_path) in str(error.value)
    assert (tmp_path / "a.txt").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_other_failures_stay_what_they_are(tmp_path):
    def broken(temporary):
        temporary.write_text("half")
        raise KeyError("x")

    with pytest.raises(KeyError):
        write_whole(tmp_path / "a.txt", broken)
    assert not list(tmp_path.iterdir())
    write_json(tmp_path / "b.json", {"x": float("nan")})
    assert "null" in (tmp_path / "b.json").read_text()


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_of_a_living_one(tmp_path):
    """Each killed while it writes a.txt; this process stands for a writer that lives."""
    killed = "import os, sys; from charmlib import files; files.check_lease = lambda path: os.kill(os.getpid(), 9); " \
             "files.write_text(sys.argv[1], 'half')"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path / "a.txt")], check=False)
    (left,) = tmp_path.iterdir()
    alive = tmp_path / re.sub(r"-\d+-", f"-{os.getpid()}-", left.name)
    alive.touch()
    write_text(tmp_path / "b.txt", "of another name")
    assert left.exists()
    write_text(tmp_path / "a.txt", "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "b.txt", alive.name}


def test_errors_without_words_are_named_by_their_class():
    assert [first_line(error) for error in (MemoryError(), EOFError("\n\n"), ValueError("\n a \nb"))] == \
        ["MemoryError", "EOFError", "a"]


def test_half_written_files_of_killed_writers_are_removed(tmp_path):
    for name in (".model.safetensors.0123456789ab.tmp", "kept.tmp", "metrics.json"):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"kept.tmp", "metrics.json"}
