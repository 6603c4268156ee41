import pytest
import torch
import torch.nn.functional as F

from charmlib.nn import (
    ClassifierHead,
    CSRAHead,
    FilterAttention,
    MultiScaleAttention,
    ScaleAttention,
    StandardHead,
    make_attention,
    make_head,
)
from charmlib.nn.head import TEMPERATURES


def test_attention_is_the_written_formula():
    torch.manual_seed(0)
    attention, x = MultiScaleAttention(16), torch.randn(2, 16, 6, 5)
    views = []
    for conv, pad in zip(attention.scales, (0, 1, 2)):
        assert conv.weight.shape == (8, 16, 2 * pad + 1, 2 * pad + 1)  # max(16 / 8, 8) channels
        views.append(F.conv2d(F.pad(x, [pad] * 4), conv.weight, conv.bias))
    mixed = torch.cat(views, 1)
    want = 1 / (1 + torch.exp(-((mixed * attention.fuse.weight.view(1, -1, 1, 1)).sum(1, keepdim=True)
                                + attention.fuse.bias)))
    got = attention(x)
    assert got.shape == (2, 1, 6, 5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_filter_has_the_gradients_of_the_four_layers(layout):
    torch.manual_seed(0)
    attention = MultiScaleAttention(24).to(memory_format=layout)
    x = torch.randn(3, 24, 4, 5).to(memory_format=layout).requires_grad_()
    pull = torch.randn(3, 1, 4, 5)

    def layers(x):
        return torch.sigmoid(attention.fuse(torch.cat([conv(x) for conv in attention.scales], 1)))

    inputs = [x, *attention.parameters()]
    want = torch.autograd.grad((layers(x) * pull).sum(), inputs)
    got = torch.autograd.grad((attention(x) * pull).sum(), inputs)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_half_precision_features_get_a_half_precision_map_from_float32_weights():
    attention = MultiScaleAttention(16)
    x = torch.randn(2, 16, 6, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(x.bfloat16())
    assert got.dtype == torch.bfloat16 and {p.dtype for p in attention.parameters()} == {torch.float32}
    weight, bias = (part.bfloat16() for part in attention.filter())  # multiplied out in float32, rounded once
    assert torch.equal(got, torch.sigmoid(F.conv2d(x.bfloat16(), weight, bias, padding=2)))
    torch.testing.assert_close(got.float(), attention(x), atol=0.02, rtol=0.02)


def test_attention_over_scales_position_by_position():
    torch.manual_seed(0)
    attention = ScaleAttention([6, 40], 64).eval()
    for part in (attention.read, *attention.scores):
        torch.nn.init.normal_(part.weight)
    for place in attention.places:
        torch.nn.init.normal_(place)
    maps = [torch.randn(2, 6, 7, 4), torch.randn(2, 40, 3, 2)]
    readings = []
    for m, reduce, score, place in zip(maps, (None, attention.reduce[1].weight), attention.scores, attention.places):
        f = m if reduce is None else F.conv2d(m, reduce)  # 40 channels become 64 / 8
        assert f.shape[1] == (6 if reduce is None else 8)
        height, width = f.shape[2:]
        for h in range(4):
            power = {(i, j): torch.exp((score.weight[h, :, 0, 0] * f[:, :, i, j]).sum(1)
                                       + place[h, 2 * i // height, 2 * j // width])
                     for i in range(height) for j in range(width)}
            total = sum(power.values())
            readings.append(sum((p / total)[:, None] * f[:, :, i, j] for (i, j), p in power.items()))
    read = torch.cat(readings, 1) / (1 + attention.norm.eps) ** 0.5  # its running mean is 0, its variance 1
    torch.testing.assert_close(attention(maps), read @ attention.read.weight.T, rtol=1e-4, atol=1e-4)


def test_attention_over_scales_starts_at_0_each_head_at_a_quarter_of_the_film():
    attention, maps = make_attention("scales", 16, [3, 5]), [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    assert not attention(maps).any()
    for share in attention.shares([reduce(m) for m, reduce in zip(maps, attention.reduce)]):
        torch.testing.assert_close(share.sum((2, 3)), torch.ones(2, 4))
        quarters = F.adaptive_avg_pool2d(share, 2).flatten(2)
        assert quarters.argmax(2).tolist() == [[0, 1, 2, 3]] * 2 and (quarters.amax(2) / quarters.sum(2) > 0.9).all()


def test_attention_width_for_wide_features():
    assert MultiScaleAttention(1280).scales[2].out_channels == 160


def test_the_filter_starts_as_the_layers_do_and_leaves_the_random_numbers_where_they_do():
    torch.manual_seed(3)
    layers, after = make_attention("layers", 24), torch.rand(1)
    torch.manual_seed(3)
    direct = make_attention("filter", 24)
    assert torch.equal(after, torch.rand(1))
    x = torch.randn(2, 24, 6, 5)
    torch.testing.assert_close(direct(x), layers(x))
    assert sum(p.numel() for p in direct.parameters()) == 25 * 24 + 1
    assert [(n, p.shape, p.requires_grad) for n, p in direct.named_parameters()] == [("weight", (1, 24, 5, 5), True),
                                                                                      ("bias", (1,), True)]


def test_any_filter_is_one_of_four_layers():
    """The same function class: layers that give a filter one channel of the 5x5 convolution give exactly it."""
    torch.manual_seed(0)
    layers, direct, x = MultiScaleAttention(16), FilterAttention(16), torch.randn(2, 16, 6, 5)
    with torch.no_grad():
        direct.weight.normal_(), direct.bias.normal_()
        layers.fuse.weight.zero_()[0, 16] = 1  # the first of the 5x5 convolution's eight
        layers.fuse.bias.zero_()
        layers.scales[2].weight[0], layers.scales[2].bias[0] = direct.weight[0], direct.bias[0]
    torch.testing.assert_close(direct(x), layers(x))


def test_attention_logits_start_with_the_spread_of_the_layers():
    """Over draws of their own, not of one seed."""
    x = torch.randn(4, 64, 7, 7)
    spread = [torch.stack([torch.logit(make_attention(form, 64)(x)).std() for _ in range(60)]).mean()
              for form in ("layers", "filter")]
    torch.testing.assert_close(*spread, rtol=0.15, atol=0)


def test_an_unknown_form_of_attention_is_refused():
    with pytest.raises(ValueError, match="layers, filter, got 'fliter'"):
        make_attention("fliter", 16)


def test_head_layers_in_the_published_order():
    head = ClassifierHead(10, 14, hidden=6, dropout=0.3)
    assert [type(m).__name__ for m in head] == ["BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear"]
    assert head(torch.randn(4, 10)).shape == (4, 14)


def test_the_head_drops_its_hidden_units_in_training_only():
    """Hidden units that are all 1 are read one by one: the share ``dropout`` of them is 0, the others make up for it."""
    head = ClassifierHead(4, 2000, hidden=2000, dropout=0.3)
    with torch.no_grad():
        head[1].weight.zero_(), head[1].bias.fill_(1), head[4].weight.copy_(torch.eye(2000)), head[4].bias.zero_()
    torch.manual_seed(0)
    units = head.train()(torch.randn(8, 4))
    assert (units == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(units[units != 0].unique(), torch.tensor([1 / 0.7]))
    assert (head.eval()(torch.randn(8, 4)) == 1).all()


def test_the_standard_heads_layers_and_its_two_dropouts():
    head = StandardHead(10, 14, hidden=6, dropout=0.25)
    assert [type(m).__name__ for m in head] == ["BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    assert [m.p for m in head if isinstance(m, torch.nn.Dropout)] == [0.25, 0.25]
    z = torch.randn(4, 10)
    head.eval()
    plain = z @ head[2].weight.T + head[2].bias  # fresh norms change nothing but for their epsilon
    torch.testing.assert_close(head(z), plain.relu() @ head[6].weight.T + head[6].bias, rtol=1e-4, atol=1e-4)


def csra(heads=1, attention="scores", lam=0.4, features=6, classes=5):
    torch.manual_seed(0)
    head = CSRAHead(features, classes, lam=lam, heads=heads, attention=attention).double()
    with torch.no_grad():
        head.bias.normal_()
    return head, torch.randn(3, features, 4, 2, dtype=torch.float64)


def slow(head, x, temperature=None):
    """Position by position, class by class, head by head; also the largest share of any position."""
    out = torch.zeros(len(x), head.classes, dtype=x.dtype)
    for b, image in enumerate(x):
        places = image.flatten(1).T  # (H * W, D)
        for c in range(head.classes):
            for h, t in enumerate(TEMPERATURES[head.heads]):
                m = head.scores.weight[h * head.classes + c].flatten()
                s = torch.stack([place @ m / m.norm() for place in places])
                a = s
                if head.own is not None:
                    own = head.own.weight[h * head.classes + c].flatten()
                    a = torch.stack([place @ own for place in places]) + head.own.bias[h * head.classes + c]
                share = torch.exp((t if temperature is None else temperature) * a)
                share = share / share.sum()
                out[b, c] += s.sum() / len(s) + head.lam * (share * s).sum()
    return out + head.bias


@pytest.mark.parametrize("heads", list(TEMPERATURES))
@pytest.mark.parametrize("attention", ["scores", "own"])
def test_csra_is_the_written_formula(heads, attention):
    head, x = csra(heads, attention)
    torch.testing.assert_close(head(x), slow(head, x))


def test_csra_with_lambda_0_is_average_pooling_then_a_linear_layer():
    head, x = csra(lam=0.0)
    weight = F.normalize(head.scores.weight.flatten(1))
    torch.testing.assert_close(head(x), F.linear(x.mean((2, 3)), weight, head.bias))


@pytest.mark.parametrize("attention", ["scores", "own"])
def test_csra_where_no_position_stands_out_adds_lambda_times_the_mean(attention):
    """A temperature of 0, or the same feature at every position: the bias stays outside the residual sum."""
    head, x = csra(attention=attention)
    weight = F.normalize(head.scores.weight.flatten(1))
    want = (1 + head.lam) * F.linear(x.mean((2, 3)), weight) + head.bias
    torch.testing.assert_close(head(x.mean((2, 3), keepdim=True).expand_as(x)), want)
    assert not torch.allclose(head(x), want)
    head.temperatures.zero_()
    torch.testing.assert_close(head(x), want)


def test_csra_at_99_is_the_mean_and_lambda_times_the_largest_score():
    head, x = csra()
    head.temperatures.fill_(99)
    scores = torch.einsum("bdhw,cd->bchw", x, F.normalize(head.scores.weight.flatten(1))).flatten(2)
    short = (scores.mean(2) + head.lam * scores.amax(2) + head.bias - head(x)) / head.lam
    assert (short >= -1e-12).all() and (short <= torch.log(torch.tensor(8.0)) / 99).all()


def test_csra_heads_are_summed_and_each_has_its_temperature():
    head, x = csra(4)
    total = head.bias.clone()
    for h, t in enumerate(TEMPERATURES[4]):
        one, _ = csra()
        with torch.no_grad():
            one.scores.weight.copy_(head.scores.weight[5 * h:5 * h + 5]), one.bias.zero_(), one.temperatures.fill_(t)
        total = total + one(x)
    torch.testing.assert_close(head(x), total)
    assert head.state_dict().keys() == {"scores.weight", "bias"}


@pytest.mark.parametrize("attention", ["scores", "own"])
def test_csra_gradients(attention):
    head, x = csra(2, attention, features=3, classes=2)
    parameters = dict(head.named_parameters())
    assert torch.autograd.gradcheck(lambda x, *p: torch.func.functional_call(head, dict(zip(parameters, p)), (x,)),
                                    (x[:2, :, :2].requires_grad_(), *parameters.values()))


def test_every_head_starts_at_given_log_odds():
    start = torch.linspace(-6, -1, 5)
    for form in ("charm", "standard", "csra"):
        head = make_head(form, 8, 5, hidden=4).eval()
        head.start_at(start)
        nothing = torch.zeros(2, 8, 3, 3) if form == "csra" else torch.zeros(2, 8)
        with torch.no_grad():
            if form != "csra":
                head[-1].weight.zero_()
            torch.testing.assert_close(head(nothing), start.expand(2, 5))


@pytest.mark.parametrize("wrong", [{"csra_heads": 3}, {"csra_attention": "other"}, {"csra_lambda": -0.1}])
def test_unknown_heads_are_refused(wrong):
    with pytest.raises(ValueError, match="csra_heads of 1, 2, 4, 6, 8, csra_attention of scores, own and csra_lambda"):
        make_head("csra", 8, 5, **wrong)
    with pytest.raises(ValueError, match="charm, standard, csra, linear, got 'crsa'"):
        make_head("crsa", 8, 5)
