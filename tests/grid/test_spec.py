from pathlib import Path

import pytest

from charmlib.evaluation.published import published_charm_grid
from charmlib.grid.sharing import training_of
from charmlib.grid.spec import cell_id, load_grid, refuse_dead_axes, remarks
from charmlib.param_sources import load_params
from charmlib.params import DEFAULTS, PARAMS, ParameterError, missing_need, resolve

PARAMS_DIR = Path(__file__).parents[2] / "params"


def grid_file(tmp_path, text, base="k: 4\nuse_momentum: on\nanswer: features\nstrategy: rarity\n"):
    (tmp_path / "base.yaml").write_text(base)
    path = tmp_path / "grid_mine.yaml"
    path.write_text(text)
    return path


def test_every_combination_with_names_and_layers(tmp_path):
    grid = load_grid(grid_file(tmp_path, "base: base.yaml\naxes: {momentum: [0.99, 0.999], threshold: [0.1, '2e-1']}\n"
                                         "cells: [{name: plain, use_bank: off}, {seed: 7, k: 3}]\n"))
    assert grid.name == "mine"
    assert [c.id for c in grid.cells] == ["m0.99_t0.1", "m0.99_t0.2", "m0.999_t0.1", "m0.999_t0.2", "plain", "k3_seed=7"]
    assert all(c.params["k"] == (3 if c.id.startswith("k3") else 4) for c in grid.cells)
    assert set(grid.cells[0].params) == set(PARAMS) - {"run_dir"}


def test_the_name_of_a_cell():
    assert cell_id({"threshold": 0.2, "k": 5, "momentum": 0.99}) == "m0.99_k5_t0.2"
    assert cell_id({"momentum": 0.99, "seed": 1, "stage2_lr_min": 2e-5}) == "m0.99_seed=1_stage2_lr_min=2e-05"
    assert "/" not in cell_id({"weights": "/a/b.pt"})
    assert cell_id({"vote_weight": -1.0}) != cell_id({"vote_weight": 1.0})


def test_assignments_pin_replace_and_override(tmp_path):
    path = grid_file(tmp_path, "base: base.yaml\naxes: {k: [2, 3], threshold: [0.1, 0.2]}\ncells: [{k: 5, threshold: 0.3}]\n")
    assert [c.id for c in load_grid(path, ["k=3"]).cells] == ["k3_t0.1", "k3_t0.2", "k3_t0.3"]
    assert [c.id for c in load_grid(path, ["k=[4,5]", "threshold=[0.1]"]).cells] == ["k4_t0.1", "k5_t0.1", "k5_t0.3"]
    assert len(load_grid(path, ["seed=[1,2]"]).cells) == 9
    assert {c.params["stage1_epochs"] for c in load_grid(path, ["stage1_epochs=1"]).cells} == {1}


def test_axes_are_those_of_the_file_and_what_the_extra_cells_set_differently(tmp_path):
    grid = load_grid(grid_file(tmp_path, "base: base.yaml\naxes: {k: [4, 5]}\ncells: [{name: a, split: patient, seed: 1},"
                                         " {name: b, seed: 1, split: patient, threshold: 0.2}]\n"))
    assert grid.axes == ("k", "split", "seed")
    only = load_grid(grid_file(tmp_path, "cells: [{name: a, seed: 1, rule: rare}, {name: b, seed: 1, rule: angle}]\n"))
    assert only.axes == ("rule",)


