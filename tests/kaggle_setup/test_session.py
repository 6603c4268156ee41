"""Rendered notebooks run with papermill in a session like Kaggle's, through the whole way there and back."""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest

import charmlib
from charmlib.data.phantom import make_phantoms
from kaggle_setup.prepare import prepare
from kaggle_setup.wheel import write_dataset
from tests.kaggle_setup.session import can_mount, image_python, run_session

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not can_mount(), reason="needs mount and network namespaces (root, unshare)")]


@pytest.fixture(scope="module")
def nih(tmp_path_factory):
    """A data set in the NIH layout."""
    return make_phantoms(tmp_path_factory.mktemp("nih") / "data", images=200, size=64)


@pytest.fixture
def image(tmp_path):
    """The interpreter of a session: all packages, no charmlib."""
    python = image_python(tmp_path / "venv")
    missing = subprocess.run([python, "-c", "import charmlib"], capture_output=True, text=True, cwd=tmp_path)
    assert "No module named 'charmlib'" in missing.stderr
    return python


def installed(venv):
    """What a session's pip has put beside the image's packages."""
    (site,) = venv.glob("lib/python*/site-packages")
    return {path.name for path in site.iterdir()} - {"image.pth"}


def printed(book):
    return "\n".join(output.get("text", "") + str(output.get("evalue", "")) for cell in book.cells if cell.cell_type == "code"
                     for output in cell.outputs)


def test_a_grid_goes_to_kaggle_and_comes_back_in_two_rounds(charm, small, server, nih, tmp_path, merged, monkeypatch):
    """Without network, on today's mounts and on those of before; what a killed session had finished is not trained again."""
    monkeypatch.setattr("kaggle_setup.wheel._POLL", 0.01)
    server.plan(run={"datasets": {"nih-chest-xrays/data": str(nih)}, "old_form": ["-s2of2-", "-r2"]})
    given = ("push", small, "--user", "anna", "--shards", 2, "-p", "k=[1,2,3]", "--accelerator", "none", "--out",
             tmp_path / "out")
    status, text = charm(*given)
    assert status == 0, text + "\n".join(path.read_text()[-3000:] for path in (tmp_path / "server").rglob("log.txt"))
    first = tmp_path / "server/kernels" / server.kernels()["1of2-r1"]["id"] / "output/runs/small"
    kept = (first / "k1/metrics.json").read_bytes()
    shutil.rmtree(first / "k3")  # as if the session had been ended in its second cell
    status, text = charm(*given, "--wait", "--poll", 0)
    assert status == 0, text
    assert {path.parent.name for path in (tmp_path / "out").glob("*/metrics.json")} == {"k1", "k2", "k3"}
    assert [len(folders) for _, folders in merged] == [2, 2]
    for key, mount in (("1of2-r1", "datasets/nih-chest-xrays/data"), ("2of2-r1", "data"), ("1of2-r2", "data")):
        home = tmp_path / "server/kernels" / server.kernels()[key]["id"]
        assert installed(home / "venv") == {"charmlib", f"charmlib-{charmlib.__version__}.dist-info"}
        words = printed(nbformat.read(home / "tree/working/__notebook__.ipynb", as_version=4))
        assert "sees no GPU" in words or "has kernels" in words
        cells = {path.parent.name: json.loads(path.read_text()) for path in (home / "output/runs/small").glob("*/metrics.json")}
        newest = cells[max(cells)]["params"]
        assert newest["data_root"] == f"/kaggle/input/{mount}" and newest["image_size"] == 32
    assert "1 cells of an earlier session copied from /kaggle/input/charmlib-small-" in words
    assert (home / "output/runs/small/k1/metrics.json").read_bytes() == kept and set(cells) == {"k1", "k3"}
    assert not Path("/kaggle").exists()


def test_a_session_without_a_gpu_ends_at_its_check_and_input_is_read_only(small, nih, image, tmp_path):
    """Not after eleven hours on its CPU."""
    state = prepare(small, user="anna", out=tmp_path / "out")
    write_dataset(state.folder / "wheel", "anna")
    pushed = state.folder / "s1-r1/kernel/notebook.ipynb"
    book = nbformat.read(pushed, as_version=4)
    first = next(cell for cell in book.cells if cell.cell_type == "code")
    first.source += "\ntry:\n    Path('/kaggle/input/datasets/x').mkdir()\nexcept OSError as error:\n    print(error)"
    nbformat.write(book, pushed)
    attached = {"datasets/anna/charmlib-wheel": state.folder / "wheel", "datasets/nih-chest-xrays/data": nih}
    done = run_session(pushed, tmp_path / "tree", attached, image)
    after = nbformat.read(tmp_path / "tree/working/__notebook__.ipynb", as_version=4)
    if "has kernels" in printed(after):
        pytest.skip("this machine has a GPU that its torch can use")
    assert done.returncode != 0 and "GPU T4 x2" in printed(after) and "Read-only file system" in printed(after)
    assert not (tmp_path / "tree/working/runs").exists()


def test_the_gpu_check_runs_from_the_attached_dataset_before_anything_is_installed(image, tmp_path):
    write_dataset(tmp_path / "wheel", "anna")
    done = subprocess.run([image, str(tmp_path / "wheel/check_gpu.py")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "GPU" in done.stdout, done.stderr
    here = subprocess.run([image, str(ROOT / "kaggle_setup/check_gpu.py")], capture_output=True, text=True, cwd=tmp_path)
    assert here.stdout == done.stdout
