import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from charmlib.nn import RareMemoryBank
from charmlib.nn.bank import RETRIEVALS


class SlowBank:
    """The bank as one would write it down: Python loops, lists, one sample at a time."""

    def __init__(self, size, k, threshold, rule, retrieval, bank_norm, gate=0.7):
        self.size, self.k, self.threshold, self.rule = size, k, threshold, rule
        self.retrieval, self.bank_norm, self.gate = retrieval, bank_norm, gate
        self.slots, self.next = {}, 0

    def __call__(self, z, ids, labels, step, training):
        if self.retrieval == "published":  # stores first, so that an image meets itself
            self._store(z, ids, labels, step, training)
            return np.array([self._answer(q, -1) for q in z])
        out = [self._answer(q, int(i)) for q, i in zip(z, ids)]
        self._store(z, ids, labels, step, training)
        return np.array(out)

    def _store(self, z, ids, labels, step, training):
        if training:
            norms = [np.linalg.norm(v) for v in z]
            mu, mean = np.mean(norms), z.mean(0)
            for v, norm, image, label in zip(z, norms, ids, labels):
                if self.rule == "angle":
                    score = 1 - v @ mean / (norm * np.linalg.norm(mean))
                else:
                    score = abs(norm - mu) / mu
                if score < self.threshold if self.rule == "published" else score > self.threshold:
                    self.slots[self.next] = (v.copy(), int(image), label.copy(), step, score)
                    self.next = (self.next + 1) % self.size
                    if self.next == 0 and self.retrieval == "published":
                        break  # drops the rest of the batch

    def _answer(self, q, image):
        found = []
        for slot, (m, owner, *_) in self.slots.items():
            if owner == image and image >= 0:
                continue
            a = q / np.linalg.norm(q) if self.bank_norm in ("both", "query") else q
            b = m / np.linalg.norm(m) if self.bank_norm in ("both", "memory") else m
            found.append((a @ b, slot))
        if self.retrieval == "published":
            found += [(0.0, None)] * (self.size - len(self.slots))  # empty slots compete
        found = [(s, slot) for s, slot in sorted(found, key=lambda pair: -pair[0])[: self.k] if slot is not None]
        if not found:
            return q
        weights = np.array([s for s, _ in found])
        if self.retrieval not in ("cosine", "published"):
            weights = np.exp(weights - weights.max())
            weights /= weights.sum()
        if self.retrieval == "gated":
            weights *= self.gate
        return q + sum(w * self.slots[slot][0] for w, (_, slot) in zip(weights, found))


@pytest.mark.parametrize("rule", ["rare", "published", "angle"])
@pytest.mark.parametrize(("retrieval", "bank_norm"), [("softmax", "both"), ("cosine", "both"), ("gated", "both"),
                                                      ("cosine", "query"), ("softmax", "memory"), ("softmax", "none"),
                                                      ("published", "both"), ("published", "query")])
@pytest.mark.parametrize("size", [3, 7, 64])
def test_equals_the_slow_bank(rule, retrieval, bank_norm, size):
    k, threshold = 3, {"rare": 0.15, "published": 0.25, "angle": 0.8}[rule]
    bank = RareMemoryBank(6, 4, size=size, k=k, threshold=threshold, rule=rule, retrieval=retrieval, bank_norm=bank_norm)
    if bank.gate is not None:
        torch.nn.init.constant_(bank.gate, 0.7)
    slow = SlowBank(size, k, threshold, rule, retrieval, bank_norm)
    generator = np.random.default_rng(0)
    for step in range(8):
        z = generator.normal(size=(10, 6)) * generator.uniform(0.5, 1.5, (10, 1))
        ids = generator.permutation(30)[:10]
        labels = generator.integers(0, 2, (10, 4))
        bank.train(step != 5)
        bank.expect(torch.tensor(ids), torch.tensor(labels))

        z = z.astype(np.float32).astype(np.float64)
        got = bank(torch.tensor(z))
        want = slow(z, ids, labels, bank.steps.item() - (step != 5), step != 5)
        np.testing.assert_allclose(got.detach().numpy(), want, rtol=2e-4, atol=2e-4)
    assert bank.filled.item() == len(slow.slots) and bank.pointer.item() == slow.next
    for slot, (feature, image, label, step, score) in slow.slots.items():
        np.testing.assert_allclose(bank.slots[slot], feature, rtol=1e-5)
        assert bank.slot_ids[slot] == image and bank.slot_steps[slot] == step
        assert bank.slot_labels[slot].tolist() == label.tolist()
        assert bank.slot_scores[slot].item() == pytest.approx(score, rel=1e-4)