@pytest.mark.parametrize(("parts", "trainings"), [(2, 3), (3, 3), (4, 6)])
def test_shards_cover_the_grid_once_and_repeat_no_training_that_they_need_not(parts, trainings):
    grid = load_grid(PARAMS_DIR / "grid_charm.yaml")
    shards = [grid.shard(i, parts).cells for i in range(1, parts + 1)]
    assert sorted(c.id for s in shards for c in s) == sorted(c.id for c in grid.cells) and all(shards)
    assert sum(len({training_of(c.params) for c in s}) for s in shards) == trainings
    if parts == 4:  # more than trainings
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(("text", "says"), [
    ("axis: {k: [2]}", "unknown key 'axis'.*Did you mean 'axes'"), ("axes: {treshold: [0.1]}", "Did you mean 'threshold'"),
    ("axes: {k: [2.5]}", "whole number"), ("axes: {k: 3}", "wanted a list"), ("axes: {k: [2, 2]}", "a value twice"),
    ("axes: [k]", "axes must be"), ("cells: [k]", "cells.0."), ("base: base.yaml", "nothing to run"),
    ("base: bas.yaml\naxes: {k: [2]}", "Did you mean 'base.yaml'"),
    *((f"cells: [{{name: {name!r}}}]", "cannot be a folder") for name in ("a/b", "..", ".", ".a", "a.", "x" * 201, "-\n")),
    *((f"cells: [{{name: {name}}}]", "cannot be a folder") for name in ("leaderboard.csv", "Grid.YAML", "kaggle", "log.txt")),
    ("cells: [{name: Plain}, {name: plain, seed: 1}]", "'Plain' and 'plain' are one folder on some file systems"),
    ("name: ../mine\naxes: {k: [2]}", "name '../mine' cannot be a folder"),
    ("cells: [{bank_size: 3, k: 5, answer: features}]", "lower k"), ("axes: {arch: [resnet51]}", "Did you mean 'resnet50'"),
    ("axes: {weights: [/none/such.pt]}", "norm"), ("cells: [{weights: /none/such.pt, norm: half}]", "nothing at /none/such"),
    ("axes: {split: [lists/mine]}", "nothing at"), ("axes: {run_dir: [x]}", "own folder"),
    ("axes: {k: [2]}\ncells: [{k: 2, name: k2, seed: 1}]", "two different cells")])
def test_whatever_is_wrong_is_refused_before_anything_runs(tmp_path, text, says):
    with pytest.raises(ParameterError, match=says):
        load_grid(grid_file(tmp_path, text + "\n"))


@pytest.mark.parametrize(("assignment", "says"), [("treshold=0.1", "Did you mean 'threshold'"), ("k", "wanted name=value"),
                                                  ("k=[2", "not a YAML list"), ("run_dir=x", "own folder")])
def test_bad_assignments_are_refused(tmp_path, assignment, says):
    with pytest.raises(ParameterError, match=says):
        load_grid(grid_file(tmp_path, "axes: {k: [2, 3]}\n"), [assignment])


def test_the_published_grid_is_exactly_the_published_one():
    grid = load_grid(PARAMS_DIR / "grid_published.yaml")
    table = published_charm_grid()
    assert [(c.params["momentum"], c.params["k"], c.params["threshold"]) for c in grid.cells] == \
        list(table[["momentum", "k", "threshold"]].itertuples(index=False, name=None))
    for cell in grid.cells:
        p = cell.params
        assert (p["rule"], p["retrieval"], p["patience"], p["stage2_loss"]) == ("published", "published", 3, "asl_published")
        assert (p["stage1_frozen_epochs"], p["stage1_epochs"], p["stage1_batch"], p["stage2_batch"]) == (3, 20, 64, 128)
        assert (p["stage2_lr_min"], p["stage2_lr_max"], p["arch"], p["seed"]) == (2e-5, 8e-5, "efficientnet_v2_s", 85)


def test_published_yaml_pins_all_that_a_changed_default_could_move():
    free = {"system", "data_root", "csv", "valid_fraction", "cache_dir", "limit", "run_dir", "precision", "workers", "device",
            "resume", "preload", "grad_checkpointing", "normal_class", "blank", "uncertain", "patients", "never_test",
            "allow_leak", "processes", "heat_maps"}
    pinned = load_params(PARAMS_DIR / "published.yaml")
    assert {name for name in PARAMS if not missing_need(name, resolve(pinned))} - free <= set(pinned) <= set(PARAMS) - free


