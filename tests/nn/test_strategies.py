"""Each strategy beside a bank written with lists and loops, and what makes each of them what it is."""

import copy
import math

import numpy as np
import pytest
import torch

from charmlib.nn import RareMemoryBank
from charmlib.nn.strategies import STRATEGIES
from tests.nn.test_bank import NoReading

ALL = ("rarity", "statistical", "entropy", "diversity", "hybrid", "fifo", "reservoir", "hard")


class ListBank:
    """Slots as a list of (feature, image, score), one sample after the other. ``draws`` are the uniform numbers of a batch."""

    def __init__(self, strategy, size, threshold, rule, momentum):
        self.strategy, self.size, self.threshold, self.rule, self.momentum = strategy, size, threshold, rule, momentum
        self.slots, self.next, self.seen, self.mean = [], 0, 0, None

    def write(self, z, ids, labels, logits, draws):
        getattr(self, self.strategy)(z, ids, labels, logits, draws)
        self.seen += len(z)

    def put_in_ring(self, z, ids, scores, keep):
        for v, image, score, kept in zip(z, ids, scores, keep):
            if kept:
                self.set(self.next, (v, int(image), score))
                self.next = (self.next + 1) % self.size

    def set(self, slot, entry):
        if slot == len(self.slots):
            self.slots.append(entry)
        else:
            self.slots[slot] = entry

    def lengths(self, z):
        return [math.sqrt(v @ v) for v in z]

    def odd(self, z, mean):
        return [abs(length - mean) / mean for length in self.lengths(z)]

    def new(self, z):
        return [1 - max((v @ m / math.sqrt(v @ v) / math.sqrt(m @ m) for m, *_ in self.slots), default=0.0) for v in z]

    def over(self, scores):
        return [s < self.threshold if self.rule == "published" else s > self.threshold for s in scores]

    def highest(self, scores):
        ordered = sorted(scores)
        place = (1 - self.threshold) * (len(ordered) - 1)
        low = int(place)
        cut = ordered[low] + (place - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        return [s >= cut - 1e-12 for s in scores]

    def rarity(self, z, ids, labels, logits, draws):
        scores = self.odd(z, np.mean(self.lengths(z)))
        self.put_in_ring(z, ids, scores, self.over(scores))

    def statistical(self, z, ids, labels, logits, draws):
        now = np.mean(self.lengths(z))
        self.mean = now if self.mean is None else self.momentum * self.mean + (1 - self.momentum) * now
        scores = self.odd(z, self.mean)
        self.put_in_ring(z, ids, scores, self.over(scores))

    def entropy(self, z, ids, labels, logits, draws):
        scores = []
        for row in logits:
            p = [1 / (1 + math.exp(-x)) for x in row]
            scores.append(np.mean([-q * math.log(q) - (1 - q) * math.log(1 - q) for q in p]))
        self.put_in_ring(z, ids, scores, self.highest(scores))

    def diversity(self, z, ids, labels, logits, draws):
        scores = self.new(z)
        self.put_in_ring(z, ids, scores, self.highest(scores))

    def hybrid(self, z, ids, labels, logits, draws):
        scores = [0.5 * a + 0.5 * b for a, b in zip(self.odd(z, np.mean(self.lengths(z))), self.new(z))]
        self.put_in_ring(z, ids, scores, self.highest(scores))

    def fifo(self, z, ids, labels, logits, draws):
        self.put_in_ring(z, ids, [0.0] * len(z), [True] * len(z))

    def reservoir(self, z, ids, labels, logits, draws):
        for i, (v, image, u) in enumerate(zip(z, ids, draws)):
            number = self.seen + i
            slot = number if number < self.size else int(u * (number + 1))
            if slot < self.size:
                self.set(slot, (v, int(image), 0.0))

    def hard(self, z, ids, labels, logits, draws):
        rows = []
        for v, image, y, x in zip(z, ids, labels, logits):
            terms = [math.log1p(math.exp(-b)) if a == 1 else math.log1p(math.exp(b)) for a, b in zip(y, x) if not math.isnan(a)]
            rows.append((v, int(image), np.mean(terms)))
        home = {image: slot for slot, (_, image, _) in enumerate(self.slots)}
        for row in rows:
            if row[1] in home:
                self.slots[home[row[1]]] = row
        for row in sorted((r for r in rows if r[1] not in home), key=lambda r: -r[2]):
            if len(self.slots) < self.size:
                self.slots.append(row)
                continue
            easiest = min(range(self.size), key=lambda s: self.slots[s][2])
            if row[2] > self.slots[easiest][2]:
                self.slots[easiest] = row


def batches(count, batch=10, features=6, classes=4, images=40):
    random = np.random.default_rng(0)
    for _ in range(count):
        z = (random.normal(size=(batch, features)) * random.uniform(0.5, 1.5, (batch, 1))).astype(np.float32)
        labels = random.integers(0, 2, (batch, classes)).astype(float)
        labels[random.random(labels.shape) < 0.1] = np.nan
        labels[:, 0] = random.integers(0, 2, batch)  # one class is always known
        yield z, random.permutation(images)[:batch], labels, random.normal(size=(batch, classes)).astype(np.float32)


@pytest.mark.parametrize("rule", ["rare", "published"])
@pytest.mark.parametrize("size", [7, 24, 200])
@pytest.mark.parametrize("strategy", ALL)
def test_equals_lists_and_loops(strategy, size, rule):
    bank = RareMemoryBank(6, 4, size=size, k=2, threshold=0.3, strategy=strategy, rule=rule, bank_momentum=0.7).train()
    slow = ListBank(strategy, size, 0.3, rule, 0.7)
    for step, (z, ids, labels, logits) in enumerate(batches(12)):
        torch.manual_seed(step)
        draws = torch.rand(len(z), dtype=torch.float64).tolist()
        torch.manual_seed(step)
        bank.write(*map(torch.tensor, (z, ids, labels, logits)))
        slow.write(z.astype(np.float64), ids, labels, logits.astype(np.float64), draws)
        assert bank.filled.item() == len(slow.slots)
        for slot, (feature, image, score, *_) in enumerate(slow.slots):
            assert bank.slot_ids[slot].item() == image
            np.testing.assert_allclose(bank.slots[slot], feature, rtol=1e-6)
            assert bank.slot_scores[slot].item() == pytest.approx(score, rel=1e-4, abs=1e-6)
    assert 0 < bank.accepted.item() <= bank.seen.item() == slow.seen
    assert len(slow.slots) == size or size == 200


def test_the_parameters_know_them_all():
    from charmlib.params import PARAMS

    assert set(ALL) == set(STRATEGIES) == set(PARAMS["strategy"].choices)
    assert all("MemAug" in (STRATEGIES[name].__doc__ or "") for name in ALL)


@pytest.mark.parametrize("strategy", ALL)
def test_no_synchronisation(strategy):
    bank = RareMemoryBank(6, 4, size=8, k=3, threshold=0.6, strategy=strategy, normalize_retrieved=True).train()
    head = torch.nn.Linear(6, 4)
    with NoReading():
        for z, ids, labels, _ in batches(3):
            bank.expect(torch.tensor(ids), torch.tensor(labels))
            bank(torch.tensor(z), head).sum()
    assert bank.filled.item() > 0


@pytest.mark.parametrize("strategy", ALL)
def test_a_checkpoint_goes_on_as_if_never_stopped(strategy):
    def run(bank, data):
        for step, (z, ids, labels, logits) in data:
            torch.manual_seed(step)
            bank.write(*map(torch.tensor, (z, ids, labels, logits)))
        return bank.state_dict()

    def make():
        return RareMemoryBank(6, 4, size=16, k=2, threshold=0.6, strategy=strategy)

    data = list(enumerate(batches(10)))
    whole = run(make(), data)
    kept = copy.deepcopy(run(make(), data[:6]))
    later = make()
    later.load_state_dict(kept)
    for name, value in run(later, data[6:]).items():
        assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("strategy", ALL)
def test_a_batch_with_overflow_leaves_no_trace(strategy):
    bank = RareMemoryBank(6, 4, size=16, k=2, threshold=0.0, strategy=strategy)
    data = list(batches(3))
    bank.write(*map(torch.tensor, data[0]))
    before = {k: v.clone() for k, v in bank.state_dict().items() if k != "steps"}
    z = data[1][0].copy()
    z[3, 2] = np.inf
    bank.write(torch.tensor(z), *map(torch.tensor, data[1][1:]))
    for name, value in before.items():
        assert torch.equal(bank.state_dict()[name], value), name


@pytest.mark.once
def test_a_reservoir_is_a_uniform_sample_of_all_that_was_seen():
    """Each of 60 features is in a reservoir of 12 with probability 1/5: counts over 4,000 runs, all within 5 sigma, and the
    chi-square of all of them. The published rule, which leans to recent ones, fails the same test."""
    runs, stream, size, batch = 4000, 60, 12, 10

    def counts(write):
        held = torch.zeros(stream)
        for seed in range(runs):
            torch.manual_seed(seed)
            held[write()] += 1
        return held

    def ours():
        bank = RareMemoryBank(1, 1, size=size, k=1, strategy="reservoir")
        for start in range(0, stream, batch):
            ids = torch.arange(start, start + batch)
            bank.write(ids[:, None].float(), ids)
        return bank.slot_ids

    def published():
        slots, at = torch.full((size,), -1), 0
        for number, start in enumerate(range(0, stream, batch), 1):
            for image in torch.arange(start, start + batch)[torch.rand(batch) < size / (number * batch)]:
                slots[at % size], at = image, at + 1
        return slots[slots >= 0]

    expected, spread = runs * size / stream, math.sqrt(runs * size / stream * (1 - size / stream))

    def chi_square(held):
        return (((held - expected) / spread) ** 2).sum().item() * (stream - 1) / stream

    held = counts(ours)
    assert held.sum() == runs * size
    assert (held - expected).abs().max() < 5 * spread
    limit = stream - 1 + 4 * math.sqrt(2 * (stream - 1))
    assert chi_square(held) < limit < chi_square(counts(published))


def test_statistical_without_momentum_is_rarity_and_nothing_else_uses_it():
    z = [b[0] for b in batches(5)]
    for strategy in ALL:
        ends = []
        for momentum in (0.0, 0.9999):
            bank = RareMemoryBank(6, 4, size=16, k=2, threshold=0.2, strategy=strategy, bank_momentum=momentum)
            torch.manual_seed(0)
            for v, ids, labels, logits in batches(5):
                bank.write(*map(torch.tensor, (v, ids, labels, logits)))
            ends.append(bank.slots)
        assert torch.equal(*ends) == (strategy != "statistical")
    still, plain = (RareMemoryBank(6, 4, size=16, k=2, threshold=0.2, strategy=s, bank_momentum=0.0)
                    for s in ("statistical", "rarity"))
    for v in z:
        still.write(torch.tensor(v))
        plain.write(torch.tensor(v))
    assert torch.equal(still.slots, plain.slots)


def test_hard_keeps_the_hardest_of_all_and_forgets_old_losses():
    bank = RareMemoryBank(2, 1, size=4, k=1, strategy="hard")
    z = torch.randn(6, 2)

    def loss(values):  # label 0: the loss is softplus(logit)
        return torch.tensor(values)[:, None]

    bank.write(z, torch.arange(6), torch.zeros(6, 1), loss([5.0, 1.0, 4.0, 2.0, 3.0, 0.0]))
    assert sorted(bank.slot_ids.tolist()) == [0, 2, 3, 4]
    bank.write(z[:1], torch.tensor([0]), torch.zeros(1, 1), loss([-4.0]))  # learnt by now: stays, with its new loss
    assert sorted(bank.slot_ids.tolist()) == [0, 2, 3, 4]
    bank.write(z[:1], torch.tensor([9]), torch.zeros(1, 1), loss([0.5]))
    assert sorted(bank.slot_ids.tolist()) == [2, 3, 4, 9]
    assert bank.accepted.item() == 5  # a held image that is brought up to date is not taken again
    bank.write(z[:2], torch.tensor([4, 8]), torch.zeros(2, 1), loss([-5.0, 1.0]))  # easy by now, and in one batch with a harder
    assert sorted(bank.slot_ids.tolist()) == [2, 3, 8, 9]


def test_ranking_strategies_take_their_share_of_the_batch():
    for strategy in ("entropy", "diversity", "hybrid"):
        for share, wanted in ((0.0, 1), (0.1, 2), (0.5, 10), (1.0, 20), (3.0, 20)):
            bank = RareMemoryBank(6, 4, size=500, k=2, threshold=share, strategy=strategy)
            bank.write(torch.randn(5, 6), logits=torch.randn(5, 4))  # not empty, so that no scores tie
            before = bank.filled.item()
            bank.write(torch.randn(20, 6), logits=torch.randn(20, 4))
            assert bank.filled.item() - before == wanted, (strategy, share)


def test_what_a_strategy_needs_is_asked_for_by_name():
    z = torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"'entropy'.*predict"):
        RareMemoryBank(6, 4, size=8, k=1, strategy="entropy")(z)
    with pytest.raises(ValueError, match=r"'hard'.*expect"):
        RareMemoryBank(6, 4, size=8, k=1, strategy="hard")(z, torch.nn.Linear(6, 4))
    with pytest.raises(ValueError, match="angle"):
        RareMemoryBank(6, 4, strategy="statistical", rule="angle")
    with pytest.raises(ValueError, match="bank_momentum"):
        RareMemoryBank(6, 4, bank_momentum=1.1)


