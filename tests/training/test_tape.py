"""Runs that share a training against the same runs alone, bit by bit."""

import itertools
import json
import os
from contextlib import suppress

import numpy as np
import pytest
import torch

from charmlib import Run, session
from charmlib.files import Damaged
from charmlib.nn import VotingBank
from charmlib.training.checkpoint import load_resume
from charmlib.training.tape import Tape, tape_of_grid
from tests.training.test_run import Killed, bits

CELLS = [{"vote_temperature": t, "average": d, "monitor": m, "vote_weight": w, "stage1_epochs": 3, "patience": 2}
         for (t, w), d, m in itertools.product(((0.8, -1), (0.2, 0.7)), (0.0, 0.9), ("valid_loss", "valid_auc"))]
MEANS = [(0.9, False)]


@pytest.fixture(scope="module")
def base(phantoms):
    from tests.conftest import TINY

    return {**TINY, "data_root": str(phantoms), "use_attention": False}


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The eight runs, each trained by itself, and scored."""
    return [scored(Run.open(base, run_dir=str(tmp_path_factory.mktemp("alone") / "run"), **cell)) for cell in CELLS]


def scored(run):
    run.train()
    run.score()
    return run


def shared(base, folder, i, tape, **changes):
    run = Run.open({**base, **CELLS[i], **changes}, run_dir=str(folder / f"run{i}"))
    run.tape = tape
    tape.remember(run.net)
    return run


def equal(run, other):
    (state, thresholds, history), (want_state, want_thresholds, want_history) = bits(run.folder), bits(other.folder)
    assert state.keys() == want_state.keys()
    assert all(torch.equal(state[name], value) for name, value in want_state.items())
    assert thresholds == want_thresholds and history.equals(want_history)
    with np.load(run.folder.predictions_file) as got, np.load(other.folder.predictions_file) as want:
        assert all(np.array_equal(got[name], want[name], equal_nan=got[name].dtype.kind == "f") for name in want.files)
    assert (run.folder / "bank.csv").read_text() == (other.folder / "bank.csv").read_text()


@pytest.mark.slow
def test_each_of_eight_runs_of_one_training_equals_itself_alone(base, alone, tmp_path):
    tape, trained = Tape(tmp_path, "these", MEANS), []
    for i in range(len(CELLS)):
        equal(scored(shared(base, tmp_path, i, tape)), alone[i])
        trained.append(tape.trained)
        assert not (tmp_path / f"run{i}" / "resume.pt").exists()
    lengths = [len(run.history) for run in alone]
    assert trained[0] == lengths[0]
    kept = {min(i for i, row in enumerate(run.history) if row[f"{CELLS[j]['monitor']}"] == best(run, CELLS[j]))
            for j, run in enumerate(alone)}
    # one training, and a stage 2 of two epochs more for each other epoch of stage 1 that is kept
    assert sum(trained) <= 4 + 2 * len(kept) and sum(trained) < sum(lengths) / 2
    assert len({json.dumps(bits(run.folder)[1]) for run in alone}) > 4, "the eight runs differ"


def test_runs_that_keep_the_last_epoch_share_all_of_it(base, tmp_path):
    tape, last = Tape(tmp_path, "these", MEANS), {"monitor": "last", "patience": 0}
    first = scored(shared(base, tmp_path, 0, tape, **last))
    assert tape.trained == len(first.history)
    second = scored(shared(base, tmp_path, 2, tape, **last))
    assert tape.trained == 0
    equal(second, scored(Run.open({**base, **CELLS[2], **last}, run_dir=str(tmp_path / "alone"))))
    assert not np.array_equal(first.logits("test")[0], second.logits("test")[0])


def best(run, cell):
    values = [row[cell["monitor"]] for row in run.history if row["stage"] == "1"]
    return min(values) if cell["monitor"] == "valid_loss" else max(values)


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize("epochs", [1, 4, 5])
def test_a_killed_training_goes_on_from_the_tape(base, alone, tmp_path, monkeypatch, epochs):
    """Killed after so many epochs over three phases, on both sides of writing the optimizer."""
    import charmlib.training.tape as module

    left, save = [2 * epochs + 1], module.save_resume

    def killed(path, state):
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        save(path, state)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(module, "save_resume", killed)
        shared(base, tmp_path, 2, Tape(tmp_path, "these", MEANS)).train()
    torch.manual_seed(1)
    tape = Tape(tmp_path, "these", MEANS)
    equal(scored(shared(base, tmp_path, 2, tape)), alone[2])
    assert tape.trained == len(alone[2].history) - epochs
    equal(scored(shared(base, tmp_path, 5, tape)), alone[5])


@pytest.mark.slow
@pytest.mark.once
def test_budgets_of_an_epoch_each_change_no_bit(base, alone, tmp_path, monkeypatch):
    """Out of time after each epoch that is trained; each continuation is a new run, which reads the epochs before."""
    def stop(seconds, what):
        if tape.trained:
            stops.append(what)
            raise session.OutOfTime(what)

    monkeypatch.setattr(session, "stop_unless", stop)
    stops = []
    while True:
        assert len(stops) <= len(alone[2].history)
        tape = Tape(tmp_path, "these", MEANS)
        with suppress(session.OutOfTime):
            equal(scored(shared(base, tmp_path, 2, tape)), alone[2])
            break
    assert len(stops) == len(alone[2].history) and {"the next epoch", "scoring"} < {*stops}
    monkeypatch.undo()
    equal(scored(shared(base, tmp_path, 5, Tape(tmp_path, "these", MEANS))), alone[5])


@pytest.mark.slow
@pytest.mark.once
def test_a_run_with_a_mean_that_the_tape_lacks_trains_again(base, alone, tmp_path):
    scored(shared(base, tmp_path, 0, Tape(tmp_path, "these")))
    tape = Tape(tmp_path, "these", MEANS)
    equal(scored(shared(base, tmp_path, 3, tape)), alone[3])
    assert tape.trained == len(alone[3].history)


def test_another_training_and_damaged_files_are_noticed(base, tmp_path):
    tape = Tape(tmp_path, "these")
    shared(base, tmp_path, 0, tape).train()
    other = Tape(tmp_path, "those")
    run = shared(base, tmp_path, 1, other)
    run.train()
    assert other.trained == len(run.history)
    file = next(path for path in tmp_path.glob("tape_*.pt") if "model" in load_resume(path))
    with open(file, "r+b") as content:
        content.seek(1000)
        content.write(b"xxxx")
    with pytest.raises(Damaged, match=file.name):
        for i, training in enumerate(("these", "those")):
            shared(base, tmp_path / "again", i, Tape(tmp_path, training)).train()


def test_features_are_looked_up_for_the_same_images_and_weights_only(base, tmp_path):
    tape = Tape(tmp_path, "these")
    run = shared(base, tmp_path, 0, tape, use_momentum=False, use_attention=False)
    net, calls = run.net, []
    net.final.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(2, 4, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        first = net(x)
        assert torch.equal(net(x), first) and len(calls) == 1
        net(y)
        assert len(calls) == 2
        net.final.load_state_dict({name: value + 1 for name, value in net.final.state_dict().items()}) \
            if len(net.final.state_dict()) else next(net.trunk.parameters()).add_(1)
        assert not torch.equal(net(x), first) and len(calls) == 3
    net(x)
    assert len(calls) == 4, "with gradients nothing is looked up"


def test_votes_are_looked_up_for_the_same_keys_and_slots_only(base, tmp_path, monkeypatch):
    run = shared(base, tmp_path, 0, Tape(tmp_path, "these"), answer="votes", vote_weight=0.5)
    run.train()
    bank, calls, real = run.net.eval().bank, [], VotingBank._nearest
    monkeypatch.setattr(VotingBank, "_nearest", lambda *given: calls.append(1) or real(*given))
    keys, logits = torch.randn(5, bank.slots.shape[1]), torch.zeros(5, 14)
    first, before = bank(keys, logits), len(calls)
    bank.temperature *= 2
    bank.weight.fill_(0.25)
    assert torch.allclose(4 * (bank(keys, logits) - bank.prior() * 0.25)[:, bank.fitted],
                          (first - bank.prior() * 0.5)[:, bank.fitted], atol=1e-5) and len(calls) == before
    for i, change in enumerate((lambda: bank.slots.mul_(1.1), lambda: bank.slot_labels[0].fill_(0), lambda: keys.add_(1),
                                lambda: setattr(bank, "k", 1)), 1):
        change()
        bank(keys, logits)
        assert len(calls) == before + i


def test_a_grid_hands_the_tape_to_its_runs(monkeypatch, tmp_path):
    tape_of_grid.cache_clear()
    assert tape_of_grid() is None
    monkeypatch.setitem(os.environ, session.TAPE, json.dumps(
        {"folder": str(tmp_path), "training": "these", "means": [[0.0, False], [0.9, True]]}))
    tape_of_grid.cache_clear()
    tape = tape_of_grid()
    assert (tape.folder, tape.training, list(tape.means)) == (tmp_path, "these", ["0.9 True"])
    assert tape_of_grid() is tape
    monkeypatch.delenv(session.TAPE)
    tape_of_grid.cache_clear()
