"""Several processes train what one trains, on the CPU: each group is forked from a server that has imported all."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from safetensors.torch import load_file
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import nn

from charmlib.param_sources import load_params
from charmlib.training import cards
from charmlib.training.no_wait import HalfPrecision
from charmlib.training.run import Run
from tests.conftest import TINY

NO_BATCH_NORMS = {**TINY, "arch": "timm:convnextv2_atto", "use_momentum": False, "use_attention": False, "stage1_epochs": 0,
                  "stage1_images": "all", "stage1_batch": 32, "stage2_batch": 32, "limit": 100, "augment": "standard"}
VOTES = {**NO_BATCH_NORMS, "head": "csra", "bank_size": 40, "average": 0.9, "schedule": "plateau"}
# 25 images are 8, 8 and 9; linear has dropout
FEATURES = {**NO_BATCH_NORMS, "head": "linear", "answer": "features", "use_momentum": True, "strategy": "reservoir",
            "bank_size": 20, "drop_path": 0.2, "stage1_batch": 25, "clip_norm": 0.5, "class_weight": "sqrt", "tta": "flip"}
PUBLISHED = {"answer": "features", "retrieval": "published", "strategy": "rarity", "rule": "published", "head": "linear"}
SMALLEST = {"image_size": 32, "input_size": 0, "crop": 0, "limit": 40, "arch": "timm:test_resnet", "weights": "none",
            "norm": "half", "contrast": "none", "drop_path": 0, "bank_size": 16, "phase_batch": "", "stage1_batch": 16,
            "stage2_batch": 16, "resume": False, "split": "official", "valid_fraction": 0.2, "stage1_lr": 1e-3,
            "vote_weight": 0.5,
            **{f"{name}_epochs": 1 for name in ("stage1_frozen", "stage1", "stage2", "global", "local", "fusion")}}
PRESETS = ("charm", "plain", "published", "memaug/baseline_resnet50", "memaug/memory_hybrid_effv2s", "longtail_standard",
           "longtail_csra", "ag_cnn", "dual_path", "vgg16_lka", "vgg16_cbam")


@pytest.fixture(scope="module")
def together():
    """``together(n, task, *args)`` runs a function of this module in n processes, as torchrun would, and returns exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])

    def run(n: int, task, *args) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = [context.Process(target=_member, args=(rank, n, port, task, *args)) for rank in range(n)]
        for process in group:
            process.start()
        for process in group:
            process.join(200)
        return [process.exitcode for process in group]

    return run


def _member(rank: int, n: int, port: int, task, *args) -> None:
    os.environ |= {cards.RUN: "test", "WORLD_SIZE": str(n), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with cards.as_one():
        task(*args)


def train(params: dict, cbs=(), score: bool = False) -> Run:
    run = Run.open(params)
    run.train(cbs)
    if score:
        run.score()
    return run


def accumulate(params: dict) -> None:
    train(params, GradientAccumulation(64))


@pytest.fixture(scope="module")
def settings(phantoms, tmp_path_factory):
    """Parameters in a new folder of a name."""
    folder = tmp_path_factory.mktemp("cards")
    return lambda name, params, **changes: {**params, "data_root": str(phantoms), "run_dir": str(folder / name), **changes}


def differences(one: dict, other: dict) -> tuple[float, float]:
    """The largest difference of a figure in the history, and of a weight or slot."""
    histories = [pd.read_csv(Path(p["run_dir"], "history.csv")).drop(columns="seconds") for p in (one, other)]
    assert histories[0].shape == histories[1].shape
    weights = [load_file(Path(p["run_dir"], "model.safetensors")) for p in (one, other)]
    return (histories[0] - histories[1]).abs().max().max(), \
        max((a.double() - b.double()).abs().max().item() for a, b in zip(*(w.values() for w in weights)) if a.numel())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "params", "groups"), [("votes", VOTES, (2, 3)), ("features", FEATURES, (3,)),
                                                        ("published", {**FEATURES, **PUBLISHED, "tta": "none"}, (2,))])
