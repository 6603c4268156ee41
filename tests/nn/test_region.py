"""Regions, crops, necks and attention against slow twins."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import nn

from charmlib.nn import CBAM, LKA, Neck, make_refine, split_backbone
from charmlib.nn.region import WHOLE, above, box_of, boxes, crop, heat_map, largest_region


def slow_region(mask: np.ndarray, connect: int) -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3)) if connect == 8 else None)
    return labels == 1 + np.argmax(ndimage.sum_labels(mask, labels, range(1, count + 1))) if count else mask


@pytest.mark.parametrize("connect", [4, 8])
def test_regions_are_scipys(connect):
    generator = np.random.default_rng(0)
    for side in (1, 2, 3, 4, 7, 8, 14):
        for _ in range(5):
            masks = generator.random((40, side, side + side % 3)) < generator.random((40, 1, 1)) * 1.1
            masks[:2] = [[[False]], [[True]]]
            fast = largest_region(torch.from_numpy(masks), connect)
            slow = np.stack([slow_region(mask, connect) for mask in masks])
            assert np.array_equal(fast.numpy(), slow)
            for region, box in zip(slow, box_of(fast).numpy()):
                at = np.argwhere(region) if region.any() else np.argwhere(~region)
                shares = np.concatenate([at.min(0), at.max(0) + 1]) / np.tile(region.shape, 2)
                np.testing.assert_allclose(box, shares, rtol=1e-6)


def test_a_region_that_winds_through_the_whole_map_is_one():
    snake = torch.ones(1, 9, 9, dtype=torch.bool)
    for i, row in enumerate(range(1, 9, 2)):
        snake[0, row] = False
        snake[0, row, -1 if i % 2 == 0 else 0] = True
    assert torch.equal(largest_region(snake, 4), snake)
    with pytest.raises(ValueError, match="connect must be 4 or 8"):
        largest_region(snake, 6)


@pytest.mark.parametrize("rows, columns", [((0, 1), (0, 1)), ((6, 8), (5, 8)), ((2, 5), (0, 8)), ((3, 4), (6, 7))])
def test_the_crop_of_a_hot_spot_is_its_box_to_the_pixel(rows, columns):
    heat = torch.zeros(1, 8, 8)
    heat[0, slice(*rows), slice(*columns)] = 1
    box = box_of(largest_region(above(heat, 0.7)))
    image = torch.rand(1, 3, 64, 64)
    tall, wide = (8 * (b - a) for a, b in (rows, columns))
    piece = image[:, :, 8 * rows[0]:8 * rows[1], 8 * columns[0]:8 * columns[1]]
    if tall == wide:
        torch.testing.assert_close(crop(image, box, tall), piece, atol=1e-5, rtol=0)
    torch.testing.assert_close(crop(image, box, 20), slow_crop(image, 8 * rows[0], 8 * columns[0], tall, wide, 20), atol=1e-4,
                               rtol=0)


def slow_crop(image, top, left, tall, wide, size):
    """Each new pixel's centre, in the old picture, between its four neighbours."""
    out = torch.zeros(*image.shape[:2], size, size)
    for i in range(size):
        for j in range(size):
            y, x = (min(max(start + (k + 0.5) / size * side - 0.5, 0), image.shape[-1] - 1)
                    for start, k, side in ((top, i, tall), (left, j, wide)))
            a, b = int(y), int(x)
            c, d = min(a + 1, image.shape[-2] - 1), min(b + 1, image.shape[-1] - 1)
            out[:, :, i, j] = (1 - y + a) * ((1 - x + b) * image[:, :, a, b] + (x - b) * image[:, :, a, d]) \
                + (y - a) * ((1 - x + b) * image[:, :, c, b] + (x - b) * image[:, :, c, d])
    return out


@pytest.mark.parametrize("heat", [torch.zeros(2, 4, 4), torch.full((2, 4, 4), 6.0), torch.full((2, 1, 1), -1.0)])
def test_a_flat_map_gives_the_whole_image(heat):
    box = box_of(largest_region(above(heat, 0.7)))
    assert box.tolist() == [list(WHOLE)] * 2 == boxes(WHOLE, heat).tolist()
    image = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(crop(image, box, 16), image, atol=1e-5, rtol=0)


def test_tau_1_keeps_nothing_and_tau_0_all_but_the_least():
    heat = torch.rand(3, 4, 4)
    assert not above(heat, 1).any() and above(heat, 0).sum().item() == 3 * 15


def test_heat_maps_are_the_written_formulas():
    maps, weight, logits = torch.randn(2, 5, 3, 3), torch.randn(4, 5), torch.randn(2, 4)
    for how, of in (("max", max), ("mean", lambda v: sum(v) / len(v))):
        slow = [[[of([abs(maps[b, d, i, j].item()) for d in range(5)]) for j in range(3)] for i in range(3)] for b in range(2)]
        torch.testing.assert_close(heat_map(maps, how), torch.tensor(slow))
    slow = torch.zeros(2, 3, 3)
    for b in range(2):
        for c in range(4):
            slow[b] += torch.sigmoid(logits[b, c]) * sum(weight[c, d] * maps[b, d] for d in range(5))
    torch.testing.assert_close(heat_map(maps, "cam", weight, logits), slow)


