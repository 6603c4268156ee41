"""The bank whose slots vote, beside one written with loops, and the scales that its keys are made of."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from charmlib.nn import VotingBank, split_backbone, split_scales
from charmlib.nn.votes import FLOOR
from tests.nn.test_bank import NoReading

BLOCKS = (2, 4)


def filled(size=24, k=5, count=20, **options):
    torch.manual_seed(0)
    bank = VotingBank(6, 3, size=size, k=k, blocks=BLOCKS, **options)
    keys = torch.randn(count, 6) * torch.tensor([5.0, 5.0, 1.0, 1.0, 1.0, 1.0]) + 3
    labels = (torch.rand(count, 3) < torch.tensor([0.5, 0.3, 0.1])).float()
    labels[torch.rand(count, 3) < 0.15] = torch.nan
    labels[:, 0] = torch.arange(count) % 2
    bank.write(keys, torch.arange(count), labels)
    return bank.eval()


def cosine(a, b):
    return a @ b / max(math.sqrt(a @ a), 1e-12) / max(math.sqrt(b @ b), 1e-12)


def by_hand(bank, key, image):
    """One vote after the other, in float64."""
    used = range(int(bank.filled))
    slots, labels = bank.slots.double().numpy(), bank.slot_labels.numpy()
    mean = sum(slots[j] for j in used) / len(used)
    key = key.double().numpy()
    similar = []
    for j in used:
        if image >= 0 and bank.slot_ids[j] == image:
            continue
        parts, start = [], 0
        for width in bank.blocks:
            parts.append(cosine((key - mean)[start:start + width], (slots[j] - mean)[start:start + width]))
            start += width
        similar.append((np.mean(parts), j))
    voters = sorted(similar, reverse=True)[:bank.k]
    weights = {j: math.exp(s / bank.temperature) for s, j in voters}
    out = []
    for c in range(labels.shape[1]):
        known = sum(w for j, w in weights.items() if labels[j, c] >= 0)
        share = sum(w for j, w in weights.items() if labels[j, c] == 1) / known if known else 0
        everyone = [labels[j, c] for j in used if labels[j, c] >= 0]
        out.append(math.log(share + FLOOR) - math.log(np.mean(everyone) + FLOOR) if known else 0.0)
    return out


@pytest.mark.parametrize("size", [24, 12])
@pytest.mark.parametrize("k", [1, 5, 100])
@pytest.mark.parametrize("temperature", [0.05, 0.15, 2.0])
def test_equals_votes_counted_by_hand(size, k, temperature):
    bank = filled(size=size, k=k, temperature=temperature, weight=1.5)
    keys, ids = torch.randn(9, 6) * 2 + 3, torch.tensor([0, 3, 5, 7, -1, -1, 40, 41, 19])
    want = np.array([by_hand(bank, key, int(i)) for key, i in zip(keys, ids)])
    np.testing.assert_allclose(bank.votes(keys, ids), want, rtol=2e-4, atol=2e-4)
    logits = torch.randn(9, 3)
    bank.expect(ids)
    np.testing.assert_allclose(bank(keys, logits), logits.numpy() + 1.5 * want, rtol=2e-4, atol=1e-3)
    assert np.abs(want).max() > 0.1


def test_training_passes_the_logits_through_and_remembers_the_batch():
    bank = VotingBank(6, 3, size=8, k=2).train()
    keys, logits = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    bank.expect(torch.arange(4), torch.eye(4)[:, :3])
    assert bank(keys, logits) is logits and bank.filled.item() == 4
    bank(keys, logits)  # nobody said whose these are
    assert bank.filled.item() == 4 and bank.steps.item() == 1
    bank.eval()(keys, logits).sum().backward()
    assert keys.grad is None and logits.grad.eq(1).all()


def test_an_empty_bank_and_a_weight_of_0_change_nothing():
    keys, logits = torch.randn(4, 6), torch.randn(4, 3)
    assert torch.equal(VotingBank(6, 3, size=8, k=2).eval()(keys, logits), logits)
    assert torch.equal(filled(weight=0.0)(torch.randn(4, 6), logits), logits)


def test_k_1_is_the_nearest_slots_word():
    bank = filled(k=1, temperature=1e-3)
    for j in range(int(bank.filled)):
        votes = bank.votes(bank.slots[j:j + 1])[0]
        for c, label in enumerate(bank.slot_labels[j].tolist()):
            assert votes[c] == 0 if label < 0 else (votes[c] > 0) == (label == 1)


def test_a_bank_that_holds_more_of_a_class_does_not_speak_for_it():
    """Twice as many slots of everything, or all slots voting alike, and the evidence is 0 whatever the prevalence."""
    bank = filled(k=100, temperature=1e6)
    assert bank.votes(torch.randn(5, 6)).abs().max() < 0.02


def test_eval_is_frozen_and_state_dict_carries_all():
    bank = filled()
    before = copy.deepcopy(bank.state_dict())
    keys = torch.randn(5, 6)
    bank.expect(torch.arange(5), torch.ones(5, 3))
    first = bank(keys, torch.zeros(5, 3))
    assert all(torch.equal(v, before[n]) for n, v in bank.state_dict().items())
    other = VotingBank(6, 3, size=24, k=5, blocks=BLOCKS).eval()
    other.load_state_dict(before)
    other.expect(torch.arange(5))
    assert torch.equal(other(keys, torch.zeros(5, 3)), first)


def test_nothing_reads_the_device():
    bank = VotingBank(6, 3, size=8, k=3, blocks=BLOCKS)
    keys, logits, ids, labels = torch.randn(5, 6), torch.randn(5, 3), torch.arange(5), torch.eye(5)[:, :3]
    with NoReading():
        for training in (True, True, False):
            bank.train(training)
            bank.expect(ids, labels)
            bank(keys, logits).sum()
    assert bank.filled.item() == 5


def test_refusals():
    for wrong in ({"weight": -1.0}, {"temperature": 0.0}, {"blocks": (2, 2)}, {"k": 0}, {"strategy": "best"}):
        with pytest.raises(ValueError):
            VotingBank(6, 3, **{"size": 8, "k": 2, **wrong})
    bank = filled()
    bank.expect(torch.arange(3))
    with pytest.raises(ValueError, match="announced 3"):
        bank(torch.randn(4, 6), torch.randn(4, 3))


def test_a_balanced_bank_holds_every_rare_image_and_no_image_twice():
    """A class of 1 in 100 fills its share with all that there are, as fresh as they come, and fifo loses most of them."""
    random = np.random.default_rng(0)
    rare, common = random.random(2000) < 0.01, random.random(2000) < 0.3
    labels = torch.tensor(np.stack([common, rare], 1).astype(np.float32))
    held = {}
    for strategy in ("balanced", "fifo"):
        bank = VotingBank(4, 2, size=90, k=5, strategy=strategy)
        for epoch in range(3):
            for ids in torch.tensor(random.permutation(2000)).split(50):
                bank.write(torch.full((50, 4), float(epoch)), ids, labels[ids])
        ids = bank.slot_ids.tolist()
        held[strategy] = {i for i in ids if rare[i]}
        if strategy == "balanced":
            assert len(set(ids)) == 90 and bank.slots[bank.slot_labels[:, 1] == 1].eq(2).all()
            shelves = np.bincount(bank.slot_scores.long().numpy(), minlength=3)
            assert shelves[1] == rare.sum() and abs(shelves[0] - shelves[2]) <= 1
    assert held["balanced"] == set(np.flatnonzero(rare)) and len(held["fifo"]) < rare.sum() / 3


@pytest.mark.parametrize(("arch", "channels"), [
    ("mobilenet_v2", [24, 32, 96, 0]), ("efficientnet_v2_s", [48, 64, 160, 0]), ("resnet50", [256, 512, 1024]),
    ("densenet121", [256, 512, 1024, 0]), ("vgg16", [256, 512, 512]), ("timm:test_convnext", None)])
def test_scales_are_the_trunk_in_pieces(arch, channels):
    trunk = split_backbone(arch, "none").trunk.eval()
    pieces, found = split_scales(trunk)
    assert channels is None or found == channels
    x = out = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = trunk(x)
        for piece, width in zip(pieces, found):
            out = piece(out)
            if width:
                assert out.shape[1] == width and 64 // out.shape[-1] in (4, 8, 16)
    assert torch.equal(out, want)
    assert [id(p) for piece in pieces for p in piece.parameters()] == [id(p) for p in trunk.parameters()]


def test_a_trunk_without_these_strides_is_one_piece():
    for trunk in (nn.Sequential(nn.Conv2d(3, 7, 3, padding=1)), nn.Conv2d(3, 7, 2, 2)):
        pieces, channels = split_scales(trunk)
        assert pieces == [trunk] and channels == [7] and trunk.training
