"""Backbones with a last norm and stochastic depth, and other heads, in training."""

import pytest
import torch

from charmlib import Run, charm_learner
from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import chest_dataloaders
from charmlib.param_sources import load_params
from charmlib.training.no_wait import HalfPrecision
from tests.training.conftest import HALF
from tests.training.test_step import watched

CONVNEXT = {"arch": "timm:convnextv2_atto", "image_size": 64, "use_momentum": False, "use_attention": False, "limit": 48,
            "stage1_frozen_epochs": 0, "stage1_epochs": 1, "stage2_epochs": 0, "drop_path": 0.2}


@pytest.mark.parametrize("head", [{"head": "csra", "csra_heads": 2, "csra_attention": "own", "adjust": 1.0},
                                  {"head": "standard", "dropout": 0.5, "use_bank": False}], ids=["csra", "standard"])
def test_convnext_trains_scores_and_comes_back_from_its_checkpoint(tiny, head):
    run = Run.open(tiny, **{**CONVNEXT, **head})
    start = {name: value.clone() for name, value in run.net.named_parameters()}
    if "adjust" in head:
        torch.testing.assert_close(run.net.head.bias.detach().double(), torch.tensor(run.data.log_odds()).double())
    run.train()
    assert not any(torch.equal(start[name], value) for name, value in run.net.named_parameters())
    assert "final.head_norm.weight" in start
    assert 0 < run.score()["test"]["mean_auc"] < 1
    back = Run.load(run.folder)
    x = torch.randn(3, 3, 64, 64)
    logits, seen = run.net.eval().read(x)
    again, kept = back.net.eval().read(x)
    assert torch.equal(logits, again) and type(back.net.head) is type(run.net.head)
    assert ("head" in seen) == head.get("use_bank", True) and seen.keys() == kept.keys()
    if "head" in seen:
        assert not torch.equal(seen["head"], logits)  # the votes are added to the head's


@pytest.mark.once
@pytest.mark.parametrize("name", ["longtail_standard", "longtail_csra"])
def test_a_published_recipe_trains_and_scores_with_a_small_backbone(tiny, name):
    """Shrunk by parameters alone; what makes the recipe stays as it is."""
    small = {key: tiny[key] for key in ("data_root", "run_dir", "cache_dir", "valid_fraction") if key in tiny}
    run = Run.open({**load_params(f"params/{name}.yaml"), **small, "arch": "timm:convnextv2_atto", "weights": "none",
                    "norm": "half", "image_size": 64, "stage1_frozen_epochs": 1, "stage2_epochs": 2,
                    "stage1_batch": 16, "stage2_batch": 16})
    history = run.train()
    assert [row["stage"] for row in history] == ["1", "2", "2"] and all(row["train_loss"] > 0 for row in history)
    assert 0 < run.score()["test"]["mean_auc"] < 1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("head", ["csra", "standard"])
def test_no_batch_of_another_head_waits_for_the_device(phantoms, tmp_path, head, half):
    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)
    learn = charm_learner(chest_dataloaders(data, bs=16, mean=HALF, std=HALF, path=tmp_path), "timm:test_convnext", seed=1,
                          path=tmp_path, weights="none", norm="half", bank_size=16, head=head, csra_heads=4, drop_path=0.3,
                          use_attention=head != "csra")
    if half:
        learn.add_cb(HalfPrecision())
    with learn.no_bar():
        assert watched(learn) == []
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())
