import math

import pytest
import torch
import torch.nn.functional as F

from charmlib.nn import AsymmetricLoss, BCELoss, FocalLoss, make_loss
from charmlib.params import LOSSES


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(6, 14) * 3, (torch.rand(6, 14) < 0.3).float()


def slow(loss, logits, targets):
    """The formulas of the papers, one entry at a time, in double precision."""
    total = 0.0
    for x, y in zip(logits.flatten().double().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-x))
        if isinstance(loss, FocalLoss):
            p_t = p if y else 1 - p
            weight = 1.0 if loss.alpha is None else (loss.alpha if y else 1 - loss.alpha)
            total += -weight * (1 - p_t) ** loss.gamma * math.log(p_t)
        elif y:
            total += -(1 - p) ** loss.gamma_pos * math.log(p)
        else:
            p_m = max(p - loss.clip, 0)
            total += -(p_m**loss.gamma_neg) * math.log(1 - p_m)
    return total / logits.numel()


@pytest.mark.parametrize("loss", [FocalLoss(), FocalLoss(3.5, alpha=0.25), AsymmetricLoss(), AsymmetricLoss(2, 0, 0.2),
                                  AsymmetricLoss(3, 1, 0), make_loss("asl_published")])
def test_against_the_formula(loss, batch):
    assert loss(*batch).item() == pytest.approx(slow(loss, *batch), rel=1e-5)


def gradient(name, logits, targets):
    """Of the summed loss by the logits (B, C); with the probabilities and the targets, all in double precision."""
    logits = logits.clone().requires_grad_()
    make_loss(name)(logits, targets).backward()
    return logits.grad.double() * logits.numel(), torch.sigmoid(logits.detach().double()), targets.double()


def test_the_focal_gradient_flows_through_the_focusing_weight(batch):
    """Lin et al., appendix B, eq. 11, gamma 2."""
    got, p, y = gradient("focal", *batch)
    p_t = torch.where(y == 1, p, 1 - p)
    want = (2 * y - 1) * (1 - p_t) ** 2 * (2 * p_t * p_t.log() + p_t - 1)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_no_asymmetric_gradient_flows_through_the_focusing_weights(batch):
    """Those of the two logarithms alone, times the weights (gammas 4 and 1, clip 0.05)."""
    got, p, y = gradient("asl", *batch)
    p_m = (p - 0.05).clamp(min=0)
    positive = (1 - p) * (p - 1)
    negative = p_m**4 * p * (1 - p) / (1 - p_m)
    torch.testing.assert_close(got, torch.where(y == 1, positive, negative), rtol=1e-4, atol=1e-6)


def test_the_published_asymmetric_gradient_has_no_clip_and_flows_through_the_focusing_weights(batch):
    """The derivatives of -(1 - p) log p and of -p^4 log(1 - p)."""
    got, p, y = gradient("asl_published", *batch)
    positive = p.log() - (1 - p) / p
    negative = p**4 / (1 - p) - 4 * p**3 * (1 - p).log()
    torch.testing.assert_close(got, torch.where(y == 1, positive, negative) * p * (1 - p), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [FocalLoss(0), AsymmetricLoss(0, 0, 0)])
def test_identities_with_bce(loss, batch):
    logits = batch[0].clone().requires_grad_()
    torch.testing.assert_close(loss(logits, batch[1]), BCELoss()(*batch))
    loss(logits, batch[1]).backward()
    mine, logits.grad = logits.grad, None
    F.binary_cross_entropy_with_logits(logits, batch[1]).backward()
    torch.testing.assert_close(mine, logits.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name):
    logits = torch.tensor([[-200.0, 200.0, -30.0, 30.0]], requires_grad=True)
    for targets in (torch.zeros(1, 4), torch.ones(1, 4)):
        loss = make_loss(name)(logits, targets)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("name", LOSSES)
def test_float32_inside_and_unknown_labels_left_out(name, batch):
    logits, targets = batch
    loss = make_loss(name)
    assert loss(logits.half(), targets).dtype == torch.float32
    holes = targets.clone()
    holes[0] = float("nan")
    torch.testing.assert_close(loss(logits, holes), loss(logits[1:], targets[1:]))
    assert loss(logits, torch.full_like(targets, float("nan"))).item() == 0


def test_refusals(batch):
    with pytest.raises(ValueError, match="differ in shape"):
        BCELoss()(batch[0], batch[1][:, :3])
    with pytest.raises(ValueError, match="unknown loss"):
        make_loss("bse")
