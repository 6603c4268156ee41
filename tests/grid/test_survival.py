"""A grid under real kills, a full disk, two runners, hung cells: it goes on and ends in the same bits."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from charmlib.files import LeaseLost
from charmlib.grid import lease
from charmlib.grid.cells import CellFolder
from charmlib.training.callbacks import HISTORY
from tests.grid.conftest import CELLS, epochs_done, family, run, same_results, start, wait_for

pytestmark = pytest.mark.slow


def same_board(ours: Path, theirs: Path) -> None:
    """Leaderboards that are equal apart from times."""
    a, b = (pd.read_csv(folder / "leaderboard.csv").drop(columns=["seconds", "overhead_seconds"]) for folder in (ours, theirs))
    pd.testing.assert_frame_equal(a, b)


def nothing_left(out: Path) -> None:
    """No lease, no half-written file, no resume file."""
    left = [p.name for cell in out.iterdir() if cell.is_dir() for p in cell.iterdir()
            if p.name in (".lease", "resume.pt", "cell.json", ".alive") or p.name.endswith((".tmp", ".running.ipynb"))]
    assert not left


def test_kills_of_runner_child_and_kernel_end_in_the_same_bits(done, tmp_path):
    """The runner in stage 1; then, in one call, the kernel in stage 2, two papermill children, one while it scores."""
    path, quiet, _ = done
    out = tmp_path / "out"
    cell, other = out / CELLS[0], out / CELLS[1]
    runner = start(path, out)
    wait_for(lambda: epochs_done(cell) >= 1 and (cell / "resume.pt").is_file(), runner=runner)  # which is written last
    everyone = runner.children(recursive=True)
    assert any("ipykernel" in " ".join(p.cmdline()) for p in everyone)
    runner.kill()
    runner.wait()
    _, alive = psutil.wait_procs(everyone, timeout=15)
    assert not alive, [p.cmdline() for p in alive]
    assert not (cell / "metrics.json").is_file() and (cell / "resume.pt").is_file()

    runner = start(path, out)
    wait_for(lambda: epochs_done(cell) >= 3, runner=runner)
    wait_for(lambda: family(runner, "ipykernel"), runner=runner)[0].kill()
    wait_for(lambda: (cell / "model.json").is_file() and family(runner, "charmlib.grid.cell_process"), runner=runner)[0].kill()
    wait_for(lambda: (cell / "metrics.json").is_file() and not (cell / ".lease").exists(), runner=runner)
    touched = {p: p.stat().st_mtime_ns for p in cell.iterdir()}
    wait_for(lambda: epochs_done(other) >= 1, runner=runner)
    family(runner, "charmlib.grid.cell_process")[0].kill()
    assert runner.wait(120) == 0, out.with_suffix(".log").read_text()
    for name in CELLS:
        same_results(out / name, quiet / name)
        assert (out / name / "predictions.npz").read_bytes() == (quiet / name / "predictions.npz").read_bytes()
    same_board(out, quiet)
    nothing_left(out)
    assert touched == {p: p.stat().st_mtime_ns for p in touched}  # a finished cell is not touched
    said = out.with_suffix(".log").read_text()
    assert "its process or kernel was killed (signal SIGKILL); started again" in said
    spent = json.loads((cell / "metrics.json").read_text())["seconds"]
    assert spent["overhead"] > 10  # of all its attempts, the killed ones too


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_polite_end_loses_the_epoch_in_hand_and_nothing_else(done, tmp_path, number, status):
    path, quiet, _ = done
    out = tmp_path / "out"
    runner = start(path, out, "-p", "k=1")
    cell = out / CELLS[0]
    wait_for(lambda: epochs_done(cell) >= 2, runner=runner)
    everyone = runner.children(recursive=True)
    runner.send_signal(number)
    assert runner.wait(30) == status
    _, alive = psutil.wait_procs(everyone, timeout=5)
    assert not alive, [p.cmdline() for p in alive]
    said = out.with_suffix(".log").read_text()
    assert "Traceback" not in said and "the same command goes on" in said
    assert not lease.holder(cell) and not (cell / ".lease").exists() and not (cell / "error.txt").exists()
    kept = epochs_done(cell)
    again = run(path, out, "-p", "k=1")
    assert again.returncode == 0, again.stderr
    goes_on_after(kept, again.stdout)
    same_results(cell, quiet / CELLS[0])


def goes_on_after(kept: int, said: str) -> None:
    """From its last saved epoch; the history may already have the row of one whose save did not come to its end."""
    found = re.search(r"going on after (\d+) finished epochs", said)
    assert kept >= 5 or (found and int(found[1]) in (kept - 1, kept)), said  # 5: trained, only scoring was left


def test_two_people_start_the_same_grid(done, tmp_path):
    """They share its cells: each trains once, both end with the whole leaderboard."""
    path, quiet, _ = done
    out = tmp_path / "out"
    runners = [start(path, out, log=tmp_path / f"{i}.log") for i in range(2)]
    assert [r.wait(150) for r in runners] == [0, 0], [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    said = [(tmp_path / f"{i}.log").read_text() for i in range(2)]
    for name in CELLS:
        same_results(out / name, quiet / name)
        assert (out / name / "log.txt").read_text().count("training on") == 1
    same_board(out, quiet)
    assert all(f"{name}: done by another runner" in "".join(said) or "[2/2]" in "".join(said) for name in CELLS)
    assert any("is being worked on by process" in text for text in said)
    nothing_left(out)


def can_mount() -> bool:
    """Whether this user may make a small file system."""
    return os.getuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many megabytes, again to make it larger."""
    if not can_mount():
        pytest.skip("a small file system can be mounted by root only")
    place = tmp_path / "disk"
    place.mkdir()

    def size(megabytes: int) -> Path:
        how = f"remount,size={megabytes}m" if place.is_mount() else f"size={megabytes}m"
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "none", str(place)], check=True)
        return place

    yield size
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_a_full_disk_stops_the_grid_with_its_name_and_loses_nothing(done, small_disk, tmp_path):
    """Filled up by another while the first epochs are saved; then there is room, and the same command goes on."""
    path, quiet, _ = done
    out, log = small_disk(80) / "out", tmp_path / "full.log"
    cell, filler = out / CELLS[0], out.parent / "filler"
    runner = start(path, out, "-p", "k=1", log=log)
    wait_for(lambda: epochs_done(cell) >= 1, runner=runner)
    with pytest.raises(OSError, match="No space left"), open(filler, "wb") as file:
        while True:
            file.write(b"0" * 2**16)
            file.flush()
    assert runner.wait(60) == 2, log.read_text()
    assert "no space left" in log.read_text() and "make room and start the same command again" in log.read_text()
    assert not (cell / "metrics.json").exists() and not list(cell.glob(".*.tmp")) and not (cell / ".lease").exists()
    kept = epochs_done(cell)
    still = run(path, out, "-p", "k=1")
    assert still.returncode == 2 and "Traceback" not in still.stderr
    filler.unlink()
    again = run(path, out, "-p", "k=1")
    assert again.returncode == 0, again.stdout + again.stderr
    goes_on_after(kept, again.stdout)
    same_results(cell, quiet / CELLS[0])


