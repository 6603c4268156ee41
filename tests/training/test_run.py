import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from charmlib import Run
from charmlib.evaluation.calibration import fit_temperature
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.operating import choose_thresholds
from charmlib.evaluation.runs import RunFolder, finish
from charmlib.files import Damaged
from charmlib.params import ParameterError
from charmlib.training import fit
from charmlib.training.checkpoint import load_model, load_resume


class Killed(BaseException):
    pass


def killed_after(monkeypatch, saves):
    """Let the run write so many resume files and then die on the spot, as by SIGKILL."""
    real, count = fit.save_resume, [0]

    def save(path, state):
        real(path, state)
        count[0] += 1
        if count[0] == saves:
            raise Killed

    monkeypatch.setattr(fit, "save_resume", save)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def bits(folder):
    net, card = load_model(folder)
    history = pd.read_csv(folder / "history.csv").drop(columns="seconds")
    return net.state_dict(), card["thresholds"], history


def same_run(folder, quiet):
    """Network, thresholds and history of five epochs are the same, bit by bit."""
    state, thresholds, history = bits(folder)
    want_state, want_thresholds, want_history = bits(quiet)
    assert state.keys() == want_state.keys()
    for name, value in want_state.items():
        assert torch.equal(state[name], value), name
    assert thresholds == want_thresholds
    pd.testing.assert_frame_equal(history, want_history)
    assert len(history) == 5
    for name in ("bank_history.csv", "bank.csv"):
        assert (folder / name).read_text() == (quiet / name).read_text()


