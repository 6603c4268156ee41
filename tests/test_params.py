import time
from pathlib import Path

import pytest
import torch

from charmlib.grid.board import read_record
from charmlib.grid.spec import load_grid
from charmlib.nn import MomentumEncoder
from charmlib.param_sources import cell_source, from_notebook, load_params, parse_assignments, parse_yaml, refuse_unknown
from charmlib.params import PARAMS, ParameterError, coerce, effective, missing_need, no_effect, resolve
from charmlib.training.recipes import phases


@pytest.mark.parametrize(("name", "given", "wanted"), [
    ("stage2_lr_min", "2e-5", 2e-5),  # YAML reads 2e-5 as text
    ("weights", False, "none"), ("use_bank", "off", False), ("use_bank", "True", True), ("k", "3", 3), ("k", 3.0, 3),
    ("momentum", 1, 1.0), ("split", "/lists/mine", "/lists/mine"), ("weights", None, "none"), ("csv", None, "")])
def test_values_are_coerced_by_type(name, given, wanted):
    value = coerce(name, given)
    assert value == wanted and type(value) is type(wanted)


@pytest.mark.parametrize(("name", "given", "says"), [
    ("k", 2.5, "whole number"), ("k", True, "true or false"), ("k", "three", "not a number"), ("k", 0, "outside"),
    ("momentum", 1.5, "outside"), ("momentum", "nan", "not finite"), ("use_bank", 1, "not true or false"),
    ("rule", "rarest", "Did you mean 'rare'"), ("split", "oficial", "Did you mean 'official'"),
    ("csra_heads", 3, "3 is none of 1, 2, 4, 6, 8"), ("treshold", 0.1, "Did you mean 'threshold'"), ("arch", 3, "not text")])
def test_refusals_name_the_value_and_the_remedy(name, given, says):
    with pytest.raises(ParameterError, match=says) as error:
        coerce(name, given, "somewhere.yaml")
    assert "somewhere.yaml" in str(error.value)


