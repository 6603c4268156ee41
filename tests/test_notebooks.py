"""Each notebook as stored, and each run through papermill on phantoms as a user would."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import charmlib
from charmlib.param_sources import cell_source
from charmlib.params import PARAMS
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = {"prepare": ["data_root", "classes", "csv", "normal_class", "blank", "uncertain", "patients", "split", "valid_fraction",
                     "image_size", "aspect", "contrast", "cache_dir", "workers"],
         "train": None, "test": ["data_root", "cache_dir", "run_dir", "workers", "device"]}


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_the_notebooks_are_there():
    assert {p.stem for p in BOOKS} >= {"prepare", "train", "test", "grid", "explore", "charm"}


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_stored_clean_and_short(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in code_cells(path):
        assert path.stem == "charm" or (not cell.outputs and cell.execution_count is None)
        assert "parameters" in cell.metadata.get("tags", []) or len(cell.source.splitlines()) <= 16
        for word in ("ipywidgets", "interact", "widgets.", "import *", "load_learner"):
            assert word not in cell.source
        tree = ast.parse(cell.source)
        assert not any(isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in tree.body), "logic belongs in charmlib"
    assert [c.metadata.get("tags") for c in book.cells].count(["parameters"]) == 1
    folded = code_cells(path)[0].metadata  # in JupyterLab, and on Kaggle
    assert path.stem == "explore" or (folded["jupyter"]["source_hidden"] and folded["_kg_hide-input"])
    prose = sum(len(c.source) for c in book.cells if c.cell_type == "markdown")
    assert prose > 300 and "Research use only" in book.cells[0].source


@pytest.mark.parametrize("path", BOOKS, ids=lambda p: p.stem)
def test_imports_only_what_it_may(path):
    allowed = {"charmlib", "matplotlib", "pandas", "numpy", "pathlib", "warnings", "os", "IPython"}
    for i, cell in enumerate(code_cells(path)):
        extra = {"importlib", "subprocess", "sys"} if i == 0 else {"torch"} if path.stem == "charm" else set()
        for node in ast.walk(ast.parse(cell.source)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed | extra


@pytest.mark.parametrize("name", NAMES)
def test_the_parameters_cell_is_the_declaration(name):
    cell = next(c for c in code_cells(ROOT / f"notebooks/{name}.ipynb") if "parameters" in c.metadata.get("tags", []))
    assert cell.source == cell_source(NAMES[name])


def test_relative_folders_are_the_checkouts_in_every_notebook(tmp_path, monkeypatch):
    """Trained in JupyterLab, a run once lay in notebooks/runs, where the explorer did not look."""
    (tmp_path / "charmlib").mkdir()  # another checkout's, whose code is not taken
    (tmp_path / "notebooks").mkdir()
    for path in BOOKS:
        monkeypatch.chdir(tmp_path / "notebooks")
        names = {}
        exec(code_cells(path)[0].source, names)
        assert Path.cwd() == tmp_path and Path(names["charmlib"].__file__).is_relative_to(ROOT)
        assert not any("chdir" in cell.source for cell in code_cells(path)[1:])


def papermill(name, out, parameters, cwd):
    """The executed notebook. Parameters that the notebook does not show go through its options; papermill warns of none."""
    book = name if isinstance(name, Path) else ROOT / f"notebooks/{name}.ipynb"
    options = {k: v for k, v in parameters.items() if name == "train" and k in PARAMS and not PARAMS[k].shown}
    done = call_papermill(book, out, {k: v for k, v in parameters.items() if k not in options}
                          | ({"options": yaml.safe_dump(options, default_flow_style=True)} if options else {}), cwd)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "unknown parameter" not in done.stderr and "Unable to parse" not in done.stderr
    return nbformat.read(out, as_version=4)


def call_papermill(book, out, parameters, cwd):
    args = [sys.executable, "-m", "papermill", str(book), str(out), "--no-progress-bar"]
    for key, value in parameters.items():
        args += ["-p", key, str(value)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("CHARM_CELL")}
    return subprocess.run(args, capture_output=True, text=True, cwd=cwd, env=env)


@pytest.mark.slow
@pytest.mark.parametrize("wrong, says", [({"stage1_epoch": 1}, "Did you mean 'stage1_epochs'"),
                                         ({"options": "{strategi: hard}"}, "Did you mean 'strategy'")])
def test_a_mistyped_name_is_an_error_before_training(phantoms, tmp_path, wrong, says):
    """Papermill itself only warns: once, this trained twenty epochs and exited 0."""
    done = call_papermill(ROOT / "notebooks/train.ipynb", tmp_path / "out.ipynb",
                          {"data_root": phantoms, "run_dir": tmp_path / "run", **wrong}, tmp_path)
    assert done.returncode != 0 and says in done.stderr and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, wrong, near", [("prepare", "image_sze", "image_size"), ("test", "worker", "workers"),
                                               ("grid", "worker", "workers"), ("explore", "data_rot", "data_root")])
def test_so_it_is_in_the_other_notebooks(tmp_path, name, wrong, near):
    done = call_papermill(ROOT / f"notebooks/{name}.ipynb", tmp_path / "out.ipynb", {wrong: 3}, tmp_path)
    assert done.returncode != 0 and f"Did you mean '{near}'" in done.stderr


def pictures(book):
    return sum("image/png" in o.get("data", {}) for c in book.cells if c.cell_type == "code" for o in c.outputs)


def text(book):
    kinds = [f"text/{kind}" for kind in ("plain", "html", "markdown")]
    return "\n".join(o.get("text", "") or "".join(o.get("data", {}).get(kind, "") for kind in kinds)
                     for c in book.cells if c.cell_type == "code" for o in c.outputs)


def test_what_charm_shows_is_of_this_version():
    """Stored by `make notebooks`: every cell in turn, none failed, nothing of the machine that ran it."""
    book = nbformat.read(ROOT / "notebooks/charm.ipynb", as_version=4)
    cells = code_cells(ROOT / "notebooks/charm.ipynb")
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(o.output_type == "error" or o.get("name") == "stderr" for cell in cells for o in cell.outputs)
    assert f"charmlib {charmlib.__version__}\n" in text(book), "say make notebooks"
    assert pictures(book) == 8 and "/root/" not in text(book) and "/home/" not in text(book)


def test_charm_uses_public_names_alone():
    for cell in code_cells(ROOT / "notebooks/charm.ipynb"):
        for node in ast.walk(ast.parse(cell.source)):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            assert name == "_" or not name.startswith("_") or name.endswith("__"), name


@pytest.mark.slow
def test_charm_runs(phantoms, tmp_path):
    """Its own assertions hold each step against the network's."""
    book = papermill("charm", tmp_path / "charm.ipynb", {"data_root": phantoms, "image_size": 64, "threshold": 0.2}, tmp_path)
    assert pictures(book) == 8 and "64 of 64 slots filled" in text(book) and "equal to encode: True" in text(book)