@pytest.fixture(scope="module")
def quiet(phantoms, tmp_path_factory):
    """An undisturbed run of five epochs over three phases."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("quiet") / "run"
    Run.open({**TINY, "data_root": str(phantoms), "run_dir": str(folder)}).train()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2, 3, 4, 5])
def test_a_killed_and_resumed_run_ends_in_the_same_bits(quiet, tiny, monkeypatch, saves):
    """Killed after each of the five epochs: inside and at the end of each phase."""
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, saves)
        Run.open(tiny).train()
    folder = Path(tiny["run_dir"])
    assert (folder / "resume.pt").is_file() and not (folder / "model.json").is_file()
    torch.manual_seed(12345)  # the new process has some other random state
    Run.open(tiny).train()
    same_run(folder, quiet)


@pytest.mark.slow
def test_a_bank_that_answers_with_features_resumes_in_the_same_bits(tiny, tmp_path, monkeypatch):
    """Its slots and its gate are part of training, which a voting bank leaves alone. Killed inside each stage."""
    mine = {**tiny, "answer": "features", "strategy": "rarity", "retrieval": "gated"}
    quiet = tmp_path / "quiet"
    Run.open(mine, run_dir=str(quiet)).train()
    assert load_model(quiet)[0].bank.gate != 0
    for saves in (2, 2):
        with monkeypatch.context() as m, pytest.raises(Killed):
            killed_after(m, saves)
            Run.open(mine).train()
        torch.manual_seed(12345)
    Run.open(mine).train()
    same_run(Path(tiny["run_dir"]), quiet)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["statistical", "entropy", "diversity", "hybrid", "fifo", "reservoir", "hard"])
@pytest.mark.once
def test_a_bank_of_any_strategy_resumes_in_the_same_bits(tiny, tmp_path, monkeypatch, strategy):
    """Killed inside stage 1 and again inside stage 2. Rarity is in the test above."""
    quiet = tmp_path / "quiet"
    Run.open(tiny, answer="features", strategy=strategy, run_dir=str(quiet)).train()
    for saves in (2, 2):
        with monkeypatch.context() as m, pytest.raises(Killed):
            killed_after(m, saves)
            Run.open(tiny, answer="features", strategy=strategy).train()
        torch.manual_seed(12345)
    Run.open(tiny, answer="features", strategy=strategy).train()
    same_run(Path(tiny["run_dir"]), quiet)


def test_each_stage_has_its_bank_momentum(tiny):
    run = Run.open(tiny, answer="features", strategy="statistical", bank_momentum=0.5)
    run.learner()
    assert run.net.bank.bank_momentum == 0.5
    run.learner(run.phase("stage2"))
    assert run.net.bank.bank_momentum == 0.9999


# Odd values of the network's parameters, and where its parts have them.
VOTES = {"momentum": (0.123, lambda net: net.momentum.momentum), "threshold": (0.321, lambda net: net.bank.threshold),
         "k": (7, lambda net: net.bank.k), "bank_size": (23, lambda net: net.bank.size),
         "vote_weight": (0.77, lambda net: net.bank.weight), "vote_temperature": (0.35, lambda net: net.bank.temperature),
         "dropout": (0.45, lambda net: net.head[3].p),
         "hidden": (19, lambda net: net.head[1].out_features)}
FEATURES = {name: VOTES[name] for name in ("k", "threshold", "bank_size")} | {
    "strategy": ("hybrid", lambda net: net.bank.strategy), "rule": ("angle", lambda net: net.bank.rule),
    "momentum_warmup": (False, lambda net: net.momentum.warmup),
    "momentum_batch_norms": (True, lambda net: net.momentum.batch_norms),
    "momentum_before_step": (True, lambda net: net.momentum_before_step),
    "retrieval": ("cosine", lambda net: net.bank.retrieval), "bank_norm": ("query", lambda net: net.bank.bank_norm),
    "normalize_retrieved": (True, lambda net: net.bank.normalize_retrieved)}


@pytest.mark.parametrize("answer, odd", [("votes", VOTES), ("features", FEATURES)], ids=["votes", "features"])
def test_the_parts_have_the_values_of_the_parameters_as_opened_and_as_loaded(tiny, answer, odd):
    values = {name: value for name, (value, _) in odd.items()}
    run = Run.open(tiny, answer=answer, **values, stage1_epochs=0, stage2_epochs=0)
    run.train()
    for net in (run.net, Run.load(run.folder).net):
        assert {name: read(net) for name, (_, read) in odd.items()} == values


@pytest.fixture
def steps(monkeypatch):
    """What torch's AdamW was set to at each step that it made: a list of (rates, decays) of its groups, the first layers'
    first."""
    made, real = [], torch.optim.AdamW.step

    def step(self, closure=None):
        made.append(([group["lr"] for group in self.param_groups], [group["weight_decay"] for group in self.param_groups]))
        return real(self, closure)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return made


def test_every_step_decays_weights_as_the_parameters_say(tiny, steps):
    Run.open(tiny, weight_decay=0.123, stage1_epochs=1, stage2_epochs=1).train()
    assert steps and {decay for _, decays in steps for decay in decays} == {0.123}


def test_the_rates_of_stage_2_rise_from_the_first_layers_to_the_head(tiny, steps):
    Run.open(tiny, stage1_frozen_epochs=0, stage1_epochs=0, stage2_epochs=2, stage2_lr_min=1e-5, stage2_lr_max=1e-3).train()
    rates = np.array([rates for rates, _ in steps])
    np.testing.assert_allclose(rates / rates[:, -1:], np.tile([0.01, 0.1, 1], (len(steps), 1)), rtol=1e-6)
    assert 0.9e-3 < rates.max() <= 1e-3


def test_one_group_freezes_nothing_and_has_the_heads_rate_everywhere(tiny, steps):
    """As in the published code, whose Learner has no splitter; norms and biases do not decay under fastai's Adam."""
    run = Run.open(tiny, one_group=True, optimizer="fastai", weight_decay=0.1, stage1_epochs=0, stage2_epochs=1)
    frozen, stage2 = run.phases()
    assert (frozen.name, frozen.trains) == ("stage1_frozen", ())
    before = {name: value.clone() for name, value in run.net.trunk.named_parameters()}
    learn = run.learner(frozen)
    assert len(learn.opt_func(learn.splitter(learn.model)).param_lists) == 1
    run.train()
    assert not any(torch.equal(value, before[name]) for name, value in run.net.trunk.named_parameters())
    assert {len(set(rates)) for rates, _ in steps} == {1} and {tuple(decays) for _, decays in steps} == {(0.1, 0.0)}
    assert max(rates[0] for rates, _ in steps) == pytest.approx(frozen.lr.stop, rel=0.05)
    assert max(rates[0] for rates, _ in steps[-6:]) <= stage2.lr.stop


def test_a_run_that_ends_in_time_after_each_epoch_ends_in_the_same_bits(quiet, tiny, monkeypatch):
    """There is always time for one more epoch and never for two; nor, at first, for scoring."""
    from charmlib import session

    kept = []
    for _ in range(20):
        answers = iter([60.0, 0.0])  # before the first epoch, then after it
        monkeypatch.setattr(session, "time_left", lambda answers=answers: next(answers, 0.0))
        try:
            Run.open(tiny).train()
        except session.OutOfTime as stop:
            assert "stopped before" in str(stop) and "The same command goes on from here" in str(stop)
            kept.append(len(pd.read_csv(Path(tiny["run_dir"]) / "history.csv")))
            continue
        break
    assert kept == sorted(kept) and set(kept) == {1, 2, 3, 4}
    with pytest.raises(session.OutOfTime, match="stopped before scoring"):
        Run.load(tiny["run_dir"]).score()
    assert not (Path(tiny["run_dir"]) / "predictions.npz").exists()
    monkeypatch.undo()
    same_run(Path(tiny["run_dir"]), quiet)


