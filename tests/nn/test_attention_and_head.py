import pytest
import torch
import torch.nn.functional as F

from charmlib.nn import ClassifierHead, MultiScaleAttention


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
        assert attention.filter()[0].dtype == torch.float32 or got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), attention(x), atol=0.02, rtol=0.02)


def test_attention_width_for_wide_features():
    assert MultiScaleAttention(1280).scales[2].out_channels == 160


def test_head_layers_in_the_published_order():
    head = ClassifierHead(10, 14, hidden=6, dropout=0.3)
    assert [type(m).__name__ for m in head] == ["BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear"]
    assert head(torch.randn(4, 10)).shape == (4, 14)
