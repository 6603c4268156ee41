"""A run as an ONNX file."""

import json

import numpy as np
import pytest
import torch

from charmlib import Run
from charmlib.data.images import read_grey
from charmlib.training import export
from charmlib.training.predict import predict

onnxruntime = pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install 'charmlib[export]'")
pytest.importorskip("onnxscript", reason="no onnxscript: pip install 'charmlib[export]'")


def test_an_exported_run_gives_the_same_logits_in_onnxruntime(tiny, phantoms, tmp_path):
    run = Run.open({**tiny, "stage1_epochs": 0, "stage2_epochs": 1})
    run.train()
    path, far = export.export_onnx(run.folder, tmp_path / "out")
    assert far <= 1e-4
    how = json.loads((tmp_path / "out/model.onnx.json").read_text())
    assert how["classes"] == list(run.data.classes) and how["size"] == 32
    files = sorted(phantoms.rglob("*.png"))[:3]  # another number of images than at the export
    grey = np.stack([read_grey(f, how["size"], how["aspect"], scale=how["scale"], contrast=how["contrast"]) for f in files])
    logits = onnxruntime.InferenceSession(path).run(None, {"grey": grey[:, None].astype(np.float32)})[0]
    want = predict(run.folder, files)[[f"p_{name}" for name in how["classes"]]]
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), want, atol=1e-4)


def test_a_run_whose_logits_differ_is_not_exported(tiny, tmp_path, monkeypatch):
    run = Run.open({**tiny, "stage1_epochs": 0, "stage2_epochs": 1})
    run.train()
    monkeypatch.setattr(export, "CLOSE", -1.0)
    with pytest.raises(ValueError, match="in onnxruntime differ by .* not exported"):
        export.export_onnx(run.folder, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and torch.is_grad_enabled()