def test_the_same_run_twice_gives_the_same_bits_and_another_seed_others(quiet, tiny):
    again = Run.open(tiny)
    again.train()
    for name, value in bits(quiet)[0].items():
        assert torch.equal(again.net.state_dict()[name], value), name
    other = Run.open(tiny, seed=7, run_dir=tiny["run_dir"] + "7")
    assert not torch.equal(other.net.head[1].weight, Run.open(tiny).net.head[1].weight)


def test_preloaded_images_train_to_the_same_bits_and_scoring_does_not_load_them_again(quiet, tiny, monkeypatch):
    from charmlib.data.loaders import ChestImages

    preloaded, real = [], ChestImages.preload
    monkeypatch.setattr(ChestImages, "preload", lambda self, device: preloaded.append(len(self)) or real(self, device))
    held = Run.open(tiny, preload=True)
    held.train()
    for name, value in bits(quiet)[0].items():
        assert torch.equal(held.net.state_dict()[name], value), name
    stages = [len(held.data.rows("train", findings_only=stage == 1)) for stage in (1, 2)]
    assert preloaded == stages
    some = held.data.rows("train")[5:25]
    np.testing.assert_allclose(held.logits("train", some)[0], held.logits("train")[0][5:25], rtol=1e-4, atol=1e-5)
    assert preloaded == stages


def test_checkpointed_gradients_train_to_the_same_bits(quiet, tiny):
    run = Run.open(tiny, grad_checkpointing=True)
    assert run.net.grad_checkpointing and not Run.open(tiny).net.grad_checkpointing
    run.train()
    same_run(run.folder, quiet)


def test_attention_as_a_filter_trains_and_loads(tiny):
    run = Run.open(tiny, attention="filter")
    run.train()
    net, _ = load_model(run.folder)
    assert net.state_dict()["attention.weight"].shape == (1, net.features, 5, 5)
    assert torch.equal(net.attention.weight, run.net.attention.weight)


def test_a_training_that_diverges_names_its_rate(tiny):
    with pytest.raises(ValueError, match="diverged in stage1 .*lower stage1_lr, now 100000000.0"):
        Run.open(tiny, stage1_lr=1e8, stage1_frozen_epochs=0).train()


def test_images_that_a_backbone_shrinks_to_nothing_are_refused_at_once(tiny):
    with pytest.raises(ValueError, match="image_size 16 is too small for vgg16"):
        Run.open(tiny, arch="vgg16", image_size=16, hidden=8, use_attention=False, use_momentum=False)


def test_no_image_with_a_finding_trains_without_stage_1_and_names_the_remedy_with_it(phantoms, tmp_path, tiny):
    table = pd.read_csv(phantoms / "Data_Entry_2017.csv")
    ids, people = table["Image Index"][:40], table["Patient ID"][:40]
    pd.DataFrame({"image": ids, "patient_id": people, "A": 0, "B": 0}).to_csv(tmp_path / "normal.csv", index=False)
    own = {**tiny, "csv": str(tmp_path / "normal.csv"), "classes": "own", "split": "patient"}
    with pytest.raises(ValueError, match="0 images with a finding: set stage1_images: all"):
        Run.open(own).dataloaders()
    run = Run.open(own, stage1_epochs=0, stage1_frozen_epochs=0)
    run.dataloaders()
    run.train()
    assert run.trained()


def test_early_stopping_and_the_best_epoch(tiny, monkeypatch):
    """Validation losses are prescribed: 5 3 4 4 ends stage 2 with patience 2, and epoch 2's weights stay."""
    from charmlib.training.callbacks import EpochRecord, KeepProgress

    script, states = iter([9, 9, 9, 5, 3, 4, 4, 1, 1]), []
    real_row, real_keep = EpochRecord.after_epoch, KeepProgress.after_epoch

    def row(self):
        real_row(self)
        self.rows[-1]["valid_loss"] = float(next(script))

    def keep(self):
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        real_keep(self)

    monkeypatch.setattr(EpochRecord, "after_epoch", row)
    monkeypatch.setattr(KeepProgress, "after_epoch", keep)
    run = Run.open(tiny, stage2_epochs=6, patience=2, vote_weight=0.5)  # chosen, it would differ from the epoch's
    history = run.train()
    assert [r["valid_loss"] for r in history] == [9, 9, 9, 5, 3, 4, 4]
    assert [r["stage"] for r in history] == ["1"] * 3 + ["2"] * 4
    for name, value in run.net.state_dict().items():
        assert torch.equal(value, states[4][name]), name