@pytest.mark.parametrize("bank_norm", ["both", "query", "memory", "none"])
@pytest.mark.parametrize("retrieval", ["softmax", "cosine", "gated"])
def test_gradients_are_those_of_the_dense_similarity(retrieval, bank_norm):
    """The bank finds its k slots without gradient and computes their similarities again; the twin keeps all of them."""
    torch.manual_seed(0)
    bank = filled(k=3, retrieval=retrieval, bank_norm=bank_norm)
    if bank.gate is not None:
        torch.nn.init.constant_(bank.gate, 0.7)
    z, pull = torch.randn(6, 4, requires_grad=True), torch.randn(6, 4)
    query = torch.nn.functional.normalize(z, dim=1) if bank_norm in ("both", "query") else z
    memory = bank.slots[:5]
    memory = torch.nn.functional.normalize(memory, dim=1) if bank_norm in ("both", "memory") else memory
    top, index = (query @ memory.T).topk(3, dim=1)
    weights = top if retrieval == "cosine" else torch.softmax(top, 1) * (1 if bank.gate is None else bank.gate)
    out = z + torch.einsum("bk,bkd->bd", weights, bank.slots[index])
    (want,) = torch.autograd.grad((out * pull).sum(), z)
    (got,) = torch.autograd.grad((bank(z) * pull).sum(), z)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def filled(k=1, retrieval="softmax", **options):
    bank = RareMemoryBank(4, 2, size=8, k=k, threshold=0.0, retrieval=retrieval, **options)
    torch.manual_seed(1)
    bank.write(torch.randn(5, 4), torch.arange(5), torch.zeros(5, 2))
    return bank.eval()


def test_k_1_returns_the_nearest_slot():
    bank = filled()
    z = torch.randn(6, 4)
    nearest = torch.nn.functional.cosine_similarity(z[:, None], bank.slots[None, :5], dim=2).argmax(1)
    torch.testing.assert_close(bank(z), z + bank.slots[nearest])


def test_an_empty_bank_changes_nothing_and_fills_after_reading():
    bank = RareMemoryBank(4, 2, size=8, k=3, threshold=0.0)
    z = torch.randn(5, 4)
    assert torch.equal(bank(z), z)
    assert bank.filled.item() > 0 and not torch.equal(bank(z), z)


def test_fewer_slots_than_k_are_enough():
    bank = filled(k=8)
    slots, weights, _ = bank.retrieve(torch.randn(3, 4))
    assert (slots[:, :5] >= 0).all() and (slots[:, 5:] == -1).all()
    assert (weights[:, 5:] == 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_an_image_never_meets_itself_even_if_its_feature_is_there():
    bank = filled(k=5)
    z = bank.slots[:5].clone()
    slots, _, _ = bank.retrieve(z, torch.arange(5))
    assert all(i not in slots[i].tolist() for i in range(5))
    strangers, _, _ = bank.retrieve(z, torch.full((5,), -1))
    assert strangers[:, 0].tolist() == list(range(5))  # similarity alone would have found it first


def test_eval_is_frozen_and_the_gate_starts_at_nothing():
    bank = filled(k=3, retrieval="gated")
    before, z = copy.deepcopy(bank.state_dict()), torch.randn(4, 4)
    assert torch.equal(bank(z), z)
    assert all(torch.equal(v, bank.state_dict()[k]) for k, v in before.items())
    bank(z).sum().backward()
    assert bank.gate.grad.abs() > 0  # it can learn to open


def test_state_dict_carries_everything():
    bank = filled(k=2)
    other = RareMemoryBank(4, 2, size=8, k=2, threshold=0.0).eval()
    other.load_state_dict(bank.state_dict())
    z = torch.randn(3, 4)
    assert torch.equal(bank(z), other(z))


def test_a_batch_with_overflow_is_not_stored():
    bank = RareMemoryBank(4, 2, size=8, k=1, threshold=0.0)
    z = torch.randn(6, 4)
    z[2] = float("inf")
    bank.write(z)
    assert bank.filled.item() == 0 and torch.isfinite(bank.slots).all()


def test_thresholds_that_take_all_or_nothing_are_counted():
    greedy = RareMemoryBank(4, 2, size=8, k=1, threshold=1e9, rule="published")
    none = RareMemoryBank(4, 2, size=8, k=1, threshold=1e9, rule="rare")
    for bank in (greedy, none):
        bank(torch.randn(6, 4))
    assert (greedy.accepted.item(), none.accepted.item(), none.seen.item()) == (6, 0, 6)


class NoReading(TorchDispatchMode):
    """Fails on what makes a GPU wait: reading a value, and shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")), name
        if name.startswith("aten.index.") or name.startswith("aten.index_put"):
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), "boolean indexing"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rule", ["rare", "published", "angle"])
@pytest.mark.parametrize("retrieval", RETRIEVALS)
def test_no_synchronisation_in_update_and_retrieval(rule, retrieval):
    bank = RareMemoryBank(4, 2, size=8, k=3, threshold=0.1, rule=rule, retrieval=retrieval)
    ids, labels, z = torch.arange(5), torch.zeros(5, 2), torch.randn(5, 4)
    with NoReading():
        for _ in range(3):
            bank.expect(ids, labels)
            bank(z).sum()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoReading():
        bank.filled.item()


def test_refusals():
    for wrong in ({"k": 0}, {"k": 9}, {"threshold": -1.0}, {"rule": "odd"}, {"retrieval": "sum"}, {"bank_norm": "l1"}):
        with pytest.raises(ValueError):
            RareMemoryBank(4, 2, **{"size": 8, "k": 1, **wrong})
    bank = filled()
    bank.expect(torch.arange(3))
    with pytest.raises(ValueError, match="announced 3"):
        bank(torch.randn(4, 4))
