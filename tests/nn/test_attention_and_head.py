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


def test_attention_width_for_wide_features():
    assert MultiScaleAttention(1280).scales[2].out_channels == 160


def test_head_layers_in_the_published_order():
    head = ClassifierHead(10, 14, hidden=6, dropout=0.3)
    assert [type(m).__name__ for m in head] == ["BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear"]
    assert head(torch.randn(4, 10)).shape == (4, 14)
