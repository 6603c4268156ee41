"""The bank whose slots vote, beside one written with loops, and the scales that its keys are made of."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from charmlib.nn import VotingBank, find_scales, split_backbone
from charmlib.nn.scales import maps_of
from tests.nn.test_bank import NoReading


def fill(bank, keys, labels):
    """A bank that chose among images of ids 0, 1, ... with these keys."""
    bank.choose(torch.arange(len(keys)), labels)
    held = bank.slot_ids[:bank.filled]
    bank.renew(torch.arange(len(held)), keys[held])
    bank.calibrate()
    return bank.eval()


def filled(size=24, k=3, count=20, **options):
    torch.manual_seed(0)
    bank = VotingBank(6, 3, size=size, k=k, **{"threshold": 1.0, **options})
    keys = torch.randn(count, 6) * torch.tensor([5.0, 5.0, 1.0, 1.0, 1.0, 1.0]) + 3
    labels = (torch.rand(count, 3) < torch.tensor([0.5, 0.3, 0.1])).float()
    labels[torch.rand(count, 3) < 0.15] = torch.nan
    labels[:, 0] = torch.arange(count) % 2
    return fill(bank, keys, labels)


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.77, 1.0])
def test_a_weight_blends_as_the_formula_with_a_number_does_to_the_bit(weight):
    bank, keys, logits = filled(weight=weight), torch.randn(37, 6), torch.randn(37, 3)
    want = torch.lerp(logits, torch.logit(bank.shares.clamp(1e-4, 1 - 1e-4)) + bank.votes(keys), weight)
    assert torch.equal(bank(keys, logits), want) and bank.weight.dtype == torch.float32 and bank.weight.ndim == 0


def test_a_weight_to_be_chosen_starts_at_a_half_and_a_state_dict_carries_the_chosen():
    bank, half, fixed = filled(weight=-1), filled(), filled(weight=0.3)
    keys, logits = torch.randn(5, 6), torch.randn(5, 3)
    assert bank.chooses and not fixed.chooses and torch.equal(bank(keys, logits), half(keys, logits))
    bank.load_state_dict(fixed.state_dict())
    assert torch.equal(bank(keys, logits), fixed(keys, logits)) and "weight=0.3," in repr(bank)


def by_hand(bank, key, image, c):
    """One slot after the other, in float64: the two mean similarities, and those of the slots that make them."""
    used = range(int(bank.filled))
    slots = bank.slots.double().numpy()[:len(used)]
    mean, deviation = slots.mean(0), slots.std(0)
    deviation[deviation == 0] = 1

    def unit(v):
        v = (v - mean) / deviation
        return v / np.sqrt(v @ v)

    sides = []
    for label in (1, 0):
        near = sorted(((unit(key) @ unit(slots[j]), j) for j in used if bank.slot_labels[j, c] == label
                       and (image < 0 or bank.slot_ids[j] != image)), reverse=True)[:bank.k]
        sides.append(near)
    return [np.mean([similarity for similarity, _ in near]) for near in sides] if all(sides) else None, sides


def usual(bank):
    slots = bank.slots.double().numpy()
    some = [j * int(bank.filled) // 1024 for j in range(1024)]
    of = {(j, c): by_hand(bank, slots[j], int(bank.slot_ids[j]), c)[0] for j in set(some) for c in range(3)}
    return np.array([np.mean([of[j, c] for j in some if bank.slot_labels[j, c] == 0], 0) for c in range(3)]).T


@pytest.mark.parametrize("size", [24, 12])
@pytest.mark.parametrize("k", [1, 3, 12])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_equals_the_nearest_slots_by_hand(size, k, temperature):
    bank = filled(size=size, temperature=temperature, k=k, weight=0.4)
    keys, ids = torch.randn(9, 6) * 2 + 3, torch.tensor([0, 3, 5, 7, -1, -1, 40, 41, 19])
    np.testing.assert_allclose(bank.usual, usual(bank), atol=1e-5)
    want = np.array([[np.subtract(*by_hand(bank, key, int(i), c)[0] - usual(bank)[:, c]) / temperature for c in range(3)]
                     for key, i in zip(keys.double().numpy(), ids)])
    np.testing.assert_allclose(bank.votes(keys, ids), want, rtol=1e-4, atol=1e-4)
    logits = torch.randn(9, 3)
    bank.expect(ids)
    prior = torch.logit(bank.shares).numpy()
    np.testing.assert_allclose(bank(keys, logits), 0.6 * logits.numpy() + 0.4 * (prior + want), rtol=1e-4, atol=1e-4)
    assert bank.fitted.all() and np.abs(want).max() > 0.01


def test_contributions_are_signed_one_slot_after_the_other_and_their_sum_is_the_logit():
    bank, logits = filled(weight=0.4), torch.randn(4, 3)
    keys, ids = torch.randn(4, 6) * 2 + 3, bank.slot_ids[[3, 0, 0, 12]]
    ids[1:3] = torch.tensor([-1, 40])
    head, prior, each = bank.contributions(keys, logits, ids)
    want = np.zeros((4, 24, 3))
    for b, (key, image) in enumerate(zip(keys.double().numpy(), ids.tolist())):
        for c in range(3):
            for sign, mean, near in zip((1, -1), usual(bank)[:, c], by_hand(bank, key, image, c)[1]):
                for similarity, j in near:
                    want[b, j, c] = 0.4 * sign * (similarity - mean) / len(near) / bank.temperature
    np.testing.assert_allclose(each, want, rtol=1e-4, atol=1e-6)
    assert not each[0, 3].any() and not each[3, 12].any() and (each > 0).any() and (each < 0).any()
    bank.expect(ids)
    torch.testing.assert_close(head + prior + each.sum(1), bank(keys, logits), rtol=0, atol=1e-5)
    torch.testing.assert_close(head, 0.6 * logits)
    bank.fitted[1] = False  # a class without votes has the head's logit
    head, prior, each = bank.contributions(keys, logits, ids)
    assert torch.equal(head[:, 1], logits[:, 1]) and prior[1] == 0 and not each[:, :, 1].any() and prior[2] != 0


def test_a_positive_slot_speaks_for_its_class_and_a_negative_one_against_it():
    bank = VotingBank(2, 1, size=4, k=1, threshold=1.0)
    fill(bank, torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.3], [-1.0, -0.3]]), torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    near, far = bank.votes(torch.tensor([[1.0, 0.1], [-1.0, 0.1]]))[:, 0]
    assert near > far


def test_of_equal_prevalence_in_the_bank_or_not_the_mean_vote_of_an_image_without_the_class_is_near_0():
    """A rare class has fewer slots, so that its nearest lie farther away: without what is usual it would be voted down."""
    torch.manual_seed(0)
    bank = VotingBank(8, 2, size=400, k=5, threshold=1.0)
    labels = (torch.rand(400, 2) < torch.tensor([0.5, 0.03])).float()
    fill(bank, torch.randn(400, 8), labels)
    votes = bank.votes(torch.randn(500, 8)).mean(0) * bank.temperature
    assert votes.abs().max() < 0.05 and torch.sub(*bank.usual)[1] < -0.2 < torch.sub(*bank.usual)[0]


def test_training_passes_the_logits_through_and_no_gradient_reaches_the_votes():
    bank, keys, logits = filled().train(), torch.randn(4, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    before = copy.deepcopy(bank.state_dict())
    bank.expect(torch.arange(4), torch.eye(4)[:, :3])
    assert bank(keys, logits) is logits and all(torch.equal(value, before[name]) for name, value in bank.state_dict().items())
    bank.eval()(keys, logits).sum().backward()
    assert keys.grad is None and logits.grad.eq(0.5).all()  # the head's half


def test_an_empty_bank_a_weight_of_0_and_a_class_that_nobody_has_change_nothing():
    keys, logits = torch.randn(4, 6), torch.randn(4, 3)
    assert torch.equal(VotingBank(6, 3, size=8, k=2).eval()(keys, logits), logits)
    assert torch.equal(filled(weight=0.0)(torch.randn(4, 6), logits), logits)
    bank = VotingBank(6, 3, size=8, k=2, threshold=1.0)
    out = fill(bank, torch.randn(8, 6), torch.tensor([[0.0, 1.0, i % 2] for i in range(8)]))(keys, logits)
    assert torch.equal(out[:, :2], logits[:, :2]) and (out[:, 2] != logits[:, 2]).all()


def test_the_only_slot_of_a_class_does_not_vote_on_its_own_image():
    bank = VotingBank(2, 1, size=4, k=2, threshold=1.0, weight=1.0)
    fill(bank, torch.randn(2, 2), torch.tensor([[1.0], [0.0]]))
    assert bank.votes(bank.slots[:1], torch.tensor([0])).item() == 0 != bank.votes(bank.slots[:1]).item()
    assert not bank.contributions(bank.slots[:1], torch.zeros(1, 1), torch.tensor([0]))[2].any()


def test_kept_directions_are_of_todays_slots():
    bank, another = filled(), filled(count=18).state_dict()
    assert torch.equal(bank.slot_directions(), bank.directions(bank.slots)) and bank.slot_directions() is bank.slot_directions()
    for change in (lambda: bank.slots.mul_(1.5), lambda: bank.load_state_dict(another), lambda: bank.deviation.mul_(2),
                   lambda: bank._buffers.update(slots=bank.slots.clone() + 1), bank.calibrate):
        before = bank.slot_directions()
        change()
        assert torch.equal(bank.slot_directions(), bank.directions(bank.slots)) and bank.slot_directions() is not before
    other = copy.deepcopy(bank)
    other.slots[0].mul_(-2)
    assert not torch.equal(other.slot_directions(), bank.slot_directions())


def drawn_labels(n=400):
    torch.manual_seed(3)
    labels = (torch.rand(n, 4) < torch.tensor([0.3, 0.15, 0.05, 0.01])).float()
    labels[:20] = torch.nan
    return labels


@pytest.mark.parametrize(("threshold", "size"), [(0.06, 400), (0.2, 400), (1.0, 400), (0.2, 60), (1.0, 13)])
def test_labels_choose_the_rare_evenly_and_as_many_without_a_finding(threshold, size):
    """By hand: the rarest finding of each image, its share, and no class far ahead of one that has images left."""
    labels = drawn_labels()
    share = np.nanmean(labels, 0)
    bank = VotingBank(6, 4, size=size, k=2, threshold=threshold)
    bank.choose(torch.arange(1000, 1400), labels)
    held = [i - 1000 for i in bank.slot_ids[:bank.filled].tolist()]
    of = {i: min((share[c], c) for c in range(4) if labels[i, c] == 1) if (labels[i] == 1).any() else None
          for i in range(20, 400)}
    rare = {i for i, found in of.items() if found and found[0] <= threshold}
    none = {i for i, found in of.items() if found is None}
    kept = rare & set(held)
    assert set(held) <= rare | none and held == sorted(set(held)) and len(held) <= size
    assert len(kept) == min(len(rare), size // 2) and len(set(held) & none) == min(len(none), len(kept), size - len(kept))
    filed = {c: [sum(of[i][1] == c for i in some) for some in (kept, rare)] for c in range(4)}
    most = max(here for here, _ in filed.values())
    assert all(here == there or here >= most - 1 for here, there in filed.values())
    assert torch.equal(bank.slot_labels[:len(held)].float(), torch.nan_to_num(labels[held], nan=-1.0))
    torch.testing.assert_close(bank.shares.double(), torch.from_numpy(share.astype(float)))
    assert not bank.slots.any() and bank.slot_ids[len(held):].eq(-1).all()


def test_a_choice_made_again_is_the_same_and_a_smaller_one_leaves_no_slot_behind():
    bank, labels = VotingBank(6, 4, size=100, k=2, threshold=0.2), drawn_labels()
    bank.choose(torch.arange(400), labels)
    first = bank.slot_ids.clone()
    bank.renew(torch.arange(int(bank.filled)), torch.ones(int(bank.filled), 6))
    bank.choose(torch.arange(400), labels)
    assert torch.equal(bank.slot_ids, first) and bank.seen == 800
    bank.choose(torch.arange(100), labels[:100])
    assert bank.filled < 100 and not bank.slots[bank.filled:].any() and bank.slot_ids[:bank.filled].max() < 100


def test_eval_is_frozen_and_state_dict_carries_all():
    bank = filled()
    before = copy.deepcopy(bank.state_dict())
    keys = torch.randn(5, 6)
    bank.expect(torch.arange(5), torch.ones(5, 3))
    first = bank(keys, torch.zeros(5, 3))
    assert all(torch.equal(v, before[n]) for n, v in bank.state_dict().items())
    other = VotingBank(6, 3, size=24, k=3, threshold=1.0).eval()
    other.load_state_dict(before)
    other.expect(torch.arange(5))
    assert torch.equal(other(keys, torch.zeros(5, 3)), first)


def test_nothing_reads_the_device():
    bank, keys, logits, ids, labels = filled(), torch.randn(5, 6), torch.randn(5, 3), torch.arange(5), torch.eye(5)[:, :3]
    for training in (True, False):
        bank.train(training)
        with NoReading():
            bank.expect(ids, labels)
            bank(keys, logits).sum()


def test_refusals():
    for wrong in ({"weight": -0.5}, {"weight": 1.5}, {"temperature": 0.0}, {"k": 0}, {"k": 9}, {"threshold": -0.1}):
        with pytest.raises(ValueError):
            VotingBank(6, 3, **{"size": 8, "k": 2, **wrong})
    bank = filled()
    bank.expect(torch.arange(3))
    with pytest.raises(ValueError, match="announced 3"):
        bank(torch.randn(4, 6), torch.randn(4, 3))


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
