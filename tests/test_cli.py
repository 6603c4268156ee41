import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY

ROOT = Path(__file__).parents[1]


def charm(*args, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "charmlib", *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_phantom_and_cache(tmp_path):
    done = charm("phantom", tmp_path / "p", "--images", 40, "--size", 32)
    assert done.returncode == 0 and "40 drawn phantoms of 32 pixels" in done.stdout
    done = charm("cache", tmp_path / "p", "--size", 32, "--cache-dir", tmp_path / "c")
    assert done.returncode == 0 and "40 images at 32 pixels" in done.stdout and "nothing odd found" in done.stdout


@pytest.mark.slow
def test_run_trains_and_tests_one_cell_and_again_does_nothing(phantoms, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TINY, "stage1_epochs": 1, "stage1_frozen_epochs": 0}))
    args = ("run", tmp_path / "mine.yaml", "-p", f"data_root={phantoms}", "-p", "stage2_epochs=1", "--out", tmp_path / "out")
    done = charm(*args)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/metrics.json").is_file() and "stage 2 epoch 1/1" in done.stdout
    again = charm(*args)
    assert again.returncode == 0 and "1 done, 0 to run" in again.stdout
    changed = charm(*args, "-p", "k=1")
    assert changed.returncode == 2 and "--rerun-changed" in changed.stderr


@pytest.mark.slow
def test_a_grid_with_a_failed_cell_does_not_exit_0(phantoms, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    base = {**TINY, "data_root": str(phantoms), "weights": str(tmp_path / "damaged.pt")}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "grid_x.yaml").write_text("base: base.yaml\naxes: {k: [1]}\n")
    done = charm("grid", "run", tmp_path / "grid_x.yaml", "--out", tmp_path / "out")
    assert done.returncode == 1 and "1 of 1 cells are not done: k1" in done.stderr
    status = charm("grid", "status", tmp_path / "out")
    assert "1 failed" in status.stdout and charm("grid", "report", tmp_path / "out").returncode == 1


@pytest.mark.parametrize(("args", "says"), [
    (("grid", "run", "params/grid_demo.yaml", "-p", "treshold=0.1"), "Did you mean 'threshold'"),
    (("grid", "run", "params/grid_dmo.yaml"), "Did you mean 'grid_demo.yaml'"),
    (("grid", "run", "params/grid_demo.yaml", "--shard", "3/2"), "wanted I/N"),
    (("run", "params/charm.yaml", "-p", "k=many"), "not a number"),
    (("run", "params/charm.yaml", "-p", "data_root=/nowhere"), "no folder /nowhere"),
    (("cache", "/nowhere"), "no folder /nowhere")])
def test_refused_input_is_one_clear_line_and_exit_2(args, says, tmp_path):
    out = ("--out", tmp_path / "out") if args[0] != "cache" else ()
    done = charm(*args, *out)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_list_of_parameters():
    done = charm("params")
    assert done.returncode == 0 and "threshold: float = 0.2" in done.stdout


def test_a_notebooks_parameters_are_brought_up_to_date(tmp_path):
    import shutil

    import nbformat

    for name in ("train", "test"):
        path = tmp_path / f"{name}.ipynb"
        shutil.copy(ROOT / "notebooks" / path.name, path)
        book = nbformat.read(path, as_version=4)
        cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
        right, cell.source = cell.source, cell.source.replace("workers: int = 2", "workers: int = 3")
        nbformat.write(book, path)
        assert charm("params", "--write", path).returncode == 0
        again = nbformat.read(path, as_version=4)
        assert [c.source for c in again.cells if "parameters" in c.metadata.get("tags", [])] == [right]
