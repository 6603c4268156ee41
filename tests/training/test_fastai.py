"""fastai's own calls on the Learner of a run."""

import importlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.interpret import Interpretation
from PIL import Image

from charmlib import Run
from tests.training.test_run import Killed, killed_after, quiet, same_run  # noqa: F401  (quiet is a fixture)


@pytest.fixture
def run(tiny):
    return Run.open(tiny)


@pytest.fixture
def learn(run):
    import matplotlib.pyplot as plt

    learn = run.learner()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
        yield learn
    plt.close("all")


def test_interpretation_finds_the_images_of_the_largest_losses(run, learn):
    _, labels, losses = learn.get_preds(with_loss=True)
    assert losses.shape == (len(labels),) and losses.min() > 0
    found = Interpretation.from_learner(learn)
    largest, where, rows = found.top_losses(4, items=True)
    assert torch.equal(largest, losses.sort(descending=True).values[:4])
    assert torch.equal(labels[where].as_subclass(torch.Tensor), torch.from_numpy(run.data.labels[rows]))
    _, probabilities, again, _, _ = found[where]
    assert torch.equal(again, labels[where])
    assert torch.allclose(learn.loss_func.terms(torch.logit(probabilities), again).mean(1), largest, atol=1e-5)
    found.plot_top_losses(4)
    found.show_results([0, 1])


def test_predictions_have_the_names_of_classes(run, learn):
    path = run.data.index.frame["path"].iloc[int(run.data.rows("test")[0])]
    learn.model.head[-1].bias.data[2] += 20
    names, calls, probabilities = learn.predict(path)
    assert list(names) == [c for c, call in zip(run.data.classes, calls) if call] and "Effusion" in names
    assert probabilities.shape == (14,) and torch.equal(calls, probabilities > 0.5)
    for image in (str(path), Path(path).read_bytes(), Image.open(path), np.asarray(Image.open(path)),
                  torch.from_numpy(np.asarray(Image.open(path)).copy())):
        assert torch.equal(learn.predict(image)[2], probabilities), type(image)
    learn.model.head[-1].bias.data[:] = -20
    assert list(learn.predict(path)[0]) == []


def test_new_images_are_read_as_those_of_the_data_set_were(run, tmp_path):
    deep = np.linspace(900, 1500, 40 * 60).reshape(40, 60).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    images = run.data.images
    images.manifest.update(aspect="pad", contrast="clahe", scale=(1000, 1200))
    from charmlib.data.images import read_grey

    try:
        wanted = read_grey(tmp_path / "deep.png", 32, "pad", contrast="clahe", scale=(1000, 1200))
    except ImportError as error:
        pytest.skip(str(error))
    for image in (tmp_path / "deep.png", Image.fromarray(deep)):
        part = run.dataloaders().test_dl([image]).dataset
        assert (part.images[0] == wanted).all()


def test_tta_averages_augmented_views(learn):
    plain, labels = learn.get_preds()
    torch.manual_seed(0)
    averaged, again = learn.tta(n=2)
    assert averaged.shape == plain.shape and torch.equal(labels, again)
    assert not torch.allclose(averaged, plain, atol=1e-6) and torch.allclose(averaged, plain, atol=0.5)
    assert (averaged - plain).abs().mean() < 0.1
    assert torch.equal(learn.get_preds()[0], plain)  # augmentation is off again
    assert torch.equal(learn.tta(n=2, beta=1)[0], plain)


def test_batches_and_results_are_drawn_and_given(run, learn):
    learn.dls.show_batch(max_n=4)
    learn.show_results(max_n=4)
    learn.show_results(dl=learn.dls.test_dl([run.data.index.frame["path"].iloc[0]]))
    x, y = learn.dls.valid.one_batch()
    _, _, samples, calls = learn.dls.valid.show_results((x, y), y, show=False, max_n=3)
    assert len(samples) == len(calls) == 3 and list(samples[0][1]) == list(calls[0][1 - len(samples[0])])


