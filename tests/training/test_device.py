import pytest
import torch

from charmlib.training import device as module
from charmlib.training.device import pick_device, pick_precision


def test_a_card_without_kernels_is_refused_plainly(monkeypatch, capsys):
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda *a: (6, 0))
    monkeypatch.setattr(module.torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda *a: "Tesla P100")
    with pytest.raises(RuntimeError, match=r"Tesla P100 is sm_60.*cu126"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu" and "Tesla P100" in capsys.readouterr().out


def test_precision():
    assert pick_precision("auto", torch.device("cpu")) == "fp32" and pick_precision("auto", torch.device("cuda")) == "fp16"
    with pytest.raises(RuntimeError, match="needs a GPU"):
        pick_precision("fp16", torch.device("cpu"))