@pytest.mark.parametrize("losses", [(5, 4.95, 4.9, 4.88, 4, 3.95, 3.97, 3.5), (5, 4.2, 4.15, 4.05, 4.04, 4.0)])
def test_small_improvements_count_as_little_as_with_fastais_callbacks(tiny, monkeypatch, losses):
    """Stage 2 of prescribed validation losses ends, and keeps the epoch, as fastai's trackers say."""
    from fastai.callback.core import CancelFitException
    from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback

    from charmlib.training.callbacks import EpochRecord

    saved, ended, real_row = 0, len(losses), EpochRecord.after_epoch
    stop = EarlyStoppingCallback(min_delta=0.3, patience=2)
    save = SaveModelCallback(min_delta=0.08)
    for one in (stop, save):
        one.best, one.idx, one.wait, one._save = float("inf"), 0, 0, lambda name: None
        one.learn = SimpleNamespace(recorder=SimpleNamespace(values=[]), epoch=0)
    for epoch, loss in enumerate(losses):
        stop.recorder.values.append([loss]), save.recorder.values.append([loss])
        save.after_epoch()
        saved = epoch if save.new_best else saved
        try:
            stop.after_epoch()
        except CancelFitException:
            ended = epoch + 1
            break

    states = []

    def row(self):
        real_row(self)
        self.rows[-1]["valid_loss"] = float(losses[len(self.rows) - 1])
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})

    monkeypatch.setattr(EpochRecord, "after_epoch", row)
    run = Run.open(tiny, stage1_frozen_epochs=0, stage1_epochs=0, stage2_epochs=len(losses), patience=2, min_delta=0.3,
                   save_delta=0.08, vote_weight=0.5)
    assert len(run.train()) == ended
    assert all(torch.equal(value, states[saved][name]) for name, value in run.net.state_dict().items())


def test_the_epoch_of_the_highest_auc_stays_where_the_auc_is_monitored(tiny):
    run = Run.open(tiny, monitor="valid_auc", stage1_frozen_epochs=0, stage1_epochs=0, stage2_epochs=4, stage2_lr_max=1e-2,
                   vote_weight=0.5)
    aucs = [row["valid_auc"] for row in run.train()]
    logits, labels = run.logits("valid")
    assert mean_auc(labels, logits, run.data.classes) == pytest.approx(max(aucs), abs=1e-9) and min(aucs) < max(aucs) - 1e-3


def test_the_last_epoch_stays_where_the_last_is_asked_for(tiny, monkeypatch):
    from charmlib.training.callbacks import EpochRecord

    real_row, states = EpochRecord.after_epoch, []

    def row(self):  # each epoch worse than the one before
        real_row(self)
        self.rows[-1]["valid_loss"] = float(len(states))
        states.append({name: value.clone() for name, value in self.model.state_dict().items()})

    monkeypatch.setattr(EpochRecord, "after_epoch", row)
    with pytest.raises(ParameterError, match="monitor last does not; say patience: 0"):
        Run.open(tiny, monitor="last", patience=3)
    with pytest.raises(ParameterError, match="monitor last does not; say schedule: steps"):
        Run.open(tiny, monitor="last", patience=0, schedule="plateau")
    run = Run.open(tiny, monitor="last", patience=0, stage1_frozen_epochs=0, stage1_epochs=0, stage2_epochs=3, vote_weight=0.5)
    assert len(run.train()) == 3
    assert all(torch.equal(value, states[-1][name]) for name, value in run.net.state_dict().items())


@pytest.mark.parametrize("more", [{}, {"answer": "votes", "vote_weight": 0.5}, {"use_bank": False, "average": 0.9}],
                         ids=["features", "votes", "mean"])
def test_where_the_last_epoch_is_kept_no_other_is_validated(tiny, tmp_path, monkeypatch, capsys, more):
    """Training, its losses, the last epochs' figures and the scores are those of a run that validates all epochs."""
    from charmlib.viz.history import plot_history

    tiny |= {"monitor": "last", "patience": 0, "stage1_frozen_epochs": 1, "stage1_epochs": 1, "stage2_epochs": 2, **more}
    run = Run.open(tiny, run_dir=str(tmp_path / "few"))
    few, said = run.train(), capsys.readouterr().out
    figures = ["valid_loss", "valid_auc", "valid_ap"]
    assert [[math.isfinite(row[name]) for name in figures] for row in few] == [[False] * 3, [True] * 3] * 2
    assert said.count("AUC") == 2 and "nan" not in said
    assert plot_history(few, monitor="last").axes
    monkeypatch.setattr(fit, "validations", lambda plan, monitor: {phase.name: phase.epochs for phase in plan})
    whole = Run.open(tiny, run_dir=str(tmp_path / "all"))
    every = whole.train()
    assert all(math.isfinite(row["valid_loss"]) for row in every)
    assert [row["train_loss"] for row in few] == [row["train_loss"] for row in every]
    assert [few[i][name] for i in (1, 3) for name in figures] == [every[i][name] for i in (1, 3) for name in figures]
    for part in ("valid", "test"):
        np.testing.assert_array_equal(run.logits(part)[0], whole.logits(part)[0])


