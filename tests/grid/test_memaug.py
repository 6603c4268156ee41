"""The fifteen experiments of MemAug: their files, and all of them end to end as one grid."""

from pathlib import Path

import pytest
import yaml

from charmlib.data.phantom import make_phantoms
from charmlib.grid import run_grid
from charmlib.grid.spec import load_grid
from charmlib.param_sources import load_params
from charmlib.params import DEFAULTS, resolve
from charmlib.training.recipes import phases

PARAMS = Path(__file__).parents[2] / "params"
FILES = sorted((PARAMS / "memaug").glob("*.yaml"))
FIFTEEN = {"baseline_effv2s", "baseline_resnet50", "memory_rarity_effv2s", "memory_rarity_effv2m", "memory_rarity_resnet50",
           "memory_rarity_densenet121", "memory_diversity_effv2s", "memory_hybrid_effv2s", "memory_statistical_effv2s",
           "memory_fifo_effv2s", "ablation_no_normalize", "ablation_topk1", "ablation_topk5", "ablation_bank256",
           "ablation_bank1024"}
SMALL = {"image_size": 32, "weights": "none", "norm": "half", "stage1_frozen_epochs": 0, "stage1_epochs": 1, "stage1_batch": 16,
         "stage2_epochs": 1, "stage2_batch": 16}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_file_holds_only_what_differs(path):
    own = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k != "base"}
    base = yaml.safe_load(path.read_text()).get("base")
    below = {**DEFAULTS, **(load_params(path.parent / base) if base else {})}
    everything = load_params(path)
    assert own and all(everything[name] != below[name] for name in own), own
    assert resolve(everything)["use_momentum"] is resolve(everything)["use_attention"] is False


def test_the_grid_is_the_fifteen_and_each_differs_from_the_default_as_its_name_says():
    assert {p.stem for p in FILES} - FIFTEEN == {"one_stage_no_validation"}
    grid = load_grid(PARAMS / "grid_memaug.yaml")
    cells = {cell.id: cell.params for cell in grid.cells}
    assert set(cells) == FIFTEEN
    default = cells["memory_rarity_effv2s"]
    differs = {name: {k: v for k, v in p.items() if v != default[k]} for name, p in cells.items()}
    assert differs == {
        "memory_rarity_effv2s": {}, "baseline_effv2s": {"use_bank": False},
        "baseline_resnet50": {"use_bank": False, "arch": "resnet50"}, "memory_rarity_resnet50": {"arch": "resnet50"},
        "memory_rarity_effv2m": {"arch": "efficientnet_v2_m", "stage1_batch": 32, "stage2_batch": 64},
        "memory_rarity_densenet121": {"arch": "densenet121"}, "memory_diversity_effv2s": {"strategy": "diversity"},
        "memory_hybrid_effv2s": {"strategy": "hybrid"}, "memory_statistical_effv2s": {"strategy": "statistical"},
        "memory_fifo_effv2s": {"strategy": "fifo"}, "ablation_no_normalize": {"bank_norm": "none"},
        "ablation_topk1": {"k": 1}, "ablation_topk5": {"k": 5}, "ablation_bank256": {"bank_size": 256},
        "ablation_bank1024": {"bank_size": 1024}}


def test_the_one_stage_file_trains_the_head_at_1e_5_and_then_all_layers_at_1e_4():
    params = resolve(load_params(PARAMS / "memaug/one_stage_no_validation.yaml"))
    head, whole = phases(params, params["stage1_lr"])
    assert (head.epochs, head.lr.stop, head.trains) == (5, 1e-5, ("head",))
    assert (whole.epochs, whole.lr, whole.trains) == (10, slice(1e-4, 1e-4), ())
    assert {(p.batch, p.images, p.patience) for p in (head, whole)} == {(32, "all", 0)}


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["1/5", pytest.param("1/1", marks=pytest.mark.long)])
def test_the_fifteen_run_end_to_end(tmp_path, shard):
    data = make_phantoms(tmp_path / "phantoms", images=120, size=32, seed=2)
    board = run_grid(PARAMS / "grid_memaug.yaml", [f"{k}={v}" for k, v in SMALL.items()] + [f"data_root={data}"],
                     out=tmp_path / "memaug", workers=2, shard=shard)
    done = board[board["status"] == "done"]
    assert set(board["cell"]) == FIFTEEN and len(done) == (15 if shard == "1/1" else 3)
    assert done["test_mean_auc"].notna().all()
    for cell in done["cell"]:
        assert (tmp_path / "memaug" / cell / "bank.csv").is_file() == (not cell.startswith("baseline"))