def test_the_text_of_the_paper_differs_from_its_code_where_it_says_so():
    code, text = (resolve(load_params(PARAMS_DIR / name)) for name in ("published.yaml", "published_text.yaml"))
    assert {name: text[name] for name in PARAMS if text[name] != code[name]} == {
        "rule": "rare", "retrieval": "cosine", "momentum_warmup": True, "momentum_before_step": False, "stage2_loss": "asl",
        "one_group": False}


def test_our_grids():
    charm = load_grid(PARAMS_DIR / "grid_charm.yaml")
    assert len(charm.cells) == 36 + 2 and [c.id for c in charm.cells[-2:]] == ["plain", "published"]
    assert all(c.params["stage1_lr"] > 0 for c in charm.cells)  # a finder in each cell would be a fourth axis
    demo = load_grid(PARAMS_DIR / "grid_demo.yaml")
    assert len(demo.cells) == 8 and set(demo.axes) == {"k", "threshold"}
    cells = {cell.id: cell.params for cell in demo.cells}
    size, published = load_params(PARAMS_DIR / "demo.yaml"), resolve(load_params(PARAMS_DIR / "published.yaml"))
    free = {*size, "split", "keys", "vote_weight"}  # ... and the last two act in no bank that answers with features
    assert [n for n in published if cells["published"].get(n, published[n]) != published[n] and n not in free] == []
    assert cells["ag_cnn"]["system"] == "two_path" and cells["csra"]["head"] == "csra" and not cells["plain"]["use_bank"]


@pytest.mark.parametrize("path", sorted(p for p in PARAMS_DIR.rglob("*.yaml") if not p.name.startswith("grid_")),
                         ids=lambda p: p.stem)
def test_every_parameter_file_resolves(path):
    resolve(load_params(path))


@pytest.mark.parametrize("path", sorted(PARAMS_DIR.rglob("grid_*.yaml")), ids=lambda p: p.stem)
def test_every_grid_file_resolves(path):
    assert load_grid(path).cells


def test_an_entry_with_lists_is_a_cell_for_each_combination(tmp_path):
    path = grid_file(tmp_path, "base: base.yaml\ncells: [{name: a, split: ['fold:1/2', 'fold:2/2'], seed: [1, 2], k: 4}, "
                               "{k: [2, 3]}]\n")
    cells = load_grid(path).cells
    assert [c.id for c in cells] == ["a_split=fold-1-2_seed=1", "a_split=fold-1-2_seed=2", "a_split=fold-2-2_seed=1",
                                     "a_split=fold-2-2_seed=2", "k2", "k3"]
    assert cells[1].params["split"] == "fold:1/2" and cells[1].params["seed"] == 2 and cells[1].params["k"] == 4
    assert [c.id for c in load_grid(path, ["seed=3", "k=9"]).cells] == ["a_split=fold-1-2", "a_split=fold-2-2", "k9"]
    assert [c.id for c in load_grid(path, ["seed=[7]", "split=[patient]"]).cells] == ["a_split=patient_seed=7", "k2", "k3"]
    with pytest.raises(ParameterError, match=r"cells\[0\].*value twice"):
        load_grid(grid_file(tmp_path, "cells: [{k: [2, 2]}]"))