def test_callbacks_live_with_epochs_that_are_not_validated(tiny):
    """fastai's logger keeps its columns, and a callback that ends the training leaves a bank that votes."""
    from fastai.callback.core import Callback, CancelFitException
    from fastai.callback.progress import CSVLogger

    def end(cb):
        if cb.epoch == 1:
            raise CancelFitException

    tiny |= {"monitor": "last", "patience": 0, "stage1_frozen_epochs": 0, "stage1_epochs": 0, "stage2_epochs": 4,
             "answer": "votes", "vote_weight": 0.5}
    run = Run.open(tiny)
    run.train([CSVLogger(), Callback(after_epoch=end)])
    assert len(run.history) == 1 and run.net.bank.filled == 16 and run.net.bank.slots.any()
    table = pd.read_csv(run.folder / "fastai/history.csv")
    assert table["valid_loss"].isna().all() and table["time"].notna().all() and len(table) == 1


def test_early_stopping_counts_on_after_a_kill(tiny, monkeypatch):
    from charmlib.training.callbacks import EpochRecord

    real_row = EpochRecord.after_epoch
    losses = {("1", 1): 9, ("1", 2): 9, ("1", 3): 9, ("2", 1): 3}

    def row(self):
        real_row(self)
        if self.epoch >= self.start:
            r = self.rows[-1]
            r["valid_loss"] = float(losses.get((r["stage"], r["epoch"]), 4))

    monkeypatch.setattr(EpochRecord, "after_epoch", row)
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 5)  # stage 2 has waited one epoch of two
        Run.open(tiny, stage2_epochs=6, patience=2).train()
    history = Run.open(tiny, stage2_epochs=6, patience=2).train()
    assert [r["stage"] for r in history].count("2") == 3


def test_the_finder_is_asked_when_no_rate_is_pinned_and_its_answer_survives_a_kill(tiny, monkeypatch):
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 2)
        run = Run.open(tiny, stage1_lr=0)
        rate = run.find_lr()
        run.train()
    assert 1e-6 < rate < 1
    again = Run.open(tiny, stage1_lr=0)
    assert again.find_lr() == rate


def test_a_run_made_by_hand_is_found_from_anywhere_and_keeps_the_finders_rate(tiny, phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(phantoms.parent)
    run = Run.open(tiny, data_root=phantoms.name, stage1_lr=0, stage1_epochs=1, stage2_epochs=1)
    run.train()
    rate = run.find_lr()
    monkeypatch.chdir(tmp_path)
    loaded = Run.load("run")
    assert loaded.score()["stage1_lr"] == rate
    finish(loaded.folder)
    monkeypatch.setattr(Run, "learner", lambda *a: pytest.fail("the finder ran again"))
    again = Run.open(tiny, stage1_lr=0, stage1_epochs=1, stage2_epochs=1)
    assert again.find_lr() == rate


def test_a_run_in_a_read_only_folder_is_copied_first(quiet, tmp_path, monkeypatch):
    """As another notebook's output is on Kaggle."""
    from charmlib.training import run as module

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.os, "access", lambda path, mode: not str(path).startswith(str(quiet)))
    before = sorted(quiet.iterdir())
    run = Run.load(quiet)
    run.score()
    assert run.folder.path.parent == tmp_path / "runs" and (run.folder / "predictions.npz").is_file()
    assert sorted(quiet.iterdir()) == before and Run.load(quiet).folder.path == run.folder.path
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [run.folder.name]


def test_two_read_only_runs_of_one_name_have_a_copy_each(quiet, tmp_path, monkeypatch):
    from charmlib.training import run as module

    first, second = (shutil.copytree(quiet, tmp_path / f"input/{place}/charm") for place in "ab")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.os, "access", lambda path, mode: "input" not in Path(path).parts)
    paths = [Run.load(folder).folder.path for folder in (first, second, first)]
    (second / "log.txt").write_text("trained again\n")
    paths.append(Run.load(second).folder.path)
    assert paths[0] == paths[2] and len(set(paths)) == 3
    assert (paths[3] / "log.txt").read_text() == "trained again\n" != (paths[1] / "log.txt").read_text()


