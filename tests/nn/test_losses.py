import importlib
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from charmlib.nn import AsymmetricLoss, BCELoss, DistributionBalancedLoss, FocalLoss, LDAMLoss
from charmlib.nn import make_loss as make
from charmlib.nn.losses import class_weights
from charmlib.param_rows import LOSSES

COUNTS = torch.tensor([1, 2, 4, 8, 16, 30, 60, 90, 120, 150, 200, 300, 500, 900.0])  # of 1,000 images
IMAGES = torch.full((14,), 1000.0)
WEIGHTS = ("none", "inverse", "sqrt", "effective", "exp")


def make_loss(name, **options):
    return make(name, COUNTS, IMAGES, **options)


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


@pytest.mark.parametrize("loss", [FocalLoss(0), AsymmetricLoss(0, 0, 0), LDAMLoss(COUNTS, 0.0), LDAMLoss(COUNTS, 0.0, 30.0)])
def test_identities_with_bce(loss, batch):
    logits = batch[0].clone().requires_grad_()
    torch.testing.assert_close(loss(logits, batch[1]), BCELoss()(*batch))
    loss(logits, batch[1]).backward()
    mine, logits.grad = logits.grad, None
    F.binary_cross_entropy_with_logits(logits, batch[1]).backward()
    torch.testing.assert_close(mine, logits.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_logits_stay_finite(name):
    logits = torch.tensor([-200.0, 200.0, -30.0, 30.0])[:, None].repeat(1, 14).requires_grad_()
    for targets in (torch.zeros(4, 14), torch.ones(4, 14)):
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
    with pytest.raises(ValueError, match="unknown class_weight"):
        class_weights(COUNTS, IMAGES, "rare")
    for name, how in (("ldam", "none"), ("db", "none"), ("bce", "sqrt")):
        with pytest.raises(ValueError, match="needs counts and images"):
            make(name, class_weight=how)


@pytest.mark.parametrize("name, how", [("ldam", "none"), ("db", "none"), ("bce", "inverse"), ("focal", "exp")])
@pytest.mark.parametrize("counts, words", [([0, 5], "no positive of Hernia:"), ([5, 10], "no negative of Mass:")])
def test_a_class_of_one_side_is_refused_by_name(name, how, counts, words):
    with pytest.raises(ValueError, match=words):
        make(name, counts, [10, 10], names=["Hernia", "Mass"], class_weight=how)


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("how", WEIGHTS)
@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in LOSSES), ("ldam", {"ldam_scale": 30.0}), ("ldam", {"ldam_margin": 2.0}),
    *(("asl", {"asl_gamma_neg": a, "asl_gamma_pos": b, "asl_clip": c})
      for a in (0, 0.5, 2, 4) for b in (0, 0.5, 1) for c in (0, 0.05, 0.5))])
@pytest.mark.filterwarnings("ignore:class_weight inverse")
def test_no_gradient_pushes_a_probability_away_from_its_label(name, options, how, mode):
    """On a negative it is never negative and on a positive never positive, at any probability.

    An asymmetric loss with its focus upside down passes the identities with BCE and fails here between p 0.22 and 0.98.
    """
    loss = make_loss(name, class_weight=how, **options).train(mode)
    loss.shift = torch.linspace(-3, 3, 14)
    _never_away(loss)


@pytest.mark.parametrize("gamma", [0, 0.5, 1, 2, 5])
@pytest.mark.parametrize("kind", [FocalLoss, lambda gamma: DistributionBalancedLoss(COUNTS, IMAGES, gamma=gamma, scale=5),
                                  lambda gamma: AsymmetricLoss(gamma, gamma / 2, 0.0, focus_gradient=True)])
def test_no_focus_pushes_a_probability_away_from_its_label(gamma, kind):
    _never_away(kind(gamma))


def _never_away(loss):
    p = torch.cat([torch.linspace(-90, 90, 1801), torch.logit(torch.linspace(0.001, 0.999, 999))])
    for y in (0.0, 1.0):
        logits = p[:, None].repeat(1, 14).requires_grad_()
        loss(logits, torch.full_like(logits, y)).backward()
        assert torch.isfinite(logits.grad).all()
        assert ((logits.grad <= 0) if y else (logits.grad >= 0)).all()
        assert (logits.grad != 0).any(0).all()


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.5])
def test_the_focal_loss_is_torchvisions(batch, gamma):
    from torchvision.ops import sigmoid_focal_loss

    z, y = batch
    torch.testing.assert_close(FocalLoss(gamma)(z, y), sigmoid_focal_loss(z, y, alpha=-1, gamma=gamma, reduction="mean"))


