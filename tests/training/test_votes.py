"""A bank that votes, in training: it leaves the network alone, sees what scoring sees, survives as runs do, and explains."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from sklearn.metrics import log_loss

from charmlib import Run
from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.runs import RunFolder, chosen_on_validation, finish
from charmlib.nn import VotingBank
from charmlib.training.external import score_elsewhere
from charmlib.training.predict import predict
from charmlib.viz.retrieved import SLOTS, plot_explanation
from tests.conftest import OURS, TINY
from tests.nn.test_votes import by_hand

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")
PLAIN = {"use_momentum": False, "use_attention": False}


class EndAfter(Callback):
    """As a person who interrupts training in an epoch, counted from 1 over all phases."""

    def __init__(self, epochs):
        self.left = epochs

    def before_epoch(self):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


def test_it_trains_the_plain_network_bit_by_bit(tiny, tmp_path):
    """All that votes change is the score: weights, order of images and augmentation are those without a bank. No validation
    part, so that both keep their last epoch."""
    runs = [Run.open(tiny, **PLAIN, use_bank=bank, valid_fraction=0, patience=0, run_dir=str(tmp_path / str(bank)))
            for bank in (False, True)]
    for run in runs:
        run.train()
    plain, ours = (run.net.state_dict() for run in runs)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert {name.split(".")[0] for name in set(ours) - set(plain)} == {"bank"} and runs[1].net.bank.filled == 16


def test_before_each_validation_slots_hold_what_scoring_sees(tiny):
    run = Run.open(tiny, **PLAIN, bank_size=32)
    learn = run.learner(run.phase("stage2"))
    learn.create_opt()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    bank = run.net.bank
    ids = bank.slot_ids[:bank.filled]
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (run.net.mean, run.net.std))
    grey = torch.from_numpy(run.data.images.take(ids.numpy(), axis=0).copy())[:, None]
    with torch.no_grad():
        keys = run.net.eval().encode(grey_to_network(grey, mean, std)).keys
    torch.testing.assert_close(bank.slots[:bank.filled], keys, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(bank.state_dict())
    bank.slots.add_(1.0)
    learn.validate()  # not training: whatever data the loaders have, the bank is let alone
    assert torch.equal(bank.slots, before["slots"] + 1.0)
    bank.slots.sub_(1.0)
    usual = bank.usual.clone()
    bank.calibrate()
    torch.testing.assert_close(bank.usual, usual, rtol=1e-3, atol=1e-3)
    assert ids.tolist() and set(ids.tolist()) <= set(run.data.rows("train").tolist())
    labels = torch.from_numpy(run.data.labels[ids.numpy()])
    assert torch.equal(bank.slot_labels[:bank.filled].float(), torch.nan_to_num(labels, nan=-1.0))
    share = np.nanmean(run.data.labels[run.data.rows("train")], 0)
    torch.testing.assert_close(bank.shares, torch.from_numpy(share), rtol=1e-5, atol=1e-6)


def test_refreshing_other_banks_and_an_empty_one_does_nothing(tiny):
    run = Run.open(tiny, **PLAIN, answer="features")
    run.net.renew(lambda ids: pytest.fail("features stay as they were written"))
    run = Run.open(tiny, **PLAIN)
    run.net.renew(lambda ids: pytest.fail("no image is held"))
    assert run.net.training and not run.net.bank.fitted.any()


@pytest.mark.parametrize("keys", ["scales", "features"])
def test_it_explains_and_loads_as_it_scores(tiny, keys):
    run = Run.open(tiny, **PLAIN, keys=keys, bank_size=32, k=8)
    run.train()
    again = Run.load(tiny["run_dir"])
    image = again.bank.cases(1)[0]
    told = again.bank.explain(image)
    logits, _ = again.logits("test")
    at = again.data.index.frame["id"].iloc[again.data.rows("test")].tolist().index(image)
    assert list(told.probabilities.values()) == pytest.approx(torch.sigmoid(torch.tensor(logits[at])).tolist(), rel=1e-4)
    assert 2 <= len(told.table) <= 10 and f"of the nearest of {int(again.net.bank.filled)} slots" in told.note
    assert told.table["similarity"].between(-1, 1).all()


CHOOSES = {**PLAIN, "vote_weight": -1, "vote_temperature": 0.3, "bank_size": 128,
           "k": 5, "classes": "nih15", "stage1_lr": 1e-2, "stage1_epochs": 5, "stage2_loss": "bce", "patience": 0}


@pytest.fixture(scope="module")
def chosen(phantoms, tmp_path_factory):
    """The folder of a finished run that chose the weight of its votes."""
    folder = tmp_path_factory.mktemp("chosen") / "run"
    Run.open({**TINY, **CHOOSES, "data_root": str(phantoms), "run_dir": str(folder)}).train()
    Run.load(folder).score()
    finish(folder)
    return folder


def ends(folder, part):
    """Logits of the loaded head alone, and of prior and votes alone, and labels."""
    run = Run.load(folder)
    out = []
    for weight in (0.0, 1.0):
        run.net.bank.weight.fill_(weight)
        logits, labels = run.logits(part)
        out.append(torch.from_numpy(logits))
    return *out, labels


def loss(logits, labels):
    """Mean log loss over the known labels, one after the other."""
    known = [(int(y), 1 / (1 + math.exp(-z))) for y, z in zip(labels.ravel(), logits.double().numpy().ravel()) if y == y]
    return log_loss(*zip(*known), labels=[0, 1])


def test_the_weight_is_that_with_the_lowest_log_loss_of_the_validation_part(chosen):
    head, votes, labels = ends(chosen, "valid")
    findings = [c != "No Finding" for c in Run.load(chosen).data.classes]
    losses = {w / 10: loss(torch.lerp(head, votes, w / 10)[:, findings], labels[:, findings]) for w in range(11)}
    best = min(losses, key=lambda w: (losses[w], w))
    assert best not in (0, 0.5, 1), "choose a run that can tell"
    assert RunFolder(chosen).card["vote_weight"] == best and RunFolder(chosen).card["params"]["vote_weight"] == -1
    line = re.search(r"vote_weight (\S+) chosen on the validation part: log loss (\S+) at 0, (\S+) at 0\.5, (\S+) at (\S+)",
                     (chosen / "log.txt").read_text())
    assert [float(x) for x in line.groups()] == pytest.approx([best, losses[0], losses[0.5], losses[best], best], abs=2e-6)
    # epochs were selected with the weight 0.5
    rows = [row for row in RunFolder(chosen).history if row["stage"] == "2"]
    assert min(float(row["valid_loss"]) for row in rows) == pytest.approx(loss(torch.lerp(head, votes, 0.5), labels), rel=1e-4)


def test_thresholds_temperature_and_all_scores_are_of_the_chosen_weight(chosen, phantoms, tmp_path):
    folder, card = RunFolder(chosen), RunFolder(chosen).card
    for part in ("valid", "test"):
        head, votes, labels = ends(chosen, part)
        logits = torch.lerp(head, votes, card["vote_weight"]).numpy()
        np.testing.assert_allclose(getattr(folder, part).logits, logits, rtol=0, atol=1e-6)
        if part == "valid":
            made = chosen_on_validation(labels, logits, card["classes"])
            assert card["temperature"] == pytest.approx(made["temperature"], rel=1e-5)
            ours, theirs = ({c: t for c, t in x["thresholds"]["youden"].items() if t is not None} for x in (card, made))
            assert ours and ours == pytest.approx(theirs, rel=1e-5)
    run = Run.open(Run.load(chosen).params)
    run.train()  # trained already: loaded from its folder
    assert run.net.bank.weight == Run.load(chosen).net.bank.weight == torch.tensor(card["vote_weight"])
    frame = Run.load(chosen).data.index.frame.set_index("id")
    told = predict(chosen, [frame.loc[name, "path"] for name in folder.test.ids[:3]])
    shown = told[[f"p_{c}" for c in card["classes"]]].to_numpy(float)
    np.testing.assert_allclose(shown, 1 / (1 + np.exp(-logits[:3])), rtol=1e-4)
    _, there = score_elsewhere(chosen, phantoms, out=tmp_path)
    at = [there.ids.tolist().index(name) for name in folder.test.ids]
    columns = [card["classes"].index(c) for c in there.classes]
    np.testing.assert_allclose(there.logits[at], logits[:, columns], rtol=0, atol=1e-4)


def test_a_run_that_ended_before_the_choice_chooses_the_same(chosen, tiny):
    run = Run.open(tiny, **CHOOSES)
    run.train()
    files = {file: file.read_bytes() for file in (run.folder.weights_file, run.folder.card_file)}
    for file in files:
        file.unlink()
    Run.open(tiny, **CHOOSES).train()  # from resume.pt, whose epochs are all there
    assert all(file.read_bytes() == content for file, content in files.items())
    assert files[run.folder.weights_file] == RunFolder(chosen).weights_file.read_bytes()


def test_an_earlier_checkpoint_is_refused_by_its_format(chosen, tmp_path):
    text = Path(chosen, "model.json").read_text()
    (tmp_path / "model.json").write_text(re.sub(r'"format": \d+', '"format": 4', text))
    with pytest.raises(ValueError, match=r"model\.json: format 4, this charmlib reads 7"):
        _ = RunFolder(tmp_path).card


def test_votes_that_only_harm_get_the_weight_0_and_so_do_votes_of_nobody(tiny):
    run = Run.open(tiny, **{**CHOOSES, "stage2_epochs": 0})
    run._choose_vote_weight()  # an empty bank: all weights score the same, and the smallest is taken
    assert run.net.bank.weight == 0
    run.train()
    assert run.net.bank.weight > 0
    run.net.bank.shares.fill_(0.999)  # as if all were ill
    run._choose_vote_weight()
    assert run.net.bank.weight == 0


@pytest.mark.parametrize("finding", ["", "Mass"])
def test_head_prior_and_every_slots_contribution_by_hand(chosen, finding):
    """One slot after the other; of a test image, and of an image whose own slot does not vote."""
    run = Run.load(chosen)
    bank, classes, frame = run.net.bank, list(run.data.classes), run.data.index.frame
    weight = float(bank.weight)
    scale = [torch.tensor(v).view(1, -1, 1, 1) for v in (run.net.mean, run.net.std)]
    for image in (run.bank.cases(1)[0], run.bank.table()["image"].iloc[0]):
        told = run.bank.explain(image, finding=finding)
        row = frame["id"].tolist().index(image)
        x = grey_to_network(torch.from_numpy(np.asarray(run.data.images[row]).copy())[None, None], *scale)
        run.net.see(torch.tensor([row]), None)
        with torch.no_grad():
            logits, (_, z, key) = run.net(x)[0], run.net.encode(x)
            head = run.net.head(z)[0]
        shown = {name: p for name, p in told.probabilities.items() if name != "No Finding"}
        assert told.finding == (finding or max(shown, key=shown.get)) in classes
        c = classes.index(told.finding)
        hand = {j: weight * sign * (similarity - float(usual)) / len(near) / bank.temperature for sign, usual, near in
                zip((1, -1), bank.usual[:, c], by_hand(bank, key[0].double().numpy(), row, c)[1]) for similarity, j in near}
        best = sorted(hand, key=lambda j: -abs(hand[j]))[:10]
        assert 5 < len(hand) <= 10 and image not in set(told.table["image"])
        np.testing.assert_allclose(np.abs(told.table["contribution"]), [abs(hand[j]) for j in best], rtol=1e-3)
        for _, slot in told.table.iterrows():
            assert slot["contribution"] == pytest.approx(hand[slot["slot"]], rel=1e-3)
        assert told.parts["votes"] == pytest.approx(sum(hand.values()), abs=1e-4)
        assert told.parts["head"] == pytest.approx((1 - weight) * float(head[c]), abs=1e-5)
        assert sum(told.parts.values()) == pytest.approx(float(logits[c]), abs=1e-5)
        assert told.share == pytest.approx(sum(abs(hand[j]) for j in best) / sum(map(abs, hand.values())), rel=1e-3)
        assert f"{told.finding}: logit {logits[c]:+.3f} = head" in told.note and f"make {told.share:.1%}" in told.note
        assert min(hand.values()) < 0 < max(hand.values())


def test_an_explanation_refuses_a_class_that_is_none_and_its_picture_has_signs_and_terms(chosen):
    import matplotlib.pyplot as plt

    run = Run.load(chosen)
    with pytest.raises(ValueError, match=r"no class 'Massa' in .*: one of Atelectasis, .*Mass"):
        run.bank.explain(run.bank.cases(1)[0], finding="Massa")
    cases = [run.bank.explain(image, finding="Mass") for image in run.bank.cases(2)]
    figure = plot_explanation(cases)
    words = " ".join(" ".join(t.get_text() for t in figure.findobj(plt.Text)).split())
    plt.close(figure)
    for case in cases:
        assert all(f"contribution {x:+.3f}" in words for x in case.table["contribution"][:SLOTS])
        assert f"Mass: logit {sum(case.parts.values()):+.2f} = head {case.parts['head']:+.2f}, prior" in words
        assert f"votes {case.parts['votes']:+.2f} ({case.share:.1%} shown)" in words
    assert "largest contributions" in words and "weight" not in words and "retrieved" not in words
    run.net.bank.weight.fill_(0)
    silent = run.bank.explain(run.bank.cases(1)[0])
    assert silent.table.empty and silent.share == 0 and silent.parts["prior"] == silent.parts["votes"] == 0


def test_each_epoch_calibrates_once(tiny, monkeypatch):
    """The bank of the epoch that is kept comes with its calibration."""
    calls, calibrate = [], VotingBank.calibrate
    monkeypatch.setattr(VotingBank, "calibrate", lambda self: (calls.append(1), calibrate(self)))
    run = Run.open(tiny, stage2_epochs=0, use_momentum=False, use_attention=False)
    assert len(run.train()) == len(calls) == 3


def test_the_default_scores_the_mean_of_the_weights_and_goes_on_to_the_bit(tiny, tmp_path):
    """Three parts at once: a resumed run ends in the same bits, and a mean of decay 0 is the network itself."""
    whole = Run.open(tiny, **OURS, momentum=0.9, run_dir=str(tmp_path / "whole"))
    whole.train()
    stopped = Run.open(tiny, **OURS, momentum=0.9)
    after = EndAfter(3)
    with pytest.raises(KeyboardInterrupt):
        stopped.train(after)
    again = Run.open(tiny, **OURS, momentum=0.9)
    again.train()
    ours, theirs = whole.net.state_dict(), again.net.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.net.bank.filled == 16 and whole.net.attention.read.weight.abs().sum() > 0
    last = Run.open(tiny, **OURS, momentum=0.0, run_dir=str(tmp_path / "last"))
    last.train()
    assert not torch.equal(last.net.head[1].weight, ours["head.1.weight"])
