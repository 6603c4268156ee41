"""What a run says before it starts, and the quick preset where there is neither data nor a GPU."""

import copy

import pytest
import torch

from charmlib import Run
from charmlib.param_sources import load_params
from charmlib.training.plan import QUICK, plan, quick_without_data


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_without_data_on_a_cpu_defaults_give_way_to_the_preset(nothing_here, capsys):
    taken = quick_without_data({"arch": "efficientnet_v2_s", "stage2_epochs": 2, "k": 5})
    preset = load_params(QUICK)
    assert taken["arch"] == preset["arch"] and taken["stage1_lr"] == preset["stage1_lr"] and "data_root" not in taken
    assert taken["stage2_epochs"] == 2, "what the user says stays"
    said = capsys.readouterr().out
    assert "arch=timm:test_resnet" in said and "stage2_epochs" not in said


def test_data_of_ones_own_and_a_grids_cell_keep_their_parameters(nothing_here, phantoms, monkeypatch, capsys):
    assert quick_without_data({"data_root": str(phantoms)}) == {"data_root": str(phantoms)}
    monkeypatch.setenv("CHARM_CELL", "plain")
    assert quick_without_data({"k": 5}) == {"k": 5} and not capsys.readouterr().out


@pytest.mark.parametrize("changes, says", [
    ({}, "charm (momentum encoder, attention, memory that gives votes)"),
    ({"use_momentum": False, "use_attention": False, "use_bank": False}, "charm (plain network)"),
    ({"system": "two_path", "image_size": 64, "heat_stride": 8}, "system two_path: timm")])
def test_the_plan_names_system_phases_and_minutes_and_changes_nothing(tiny, changes, says):
    run = Run.open({**tiny, **changes})
    before, state = copy.deepcopy(run.net.state_dict()), torch.get_rng_state()
    text = plan(run)
    assert says in text and " on this machine, if no phase ends early" in text and text.count("phase ") == len(run.phases()) + 1
    assert run.net.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in run.net.state_dict().items())


def test_the_finder_is_announced_where_it_will_run(tiny, monkeypatch):
    assert "rate finder" not in plan(Run.open(tiny))
    assert "rate finder" in plan(Run.open({**tiny, "stage1_lr": 0.0}))
    monkeypatch.setenv("CHARM_CELL", "plain")  # a cell of a grid is no place for measuring
    assert "minutes" not in plan(Run.open(tiny))