def test_ldam_against_the_formula(batch):
    z, y = batch
    loss, largest = LDAMLoss(COUNTS, 0.5, 30.0), 1 / COUNTS[0].item() ** 0.25
    total = 0.0
    for row, labels in zip(z.double().tolist(), y.tolist()):
        for c, (value, label) in enumerate(zip(row, labels)):
            x = 30 * (value - label * 0.5 * COUNTS[c].item() ** -0.25 / largest)
            total += math.log1p(math.exp(-abs(x))) + max(-x if label else x, 0)
    assert loss(30 * z, y).item() == pytest.approx(total / z.numel(), rel=1e-5)


def test_margins_fall_with_the_fourth_root_and_the_largest_is_the_margin():
    margins = LDAMLoss(COUNTS, 0.3).margins
    torch.testing.assert_close(margins / margins[0], COUNTS.pow(-0.25) / COUNTS[0].pow(-0.25))
    assert margins[0] == margins.max() == pytest.approx(0.3)
    torch.testing.assert_close(LDAMLoss(1000 * COUNTS, 0.3).margins, margins)


def slow_balanced(loss, logits, targets, counts=COUNTS, images=1000):
    """Wu et al.'s code, one entry at a time, in double precision."""
    counts, out = counts.double().tolist(), torch.zeros_like(logits, dtype=torch.float64)
    for i, (row, labels) in enumerate(zip(logits.double().tolist(), targets.tolist())):
        rates = [1 / n for n, y in zip(counts, labels) if y]
        for c, (x, y, n) in enumerate(zip(row, labels, counts)):
            r = 1 / n / sum(rates) if rates else math.inf
            w = loss.alpha + (1 / (1 + math.exp(-loss.beta * (r - loss.mu))) if rates else 1.0)
            u = x - math.log(images / n - 1) * 0.05 / loss.scale
            steep = -u if y else loss.scale * u
            p_t = 1 / (1 + math.exp(steep))
            out[i, c] = -w * math.log(p_t) * loss.balance * (1 - p_t) ** loss.gamma / (1 if y else loss.scale)
    return out


@pytest.mark.parametrize("options", [{}, {"mu": 0.3, "scale": 5.0}])
def test_the_balanced_loss_against_the_formula(options, batch):
    logits, targets = batch
    targets[0] = 0  # an image without a finding
    loss = DistributionBalancedLoss(COUNTS, IMAGES, **options, reduction="none")
    torch.testing.assert_close(loss(logits, targets).double(), slow_balanced(loss, logits, targets), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"mu": 0.3, "scale": 5.0}, {"gamma": 0.5}])
def test_the_gradient_of_the_balanced_loss_against_differences_of_the_formula(options, batch):
    logits, targets = batch[0].double().requires_grad_(), batch[1]
    targets[0] = 0
    loss, h = DistributionBalancedLoss(COUNTS, IMAGES, **options, reduction="sum"), 1e-4
    loss(logits, targets).backward()
    up, down = (slow_balanced(loss, logits.detach() + step, targets) for step in (h, -h))
    torch.testing.assert_close(logits.grad, (up - down) / (2 * h), rtol=1e-3, atol=1e-5)


def test_the_gradient_of_ldam_against_the_formula(batch):
    """sigmoid(s (z - y m)) - y by the logits s z."""
    z, y = batch
    logits, loss = (30 * z).requires_grad_(), LDAMLoss(COUNTS, 0.5, 30.0, reduction="sum")
    loss(logits, y).backward()
    margins = 0.5 * (COUNTS[0] / COUNTS) ** 0.25
    torch.testing.assert_close(logits.grad, torch.sigmoid(30 * (z - y * margins)) - y, rtol=1e-4, atol=1e-6)


def test_the_balanced_loss_leaves_the_logits_as_they_are(batch):
    before = batch[0].clone()
    make_loss("db")(*batch)
    assert torch.equal(before, batch[0])


