"""The bank whose slots vote, beside one written with loops, and the scales that its keys are made of."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from charmlib.nn import VotingBank, find_scales, split_backbone, votes
from charmlib.nn.scales import maps_of
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


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_a_weight_blends_as_the_formula_with_a_number_does_to_the_bit(weight):
    bank, keys, logits = filled(weight=weight), torch.randn(37, 6), torch.randn(37, 3)
    votes, _ = bank.votes(keys)
    want = torch.lerp(logits, torch.logit(bank.shares.clamp(1e-4, 1 - 1e-4)) + votes, weight)
    assert torch.equal(bank(keys, logits), want) and bank.weight.dtype == torch.float32 and bank.weight.ndim == 0


def test_a_weight_to_be_chosen_starts_at_a_half_and_a_state_dict_carries_the_chosen():
    bank, half, fixed = filled(weight=-1), filled(), filled(weight=0.3)
    keys, logits = torch.randn(5, 6), torch.randn(5, 3)
    assert bank.chooses and not fixed.chooses and torch.equal(bank(keys, logits), half(keys, logits))
    bank.load_state_dict(fixed.state_dict())
    assert torch.equal(bank(keys, logits), fixed(keys, logits)) and "weight=0.3," in repr(bank)


def cosine(a, b):
    return a @ b / max(math.sqrt(a @ a), 1e-12) / max(math.sqrt(b @ b), 1e-12)


def similar(bank, key, j, mean):
    parts, start = [], 0
    for width in bank.blocks:
        parts.append(cosine((key - mean)[start:start + width], (bank.slots[j].double().numpy() - mean)[start:start + width]))
        start += width
    return np.mean(parts)


def by_hand(bank, key, image):
    """One slot after the other, in float64: the regression as gradient descent would find it, then the votes."""
    used = range(int(bank.filled))
    slots, labels = bank.slots.double().numpy(), bank.slot_labels.numpy()
    mean = sum(slots[j] for j in used) / len(used)

    def kernel(a, j):
        return math.exp((similar(bank, a, j, mean) - 1) / bank.temperature)

    matrix = np.array([[kernel(slots[i], j) for j in used] for i in used])
    out = []
    for c in range(labels.shape[1]):
        known = [labels[j, c] for j in used if labels[j, c] >= 0]
        base = np.mean(known) if known else 0
        target = np.array([(labels[j, c] - base) if labels[j, c] >= 0 else 0 for j in used]) / (base * (1 - base) + FLOOR)
        a = np.linalg.inv(matrix + bank.ridge * np.eye(len(used))) @ target
        out.append(sum(a[j] * kernel(key.double().numpy(), j) for j in used if image < 0 or bank.slot_ids[j] != image))
    return out


def test_contributions_are_signed_one_slot_after_the_other_and_their_sum_is_the_logit():
    bank, logits = filled(weight=0.4), torch.randn(4, 3)
    keys, ids = torch.randn(4, 6) * 2 + 3, torch.tensor([3, -1, 40, 19])
    mean = bank.slots[:20].double().numpy().mean(0)
    head, prior, each = bank.contributions(keys, logits, ids)
    want = np.zeros((4, 24, 3))
    for b, (key, image) in enumerate(zip(keys.double().numpy(), ids.tolist())):
        for j in range(20):
            if image < 0 or bank.slot_ids[j] != image:
                kernel = math.exp((similar(bank, key, j, mean) - 1) / bank.temperature)
                want[b, j] = 0.4 * bank.coefficients[j].numpy() * kernel
    np.testing.assert_allclose(each, want, rtol=1e-4, atol=1e-6)
    assert not each[0, 3].any() and not each[3, 19].any() and each[1, 3].all() and (each > 0).any() and (each < 0).any()
    bank.expect(ids)
    torch.testing.assert_close(head + prior + each.sum(1), bank(keys, logits), rtol=0, atol=1e-5)
    torch.testing.assert_close(head, 0.6 * logits)
    bank.coefficients[:, 1] = 0  # a class without votes has the head's logit
    head, prior, each = bank.contributions(keys, logits, ids)
    assert torch.equal(head[:, 1], logits[:, 1]) and prior[1] == 0 and not each[:, :, 1].any() and prior[2] != 0


def test_a_positive_slot_alone_speaks_for_its_class_and_a_negative_one_against_it():
    bank = VotingBank(2, 1, size=4)
    bank.write(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.arange(2), torch.tensor([[1.0], [0.0]]))
    _, _, each = bank.eval().contributions(torch.tensor([[1.0, 0.1]]), torch.zeros(1, 1))
    assert each[0, 0, 0] > 0 > each[0, 1, 0] and each[0, 0, 0] > -each[0, 1, 0] and not each[0, 2:].any()


@pytest.mark.parametrize("size", [24, 12])
@pytest.mark.parametrize("ridge", [0.01, 3.0])
@pytest.mark.parametrize("temperature", [0.05, 0.8, 5.0])
def test_equals_the_regression_by_hand(size, ridge, temperature):
    bank = filled(size=size, temperature=temperature, ridge=ridge, weight=0.4)
    keys, ids = torch.randn(9, 6) * 2 + 3, torch.tensor([0, 3, 5, 7, -1, -1, 40, 41, 19])
    want = np.array([by_hand(bank, key, int(i)) for key, i in zip(keys, ids)])
    votes, heard = bank.votes(keys, ids)
    np.testing.assert_allclose(votes, want, rtol=2e-3, atol=2e-3)
    logits = torch.randn(9, 3)
    bank.expect(ids)
    prior = torch.logit(bank.shares).numpy()
    np.testing.assert_allclose(bank(keys, logits), 0.6 * logits.numpy() + 0.4 * (prior + want), rtol=2e-3, atol=3e-3)
    assert heard.all() and np.abs(want).max() > 0.01


def test_training_passes_the_logits_through_and_remembers_the_batch():
    bank = VotingBank(6, 3, size=8, k=2).train()
    keys, logits = torch.randn(4, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    bank.expect(torch.arange(4), torch.eye(4)[:, :3])
    assert bank(keys, logits) is logits and bank.filled.item() == 4
    bank(keys, logits)  # nobody said whose these are
    assert bank.filled.item() == 4 and bank.steps.item() == 1
    bank.eval()(keys, logits).sum().backward()
    assert keys.grad is None and logits.grad.eq(0.5).all()  # the head's half


def test_an_empty_bank_a_weight_of_0_and_a_class_that_nobody_has_change_nothing():
    keys, logits = torch.randn(4, 6), torch.randn(4, 3)
    assert torch.equal(VotingBank(6, 3, size=8, k=2).eval()(keys, logits), logits)
    assert torch.equal(filled(weight=0.0)(torch.randn(4, 6), logits), logits)
    bank = VotingBank(6, 3, size=8, k=2)
    bank.write(torch.randn(8, 6), torch.arange(8), torch.tensor([[0.0, 1.0, i % 2] for i in range(8)]))
    out = bank.eval()(keys, logits)
    assert torch.equal(out[:, :2], logits[:, :2]) and (out[:, 2] != logits[:, 2]).all()


def test_a_small_ridge_and_a_narrow_kernel_give_the_slots_own_labels():
    bank = filled(temperature=1e-2, ridge=1e-3)
    votes, _ = bank.votes(bank.slots[:20])
    known = bank.slot_labels[:20] >= 0
    assert ((votes > 0) == (bank.slot_labels[:20] == 1))[known].all()


def test_slots_that_say_the_same_share_one_vote():
    """Nine copies of one positive are hardly more than one where the ridge is small; a count of votes would give nine."""
    near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.2], [-1.0, -0.2], [-0.9, 0.1], [0.0, 1.0], [0.0, -1.0]])
    said = []
    for copies in (1, 9):
        bank = VotingBank(2, 1, size=32, ridge=1e-3)
        keys = torch.cat([near.expand(copies, 2), far])
        # unequal shares, so hold the votes against the class's own variance
        labels = torch.cat([torch.ones(copies, 1), torch.zeros(5, 1)])
        bank.write(keys, torch.arange(len(keys)), labels)
        bank.eval()
        base = labels.mean()
        votes, _ = bank.votes(near)
        said.append(float(votes * (base * (1 - base) + FLOOR) + base))
    assert said == pytest.approx([1.0, 1.0], abs=0.02)


def test_the_prior_is_the_share_of_late_batches_and_the_bank_knows_it_from_the_first():
    bank = VotingBank(4, 3, size=8)
    first = torch.tensor([[1.0, 0.0, torch.nan]] * 5 + [[0.0, 0.0, torch.nan]] * 5)
    bank.write(torch.randn(10, 4), torch.arange(10), first)
    torch.testing.assert_close(bank.shares, torch.tensor([0.5, 0.0, 0.0]))
    for _ in range(600):
        bank.write(torch.randn(10, 4), torch.arange(10), torch.tensor([[0.0, 1.0, 1.0]] * 10))
    assert bank.shares[0] < 0.01 and (bank.shares[1:] > 0.99).all()


def test_training_and_back_solves_again():
    bank = filled()
    before = bank.coefficients.clone()
    bank.train().write(torch.randn(4, 6), torch.arange(50, 54), torch.ones(4, 3))
    assert torch.equal(bank.coefficients, before)
    assert not torch.equal(bank.eval().coefficients, before)


def test_what_is_solved_is_not_solved_again_and_kept_directions_are_of_todays_slots(monkeypatch):
    bank, solved = filled(), []
    keys, another = torch.randn(5, 6), filled(ridge=5.0).state_dict()
    first = bank.votes(keys)[0]
    assert torch.equal(bank.slot_directions(), bank.directions(bank.slots)) and bank.slot_directions() is bank.slot_directions()
    solve = VotingBank.solve
    monkeypatch.setattr(VotingBank, "solve", lambda self: (solved.append(1), solve(self)))
    bank.train().eval()
    assert not solved and torch.equal(bank.votes(keys)[0], first)
    for change in (lambda: bank.slots.mul_(1.5), lambda: bank.slot_labels.neg_(), lambda: bank.filled.sub_(1),
                   lambda: bank.load_state_dict(another), lambda: bank._buffers.update(slots=bank.slots.clone())):
        before = len(solved)
        bank.train()
        change()
        bank.eval()
        assert len(solved) == before + 1 and torch.equal(bank.slot_directions(), bank.directions(bank.slots))
    other = copy.deepcopy(bank)
    other.slots[0].mul_(-2)
    assert not torch.equal(other.slot_directions(), bank.slot_directions())


def test_the_factor_takes_the_place_of_the_matrix():
    bank = filled(size=600, count=600)
    slots = bank.directions(bank.slots)
    matrix = bank.kernel(slots @ slots.T) + bank.ridge * torch.eye(600)
    labels = bank.slot_labels.float()
    known = (labels >= 0).float()
    base = ((labels == 1) * known).sum(0) / known.sum(0)
    want = torch.linalg.solve(matrix.double(), ((labels - base) * known / (base * (1 - base) + FLOOR)).double())
    torch.testing.assert_close(bank.coefficients.double(), want, rtol=1e-4, atol=1e-4)


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
    for training in (True, True, False):
        bank.train(training)  # solving reads the number of filled slots, once an epoch
        with NoReading():
            bank.expect(ids, labels)
            bank(keys, logits).sum()
    assert bank.filled.item() == 5


def test_a_large_bank_costs_what_is_filled_and_one_that_cannot_fit_is_refused(monkeypatch):
    large, small = (VotingBank(6, 3, size=size, blocks=BLOCKS) for size in (65536, 64))
    keys, labels = torch.randn(42, 6), torch.randint(0, 2, (42, 3)).float()
    for bank in (large, small):
        bank.write(keys, torch.arange(42), labels)
        bank.eval()
    torch.testing.assert_close(large.coefficients[:42], small.coefficients[:42], rtol=1e-4, atol=1e-5)
    assert not large.coefficients[42:].any()
    with pytest.raises(MemoryError, match=r"65,536 slots need 21\.5 GB .* GB are free: lower bank_size"):
        monkeypatch.setattr(votes.psutil, "virtual_memory", lambda: SimpleNamespace(available=16e9))
        large.refuse(65536)


def test_refusals():
    for wrong in ({"weight": -0.5}, {"weight": 1.5}, {"temperature": 0.0}, {"ridge": 0.0},
                  {"blocks": (2, 2)}, {"k": 0}, {"strategy": "best"}):
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
    ("mobilenet_v2", [24, 32, 96]), ("efficientnet_v2_s", [48, 64, 160]), ("resnet50", [256, 512, 1024]),
    ("densenet121", [256, 512, 1024]), ("vgg16", [256, 512, 512]), ("timm:test_convnext", None),
    ("timm:efficientformerv2_s0", None), ("timm:coatnet_nano_rw_224", None)])
def test_scales_are_the_trunks_maps(arch, channels):
    trunk = split_backbone(arch, "none").trunk.eval()
    ends, found = find_scales(trunk)
    assert channels is None or found == channels
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = trunk(x)
        out, maps = maps_of(trunk, ends, x, lambda part, x: part(x))
    assert torch.equal(out, want) and [m.shape[1] for m in maps] == found
    assert all(224 // m.shape[-1] in (4, 8, 16) for m in maps) and not trunk.training


def test_a_trunk_without_these_strides_is_one_block():
    for trunk in (nn.Sequential(nn.Conv2d(3, 7, 3, padding=1)), nn.Conv2d(3, 7, 2, 2)):
        assert find_scales(trunk) == ([1], [7]) and trunk.training
        out, maps = maps_of(trunk, [1], torch.randn(2, 3, 8, 8), lambda part, x: part(x))
        assert len(maps) == 1 and maps[0] is out