def test_what_was_retrieved_can_take_the_querys_length():
    bank = RareMemoryBank(6, 4, size=8, k=3, threshold=0.0, normalize_retrieved=True)
    z = torch.randn(5, 6)
    assert torch.equal(bank(z), z)  # empty: nothing to scale
    bank.eval()
    z = torch.randn(5, 6)
    _, weights, values = bank.retrieve(z)
    for query, w, m, got in zip(z, weights, values, bank(z)):
        total = sum(a * b for a, b in zip(w, m))
        torch.testing.assert_close(got, query + total / total.norm() * query.norm())


def test_a_gate_opens_what_was_scaled():
    bank = RareMemoryBank(6, 4, size=8, k=3, threshold=0.0, normalize_retrieved=True, retrieval="gated")
    bank(torch.randn(5, 6))
    z = torch.randn(5, 6)
    bank.eval()
    assert torch.equal(bank(z), z)
    torch.nn.init.constant_(bank.gate, 0.25)
    torch.testing.assert_close((bank(z) - z).norm(dim=1), 0.25 * z.norm(dim=1))


@pytest.mark.parametrize("strategy", ALL)
def test_the_largest_bank_takes_no_more_memory_with_time(strategy):
    bank = RareMemoryBank(8, 2, size=65536, k=5, threshold=0.2, strategy=strategy).train()
    sizes = set()
    for z, ids, labels, logits in batches(4, batch=64, features=8, classes=2, images=200):
        bank.write(*map(torch.tensor, (z, ids, labels, logits)))
        sizes.add(sum(v.numel() * v.element_size() for v in bank.state_dict().values()))
    assert len(sizes) == 1 and bank.filled.item() > 0