def test_identities_of_the_balanced_loss(batch):
    plain = {"alpha": 0.5, "beta": 0.0, "scale": 1.0, "kappa": 0.0}
    torch.testing.assert_close(DistributionBalancedLoss(COUNTS, IMAGES, **plain, gamma=0)(*batch), BCELoss()(*batch))
    focal = DistributionBalancedLoss(COUNTS, IMAGES, **plain, gamma=2, balance=1)
    torch.testing.assert_close(focal(*batch), FocalLoss(2)(*batch))
    tilted = DistributionBalancedLoss(COUNTS, IMAGES, **{**plain, "kappa": 0.5}, gamma=0)
    torch.testing.assert_close(tilted(*batch), BCELoss()(batch[0] + 0.5 * torch.logit(COUNTS / IMAGES), batch[1]))


def test_against_timm(batch):
    timm = pytest.importorskip("timm.loss")
    if not hasattr(timm, "DistributionBalancedLoss"):
        pytest.skip("this timm has no DistributionBalancedLoss")
    batch[1][0] = 0
    torch.testing.assert_close(make_loss("db")(*batch), timm.DistributionBalancedLoss(COUNTS, 1000)(*batch))
    torch.testing.assert_close(
        make_loss("asl")(*batch),
        timm.AsymmetricLossMultiLabel(4, 1, 0.05, disable_torch_grad_focal_loss=True, reduction="mean")(*batch))
    weigh = importlib.import_module("timm.loss.distribution_balanced_loss" if not hasattr(timm, "compute_class_weights")
                                    else "timm.loss").compute_class_weights
    for how, options in (("inverse", {}), ("sqrt", {"power": 0.5}), ("effective", {"method": "effective_num", "beta": 0.9999})):
        with warnings.catch_warnings(action="ignore"):
            mine = class_weights(COUNTS, IMAGES, how)[0]
        torch.testing.assert_close(mine, weigh(COUNTS, 1000, **options)[1])


def test_class_weights_against_their_formulas():
    with pytest.warns(UserWarning, match=r"weight above 100 \(class 0 999, class 1 499, class 2 249, class 3 124\)"):
        inverse, ones = class_weights(COUNTS, IMAGES, "inverse")
    assert inverse.tolist() == pytest.approx([(1000 - n) / n for n in COUNTS.tolist()]) and (ones == 1).all()
    assert class_weights(COUNTS, IMAGES, "sqrt")[0].tolist() == pytest.approx(inverse.sqrt().tolist())
    rates = [(1 - 0.9999) / (1 - 0.9999**n) for n in COUNTS.tolist()]
    assert class_weights(COUNTS, IMAGES, "effective")[0].tolist() == pytest.approx([14 * w / sum(rates) for w in rates])
    positive, negative = class_weights(COUNTS, IMAGES, "exp")
    assert positive.tolist() == pytest.approx([math.exp(1 - n / 1000) for n in COUNTS.tolist()])
    assert negative.tolist() == pytest.approx([math.exp(n / 1000) for n in COUNTS.tolist()])
    assert class_weights(COUNTS, IMAGES, "effective")[0].sum().item() == pytest.approx(14)
    assert all((w == 1).all() for w in class_weights(COUNTS, IMAGES, "effective", beta=0.0))


@pytest.mark.filterwarnings("ignore:class_weight inverse")
def test_inverse_weights_are_torchs(batch):
    weight = (1000 - COUNTS) / COUNTS
    torch.testing.assert_close(make_loss("bce", class_weight="inverse")(*batch),
                               F.binary_cross_entropy_with_logits(*batch, pos_weight=weight))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("how", ["sqrt", "exp"])
def test_weights_multiply_the_terms_in_training_mode_only(name, how, batch):
    holes = batch[1].clone()
    holes[1] = float("nan")
    plain, loss = make_loss(name), make_loss(name, class_weight=how)
    plain.reduction = "none"
    positive, negative = class_weights(COUNTS, IMAGES, how)
    terms = plain(batch[0], holes) * torch.where(batch[1] == 1, positive, negative)
    torch.testing.assert_close(loss(batch[0], holes), terms.sum() / (5 * 14))
    plain.reduction = "mean"
    for off in (loss.eval(), loss.train()):
        loss.weighted = not off.training
        assert torch.equal(off(batch[0], holes), plain(batch[0], holes))


def test_the_shift_is_added_in_training_mode_only(batch):
    loss = make_loss("focal")
    plain, loss.shift = loss(*batch), torch.linspace(-1, 1, 14)
    assert torch.equal(loss(*batch), FocalLoss()(batch[0] + loss.shift, batch[1]))
    assert torch.equal(loss.eval()(*batch), plain)