@pytest.mark.slow
def test_prepare_builds_the_cache_and_shows_the_data(phantoms, tmp_path):
    given = {"data_root": phantoms, "image_size": 40, "cache_dir": tmp_path / "cache", "valid_fraction": 0.2}
    book = papermill("prepare", tmp_path / "prepare.ipynb", given, tmp_path)
    assert pictures(book) == 4 and "unreadable: 0" in text(book) and "Hernia" in text(book)
    assert len(list((tmp_path / "cache").glob("*/charm_cache.json"))) == 1
    page = (tmp_path / "data.html").read_text()
    assert page.count("data:image/png") == 4 and "drawn phantoms" in page
    papermill("prepare", tmp_path / "again.ipynb", given, tmp_path)
    assert len(list((tmp_path / "cache").glob("*/pixels.npy"))) == 1


@pytest.mark.slow
def test_train_with_the_finder_then_test(phantoms, tmp_path):
    run = tmp_path / "run"
    given = {**TINY, "data_root": phantoms, "run_dir": run, "stage1_lr": 0.0, "stage1_frozen_epochs": 1, "stage1_epochs": 1}
    book = papermill("train", tmp_path / "train.ipynb", given, ROOT / "notebooks")
    assert pictures(book) == 4  # a batch, the finder's curve, the loss curves, what filled the bank
    assert "learning-rate finder: " in text(book) and "DRAWN PHANTOMS" in text(book) and "stage 2 epoch 2/2" in text(book)
    assert "phase stage1_frozen: at most 1 epochs" in text(book) and "minutes on this machine" in text(book)
    book = papermill("test", tmp_path / "test.ipynb", {"run_dir": run}, ROOT / "notebooks")
    assert (run / "metrics.json").is_file() and pictures(book) == 10
    assert "QUICK CHECK on" in text(book) and "What the memory holds" in text(book) and "The two paths" not in text(book)
    assert "slots with images of" in text(book) and "any head finding" in text(book)
    assert re.search("mean of (\\d+ of 14 )?classes", text(book)) and "no published figure belongs beside" in text(book)
    assert (run / "report.html").read_text().count("data:image/png") == 12  # and training and worst errors


@pytest.mark.slow
@pytest.mark.once
def test_the_grid_notebook(phantoms, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**TINY, "data_root": str(phantoms), "stage1_epochs": 1,
                                                        "stage1_frozen_epochs": 0, "stage2_epochs": 1,
                                                        "answer": "features", "strategy": "rarity"}))
    (tmp_path / "grid_nb.yaml").write_text(yaml.safe_dump(
        {"base": "base.yaml", "axes": {"momentum": [0.5], "k": [1, 2], "threshold": [0.2]}}))
    book = papermill("grid", tmp_path / "grid.ipynb", {"grid": tmp_path / "grid_nb.yaml", "out": tmp_path / "out"}, tmp_path)
    assert pictures(book) == 2  # heat maps and ROC curves
    assert (tmp_path / "out/leaderboard.csv").is_file()
