"""A bank that votes, in training: it leaves the network alone, sees what scoring sees, and survives as runs do."""

import copy

import pytest
import torch

from charmlib import Run
from charmlib.data.loaders import grey_to_network

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")
PLAIN = {"use_momentum": False, "use_attention": False}


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
        _, keys = run.net.eval().encode(grey_to_network(grey, mean, std))
    torch.testing.assert_close(bank.slots[:bank.filled], keys, rtol=1e-4, atol=1e-5)
    before = copy.deepcopy(bank.state_dict())
    bank.slots.add_(1.0)
    learn.validate()  # not training: whatever data the loaders have, the bank is let alone
    assert torch.equal(bank.slots, before["slots"] + 1.0)
    bank.slots.sub_(1.0)
    solved = bank.coefficients.clone()
    bank.solve()
    torch.testing.assert_close(bank.coefficients, solved, rtol=1e-3, atol=1e-3)


def test_refreshing_other_banks_and_strangers_does_nothing(tiny):
    run = Run.open(tiny, **PLAIN, answer="features", strategy="rarity")
    run.net.renew(lambda ids: pytest.fail("features stay as they were written"))
    run = Run.open(tiny, **PLAIN)
    run.net.bank.write(torch.randn(4, run.net.bank.slots.shape[1]), None, torch.ones(4, 14))
    kept = run.net.bank.slots.clone()
    run.net.renew(lambda ids: pytest.fail("nobody knows these images"))
    assert torch.equal(run.net.bank.slots, kept) and run.net.training


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
    assert len(told.table) == 8 and told.note == f"all {int(again.net.bank.filled)} slots voted"
    assert told.table["similarity"].is_monotonic_decreasing and told.table["similarity"].between(-1, 1).all()
    assert told.table["weight"].is_monotonic_decreasing and told.table["weight"].between(0, 1).all()