def test_mixed_images_train_and_the_bank_keeps_true_labels(run, learn):
    before = {name: value.clone() for name, value in learn.model.named_parameters()}
    for mix in (MixUp(), CutMix()):
        learn.fit(1, 1e-3, cbs=mix)
        assert np.isfinite(learn.recorder.losses).all()
    assert any(not torch.equal(value, before[name]) for name, value in learn.model.named_parameters())
    bank = learn.model.bank
    for row, labels in zip(bank.slot_ids[:bank.filled].tolist(), bank.slot_labels):
        assert labels.tolist() == run.data.labels[row].tolist()
    assert not any(isinstance(cb, MixUp) for cb in learn.cbs)


def test_a_bank_of_features_refuses_mixed_images(tiny):
    learn = Run.open(tiny, answer="features", strategy="rarity").learner()
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match="MixUp mixes images.*answer: votes"):
        learn.fit(1, 1e-3, cbs=MixUp())
    assert learn.model.bank.filled == 0


def test_loggers_and_checkpoints_leave_the_runs_files_alone(run, learn):
    learn.fit(2, 1e-3, cbs=[CSVLogger(), SaveModelCallback(with_opt=True)])
    assert list(pd.read_csv(learn.path / "history.csv")["epoch"]) == [0, 1]
    assert (learn.path / "model.pth").is_file() and not run.folder.history_file.exists()
    saved = torch.load(learn.path / "model.pth", weights_only=True)
    assert saved["model"].keys() == learn.model.state_dict().keys()
    assert 1e-7 < learn.lr_find(num_it=12, show_plot=False).valley < 10


def test_export_is_refused_and_leaves_the_learner_whole(learn):
    with pytest.raises(NotImplementedError, match="pickle.*model.safetensors"):
        learn.export()
    assert not list(learn.path.glob("*.pkl"))
    learn.fit(1, 1e-3)


def test_callbacks_of_a_run_see_each_epoch_once_and_change_no_bit(quiet, tiny, monkeypatch):  # noqa: F811
    """Killed within the second phase and started again with the same callbacks."""
    class Count(Callback):
        order = 60  # after fastai's Recorder

        def after_epoch(self):
            seen.append((self.epoch, float(self.recorder.values[-1][1])))

    seen = []
    callbacks = [CSVLogger(append=True), Count()]
    with monkeypatch.context() as m, pytest.raises(Killed):
        killed_after(m, 2)
        Run.open(tiny).train(cbs=callbacks)
    run = Run.open(tiny)
    run.train(cbs=callbacks)
    same_run(run.folder.path, quiet)
    assert [epoch for epoch, _ in seen] == [0, 0, 1, 0, 1]
    assert [loss for _, loss in seen] == [row["valid_loss"] for row in run.history]
    rows = (run.folder / "fastai/history.csv").read_text().splitlines()
    assert len([row for row in rows if row[0].isdigit()]) == 5
    assert "with the callbacks CSVLogger, Count" in run.folder.log_file.read_text()


def test_a_run_without_callbacks_has_no_folder_of_them(quiet):  # noqa: F811
    assert not (quiet / "fastai").exists()


def test_a_callback_may_end_a_phase(tiny):
    run = Run.open(tiny)
    stop = EarlyStoppingCallback(monitor="valid_loss", comp=lambda new, best: False, patience=1)
    history = run.train(cbs=stop)
    assert [(row["stage"], row["epoch"]) for row in history] == [("1", 1), ("1", 2), ("2", 1)]
    assert Run.load(run.folder).net.head[-1].bias.isfinite().all()


def test_tensorboard_takes_a_run(tiny, tmp_path):
    try:
        tensorboard = importlib.import_module("fastai.callback.tensorboard")
    except ImportError:
        pytest.skip("tensorboard is not installed")
    Run.open(tiny, stage1_epochs=0, stage2_epochs=0).train(cbs=[tensorboard.TensorBoardCallback(log_dir=tmp_path / "board")])
    assert list((tmp_path / "board").rglob("events*"))
