"""Fixtures: drawn phantoms for everything, real radiographs where ``$CHARM_SHARED`` (../shared) is there."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib
import pytest

matplotlib.use("Agg")
# Two test processes share two cores, and the processes that they start inherit this: more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {"image_size": 32, "arch": "timm:test_resnet", "weights": "none", "norm": "half", "bank_size": 16, "k": 2,
        "valid_fraction": 0.2, "stage1_frozen_epochs": 1, "stage1_epochs": 2, "stage1_batch": 16, "stage1_lr": 1e-3,
        "stage2_epochs": 2, "stage2_batch": 32, "hidden": 16}


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["CHARM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """320 drawn radiographs of 32 pixels in the NIH layout."""
    from charmlib.data.phantom import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", images=320, size=32, seed=1)


@pytest.fixture
def tiny(phantoms, tmp_path) -> dict:
    """Parameters of a run that takes seconds."""
    return {**TINY, "data_root": str(phantoms), "run_dir": str(tmp_path / "run")}


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data for development."""
    folder = Path(os.environ.get("CHARM_SHARED", Path(__file__).parents[1] / ".." / "shared")).resolve()
    if not (folder / "nih64").is_dir():
        pytest.skip(f"no real data: {folder}/nih64 is not there (set CHARM_SHARED)")
    return folder
