"""Training on all images without a validation part: nothing is chosen, then or later."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from charmlib import Run, charm_learner
from charmlib.evaluation.runs import RunFolder, finish
from charmlib.evaluation.score import evaluate_run, thresholds_at
from charmlib.params import ParameterError
from charmlib.training.checkpoint import load_model, load_resume
from charmlib.training.predict import predict
from charmlib.viz.history import plot_history
from tests.conftest import TINY
from tests.training.test_run import Killed, killed_after

ONE_STAGE = {**TINY, "valid_fraction": 0.0, "patience": 0, "stage1_images": "all", "stage1_frozen_epochs": 1,
             "stage1_epochs": 2, "stage2_epochs": 0, "use_momentum": False, "use_attention": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """A one-stage run, trained, scored and finished."""
    folder = tmp_path_factory.mktemp("one_stage") / "run"
    run = Run.open({**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(folder)})
    run.train()
    run.score()
    finish(folder)
    return folder


def test_it_takes_all_images_and_ends_with_its_last_epoch(trained, phantoms, tmp_path, monkeypatch, capsys):
    from charmlib.training.callbacks import KeepProgress

    states, real = [], KeepProgress.after_epoch

    def keep(self):
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        real(self)

    monkeypatch.setattr(KeepProgress, "after_epoch", keep)
    run = Run.open({**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(tmp_path / "run")})
    dls = run.dataloaders()
    np.testing.assert_array_equal(dls.train.dataset.rows, run.data.rows("train"))
    assert set(run.data.index.frame["id"][run.data.rows("train")]) == set((phantoms / "train_val_list.txt").read_text().split())
    assert len(dls.valid.dataset) == 0 and list(dls.valid) == []
    history = run.train()
    assert [(r["stage"], r["epoch"]) for r in history] == [("1", 1), ("1", 2), ("1", 3)]
    assert np.isnan([r["valid_loss"] for r in history]).all() and np.isnan([r["valid_auc"] for r in history]).all()
    for name, value in run.net.state_dict().items():
        assert torch.equal(value, states[-1][name]), name
        assert torch.equal(value, load_model(trained)[0].state_dict()[name]), name
    said = capsys.readouterr().out
    assert "no validation part: nothing is chosen" in said and "stage 1 epoch 3/3" in said and "nan" not in said
    card = RunFolder(run.folder).card
    assert card["thresholds"] == {} and card["temperature"] is None


@pytest.mark.slow
@pytest.mark.parametrize("saves", [1, 2, 3])
def test_a_stopped_one_stage_run_ends_in_the_same_bits(trained, phantoms, tmp_path, monkeypatch, saves):
    mine = {**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(tmp_path / "run")}
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, saves)
        Run.open(mine).train()
    assert len(load_resume(tmp_path / "run/resume.pt")["history"]) == saves
    torch.manual_seed(12345)
    run = Run.open(mine)
    run.train()
    for name, value in load_model(trained)[0].state_dict().items():
        assert torch.equal(run.net.state_dict()[name], value), name
    ours, theirs = (pd.read_csv(f / "history.csv").drop(columns="seconds") for f in (run.folder, trained))
    pd.testing.assert_frame_equal(ours, theirs)


def test_two_stages_work_without_validation_too(phantoms, tmp_path):
    run = Run.open({**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(tmp_path / "run"), "stage1_images": "findings",
                    "stage1_frozen_epochs": 0, "stage1_epochs": 1, "stage2_epochs": 1})
    assert len(run.dataloaders().train.dataset) == run.data.index.has_finding()[run.data.rows("train")].sum()
    assert [r["stage"] for r in run.train()] == ["1", "2"]


def test_weights_that_are_not_finite_are_an_error_and_not_a_model(phantoms, tmp_path, monkeypatch):
    """No validation figure would show them."""
    from charmlib.training.callbacks import EpochRecord

    real = EpochRecord.after_epoch

    def spoil(self):
        real(self)
        if self.epoch == 1:
            next(self.model.head.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(EpochRecord, "after_epoch", spoil)
    run = Run.open({**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(tmp_path / "run"), "stage1_frozen_epochs": 0,
                    "stage1_epochs": 3})
    with pytest.raises(ValueError, match=r"epoch 2 ended with weights that are not finite.*Lower the learning rate"):
        run.train()
    assert len(load_resume(run.folder / "resume.pt")["history"]) == 1 and not (run.folder / "model.json").exists()


def test_the_finder_and_early_stopping(phantoms, tmp_path):
    mine = {**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(tmp_path / "run")}
    assert 1e-6 < Run.open(mine, stage1_lr=0).find_lr() < 1
    with pytest.raises(ParameterError, match="patience: 0"):
        Run.open(mine, patience=3)


def test_the_note_on_the_warm_up_counts_the_steps_of_all_images(phantoms, tmp_path):
    steps = {}
    for images in ("findings", "all"):
        run = Run.open({**ONE_STAGE, "data_root": str(phantoms), "run_dir": str(tmp_path / images), "stage1_images": images,
                        "use_momentum": True, "stage1_epochs": 0})
        run.train()
        said = (run.folder / "log.txt").read_text()
        steps[images] = int(said.split("in at most ")[1].split()[0])
        assert steps[images] == len(run.dataloaders().train)
    assert steps["findings"] < steps["all"]


def test_a_plain_fastai_learner_trains_without_validation(phantoms, tmp_path):
    from charmlib.data.dataset import open_dataset
    from charmlib.data.loaders import chest_dataloaders
    from tests.training.conftest import HALF, NET

    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0)
    learn = charm_learner(chest_dataloaders(data, bs=64, mean=HALF, std=HALF, path=tmp_path), path=tmp_path, **NET)
    learn.fit_one_cycle(1, 1e-3)
    assert learn.recorder.final_record[1] is None  # no validation loss, and no invented one


def test_it_is_scored_on_the_test_part_alone(trained):
    metrics, valid = RunFolder(trained).metrics, RunFolder(trained).valid
    assert metrics["valid"] is None and metrics["split"]["valid"]["images"] == 0
    assert metrics["test"]["operating"] == {} and list(metrics["test"]["calibration"]) == ["as_trained"]
    assert valid.ids.shape == (0,) and valid.labels.shape == valid.logits.shape == (0, 14)
    assert len(RunFolder(trained).test.ids) == metrics["split"]["test"]["images"] > 0
    assert json.loads((trained / "metrics.json").read_text())["split"]["valid"]["positive_share"] is None


@pytest.mark.parametrize("card", [True, False])
def test_nothing_is_chosen_later(trained, tmp_path, card):
    """Also where model.json was not brought along."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    if not card:
        (folder / "model.json").unlink()
    for point in ("youden", "sensitivity_0.80"):
        assert thresholds_at(folder, point) == {}
        again, _ = evaluate_run(folder, points=[point])
        assert again["test"]["operating"] == {} and "scaled" not in again["test"]["calibration"] and again["valid"] is None
    with pytest.raises(ValueError, match="unknown operating point 'yuden'"):
        evaluate_run(folder, points=["yuden"])


def test_new_images_get_probabilities_and_no_calls(trained, phantoms, tmp_path):
    images = sorted((phantoms / "images_001/images").iterdir())[:3]
    bare = shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("predictions.npz"))
    table = predict(bare, images)
    assert len(table) == 3 and table["p_Hernia"].between(0, 1).all() and table["point"].isna().all()
    assert not any(column.startswith("call_") for column in table)
    with pytest.raises(ValueError, match="no temperature"):
        predict(trained, images, calibrated=True)


def test_its_history_is_drawn_without_validation(trained):
    figure = plot_history(pd.read_csv(Path(trained) / "history.csv"))
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ["loss (one per stage)", "share of features stored in the bank"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["train loss"]
