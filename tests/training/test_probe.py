"""What a few steps say of an epoch's cost."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from charmlib.models.registry import create
from charmlib.params import resolve
from charmlib.training.probe import measured
from charmlib.training.recipes import batches, phases
from tests.conftest import TINY

IMAGES = {"all": 640, "findings": 320, "valid": 100, "test": 50}


@pytest.mark.parametrize("own", [{}, {"use_bank": True, "answer": "votes", "k": 2}])
def test_operations_of_an_epoch_are_passes_of_images(tmp_path, own):
    """Three of each image where all layers train, one where the head does, those of validation, and a vote's slots."""
    params = resolve({**TINY, "use_momentum": False, "use_attention": False, "use_bank": False, **own,
                      "run_dir": str(tmp_path / "run")})
    net = create({**params, "norm": "half"}, [f"class {c}" for c in range(14)]).eval()
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        net(torch.zeros(1, 3, 32, 32))
    one, found = flops.get_total_flops() / 1e12, measured(params, IMAGES, tmp_path)["tflop"]
    look = IMAGES["valid"] + (16 if own else 0)
    for phase in phases(params, 1e-3):
        passes = (1 if phase.trains == ("head",) else 3) * batches(phase, IMAGES) * phase.batch + look
        assert found["epochs"][phase.name] == pytest.approx(passes * one, rel=0.02), phase.name
    assert found["scoring"] == pytest.approx((IMAGES["valid"] + IMAGES["test"]) * one, rel=0.02)
