"""A stand-in for the kaggle command on PATH, and a small grid."""

import json
import os
import shutil
import stat
import sys
import types
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from charmlib.cli import cli
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

    def calls(self, *command):
        """The calls so far, of one command if named."""
        path = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [call for call in calls if tuple(call[:len(command)]) == command]

    def kernels(self):
        """Metadata of what lies on the server, by the end of its name."""
        paths = sorted((self.folder / "kernels").glob("*/*/meta.json"))
        return {path.parent.name.rpartition("-s")[2]: json.loads(path.read_text()) for path in paths}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The stand-in as ``kaggle`` on PATH, with a token in the environment."""
    folder, bin_ = tmp_path / "server", tmp_path / "bin"
    folder.mkdir()
    bin_.mkdir()
    command = bin_ / "kaggle"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stand_in.py")} "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{bin_}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_STAND_IN", str(folder))
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    kaggle = Kaggle(folder)
    kaggle.plan()
    return kaggle


@pytest.fixture
def merged(monkeypatch):
    """Calls of merge_grids; a plain copy where that module is not there."""
    calls = []
    try:
        from charmlib.grid import bring as module

        really = module.merge_grids
    except ImportError:
        module = types.ModuleType("charmlib.grid.bring")
        monkeypatch.setitem(sys.modules, "charmlib.grid.bring", module)

        def really(out, folders, say=print):
            for folder in folders:
                shutil.copytree(folder, out, dirs_exist_ok=True)

    def merge_grids(out, folders, say=print):
        calls.append((out, list(folders)))
        if all((folder / "split.csv").is_file() for folder in folders):  # drawn cells of the stand-in cannot be merged
            really(out, folders, say=say)

    monkeypatch.setattr(module, "merge_grids", merge_grids, raising=False)
    return calls


@pytest.fixture
def quick_wheel(monkeypatch):
    """A wheel of a few bytes: building the real one takes seconds, and has tests of its own."""
    import charmlib.kaggle.wheel as module

    def build(checkout, folder):
        import zipfile

        path = folder / "charmlib-0.0.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("charmlib/__init__.py", "")
        return path

    monkeypatch.setattr(module, "build_wheel", build)
    monkeypatch.setattr("charmlib.kaggle.upload._POLL", 0.01)


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
        result = CliRunner().invoke(cli, ["kaggle", *map(str, args)], catch_exceptions=True)
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            raise error
        return result.exit_code, result.output + (str(error) if error and not isinstance(error.code, int) else "")

    return run