def test_a_grid_that_cannot_fit_is_refused_before_it_trains(done, small_disk):
    path, _, _ = done
    tight = run(path, small_disk(4) / "out")
    assert tight.returncode == 2 and "not even one fits" in tight.stderr and "training on" not in tight.stdout


def test_a_hung_cell_is_ended_with_all_its_children_and_tried_once_more(light, tmp_path):
    """k1 hangs at its first start only, k2 at both: one is done, the other failed with its log."""
    hang = f'''
import subprocess, time
from pathlib import Path
mark = Path({str(tmp_path)!r}) / f"hung{{k}}"
if k == 2 or not mark.exists():
    with open(Path(run_dir) / "log.txt", "a") as log:
        print(f"k{{k}} hangs", file=log)
    with open(mark, "a") as file:
        print(subprocess.Popen(["sleep", "1234"], start_new_session=True).pid, file=file)
    time.sleep(1234)
'''
    result = light("--hung-after", "6s", first=hang)
    assert result.returncode == 1 and "1 of 2 cells failed: k2" in result.stderr
    assert (light.out / "k1/metrics.json").is_file() and not (light.out / "k1/error.txt").exists()
    error = (light.out / "k2/error.txt").read_text()
    assert "no sign of life" in error and "k2 hangs" in error
    assert "k1: showed no sign of life and was ended" in result.stdout and "started again" in result.stdout
    sleepers = [int(pid) for name in ("hung1", "hung2") for pid in (tmp_path / name).read_text().split()]
    assert len(sleepers) == 3 and not any(psutil.pid_exists(pid) for pid in sleepers)
    assert (light.out / "k2/log.txt").read_text().count("k2 hangs") == 2


def test_a_cell_that_works_is_not_taken_for_hung(light):
    """Its epochs together take longer than the limit, each of them less."""
    result = light("--hung-after", "4s", "-p", "stage1_epochs=6", k=[1], pace=1.2)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_zombie_writes_nothing_once_its_lease_is_lost(light):
    """Its lease taken away while it trains, a cell stops at its next file, and the runner starts it again."""
    runner = light("-p", "stage1_epochs=12", k=[1], pace=0.5, background=True)
    cell = light.out / "k1"
    wait_for(lambda: epochs_done(cell) >= 2, runner=runner)
    theirs = {"token": "another", "host": "elsewhere", "place": "elsewhere", "pid": 1, "born": 0.0,
              "folder": str(cell), "number": cell.stat().st_ino}
    (cell / ".lease").write_text(json.dumps(theirs))
    before = epochs_done(cell)
    wait_for(lambda: "is being worked on by process 1 on elsewhere" in (light.out.with_suffix(".log")).read_text(),
             runner=runner)
    assert epochs_done(cell) <= before + 1  # the one that was being written when the lease went
    (cell / ".lease").unlink()
    assert runner.wait(60) == 0, light.out.with_suffix(".log").read_text()
    starts = [line for line in (cell / "log.txt").read_text().splitlines() if line.startswith("start")]
    assert len(starts) == 2 and epochs_done(cell) == 12 + 1


