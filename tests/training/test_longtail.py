"""Losses with class counts, class weights that wait, and uneven draws, in training and in the network that it leaves."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from charmlib import Run, charm_learner
from charmlib.data.dataset import open_dataset
from charmlib.data.loaders import chest_dataloaders
from charmlib.data.sampling import prior_shift, shares
from charmlib.models.registry import create
from charmlib.nn import BCELoss, LDAMLoss, make_loss
from charmlib.params import ParameterError, effective, missing_need, resolve
from charmlib.training.callbacks import LossMode
from charmlib.training.checkpoint import load_model
from charmlib.training.no_wait import HalfPrecision
from tests.training.conftest import HALF, NET
from tests.training.test_run import Killed, killed_after
from tests.training.test_step import watched

pytestmark = pytest.mark.filterwarnings("ignore:class weights and uneven draws", "ignore:class_weight inverse")


@pytest.fixture(scope="module")
def data(phantoms):
    return open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)


@pytest.fixture
def make(data, tmp_path):
    """A Learner, whose network starts with the same weights each time."""
    def learner(sampler="natural", **options):
        torch.manual_seed(0)
        dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF, path=tmp_path, sampler=sampler, repeat_threshold=0.1)
        with torch.random.fork_rng():
            return charm_learner(dls, seed=1, path=tmp_path, **{**NET, **options})

    return learner


def fit(learn, epochs=1, **options):
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-3, **options)
    return learn


def same(a, b):
    return all(torch.equal(value, b.model.state_dict()[name]) for name, value in a.model.state_dict().items())


@pytest.mark.parametrize("half, sampler, options", [
    (False, "class_aware", {"loss": "ldam", "class_weight": "exp", "ldam_scale": 30.0, "weight_from": 0.5}),
    (True, "repeat", {"loss": "db", "class_weight": "effective"})])
def test_no_step_waits_for_the_device(make, half, sampler, options):
    learn = make(sampler, **options)
    if half:
        learn.add_cb(HalfPrecision())
    with learn.no_bar():
        assert watched(learn) == []
    assert all(torch.isfinite(p).all() for p in learn.model.parameters())


def test_counts_are_those_of_the_loaders_images(data, make):
    for findings in (False, True):
        dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF, findings_only=findings)
        learn = charm_learner(dls, loss="db", class_weight="inverse", **NET)
        labels = data.labels[data.rows("train", findings_only=findings)]
        counts = (labels == 1).sum(0)
        np.testing.assert_allclose(learn.loss_func.rarity, 1 / counts, rtol=1e-6)
        np.testing.assert_allclose(learn.loss_func.weights[0], (len(labels) - counts) / counts, rtol=1e-6)


def test_validation_losses_have_no_weights(make):
    plain, weighted, losses = make(), make(class_weight="exp", loss="bce"), []
    for learn in (plain, weighted):
        with learn.no_bar():
            losses.append((learn.validate()[0], learn.get_preds(with_loss=True)[2].mean().item()))
    assert losses[0] == losses[1]
    assert fit(plain).recorder.values[-1][0] != fit(weighted).recorder.values[-1][0]


def test_weights_that_never_come_are_none_and_those_from_the_start_are_all(make):
    plain, never, at_once = make(), make(class_weight="sqrt", weight_from=1.0), make(class_weight="sqrt")
    late = make(class_weight="sqrt", weight_from=0.5)
    for learn in (plain, never, at_once, late):
        fit(learn, 2)
    assert same(plain, never) and not same(plain, at_once) and not same(plain, late) and not same(late, at_once)


def test_weights_wait_for_a_share_of_a_stage_of_two_phases(tiny):
    seen = []
    run = Run.open(tiny, class_weight="effective", weight_from=0.5, monitor="last", patience=0)
    run.train(Callback(after_train=lambda cb: seen.append((len(run.history), cb.loss_func.weighted))))
    assert [on for _, on in seen] == [False, False, True, False, True]  # stage 1 has 1 + 2 epochs, stage 2 has 2


@pytest.mark.parametrize("epochs", range(1, 11))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.75, 0.8, 0.9])
def test_weights_that_come_late_come_in_the_last_epoch_at_least(share, epochs):
    mode = LossMode(share)
    mode.learn, mode.epochs, mode.loss_func = SimpleNamespace(n_epoch=epochs), epochs, BCELoss()
    on = [epoch >= mode.first for epoch in range(epochs)]
    assert on[-1] and on == sorted(on) and on.count(False) <= share * epochs + 1
    assert on == [epoch >= share * epochs - 1e-6 or epoch == epochs - 1 for epoch in range(epochs)]
    with pytest.raises(ValueError, match="weight_from must be in"):
        LossMode(1.5)


def test_weights_that_come_late_are_refused_where_an_epoch_before_them_might_be_kept(tiny):
    with pytest.raises(ParameterError, match="valid_loss might keep an epoch from before.*say monitor: last and patience: 0"):
        Run.open(tiny, class_weight="effective", weight_from=0.5)


def test_what_would_have_no_effect_is_refused(make):
    plain = make(loss="bce")
    for given, words in (({"loss": BCELoss(), "class_weight": "inverse"}, "class_weight would have no effect"),
                         ({"head": "csra"}, "head would have no effect"),
                         ({"loss": "ldam", "ldam_scale": 30.0}, "ldam_scale would have no effect"),
                         ({"loss": LDAMLoss([5.0] * 14, scale=30.0)}, "scale is 30, the network's ldam_scale 1")):
        with pytest.raises(ValueError, match=words):
            charm_learner(plain.dls, net=plain.model, **given)
    with pytest.raises(ValueError, match="counts of 1 or more"):
        LDAMLoss([0.0, 5.0])


def test_a_scale_that_a_loss_does_not_have_stays_without_effect(tiny):
    assert Run.open(tiny, ldam_scale=30.0).learner().model.ldam_scale == 1.0


def test_a_loss_that_is_used_again_forgets_the_draws_before(make):
    loss = BCELoss()
    assert make("class_aware", loss=loss).loss_func.shift is not None
    assert make(loss=loss).loss_func.shift is None


def test_a_steep_head_is_steep_in_training_and_in_scoring(make):
    learn = make(loss="ldam", ldam_scale=30.0, ldam_margin=0.4, use_bank=False)
    net, loss = learn.model, learn.loss_func
    x, y = learn.dls.valid.one_batch()
    x, y = x.as_subclass(torch.Tensor), y.as_subclass(torch.Tensor)
    for mode in (True, False):
        net.train(mode), loss.train(mode)
        net.head[3].p = 0.0
        logits, seen = net.read(x)
        z = net.head(seen["z"])
        torch.testing.assert_close(logits, 30 * z)
        margin = 0.4 * (1 / loss.margins.new_tensor(_counts(learn))) ** 0.25 / (1 / min(_counts(learn))) ** 0.25
        torch.testing.assert_close(loss(logits, y), F.binary_cross_entropy_with_logits(30 * (z - y * margin), y))
    with learn.no_bar():
        torch.testing.assert_close(learn.get_preds()[0][:len(x)], torch.sigmoid(30 * z), rtol=1e-4, atol=1e-5)
    plain = make(use_bank=False).model
    plain.eval()
    logits, seen = plain.read(x)
    assert torch.equal(logits, plain.head(seen["z"]))


def _counts(learn):
    dataset = learn.dls.train.dataset
    return (dataset.labels[dataset.rows] == 1).sum(0).tolist()


def test_the_scale_acts_only_with_a_stage_that_has_the_loss(tiny):
    for changes, scale in (({}, 1.0), ({"stage1_loss": "ldam"}, 30.0), ({"stage2_loss": "ldam"}, 30.0),
                           ({"stage1_loss": "ldam", "stage1_epochs": 0, "stage1_frozen_epochs": 0}, 1.0)):
        p = resolve(tiny, {"ldam_scale": 30.0, **changes})
        assert create(p, ["a", "b"]).ldam_scale == scale
        assert (effective(p)["ldam_scale"] is None) == (scale == 1.0)
    assert missing_need("weight_from", resolve()) == "class_weight: inverse or sqrt or effective or exp"
    assert missing_need("repeat_threshold", resolve()) == "stage1_sampler or stage2_sampler: repeat"
    net = create(resolve(tiny, {"ldam_scale": 30.0, "stage2_loss": "ldam"}), ["a", "b"])
    net.start_at(torch.tensor([-3.0, 1.5]))
    torch.testing.assert_close(net.head[-1].bias.detach(), torch.tensor([-0.1, 0.05]))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"average": 0.9, "schedule": "steps", "clip_norm": 1.0, "augment": "strong"}],
                         ids=["alone", "with_average"])
def test_a_killed_run_with_uneven_draws_and_late_weights_ends_in_the_same_bits_and_loads(tiny, tmp_path, monkeypatch, more):
    options = {"stage1_sampler": "repeat", "repeat_threshold": 0.1, "stage2_sampler": "class_aware", "class_weight": "sqrt",
               "weight_from": 0.6, "stage2_loss": "ldam", "ldam_scale": 30.0, "monitor": "last", "patience": 0,
               "vote_weight": 0.5, **more}
    whole = Run.open(tiny, **options, run_dir=str(tmp_path / "whole"))
    history = whole.train()
    for saves in (2, 2):  # inside stage 1, and in stage 2
        with monkeypatch.context() as m, pytest.raises(Killed):
            killed_after(m, saves)
            Run.open(tiny, **options).train()
        torch.manual_seed(12345)
    again = Run.open(tiny, **options)
    again.train()
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, again.net.state_dict()[name]), name
    # the network that is saved scores with the images' own prior and the steep head, whoever loads it
    loaded = Run.load(tiny["run_dir"])
    assert loaded.net.ldam_scale == 30.0 and np.array_equal(loaded.logits("test")[0], whole.logits("test")[0])
    labels = whole.data.labels[whole.data.rows("train")]
    np.testing.assert_allclose(load_model(tiny["run_dir"])[0].bank.shares, shares(labels), rtol=1e-6)
    last = [row["valid_ap"] for row in history if row["stage"] == "2"]
    logits, y = loaded.logits("valid")
    from charmlib.evaluation.metrics import ap_by_class
    with warnings.catch_warnings(action="ignore"):
        assert np.nanmean(list(ap_by_class(y, logits).values())) == pytest.approx(last[-1], abs=1e-9)


def test_training_on_a_sample_with_the_shift_is_the_correction_of_its_logits_afterwards(make):
    """z_c + logit(pi_c) - logit(pi_sampled,c) of a network that knows nothing of the sample, from the same start."""
    off = {"use_bank": False, "use_momentum": False, "weight_decay": 0.0}
    ours, after = make("class_aware", **off), make("class_aware", **off)
    dataset = ours.dls.train.dataset
    shift = torch.from_numpy(prior_shift(dataset.labels[dataset.rows], ours.dls.train.expected)).float()
    assert shift.abs().max() > 0.5
    torch.testing.assert_close(ours.loss_func.shift, shift)
    after.loss_func.shift = None
    with torch.no_grad():
        after.model.head[-1].bias.add_(shift)
    for learn in (ours, after):
        fit(learn)
    x = ours.dls.valid.one_batch()[0].as_subclass(torch.Tensor)
    ours.model.eval(), after.model.eval()
    logits = ours.model(x)
    torch.testing.assert_close(logits, after.model(x) - shift, rtol=0, atol=0.01)  # Adam enlarges differences of rounding
    assert (logits - after.model(x)).abs().max() > 0.5


def test_uneven_draws_leave_the_prevalence_of_the_images(data):
    """One bias a class, fitted to the draws by expectation: with the shift its probabilities are the prevalence."""
    dls = chest_dataloaders(data, bs=16, sampler="class_aware")
    labels, expected = data.labels[data.rows("train")], dls.train.expected
    loss, bias = make_loss("bce"), torch.zeros(14, requires_grad=True)
    loss.reduction, loss.shift = "none", torch.from_numpy(prior_shift(labels, expected)).float()
    descent = torch.optim.LBFGS([bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        descent.zero_grad()
        total = (loss(bias.expand(len(labels), -1), torch.from_numpy(labels)) * torch.from_numpy(expected)[:, None]).mean()
        total.backward()
        return total

    descent.step(closure)
    np.testing.assert_allclose(torch.sigmoid(bias).detach(), shares(labels), rtol=1e-2)
    assert np.abs(shares(labels, expected) / shares(labels) - 1).max() > 0.5


def test_a_bank_votes_with_the_prevalence_of_the_images(make):
    learn = fit(make("class_aware"))
    dataset = learn.dls.train.dataset
    np.testing.assert_allclose(learn.model.bank.shares, shares(dataset.labels[dataset.rows]), rtol=1e-6)
    assert torch.equal(fit(make()).model.bank.shares, learn.model.bank.shares)


def test_what_uneven_draws_cannot_go_with(make):
    with pytest.raises(ValueError, match="loss BCEWithLogitsLoss cannot take the prior of uneven draws"):
        make("class_aware", loss=torch.nn.BCEWithLogitsLoss())
    with pytest.warns(UserWarning, match="class weights and uneven draws .* multiply"):
        make("repeat", class_weight="exp")