def test_the_parts_differ_by_their_parts_only():
    """The judged comparison: what differs from the plain network is CHARM's own, never epochs, rates, loss or data."""
    grid = load_grid(PARAMS_DIR / "grid_nih64_parts.yaml", ["weights=none"])
    by_name = {}
    for cell in grid.cells:
        by_name.setdefault(cell.id.partition("_split=")[0], []).append(cell.params)
    judged = sorted((f"fold:{i}/5", seed) for i in range(1, 6) for seed in (85, 1, 2))
    assert all(sorted((p["split"], p["seed"]) for p in cells) == judged for cells in by_name.values())
    plain, ours, before = by_name["plain"][0], by_name["charm"][0], by_name.pop("plain_0.5")[0]
    regime = {"monitor", "image_size", "stage1_lr", "stage2_epochs", "stage2_lr_min", "stage2_lr_max"}
    assert {name for name in plain if plain[name] != before[name]} == regime
    own = {"use_momentum", "use_attention", "use_bank", "momentum", "k", "threshold", "bank_size", "strategy", "rule", "answer",
           "keys", "vote_weight", "vote_temperature", "momentum_form", "retrieval", "bank_norm", "attention",
           "momentum_warmup", "momentum_before_step", "momentum_batch_norms"}
    for name, cells in by_name.items():
        assert {k for k in plain if plain[k] != cells[0][k]} <= own, name
    network = [p.name for p in PARAMS.values() if p.group == "network" and p.name not in ("arch", "weights", "norm")]
    assert {k: ours[k] for k in network} == {k: DEFAULTS[k] for k in network}  # the judged CHARM is the default one
    assert sum(plain[k] for k in ("use_momentum", "use_attention", "use_bank")) == 0


def test_an_axis_without_effect_is_refused_with_what_would_give_it_one(tmp_path):
    """momentum x k x threshold over the default were eight equal trainings."""
    for axes, says in (("k: [1, 2], use_bank: [false]", "axis 'k' has no effect in any cell; it needs use_bank: true"),
                       ("momentum: [0.9, 0.99], use_momentum: [false]", "'momentum'.*use_momentum: true"),
                       ("threshold: [0.1], strategy: [fifo], answer: [features]", "'threshold'.*strategy"),
                       ("vote_weight: [0.1, 0.2], use_bank: [false]", "'vote_weight'.*use_bank: true")):
        with pytest.raises(ParameterError, match=says):
            load_grid(grid_file(tmp_path, f"base: base.yaml\naxes: {{{axes}}}\n", base="seed: 1\n"))
    with pytest.raises(ParameterError, match="axis 'retrieval' has no effect"):
        load_grid(grid_file(tmp_path, "cells: [{seed: [1, 2]}]\n"), ["retrieval=[cosine,softmax]"])
    half = load_grid(grid_file(tmp_path, "base: base.yaml\naxes: {use_bank: [true, false], k: [1, 2]}\n"))
    assert len(half.cells) == 4
    with pytest.raises(ParameterError, match="all values of axis 'valid_fraction' amount to 1"):
        load_grid(grid_file(tmp_path, "axes: {valid_fraction: [0.1, 0.2], split: [patient]}\n"))


def test_steps_say_whether_a_momentum_is_reached(tmp_path):
    """The warm-up reaches 0.99 after 890 steps: in fewer, all larger values are one run."""
    text = "base: base.yaml\naxes: {momentum: [0.99, 0.999]}\n"
    short = load_grid(grid_file(tmp_path, text, base="momentum_form: branch\nstage1_batch: 100\nstage2_batch: 100\n"))
    few = {cell.id: {"all": 1000, "findings": 500} for cell in short.cells}
    with pytest.raises(ParameterError, match=r"all values of axis 'momentum' amount to 0\.9\d* in every cell"):
        refuse_dead_axes(short, few)
    refuse_dead_axes(short, {cell.id: {"all": 100000, "findings": 50000} for cell in short.cells})
    both = load_grid(grid_file(tmp_path, text.replace("[0.99", "[0.5, 0.99"), base="momentum_form: branch\n"))
    assert remarks(both, {cell.id: few["m0.99"] for cell in both.cells}) == ["the same run: m0.99 = m0.999"]


def test_given_values_without_effect_are_named_in_one_line(tmp_path):
    """Those of -p and of the grid file; what a base pins is left alone."""
    path = grid_file(tmp_path, "base: base.yaml\ncells: [{name: a, rule: angle}, {name: b, seed: 2}]\n",
                     base="hidden: 4\nuse_momentum: false\n")
    grid = load_grid(path, ["momentum=0.5", "vote_weight=0.3"])
    (line,) = remarks(grid, {cell.id: {"all": 1000, "findings": 500} for cell in grid.cells})
    assert line == "without effect: momentum (needs use_momentum: true); rule (needs answer: features)"