def test_settings_that_differ_are_refused_by_name(quiet, tiny, tmp_path, phantoms, monkeypatch):
    from tests.conftest import TINY

    copy = tmp_path / "copy"
    shutil.copytree(quiet, copy)
    mine = {**TINY, "data_root": str(phantoms), "run_dir": str(copy)}
    before = (copy / "params.yaml").read_text()
    with pytest.raises(ValueError, match="k 2 there, 3 here"):
        Run.open(mine, k=3).train()
    assert (copy / "params.yaml").read_text() == before  # a refused start loses nothing
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 1)
        Run.open(tiny).train()
    with pytest.raises(ValueError, match=r"threshold 0\.2 there, 0\.1 here"):
        Run.open(tiny, threshold=0.1).train()
    before = (copy / "model.safetensors").stat().st_mtime_ns
    Run.open(mine).train()  # the same settings: nothing to do
    assert (copy / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ParameterError, match="Did you mean 'threshold'"):
        Run.open(tiny, treshold=0.1)


def test_a_damaged_resume_file_is_named(tiny):

    run = Run.open(tiny)
    Path(tiny["run_dir"]).mkdir()
    Path(tiny["run_dir"], "resume.pt").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"resume\.pt is damaged.*resume=False"):
        run.train()


def test_any_flipped_bit_of_a_resume_file_is_found(tmp_path):
    path, generator = tmp_path / "resume.pt", np.random.default_rng(0)
    fit.save_resume(path, {"format": fit.FORMAT, "model": {"w": torch.randn(300)}, "history": [{"lr": np.float64(0.5)}]})
    good = path.read_bytes()
    assert torch.load(path, weights_only=True)["history"] == load_resume(path)["history"] == [{"lr": 0.5}]
    for at in (*generator.integers(0, len(good), 60), len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << int(generator.integers(8))]) + good[at + 1:])
        with pytest.raises(Damaged, match=r"resume\.pt is damaged"):
            load_resume(path)
    for content in (b"", good[:-1], good + b"0", good[:1000], b"x" * 40, b"PK\3\4"):
        path.write_bytes(content)
        with pytest.raises(Damaged, match=r"resume\.pt is damaged.*delete it"):
            load_resume(path)


def test_a_grids_cell_sets_a_damaged_resume_file_aside_and_starts_again(tiny, quiet, monkeypatch, capsys):
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 2)
        Run.open(tiny).train()
    file = Path(tiny["run_dir"], "resume.pt")
    file.write_bytes(half := file.read_bytes()[:-100])
    monkeypatch.setenv("CHARM_CELL", "k1")
    monkeypatch.setattr("charmlib.session.die_with_parent", lambda parent: None)
    Run.open(tiny).train()
    assert "resume.pt.damaged, and the cell starts again" in capsys.readouterr().out
    assert file.with_name("resume.pt.damaged").read_bytes() == half
    same_run(Path(tiny["run_dir"]), quiet)


@pytest.mark.parametrize(("change", "says"), [
    ({"hidden": 10**12}, "does not fit the network"), ({"hidden": 10**18}, r"model\.json is damaged"),
    ({"bank_size": 10**9}, "outside 1 to 65536"), ({"k": "2"}, "'k' is '2', wanted int"), ({"new": 1}, "unknown parameter"),
    ({"arch": "timm:no_such"}, "no_such"), ({"system": "os"}, "'os' is none of"), ({"dropout": 7.0}, "outside")])