@pytest.mark.parametrize("refine", ["cbam", "lka"])
def test_attention_starts_as_the_identity_to_the_bit_and_learns(refine):
    x, net = torch.randn(2, 32, 9, 9), make_refine(refine, 32)
    for mode in (True, False):
        assert torch.equal(net.train(mode)(x), x)
    published = make_refine(refine, 32, "published")(x)
    assert (published - x).abs().max() > 0.1
    net.train()(x).square().mean().backward()
    assert any(p.grad.abs().sum() > 0 for p in net.parameters())
    with pytest.raises(ValueError, match="refine must be one of none, cbam, lka"):
        make_refine("se", 32)


def test_lka_is_three_convolutions_and_sees_23_pixels():
    net, x = LKA(3, "published"), torch.randn(2, 3, 31, 31)
    a = F.conv2d(F.pad(x, [2] * 4), net.near.weight, net.near.bias, groups=3)
    b = F.conv2d(F.pad(a, [9] * 4), net.far.weight, net.far.bias, dilation=3, groups=3)
    slow = x * torch.einsum("oi,bihw->bohw", net.point.weight[:, :, 0, 0], b) - x * -net.point.bias[:, None, None]
    torch.testing.assert_close(net(x), slow)
    impulse = torch.zeros(1, 3, 31, 31)
    impulse[0, :, 15, 15] = 1
    zero = torch.zeros_like(impulse)
    seen = net.point(net.far(net.near(impulse))) - net.point(net.far(net.near(zero)))
    at = torch.nonzero(seen[0].abs().sum(0) > 1e-9)
    assert (at.amax(0) - at.amin(0) + 1).tolist() == [23, 23]


def test_cbam_is_the_papers_formula():
    net, x = CBAM(32, "published").eval(), torch.randn(2, 32, 5, 6)
    gates = net.gates
    nn.init.normal_(gates.spatial.conv.bn.running_mean)

    def mlp(v):
        fc1, fc2 = (layer.weight[:, :, 0, 0] for layer in (gates.channel.fc1, gates.channel.fc2))
        return F.relu(v @ fc1.T + gates.channel.fc1.bias) @ fc2.T + gates.channel.fc2.bias

    gate = torch.sigmoid(mlp(x.mean((2, 3))) + mlp(x.flatten(2).max(2)[0]))
    y = x * gate[:, :, None, None]
    maps, conv = torch.stack([y.mean(1), y.max(1)[0]], 1), gates.spatial.conv
    torch.testing.assert_close(net(x), y * torch.sigmoid(conv.bn(F.conv2d(maps, conv.conv.weight, padding=3))))


@pytest.mark.parametrize("neck", ["laterals", "fpn"])
def test_necks_are_the_written_sums(neck):
    maps = [torch.randn(2, c, s, s) for c, s in ((8, 16), (12, 8), (16, 4))]
    net = Neck(neck, [8, 12, 16])
    blocks = [(level.inner_blocks[i][0], level.layer_blocks[i][0]) for level in net.levels
              for i in range(len(level.inner_blocks))]
    above_, slow = 0, []
    for (inner, layer), m in reversed(list(zip(blocks, maps))):
        mixed = inner(m) + (above_ if neck == "fpn" else 0)
        slow.insert(0, layer(mixed))
        above_ = mixed.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for fast, want in zip(net(maps), slow, strict=True):
        torch.testing.assert_close(fast, want)


def test_vgg16_with_attention_has_the_published_number_of_weights():
    from charmlib.models import CharmNet

    with torch.device("meta"):
        net = CharmNet("vgg16_bn", weights="none", norm="imagenet", use_bank=False, use_attention=False, head="linear",
                       dropout=0.5, refine="lka")
    assert sum(p.numel() for p in net.parameters()) == 15_418_702
    behind = [name for name, module in net.named_modules() if isinstance(module, LKA)]
    assert behind == ["trunk.22.1", "trunk.32.1", "final.42.1"]
    assert [net.get_submodule(name).point.in_channels for name in behind] == [256, 512, 512]


@pytest.mark.parametrize("arch", ["mobilenet_v2", "densenet121", "resnet18", "vgg16_bn", "timm:test_resnet"])
def test_attention_goes_into_any_backbone_in_sequence_and_changes_nothing_at_first(arch):
    def made(**more):
        torch.manual_seed(0)
        return split_backbone(arch, "none", **more)

    plain, refined = made(), made(refine="cbam")
    x = torch.randn(1, 3, 64, 64)
    outs = []
    for backbone in (plain, refined):
        for part in (backbone.trunk, backbone.final):
            part.eval()
        outs.append(backbone.final(backbone.trunk(x)))
    assert torch.equal(*outs)
    assert sum(isinstance(m, CBAM) for p in (refined.trunk, refined.final) for m in p.modules()) == 3


def test_a_backbone_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="refine lka needs maps at strides 4, 8, 16"):
        from charmlib.nn.refine import attach

        attach([nn.Conv2d(3, 4, 3)], "lka", "identity")