def test_later_layers_win(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("k: 4\nstage2_lr_max: 1e-4\nuse_bank: off\n")
    p = resolve(load_params(path), {"k": 3}, parse_assignments(["k=2"]))
    assert (p["k"], p["stage2_lr_max"], p["use_bank"]) == (2, 1e-4, False)
    assert set(p) == set(PARAMS)


def test_contradictions_are_refused():
    with pytest.raises(ParameterError, match="bank_size"):
        resolve({"k": 5, "bank_size": 3, "answer": "features"})
    with pytest.raises(ParameterError, match="csv"):
        resolve({"classes": "own"})
    with pytest.raises(ParameterError, match="'retrieval': published .* strategy hard needs; say cosine"):
        resolve({"answer": "features", "retrieval": "published", "strategy": "hard"})
    with pytest.raises(ParameterError, match="'drop_path': 0.2 is for timm models, not for torchvision's resnet18; say"):
        resolve({"arch": "resnet18", "drop_path": 0.2})
    for pooled in ({"momentum_form": "branch"}, {"attention": "scales"}, {"answer": "features"}):
        with pytest.raises(ParameterError, match="'head': csra reads a map.*say momentum_form: weights, use_attention: false"):
            resolve({"head": "csra", **pooled})
    assert resolve({"head": "csra", "use_attention": False, "use_bank": False, "answer": "features"})  # no bank, no answer
    with pytest.raises(ParameterError, match="nothing would be trained"):
        phases(resolve({"stage1_epochs": 0, "stage1_frozen_epochs": 0, "stage2_epochs": 0}))


def test_what_a_run_names_is_absolute_and_there(tmp_path, monkeypatch):
    from charmlib.param_sources import with_absolute_paths

    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pt").touch()
    p = with_absolute_paths(resolve({"weights": "w.pt", "norm": "half", "cache_dir": "c", "run_dir": "r"}))
    assert (p["weights"], p["cache_dir"], p["run_dir"]) == tuple(str(tmp_path / n) for n in ("w.pt", "c", "r"))
    with pytest.raises(ParameterError, match="nothing at"):
        with_absolute_paths(resolve({"weights": "v.pt", "norm": "half"}))
    with pytest.raises(ParameterError, match="norm: imagenet"):
        resolve({"weights": "w.pt"})


def test_the_declared_backbones_are_those_that_can_be_split():
    from charmlib.nn.backbone import TORCHVISION
    from charmlib.params import ARCHS

    assert set(ARCHS) == set(TORCHVISION)
    with pytest.raises(ParameterError, match="Did you mean 'efficientnet_v2_s'"):
        resolve({"arch": "efficientnet_v2s"})


def test_bad_files_are_named(tmp_path):
    (tmp_path / "charm.yaml").write_text("k: [")
    with pytest.raises(ParameterError, match=r"charm\.yaml is not valid YAML"):
        load_params(tmp_path / "charm.yaml")
    with pytest.raises(ParameterError, match=r"Did you mean 'charm\.yaml'"):
        load_params(tmp_path / "charn.yaml")


def test_a_file_holds_only_its_differences_from_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/first.yaml").write_text("k: 4\nseed: 1\n")
    (tmp_path / "second.yaml").write_text("base: sub/first.yaml\nk: 3\n")
    (tmp_path / "sub/third.yaml").write_text("base: ../second.yaml\nbank_size: 9\n")
    assert load_params(tmp_path / "sub/third.yaml") == {"k": 3, "seed": 1, "bank_size": 9}
    (tmp_path / "sub/first.yaml").write_text("base: third.yaml\n")
    with pytest.raises(ParameterError, match="based on this file itself"):
        load_params(tmp_path / "sub/third.yaml")
    (tmp_path / "sub/first.yaml").write_text("base: [a]\n")
    with pytest.raises(ParameterError, match=r"first\.yaml.*wanted the name of a file"):
        load_params(tmp_path / "second.yaml")
    (tmp_path / "sub/first.yaml").write_text("base: nothing.yaml\n")
    with pytest.raises(ParameterError, match=r"no file .*nothing\.yaml"):
        load_params(tmp_path / "second.yaml")


def test_the_cell_text_runs_and_gives_the_defaults():
    namespace: dict = {}
    exec(cell_source(PARAMS), namespace)
    assert {name: namespace[name] for name in PARAMS} == resolve()
    assert all(p.reason and not set("=[]") & set(p.reason) for p in PARAMS.values())  # papermill overlooks such lines


def test_library_keywords_have_the_declared_defaults():
    import inspect

    from charmlib.models.charm import CharmNet
    from charmlib.training.learner import charm_learner

    for function in (CharmNet.__init__, charm_learner):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in PARAMS and parameter.default is not inspect.Parameter.empty and name not in ("classes", "seed"):
                assert parameter.default == PARAMS[name].default, f"{function.__qualname__}: {name}"


def test_a_parameter_says_what_would_give_it_an_effect():
    p = resolve({"use_bank": False, "use_momentum": False})
    assert {n: missing_need(n, p) for n in ("k", "strategy", "vote_weight", "momentum", "dropout")} == {
        "k": "use_bank: true", "strategy": "use_bank: true", "vote_weight": "use_bank: true", "momentum": "use_momentum: true",
        "dropout": ""}
    assert no_effect({name: missing_need(name, resolve()) for name in ("rule", "retrieval", "momentum", "seed")}) == \
        "without effect: rule, retrieval (needs answer: features)"
    csra = resolve({"head": "csra", "use_attention": False})
    assert {n: missing_need(n, csra) for n in ("csra_heads", "hidden", "dropout")} == {
        "csra_heads": "", "hidden": "head: charm or standard", "dropout": "head: charm or standard or linear"}
    assert missing_need("csra_lambda", resolve()) == "head: csra"
    assert missing_need("stage2_loss", resolve({"stage2_epochs": 0})) == "stage2_epochs: above 0"
    assert missing_need("stage1_lr", resolve({"stage1_epochs": 0, "stage1_frozen_epochs": 0})) == \
        "stage1_frozen_epochs or stage1_epochs: above 0"
    assert not missing_need("stage1_lr", resolve({"stage1_epochs": 0}))


def test_two_settings_of_one_effect_are_one_run():
    """The warm-up reaches 0.99 after 890 steps and 0.999 after 8,990: in fewer, a larger momentum changes nothing."""
    on = {"momentum_form": "branch"}
    for momentum, steps in ((0.99, 890), (0.999, 8990), (0.9999, 89990)):
        p = resolve(on, {"momentum": momentum})
        larger = resolve(on, {"momentum": (1 + momentum) / 2})
        assert effective(p, steps + 2) != effective(larger, steps + 2) and effective(p, steps)["momentum"] <= momentum
        assert effective(p, steps - 20) == effective(larger, steps - 20) and effective(p) != effective(larger)
    assert effective(resolve(on, {"momentum": 0.99, "momentum_warmup": False}), 5)["momentum"] == 0.99
    encoder = MomentumEncoder(torch.nn.Linear(1, 1), 0.999)
    for _ in range(50):
        encoder.update(torch.nn.Linear(1, 1))
    assert float(encoder.current_momentum()) == pytest.approx(effective(resolve(on, {"momentum": 0.999}), 51)["momentum"])
    assert effective(resolve({"split": "patient", "valid_fraction": 0.3})) == effective(resolve({"split": "patient"}))
    assert effective(resolve()) == effective(resolve({"retrieval": "cosine", "run_dir": "x", "workers": 7}))


def test_the_weight_of_votes_is_a_share_or_chosen():
    assert [resolve({"vote_weight": w})["vote_weight"] for w in ("-1", -1, 0, 1)] == [-1, -1, 0, 1]
    for wrong in (-0.5, -1e-3, -0.999):
        with pytest.raises(ParameterError, match=rf"'vote_weight': {wrong:g} is neither -1 .* nor in 0 to 1"):
            resolve({"vote_weight": wrong})
    for wrong in (-2, 1.1):
        with pytest.raises(ParameterError, match="'vote_weight'.*outside -1 to 1"):
            resolve({"vote_weight": wrong})


def test_a_notebook_gives_shown_names_options_and_no_others():
    shown = {"k": 3, "options": {"use_bank": False}, "np": object(), "In": ["", "# Parameters\nk = 3"]}
    assert from_notebook(shown) == {"k": 3, "use_bank": False}
    assert from_notebook({**shown, "options": "{use_bank: off, answer: features}"}) == {"k": 3, "use_bank": False,
                                                                                        "answer": "features"}
    for wrong, says in (({"In": ["# Parameters\nstage1_epoch = 1"]}, "unknown parameter 'stage1_epoch'.*Did you mean"),
                        ({"__annotations__": {"seeed": int}}, "Did you mean 'seed'"),
                        ({"options": {"kk": 1}}, "unknown parameter 'kk'"), ({"options": [1]}, "wanted a dict"),
                        ({"k": "three"}, "not a number")):
        with pytest.raises(ParameterError, match=says):
            from_notebook({**shown, **wrong})


def test_another_notebook_refuses_names_that_its_parameters_cell_lacks():
    cell, given = "limit: int = 0  # 0 is all\nrun_dir: str = ''", "# Parameters\nlimit = 5\n"
    mine = {"__annotations__": {"limit": int, "run_dir": str}}
    refuse_unknown({**mine, "In": ["", cell, given]})
    refuse_unknown({**mine, "In": ["", "k: int = 3", "# Parameters\nk = 4", cell, given]})  # train and test in one kernel
    for wrong, says in (("limt", "Did you mean 'limit'"), ("k", "This notebook takes limit, run_dir")):
        with pytest.raises(ParameterError, match=f"unknown parameter '{wrong}'.*{says}"):
            refuse_unknown({**mine, "In": ["", cell, f"{given}{wrong} = 1\n"]})


@pytest.mark.parametrize("name", ["explore", "grid", "prepare", "test"])
def test_each_notebook_checks_the_names_it_is_given(name):
    text = (Path(__file__).parents[1] / f"notebooks/{name}.ipynb").read_text()
    assert "refuse_unknown(globals())" in text


@pytest.mark.parametrize("text, says", [
    ("stage1_lr: 0.001\nk: 3\nstage1_lr: 0.5\n", "'stage1_lr' stands twice: in line 1 and line 3"),
    ("axes: {k: [2], k: [3]}", "'k' stands twice"), ("cells: [{name: a, name: b}]", "'name' stands twice"),
    ("k: 3\n\"k\": 4", "'k' stands twice")])
def test_a_key_twice_is_refused_wherever_yaml_is_read(tmp_path, text, says):
    (tmp_path / "twice.yaml").write_text(text)
    for read in (load_params, load_grid, read_record):
        path = tmp_path / "twice.yaml" if read is not read_record else tmp_path
        (tmp_path / "grid.yaml").write_text(text)
        with pytest.raises(ParameterError, match=f"yaml is not valid YAML: {says}"):
            read(path)
    with pytest.raises(ParameterError, match="options is not valid YAML: 'k' stands twice"):
        from_notebook({"options": "{k: 3, k: 4}"})


def test_anchors_and_merged_keys_are_no_repetition():
    assert parse_yaml("a: &x {k: 1}\nb: {<<: *x, k: 2}", "text")["b"] == {"k": 2}


@pytest.mark.parametrize("name", ["split", "arch", "monitor", "system", "weights", "classes"])
def test_an_empty_text_is_refused_where_a_default_is_not_empty(name):
    with pytest.raises(ParameterError, match=f"parameter '{name}'.*is empty; leave it out for '{PARAMS[name].default}'"):
        coerce(name, "")


def test_none_and_home_folders(monkeypatch):
    with pytest.raises(ParameterError, match="'split' .*is empty"):
        coerce("split", None, "-p")
    assert coerce("weights", None) == "none" and coerce("csv", None) == ""
    monkeypatch.setenv("HOME", "/home/somebody")
    for name in ("split", "csv", "cache_dir", "data_root", "weights", "run_dir"):
        assert coerce(name, "~/there.x") == "/home/somebody/there.x"


def bomb(kind):
    """Lists in lists of nine aliases, the same of empty cells, merged mappings, one long text, and a list that holds itself."""
    levels = "bcdefghi"
    if kind in ("x", "''"):
        return f"k:\n  - &a [{','.join([kind] * 9)}]\n" + "".join(
            f"  - &{n} [{','.join(['*' + p] * 9)}]\n" for p, n in zip("a" + levels, levels))
    if kind == "merge":
        return "a: &a {k: 1, seed: 2}\n" + "".join(
            f"{n}: &{n} {{<<: [{','.join(['*' + p] * 9)}]}}\n" for p, n in zip("a" + levels, levels))
    return f"k: [&a {'x' * 5000}, {','.join(['*a'] * 5000)}]" if kind == "text" else "k: &a [*a]"


@pytest.mark.parametrize("kind", ["x", "''", "merge", "text", "itself"])
def test_aliases_that_expand_without_end_are_refused_at_once(tmp_path, kind):
    (tmp_path / "p.yaml").write_text(bomb(kind))
    start = time.monotonic()
    with pytest.raises(ParameterError, match=r"p\.yaml.*aliases") as refused:
        load_params(tmp_path / "p.yaml")
    assert time.monotonic() - start < 2 and len(str(refused.value)) < 500


def test_anchors_as_people_use_them_are_read(tmp_path):
    (tmp_path / "p.yaml").write_text("k: &k 4\nbank_size: *k\n")
    assert load_params(tmp_path / "p.yaml") == {"k": 4, "bank_size": 4}
    text = "a: &a {k: 1, seed: 2}\nb: {<<: *a, k: 3}\nc: [*a, *a]\n"
    assert parse_yaml(text, "text")["b"] == {"k": 3, "seed": 2}


@pytest.mark.parametrize("content", [b"\x80\x81", b"k: !!int ''", b"k: !!bool maybe", b"k: 2024-13-45", b"[" * 3000, b"k: \0",
                                     b"- k", b"!!python/object:os.system {}"])
def test_a_parameter_file_that_is_none_is_named(tmp_path, content):
    (tmp_path / "p.yaml").write_bytes(content)
    with pytest.raises(ParameterError, match=r"p\.yaml"):
        load_params(tmp_path / "p.yaml")