def test_a_card_from_elsewhere_is_checked_before_anything_is_built(quiet, tmp_path, change, says):
    import resource

    folder = shutil.copytree(quiet, tmp_path / "x")
    card = json.loads((folder / "model.json").read_text())
    edit(folder / "model.json", params={**card["params"], **change})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Damaged, match=says):
        load_model(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", bytes(range(128, 256)) * 4, b"PK\3\4", b"\x80\x04N."])
def test_weights_that_are_none_are_named(quiet, tmp_path, content):
    folder = shutil.copytree(quiet, tmp_path / "x")
    (folder / "model.safetensors").write_bytes(content)
    for digest in ("", hashlib.sha256(content).hexdigest()):  # also where the card was made to fit
        edit(folder / "model.json", sha256=digest)
        with pytest.raises(Damaged, match=r"model\.safetensors is damaged"):
            load_model(folder)


def test_scoring_the_whole_test_part(quiet, tmp_path, phantoms):
    from sklearn.metrics import roc_auc_score

    folder = tmp_path / "scored"
    shutil.copytree(quiet, folder)
    run = Run.load(folder)
    metrics = run.score()
    p = RunFolder(folder).test
    assert set(p.ids) == set((phantoms / "test_list.txt").read_text().split()) and p.classes == run.data.classes
    with np.load(folder / "predictions.npz", allow_pickle=False) as file:
        assert set(file.files) == {"classes", "normal_class", *(f"{a}_{b}" for a in ("valid", "test") for b in (
            "ids", "patients", "labels", "logits", "view", "sex", "age"))}
    defined = [i for i in range(14) if 0 < p.labels[:, i].sum() < len(p.labels)]
    want = np.mean([roc_auc_score(p.labels[:, i], p.logits[:, i]) for i in defined])
    assert metrics["test"]["mean_auc"] == pytest.approx(want, abs=1e-12)
    # the order of the ids is the order of the rows: score one image alone
    with torch.no_grad():
        x, _ = run.dataloaders().test_dl([run.data.index.frame.set_index("id").loc[p.ids[3], "path"]]).one_batch()
        alone = run.net(x.as_subclass(torch.Tensor))[0].numpy()
    np.testing.assert_allclose(alone, p.logits[3], rtol=1e-3, atol=1e-4)
    assert not (folder / "metrics.json").exists()
    finish(folder)
    kept = RunFolder(folder).metrics
    for key in ("format", "cell", "hash", "params", "split", "classes", "valid", "test", "bank", "seconds", "peak_memory_mb",
                "device", "versions", "quick_check"):
        assert key in kept, key
    assert kept["split"]["test"]["patients"] > 1 and kept["data"]["drawn"] and not (folder / "resume.pt").exists()
    assert 0 < run.quick_check(40) < 1


def test_thresholds_and_temperature_are_those_of_the_validation_part(quiet, tmp_path):
    """Those that training chose, and those that scoring uses."""
    run = Run.load(shutil.copytree(quiet, tmp_path / "scored"))
    card, test = json.loads((run.folder / "model.json").read_text()), run.score()["test"]
    assert {point: {name: row["threshold"] for name, row in rows.items()} for point, rows in test["operating"].items()} == {
        point: {name: value for name, value in of.items() if value is not None} for point, of in card["thresholds"].items()}
    assert test["calibration"]["scaled"]["temperature"] == card["temperature"]
    for part in ("valid", "test"):
        logits, labels = run.logits(part)
        chosen = choose_thresholds(labels, logits, run.data.classes), fit_temperature(labels, logits)
        assert [a == b for a, b in zip(chosen, (card["thresholds"], card["temperature"]))] == [part == "valid"] * 2


def test_loading_is_strict_and_loud(quiet, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "x"
    shutil.copytree(quiet, folder)
    state = load_file(folder / "model.safetensors")
    state["head.9.weight"] = state.pop("head.4.weight")
    save_file(state, folder / "model.safetensors")
    with pytest.raises(Damaged, match=r"model\.safetensors is damaged.*sha256"):
        load_model(folder)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder / "model.json", sha256=digest)
    with pytest.raises(ValueError, match=r"2 differences.*head\.4\.weight is missing"):
        load_model(folder)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="Train first"):
        Run.load(tmp_path)
    with pytest.raises(ValueError, match="another k"):
        Run.load(quiet, k=3)


def test_a_checkpoint_meets_only_data_with_its_labels_and_split(quiet, tmp_path):
    folder = tmp_path / "x"
    shutil.copytree(quiet, folder)
    card = json.loads((folder / "model.json").read_text())
    card["classes"][:2] = card["classes"][1::-1]
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="class 0 is 'Cardiomegaly' here and 'Atelectasis' there"):
        Run.load(folder)
    card["classes"][:2] = card["classes"][1::-1]
    card["params"]["split_hash"] = "0" * 16
    (folder / "model.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match="would mix training and test"):
        Run.load(folder)


def test_resume_files_load_without_pickles_and_history_counts_the_bank(tiny, monkeypatch):

    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 4)
        Run.open(tiny).train()
    state = load_resume(Path(tiny["run_dir"]) / "resume.pt")
    assert state["phase"] == "stage2" and state["epochs"] == 1
    assert "bank.slots" in state["model"] and state["model"]["momentum.updates"].item() > 0
    rows = state["history"]
    assert all(0 <= r["bank_accepted"] <= 1 and 0 <= r["bank_filled"] <= 16 for r in rows)