def test_a_grid_goes_on_when_its_machine_wakes(light, monkeypatch):
    """Dask drops workers that were silent for five minutes (here: a second), its own process's too."""
    monkeypatch.setenv("DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL", "1s")
    runner = light("-p", "stage1_epochs=6", k=[1], pace=1.0, background=True)
    wait_for(lambda: epochs_done(light.out / "k1") >= 1, runner=runner)
    everyone = [runner, *runner.children(recursive=True)]
    for process in everyone:
        process.suspend()
    time.sleep(6)
    for process in everyone:
        process.resume()
    assert runner.wait(60) == 0, light.out.with_suffix(".log").read_text()
    assert sum(line.startswith("start") for line in (light.out / "k1/log.txt").read_text().splitlines()) == 1


def test_a_machine_that_slept_loses_its_lease_after_a_while(tmp_path, monkeypatch):
    """A lease of another machine holds while it is renewed, and no longer than its patience after that."""
    mine = lease.take(tmp_path)
    (tmp_path / ".lease").write_text((tmp_path / ".lease").read_text().replace(lease._place(), "another machine"))
    with pytest.raises(lease.Busy, match="being worked on by process"):
        lease.take(tmp_path, patience=2.0)
    os.utime(tmp_path / ".lease", (time.time() - 3, time.time() - 3))
    theirs = lease.take(tmp_path, patience=2.0)
    for name, value in mine.environment.items():
        monkeypatch.setenv(name, value)
    from charmlib.files import write_text

    with pytest.raises(LeaseLost, match="taken over by another"):
        write_text(tmp_path / "metrics.json", "{}")
    assert not (tmp_path / "metrics.json").exists() and not list(tmp_path.glob("*.tmp"))
    mine.release()
    assert lease.holder(tmp_path)  # it was not mine to give back
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert not lease.holder(tmp_path / "copy")  # of a session that was killed, and its output fetched
    theirs.release()
    assert not lease.holder(tmp_path)


def test_a_lease_guards_its_folder_by_any_path(tmp_path, monkeypatch):
    """Written through a link, results were not guarded."""
    from charmlib.files import write_text

    (tmp_path / "link").symlink_to(tmp_path / "cell")
    mine = lease.take(tmp_path / "cell")
    for name, value in mine.environment.items():
        monkeypatch.setenv(name, value)
    write_text(tmp_path / "link/a.txt", "mine")
    (tmp_path / "cell/.lease").unlink()
    with pytest.raises(LeaseLost, match="is gone"):
        write_text(tmp_path / "link/a.txt", "no longer")
    assert (tmp_path / "cell/a.txt").read_text() == "mine"


def test_a_cells_process_ends_also_when_its_parent_was_killed_before_it_could_look(done, tmp_path):
    """Killed a tenth of a second after it started the cell, the parent left it running for good."""
    code = ("import json, os, subprocess, sys, time; from charmlib.session import with_this_package\n"
            "child = subprocess.Popen([sys.executable, '-m', 'charmlib.grid.cell_process'], stdin=subprocess.PIPE, text=True,\n"
            "                         env=with_this_package(os.environ))\n"
            "print(child.pid, flush=True); time.sleep(60)")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    assert not psutil.wait_procs([child], timeout=15)[1]


def test_time_between_sessions_is_not_a_cells_overhead(tmp_path):
    """A copied cell has no last sign of life; what its epochs took is counted, the night before the copy is not."""
    from charmlib.grid.cell_process import _spent

    (tmp_path / "cell.json").write_text(json.dumps({"hash": "h", "spent": 5.0, "started": time.time() - 50000}))
    (tmp_path / "history.csv").write_text(f"{','.join(HISTORY)}\n1,1,,,,,,20.0,,\n1,2,,,,,,22.0,,\n")
    assert _spent(CellFolder(tmp_path), "h") == 42.0
    (tmp_path / ".alive").touch()
    os.utime(tmp_path / ".alive", (time.time() - 49000, time.time() - 49000))
    assert _spent(CellFolder(tmp_path), "h") == pytest.approx(1005, abs=2) and _spent(CellFolder(tmp_path), "other") == 0.0


def test_of_many_that_want_a_lease_one_gets_it(tmp_path):
    """Twelve processes at once, over a lease whose holder is dead."""
    code = ("import sys, time; from charmlib.grid import lease\n"
            "try: lease.take(sys.argv[1]); print('mine', flush=True); time.sleep(6)\n"
            "except lease.Busy: print('busy', flush=True)")
    dead = subprocess.run([sys.executable, "-c", code.replace("time.sleep(6)", "pass"), str(tmp_path)], capture_output=True,
                          text=True)
    assert dead.stdout == "mine\n" and (tmp_path / ".lease").is_file() and not lease.holder(tmp_path)
    takers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
              for _ in range(12)]
    assert sorted(t.communicate()[0].strip() for t in takers) == ["busy"] * 11 + ["mine"]
