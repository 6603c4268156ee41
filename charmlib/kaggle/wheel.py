"""The dataset that carries charmlib to Kaggle: its wheel, the GPU check and ``dataset-metadata.json``."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import charmlib
from charmlib.files import write_json
from charmlib.kaggle.errors import KaggleError
from charmlib.kaggle.metadata import dataset_metadata

TITLE = "charmlib wheel"
_SOURCES = ("charmlib", "notebooks", "params", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
_CHECK = "kaggle_setup/check_gpu.py"
_NOT_SOURCES = ("__pycache__", ".ipynb_checkpoints", "*.tmp")
_SETUPTOOLS = 77


def write_dataset(folder: Path, user: str, title: str = TITLE) -> str:
    """Fill ``folder`` with what is to be uploaded; returns a digest of it.

    The digest is over the files in the wheel and not over the archive, whose times change with each build.

    Raises
    ------
    KaggleError
        charmlib here is no checkout, or does not build.
    """
    checkout = _checkout()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = build_wheel(checkout, folder)
    shutil.copy(checkout / _CHECK, folder)
    write_json(folder / "dataset-metadata.json", dataset_metadata(
        user, title, f"charmlib {charmlib.__version__} (MIT licence): notebooks and helper for long-tailed chest X-ray "
        "classification. Research use only. Installed with --no-deps by the notebooks that it is attached to."))
    return _digest(wheel)


def build_wheel(checkout: Path, folder: Path) -> Path:
    """The wheel of a checkout, as it is now, with its notebooks and parameter files; leaves nothing in the checkout.

    Raises
    ------
    KaggleError
        It does not build.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.mkdir()
        for name in _SOURCES:
            here = checkout / name
            if here.is_dir():
                shutil.copytree(here, source / name, ignore=shutil.ignore_patterns(*_NOT_SOURCES))
            elif here.is_file():
                shutil.copy(here, source / name)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(source)]
        done = subprocess.run([*command, *_without_isolation()], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("charmlib-*.whl"))
    if done.returncode or not wheels:
        raise KaggleError(f"the wheel of {checkout} does not build ({' '.join(command)}):\n{done.stderr[-2000:]}")
    return wheels[-1]


def _checkout() -> Path:
    home = Path(charmlib.__file__).parents[1]
    if not (home / "pyproject.toml").is_file() or not (home / _CHECK).is_file():
        raise KaggleError(f"charmlib in {home} is installed, not a checkout, so there is nothing to build its wheel from: "
                          "clone the repository and start there")
    return home


def _without_isolation() -> list[str]:
    """Building with the setuptools that is here needs no network."""
    try:
        enough = int(importlib.metadata.version("setuptools").split(".")[0]) >= _SETUPTOOLS
    except importlib.metadata.PackageNotFoundError:
        enough = False
    return ["--no-build-isolation"] if enough else []


def _digest(wheel: Path) -> str:
    out = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            out.update(name.encode() + b"\0" + hashlib.sha256(archive.read(name)).digest())
    return out.hexdigest()[:16]