def test_what_fills_the_bank_is_counted_epoch_by_epoch(quiet, tmp_path):
    """Each row counts the labels of the slots as they were then; the last bank is the one of the best epoch."""
    run = Run.load(quiet)
    rows, history = pd.read_csv(quiet / "bank_history.csv"), pd.read_csv(quiet / "history.csv")
    assert list(rows) == ["stage", "epoch", "filled", *run.data.classes, "no_finding"]
    assert rows["filled"].tolist() == history["bank_filled"].tolist() and len(rows) == 5
    assert (rows.loc[rows["stage"] == 1, "no_finding"] == 0).all()  # stage 1 sees images with a finding only
    frame = run.data.index.frame.set_index("id")
    table, kept = run.bank.table(), pd.read_csv(quiet / "bank.csv", dtype={"patient": str})
    assert list(kept) == ["slot", "image", "patient", "step", "score", *run.data.classes]
    assert (kept["image"] == table["image"]).all() and set(kept["image"]) <= set(run.data.split.frame(run.data.index)
                                                                             .query("part == 'train'")["id"])
    truth = frame.loc[kept["image"]]
    assert (truth[list(run.data.classes)].to_numpy() == kept[list(run.data.classes)].to_numpy()).all()
    assert (truth["patient"].to_numpy() == kept["patient"].to_numpy()).all()
    best = rows.loc[history[history["stage"] == 2]["valid_loss"].idxmin()]
    assert (kept[list(run.data.classes)].sum() == best[list(run.data.classes)]).all()
    assert (table["labels"] == "No Finding").sum() == best["no_finding"]
    run.params["use_bank"], run.net.bank = False, None
    with pytest.raises(ValueError, match="no bank"):
        run.bank.table()


def test_a_new_start_removes_what_the_bank_left(tiny):
    Run.open(tiny).train()
    Run.open(tiny, resume=False, use_bank=False, stage1_epochs=1, stage2_epochs=1).train()
    assert not {"bank.csv", "bank_history.csv"} & {p.name for p in Path(tiny["run_dir"]).iterdir()}


def test_own_classes_end_to_end(phantoms, tmp_path, tiny):
    """A table of one's own with holes in it trains, scores and names the class that has no positives."""
    from charmlib.data.index import read_index

    index = read_index(phantoms)
    table = index.frame[["id", "patient"]].assign(Big=index.frame["Effusion"], Small=index.frame["Infiltration"], Never=0.0)
    table.loc[::7, "Small"] = np.nan
    table.to_csv(tmp_path / "own.csv", index=False)
    run = Run.open(tiny, classes="own", csv=str(tmp_path / "own.csv"), split="patient", stage1_epochs=1, stage2_epochs=1)
    run.train()
    with pytest.warns(UserWarning, match="Never"):
        metrics = run.score()
    assert metrics["test"]["undefined"] == ["Never"] and np.isfinite(metrics["test"]["mean_auc"])
    assert np.isnan(RunFolder(run.folder).test.labels).any()


def test_the_last_bias_starts_at_the_prevalence(tiny):
    """``adjust`` of a class that 10 of 100 known images have is log(10.5 / 90.5); with the last weights at 0 the probabilities
    are the prevalence, and a half is half the log-odds."""
    runs = {adjust: Run.open(tiny, adjust=adjust) for adjust in (0.0, 0.5, 1.0)}
    labels = runs[1.0].data.labels[runs[1.0].data.rows("train")]
    share = (np.nansum(labels, 0) + 0.5) / ((~np.isnan(labels)).sum(0) + 1)
    start = {adjust: run.net.head[-1].bias.detach().numpy() for adjust, run in runs.items()}
    np.testing.assert_allclose(1 / (1 + np.exp(-start[1.0])), share, rtol=1e-5)
    np.testing.assert_allclose(start[0.5], start[1.0] / 2, rtol=1e-6)
    assert np.abs(start[0.0] - start[1.0]).min() > 0.1
    # with the last weights at 0 the first loss is the entropy of the prevalence
    run, known = runs[1.0], labels[~np.isnan(labels).any(1)]
    weight = run.net.head[-1].weight.detach().clone()
    torch.nn.init.zeros_(run.net.head[-1].weight)
    run.net.bank.filled.zero_(), run.net.train(False)
    logits = run.net(torch.zeros(1, 3, 32, 32)).expand(len(known), -1)
    had = known.mean(0)
    entropy = -(had * np.log(share) + (1 - had) * np.log(1 - share)).mean()
    assert torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(known)).item() == pytest.approx(
        entropy, rel=1e-5)
    with torch.no_grad():
        run.net.head[-1].weight.copy_(weight)
    others = [{k: v for k, v in run.net.state_dict().items() if k != "head.4.bias"} for run in runs.values()]
    assert all(torch.equal(value, others[0][name]) for name, value in others[2].items())
