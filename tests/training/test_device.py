import pytest
import torch

from charmlib.training import device as module
from charmlib.training.device import has_kernels, pick_device, pick_precision


@pytest.mark.parametrize(("card", "built_for", "runs"), [
    ((6, 0), ["sm_70", "sm_75", "sm_80"], False),  # a P100 and a cu128 build
    ((6, 0), ["sm_50", "sm_60", "sm_70"], True), ((7, 5), ["sm_70", "sm_75"], True),
    ((7, 5), ["sm_80", "sm_90"], False), ((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False),
    ((12, 0), ["sm_90", "compute_90"], True), ((9, 0), ["sm_90a"], True), ((12, 0), ["sm_120"], True)])
def test_kernels_for_a_card(card, built_for, runs):
    assert has_kernels(card, built_for) is runs


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