def test_several_processes_train_what_one_trains(together, settings, name, params, groups):
    one, scores = settings(f"{name}1", params), name == "features"
    assert together(1, train, one, (), scores) == [0]
    for n in groups:
        several = settings(f"{name}{n}", params)
        assert together(n, train, several, (), scores) == [0] * n
        figure, weight = differences(one, several)
        assert figure < 1e-5 and weight < 1e-5, (n, figure, weight)
        banks = [pd.read_csv(Path(p["run_dir"], "bank.csv")) for p in (one, several)]
        assert len(banks[0]) == params["bank_size"]
        pd.testing.assert_frame_equal(*banks, atol=1e-5)
        files = [set(os.listdir(p["run_dir"])) for p in (one, several)]
        assert files[0] == files[1]
        if scores:
            found = [np.load(Path(p["run_dir"], "predictions.npz")) for p in (one, several)]
            assert (found[0]["test_ids"] == found[1]["test_ids"]).all()
            np.testing.assert_allclose(found[0]["test_logits"], found[1]["test_logits"], atol=1e-5)


def test_a_step_of_several_batches_is_that_of_one_process(together, settings):
    """With SGD, whose steps grow with the gradient; those of AdamW do not."""
    params = {**VOTES, "use_bank": False, "stage1_frozen_epochs": 0, "optimizer": "sgd", "stage2_lr_max": 1e-2}
    one, two = (settings(f"accumulate{n}", params) for n in (1, 2))
    assert together(1, accumulate, one) == [0] and together(2, accumulate, two) == [0, 0]
    assert max(differences(one, two)) < 1e-5


def score_all(run_dir: str, out: str) -> None:
    run = Run.load(run_dir)
    rows = np.arange(101)
    logits, labels = run.logits("test", rows)
    np.savez(f"{out}_{cards.size()}_{cards.rank()}.npz", logits=logits, labels=labels)


def test_each_of_101_images_is_scored_once_by_four_processes(together, settings, tmp_path):
    params = settings("votes1", VOTES)
    if not Path(params["run_dir"], "model.json").is_file():
        assert together(1, train, params) == [0]
    for n in (1, 4):
        assert together(n, score_all, params["run_dir"], str(tmp_path / "scores")) == [0] * n
    alone = np.load(tmp_path / "scores_1_0.npz")
    assert alone["logits"].shape == (101, 14)
    for rank in range(4):  # the batches are those of one process, and so are the bits
        for name, values in np.load(tmp_path / f"scores_4_{rank}.npz").items():
            np.testing.assert_array_equal(values, alone[name])


class Ends(Callback):
    """Ends this process at the start of an epoch of a phase."""

    def __init__(self, phase: str, epoch: int):
        self.phase, self.at = phase, epoch

    def before_epoch(self):
        if (self.learn.seed_epoch.phase, self.epoch) == (self.phase, self.at):
            raise SystemExit(7)


