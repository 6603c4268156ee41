"""The dataset that carries charmlib to Kaggle: its wheel, the GPU check and ``dataset-metadata.json``."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import charmlib
from charmlib.files import write_json
from kaggle_setup import client
from kaggle_setup.kernel import id_of
from kaggle_setup.redaction import say

WHEEL_TITLE = "charmlib wheel"
CHECKOUT = Path(__file__).parents[1]
_SOURCES = ("charmlib", "notebooks", "params", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.tmp")
_SETUPTOOLS, _POLL, _SECONDS = 77, 5.0, 900


def write_dataset(folder: Path, user: str, title: str = WHEEL_TITLE) -> str:
    """Fill ``folder`` with what is to be uploaded; returns a digest of it.

    The digest is over the wheel's files, not over the archive, whose times change. Raises KaggleError where it does not build.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = build_wheel(folder)
    shutil.copy(Path(__file__).with_name("check_gpu.py"), folder)
    # Kaggle's list of licences has no MIT, so the description names it
    write_json(folder / "dataset-metadata.json", {
        "id": id_of(user, title), "title": title, "licenses": [{"name": "other"}],
        "description": f"charmlib {charmlib.__version__} (MIT licence): notebooks and helper for long-tailed chest X-ray "
        "classification. Research use only. Installed with --no-deps by the notebooks that it is attached to."})
    with zipfile.ZipFile(wheel) as archive:
        content = [(name, hashlib.sha256(archive.read(name)).hexdigest()) for name in sorted(archive.namelist())]
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout as it is now, with notebooks and parameter files; leaves nothing in the checkout."""
    # building with the setuptools that is here needs no network
    here = any(int(one.version.split(".")[0]) >= _SETUPTOOLS for one in importlib.metadata.distributions(name="setuptools"))
    with tempfile.TemporaryDirectory() as source:
        for name in _SOURCES:
            if (CHECKOUT / name).is_dir():
                shutil.copytree(CHECKOUT / name, Path(source, name), ignore=_LEFT_OUT)
            else:
                shutil.copy(CHECKOUT / name, source)
        command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), source]
        command += ["--no-build-isolation"] if here else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("charmlib-*.whl"))
    if done.returncode or not wheels:
        raise client.KaggleError(f"the wheel of {CHECKOUT} does not build ({' '.join(command)}):\n{done.stderr[-2000:]}")
    return wheels[-1]


def upload(folder: Path, digest: str) -> None:
    """Make ``folder`` a new private dataset, or the next version of its own, and wait until notebooks can attach it.

    A notebook that is pushed before the version is ready would get the one before, or none. Raises Refused where Kaggle did
    not take it, KaggleError where it cannot make a version of it.
    """
    name = json.loads((folder / "dataset-metadata.json").read_text())["id"]
    state, before = client.dataset(name)
    client.upload(folder, notes="" if state == client.ABSENT else f"charmlib wheel {digest}")
    end = time.monotonic() + _SECONDS
    while True:
        state, version = client.dataset(name)
        if state == "ready" and version > before:
            break
        if state in ("failed", "deleted") or time.monotonic() > end:
            raise client.KaggleError(f"dataset {name}: {state}, version {version}, after its upload: look at "
                                     f"kaggle.com/datasets/{name}, then give the same command")
        time.sleep(_POLL)
    say(f"{name}: the wheel is there, version {version}")
