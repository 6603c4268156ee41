"""A stand-in for the official client's package, and a small grid."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import yaml

from kaggle_setup import rounds
from kaggle_setup.__main__ import main
from tests.conftest import TINY

TOKEN = "KGAT_0123456789abcdefSECRET"


class Kaggle:
    """The stand-in's folder: what it was asked, and what it is to do."""

    def __init__(self, folder: Path):
        self.folder = folder

    def plan(self, **content):
        """Lay down what it does next."""
        path = self.folder / "plan.json"
        kept = json.loads(path.read_text()) if path.is_file() else {"name": "small", "datasets": ["nih-chest-xrays/data"]}
        path.write_text(json.dumps({**kept, **content}))

    def calls(self, method=""):
        """The calls so far as name and arguments; the arguments alone of one method if named."""
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [arguments for name, arguments in calls if name == method] if method else calls

    def kernels(self):
        """Metadata of what lies on the server, by the end of its name."""
        paths = sorted((self.folder / "kernels").glob("*/*/meta.json"))
        return {path.parent.name.rpartition("-s")[2]: json.loads(path.read_text()) for path in paths}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in as package ``kaggle`` of the child processes, with a token in the environment."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).with_name("stand_in")))
    monkeypatch.setenv("KAGGLE_STAND_IN", str(folder))
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kaggle = Kaggle(folder)
    kaggle.plan()
    return kaggle


@pytest.fixture
def merged(monkeypatch):
    """Calls of merge_grids."""
    calls, really = [], rounds.merge_grids

    def merge_grids(out, folders, say=print):
        calls.append((out, list(folders)))
        if all((folder / "split.csv").is_file() for folder in folders):  # drawn cells of the stand-in cannot be merged
            really(out, folders, say=say)

    monkeypatch.setattr(rounds, "merge_grids", merge_grids)
    return calls


@pytest.fixture
def quick_wheel(monkeypatch):
    """A wheel of a few bytes: building the real one takes seconds, and has tests of its own."""
    import kaggle_setup.wheel as module

    def build(folder):
        import zipfile

        path = folder / "charmlib-0.0.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("charmlib/__init__.py", "")
        return path

    monkeypatch.setattr(module, "build_wheel", build)
    monkeypatch.setattr(module, "_POLL", 0.01)


@pytest.fixture
def small(tmp_path):
    """A grid of four cells; its base lies in a folder beside it."""
    folder = tmp_path / "mine"
    (folder / "bases").mkdir(parents=True)
    base = {**TINY, "stage1_frozen_epochs": 0, "stage1_epochs": 1, "stage2_epochs": 1, "answer": "features"}
    (folder / "bases/tiny.yaml").write_text(yaml.safe_dump(base))
    (folder / "grid_small.yaml").write_text(yaml.safe_dump({"base": "bases/tiny.yaml", "axes": {"k": [1, 2, 3, 4]}}))
    return folder / "grid_small.yaml"


@pytest.fixture
def charm(tmp_path):
    """The command line, in this process; returns exit status and all that was printed."""
    def run(*args):
        status, printed = 0, io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                main(list(map(str, args)))
            except SystemExit as error:  # a text is printed by Python when it ends, with status 1
                status = error.code if isinstance(error.code, int) else 1
                print("" if isinstance(error.code, int) else error.code)
        return status, printed.getvalue()

    return run