def test_a_lost_neighbour_is_named_and_other_errors_pass(monkeypatch):
    monkeypatch.setattr(cards, "size", lambda: 2)
    with pytest.raises(ChildProcessError, match="process 0 of 2 .*, because another one has ended"), cards.as_one():
        raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    with pytest.raises(RuntimeError, match="size mismatch"), cards.as_one():
        raise RuntimeError("size mismatch")


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.skipif(sys.platform != "linux", reason="that nothing runs on is promised on Linux only")
def test_a_killed_process_ends_all_and_one_process_goes_on(together, settings, tmp_path):
    from charmlib.params import resolve
    from charmlib.training.checkpoint import load_resume

    params = settings("killed", TINY, stage1_epochs=8, stage2_epochs=1, patience=0, processes=2)
    file = tmp_path / "killed.yaml"
    file.write_text("\n".join(f"{name}: {value}" for name, value in params.items() if name != "run_dir"))
    with subprocess.Popen([sys.executable, "-m", "charmlib", "train", str(file), "--out", params["run_dir"]], text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
        history, deadline = Path(params["run_dir"], "history.csv"), time.monotonic() + 120
        while not history.is_file() or len(history.read_text().splitlines()) < 4:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        family = psutil.Process(child.pid).children(recursive=True)
        workers = [p for p in family if "charmlib" in p.cmdline() and "torch.distributed.run" not in p.cmdline()]
        assert len(workers) == 2
        second = next(p for p in workers if p.environ()["RANK"] == "1")
        second.send_signal(signal.SIGKILL)
        output = child.stdout.read()
    assert child.returncode == 2 and "Signal 9 (SIGKILL)" in output  # torchrun may end process 0 before it notices
    assert "the training in 2 processes has failed: the lines above say why, and the same command goes on" in output
    with suppress(psutil.NoSuchProcess):
        assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    state = load_resume(Path(params["run_dir"], "resume.pt"))
    assert state["phase"] == "stage1" and 0 < state["epochs"] < 8
    stopped = settings("stopped", resolve(params), processes=1, run_dir=str(Path(params["run_dir"]).with_name("stopped")))
    assert together(2, train, stopped, (Ends("stage1", state["epochs"]),)) == [7, 7]
    killed = {**resolve(params), "processes": 1}
    for run in (killed, stopped):
        assert together(1, train, run) == [0]
    assert differences(killed, stopped) == (0.0, 0.0)


class Rows(Callback):
    """Another validation loss in each process, before the first one's counts for all."""

    order = 54

    def after_epoch(self):
        self.recorder.log[2] = self.recorder.log[2] + (self.epoch if cards.rank() == 0 else -self.epoch)


class Overflows(Callback):
    """In the second step, the images of the last process overflow."""

    order = 201

    def before_fit(self):
        self.steps, self.skipped = 0, []
        self.learn.scaler.load_state_dict(self.learn.scaler.state_dict() | {"scale": 2.0})  # with which nothing else overflows

    def before_batch(self):
        if self.training and self.steps == 1 and cards.rank() == cards.size() - 1:
            self.learn.xb = (self.xb[0] * float("inf"),)

    def after_step(self):
        self.steps += 1
        self.skipped.append(self.opt.skipped.item())


def presets(all_params: list[dict]) -> None:
    for params in all_params:
        run = train(params)
        assert all(np.isfinite(row["train_loss"]) for row in run.history), params["run_dir"]
        state = {name: value.clone() for name, value in run.net.state_dict().items()}
        assert all(torch.equal(value, other) for value, other in zip(state.values(), cards.same([*state.values()])))


def decide(early: dict, half: dict) -> None:
    run = train(early, [Rows()])
    assert len(run.history) == 2 < early["stage2_epochs"]  # alone, the second process would go on
    seen, scaled = Overflows(), Run.open(half)
    learner = scaled.learner()
    learner.add_cb(HalfPrecision())
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 1e-3, cbs=seen)
    assert seen.skipped == [0, 1, 0] and seen.skipped == cards.same(seen.skipped)
    weights = [*scaled.net.state_dict().values()]
    assert all(torch.equal(value, other) and value.isfinite().all() for value, other in zip(weights, cards.same(weights)))


@pytest.mark.slow
def test_every_preset_trains_in_two_processes_that_stay_equal(together, settings):
    chosen = [settings(f"preset{i}", {**load_params(f"params/{name}.yaml"), **SMALLEST}) for i, name in enumerate(PRESETS)]
    assert together(2, presets, chosen) == [0, 0]


def test_stopping_and_the_verdict_of_a_scaler_are_decided_once(together, settings):
    plain = {**NO_BATCH_NORMS, "use_bank": False, "stage1_frozen_epochs": 0}
    early = settings("early", plain, stage2_epochs=6, patience=1)
    assert together(2, decide, early, settings("half", {**plain, "head": "csra"})) == [0, 0]


def refuse(params: dict) -> None:
    with pytest.raises(ValueError, match="a batch of 3 is too small for 2 processes, which need two images each"):
        train({**params, "stage1_batch": 3})


def test_what_cannot_be_is_refused(together, settings, monkeypatch):
    params = settings("refused", TINY)
    assert together(2, refuse, params) == [0, 0]
    run = Run.open({**params, "processes": 2})
    with pytest.raises(ValueError, match="callbacks reach no other process; say processes: 1"):
        run.train(Ends("", 0))
    monkeypatch.setenv("CHARM_CELL", "cell")
    with pytest.raises(ValueError, match="a grid gives each card a cell"):
        run.train()


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(3), nn.BatchNorm2d(3), BatchNormAct2d(3)])
def test_a_synchronised_batch_norm_shares_weights_statistics_and_activation(norm):
    """Its training needs GPUs; in eval mode, and for one process, it computes what it stands for."""
    x = torch.randn(5, 3, *[4] * (2 * (not isinstance(norm, nn.BatchNorm1d))))
    norm(x)
    twin = convert_sync_batchnorm(norm)
    assert twin.weight is norm.weight and twin.running_mean is norm.running_mean
    torch.testing.assert_close(cards.synced(twin, norm.eval(), x), norm(x), rtol=0, atol=0)
