"""What a torch build can do on a card, judged from numbers: no GPU is needed to test it."""

import subprocess
import sys

import pytest
import torch

from charmlib.gpu_support import gpu_report, has_kernels, verdict

CU128 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.mark.parametrize(("card", "built_for", "runs"), [
    ((6, 0), ["sm_70", "sm_75", "sm_80"], False),  # a P100 and a cu128 build
    ((6, 0), ["sm_50", "sm_60", "sm_70"], True), ((7, 5), ["sm_70", "sm_75"], True),
    ((7, 5), ["sm_80", "sm_90"], False), ((8, 6), ["sm_80"], True), ((8, 0), ["sm_86"], False),
    ((12, 0), ["sm_90", "compute_90"], True), ((9, 0), ["sm_90a"], True), ((12, 0), ["sm_120"], True)])
def test_kernels_for_a_card(card, built_for, runs):
    assert has_kernels(card, built_for) is runs


def test_a_p100_under_kaggles_torch_names_card_torch_and_both_ways_out():
    found = verdict("Tesla P100-PCIE-16GB", (6, 0), CU128, "2.10.0+cu128", "12.8")
    assert not found.usable
    for word in ("Tesla P100-PCIE-16GB", "sm_60", "2.10.0+cu128", "sm_70, sm_75", "T4 x2", "cu126", "torch<2.15"):
        assert word in found.text


@pytest.mark.parametrize(("name", "card", "built_for", "said"), [
    ("Tesla P100-PCIE-16GB", (6, 0), CU126, "without tensor cores, and no torch.compile"),
    ("Tesla T4", (7, 5), CU128, "sm_75"), ("Tesla T4", (7, 5), CU128, "fp16 on tensor cores"),
    ("NVIDIA H200", (9, 0), CU128, "sm_90")])
def test_a_card_with_kernels_is_named_with_what_it_can_do(name, card, built_for, said):
    found = verdict(name, card, built_for, "2.10.0", "12.8")
    assert found.usable and name in found.text and said in found.text and "bf16" not in found.text


def test_a_card_newer_than_the_torch_wants_a_newer_torch_not_an_older_one():
    found = verdict("NVIDIA B200", (10, 0), CU126, "2.6.0+cu126", "12.6")
    assert not found.usable and "newer torch" in found.text and "whl/cu126" not in found.text


def test_no_card_and_a_torch_for_cpus_only_are_told_apart():
    nothing = verdict("", None, CU128, "2.10.0+cu128", "12.8")
    assert not nothing.usable and "sees no GPU" in nothing.text and "T4 x2" in nothing.text
    cpu = verdict("", None, [], "2.14.1+cpu", None)
    assert not cpu.usable and "for CPUs only" in cpu.text and "2.14.1+cpu" in cpu.text


def test_a_session_that_needs_a_card_and_has_none_ends_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "GPU" in gpu_report()
    with pytest.raises(RuntimeError, match="T4 x2"):
        gpu_report(required=True)


def test_judging_imports_no_torch():
    code = ("import sys, charmlib.gpu_support as g; g.verdict('x', (7, 5), ['sm_75'], '2', '12')\n"
            "assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
