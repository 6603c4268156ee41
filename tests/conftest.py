"""Fixtures: drawn phantoms for everything, real radiographs where ``$CHARM_SHARED`` (../shared) is there."""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
# Two test processes share two cores, and the processes that they start inherit this: more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TINY = {"image_size": 32, "arch": "timm:test_resnet", "weights": "none", "norm": "half", "momentum_form": "branch",
        "attention": "layers", "bank_size": 16, "k": 2, "valid_fraction": 0.2,
        "stage1_frozen_epochs": 1, "stage1_epochs": 2, "stage1_batch": 16, "stage1_lr": 1e-3, "stage2_epochs": 2,
        "stage2_batch": 32, "hidden": 16}
OURS = {"momentum_form": "weights", "attention": "scales"}  # the default of what TINY changes


def pytest_report_header() -> str:
    """Which end of the ecosystem a log is of."""
    names = ("torch", "fastai", "fastcore", "timm", "pandas", "numpy", "scikit-learn", "dask", "nbclient", "matplotlib")
    return "with " + ", ".join(f"{name} {metadata.version(name)}" for name in names)


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


@pytest.fixture(scope="session")
def browser():
    """Chromium, for which evil.example is this machine (DNS rebinding)."""
    pytest.importorskip("playwright", reason="no playwright: pip install 'charmlib[test]'")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no browser: install one (apt-get install chromium) to test the pages")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=path, args=[
            "--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"])
        yield chromium
        chromium.close()


@pytest.fixture
def grey():
    """A drawn radiograph (S, S) uint8."""
    from charmlib.data.phantom import draw_phantom

    return draw_phantom(seed=3)[0]


@pytest.fixture
def dicom(tmp_path, grey):
    """Writes a 12-bit DICOM radiograph."""
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (pip install pydicom)")
    from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

    def write(name, values=None, **tags):
        values = grey.astype(np.uint16) * 16 if values is None else values
        file = pydicom.Dataset()
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.file_meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
        file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        file.SOPClassUID, file.SOPInstanceUID = file.file_meta.MediaStorageSOPClassUID, generate_uid()
        file.Modality, file.PhotometricInterpretation = "DX", "MONOCHROME2"
        file.Rows, file.Columns = values.shape[:2]
        file.SamplesPerPixel, file.BitsAllocated, file.BitsStored, file.HighBit = 1, 16, 12, 11
        file.PixelRepresentation, file.PixelData = 0, values.tobytes()
        for tag, value in tags.items():
            setattr(file, tag, value)
        path = tmp_path / name
        file.save_as(path, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def make_run(phantoms, tmp_path):
    """Makes the folder of a finished run, with scores drawn instead of a network's; ``skill`` 0 knows nothing."""
    return lambda name, **settings: _finished_run(tmp_path / name, str(phantoms), **settings)


def _finished_run(folder: Path, data_root: str, *, skill: float = 1.0, seed: int = 0, split: str = "official",
                  split_csv: bool = True, real: bool = False, **changes) -> Path:
    import numpy as np

    from charmlib.data.dataset import open_dataset
    from charmlib.evaluation.intervals import save_resamples
    from charmlib.evaluation.metrics import prevalence
    from charmlib.evaluation.runs import FORMAT, chosen_on_validation, save_predictions
    from charmlib.evaluation.score import score_part
    from charmlib.files import write_json
    from charmlib.params import resolve

    params = resolve({**TINY, "data_root": data_root, "split": split, "seed": seed, **changes})
    data = open_dataset(params)
    generator = np.random.default_rng(seed)
    parts = {}
    for part in ("valid", "test"):
        rows = data.rows(part)
        frame = data.index.frame.iloc[rows]
        labels = data.labels[rows]
        logits = (skill * labels + generator.normal(-2, 1, labels.shape)).astype(np.float32)
        parts[part] = {"ids": frame["id"].to_numpy(str), "patients": frame["patient"].to_numpy(str), "labels": labels,
                       "logits": logits}
    folder.mkdir(parents=True)
    save_predictions(folder / "predictions.npz", parts, data.classes)
    valid = parts["valid"]
    chosen = chosen_on_validation(valid["labels"], valid["logits"], data.classes)
    source = {"name": data.source, "drawn": not real, "scale": data.images.scale}
    write_json(folder / "model.json", {
        "format": FORMAT, "classes": data.classes, "normal_class": data.index.normal_class, "arch": params["arch"],
        "params": {**params, "split_hash": data.split.hash}, "norm": {"mean": [0.5] * 3, "std": [0.5] * 3}, "stage1_lr": None,
        "vote_weight": None, "data": source, "sha256": "", **chosen})
    train = prevalence(data.labels[data.rows("train")], data.classes)
    validated = score_part(valid, data.classes)[0] if data.split.has_valid else None
    test, samples = score_part(parts["test"], data.classes, prevalence=train, **chosen)
    save_resamples(folder / "resamples.npz", samples)
    write_json(folder / "metrics.json", {
        "format": FORMAT, "cell": folder.name, "hash": None, "params": params, "data": source,
        "split": data.split.record(), "classes": data.classes, "normal_class": data.index.normal_class,
        "images": data.train_images(), "train_prevalence": train, "valid": validated, "test": test, "bank": None,
        "seconds": {"train": 1.0, "score": 1.0, "overhead": 1.0}, "device": "cpu", "precision": "fp32",
        "versions": {"torch": "0", "charmlib": "0"}, "quick_check": bool(params["limit"])})
    (folder / "history.csv").write_text("stage,epoch,train_loss,valid_loss,valid_auc,valid_ap,lr,seconds,bank_filled,"
                                        "bank_accepted\n1,0,0.5,0.5,0.6,0.3,0.001,1.0,,\n2,0,0.4,0.4,0.7,0.4,0.001,1.0,,\n")
    if split_csv:
        data.split.frame(data.index).to_csv(folder / "split.csv", index=False)
    return folder
