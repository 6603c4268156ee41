import copy

import pytest
import torch
from torch import nn

from charmlib.nn import MomentumEncoder


def block():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


def disturb(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    module.train()(torch.randn(8, 3, 5, 5))  # moves the norm statistics


def slow_reference(states, m):
    """p_k <- m_t p_k + (1 - m_t) p_q, one number at a time, in double precision."""
    mine = {k: v.double() for k, v in states[0].items()}
    for t, theirs in enumerate(states[1:]):
        m_t = min(m, (1 + t) / (10 + t))
        for name, value in theirs.items():
            mine[name] = m_t * mine[name] + (1 - m_t) * value.double() if value.is_floating_point() else value.double()
    return mine


@pytest.mark.parametrize("m", [0.0, 0.5, 0.99, 1.0])
def test_follows_the_formula_with_warmup_and_norm_statistics(m):
    source = block()
    encoder = MomentumEncoder(source, m)
    states = [copy.deepcopy(source.state_dict())]
    for _ in range(12):
        disturb(source)
        states.append(copy.deepcopy(source.state_dict()))
        encoder.update(source)
    want = slow_reference(states, m)
    for name, value in encoder.encoder.state_dict().items():
        torch.testing.assert_close(value.double(), want[name], rtol=1e-4, atol=1e-5)
    assert encoder.updates.item() == 12
    assert not torch.equal(want["1.running_mean"], states[0]["1.running_mean"].double()) or m == 1.0


def test_momentum_0_copies_bit_for_bit_and_1_freezes():
    source = block()
    copier, frozen = MomentumEncoder(source, 0.0), MomentumEncoder(source, 1.0, warmup=False)
    before = copy.deepcopy(frozen.encoder.state_dict())
    disturb(source)
    copier.update(source), frozen.update(source)
    for name, value in source.state_dict().items():
        assert torch.equal(copier.encoder.state_dict()[name], value)
        if value.is_floating_point():
            assert torch.equal(frozen.encoder.state_dict()[name], before[name])


def test_warmup_schedule():
    encoder = MomentumEncoder(block(), 0.99)
    seen = []
    for _ in range(3):
        seen.append(encoder.current_momentum().item())
        encoder.update(block())
    assert seen == pytest.approx([0.1, 2 / 11, 3 / 12])
    encoder.updates.fill_(10_000)
    assert encoder.current_momentum().item() == pytest.approx(0.99)


def test_no_gradient_and_always_in_eval_mode():
    source = block()
    encoder = MomentumEncoder(source).train()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    statistics = encoder.encoder[1].running_mean.clone()
    assert not encoder(x).requires_grad
    assert not any(m.training for m in encoder.modules())
    assert torch.equal(statistics, encoder.encoder[1].running_mean)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_a_step_that_the_scaler_skipped_moves_nothing_and_is_not_counted():
    source = block()
    encoder, told = MomentumEncoder(source, 0.5), MomentumEncoder(source, 0.5)
    disturb(source)
    encoder.update(source, torch.tensor(0.0)), told.update(source)
    for (name, value), other in zip(encoder.state_dict().items(), told.state_dict().values()):
        assert torch.equal(value, other), name
    before = copy.deepcopy(encoder.state_dict())
    disturb(source)
    encoder.update(source, torch.tensor(1.0))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]) or "num_batches" in name, name


def test_norms_of_the_batch_in_training_and_of_its_own_batches_in_eval_mode():
    """As the published code, whose branch is in train mode; its parameters alone are averaged."""
    source = block()
    encoder, twin = MomentumEncoder(source, 0.9, warmup=False, batch_norms=True).train(), copy.deepcopy(source).train()
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    for _ in range(3):
        assert torch.equal(encoder(x), twin(x)) and not encoder(x + 1).requires_grad and twin(x + 1) is not None
    assert encoder.encoder[1].num_batches_tracked == 6
    before = copy.deepcopy(encoder.encoder.state_dict())
    disturb(source)
    encoder.update(source)
    for name, value in encoder.encoder.state_dict().items():
        want = 0.9 * before[name] + 0.1 * source.state_dict()[name] if name in dict(source.named_parameters()) else before[name]
        torch.testing.assert_close(value, want)
    twin.load_state_dict(encoder.encoder.state_dict())
    assert torch.equal(encoder.eval()(x), twin.eval()(x))


def test_a_block_without_weights_is_followed_too():
    encoder = MomentumEncoder(nn.ReLU())
    encoder.update(nn.ReLU())
    assert encoder.updates.item() == 1


def test_refuses_momentum_outside_0_1():
    with pytest.raises(ValueError, match="momentum"):
        MomentumEncoder(block(), 1.01)
