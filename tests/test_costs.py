"""What the cost table counts: operations by formula, memory by real tensors."""

import gc

import pytest
import torch

from benchmarks.costs import AGAIN, CASES, bank_flops, build, cases_of, on_meta, preset_rows
from benchmarks.loops import PARTS, LayeredAttention, network
from benchmarks.tracing import LiveBytes, flop_counter, flops_of, memory_of, step


def small(**changes):
    """A network on the meta device that is followed in a second."""
    with torch.device("meta"):
        return network("resnet18", **changes)


def flops(**changes):
    return flops_of(small(**changes), batch=4, size=64)


def test_plain_networks_have_the_operations_that_torchvision_gives():
    """Multiply-adds of one image at 224: 4.09 G and 0.30 G; the classifier of 1000 classes is left out, the head put in."""
    from torchvision.models import MobileNet_V2_Weights, ResNet50_Weights

    for arch, weights, classifier in (("resnet50", ResNet50_Weights, 2048_000),
                                      ("mobilenet_v2", MobileNet_V2_Weights, 1280_000)):
        found = flops_of(on_meta(arch, "plain"), batch=2, size=224)
        own = 2 * (weights.DEFAULT.meta["_ops"] * 1e9 - classifier)  # theirs counts a multiply-add once
        assert found.inference / 2 == pytest.approx(own, rel=0.02)
        # every convolution again for each of its two gradients, but for that of the image
        assert found.training == pytest.approx(3 * found.inference, rel=0.03)


def test_the_bank_costs_what_its_formula_says():
    plain, bank = flops(), flops(on=PARTS[2:])
    assert bank.inference - plain.inference == 4 * bank_flops(512, training=False)
    assert bank.training - plain.training == 4 * bank_flops(512, training=True)


def test_the_momentum_branch_costs_one_forward_pass_of_the_final_block():
    plain, momentum = flops(), flops(on=PARTS[:1])
    assert momentum.training - plain.training == momentum.inference - plain.inference > 0


def test_attention_as_one_filter_costs_25_multiplications_a_position_and_channel():
    plain, direct, published = flops(), flops(on=PARTS[1:2], attention="filter"), flops(on=PARTS[1:2], layered=True)
    assert direct.inference - plain.inference == 4 * 2 * 25 * 512 * 2 * 2  # 2 x 2 positions
    assert direct.training - plain.training == 3 * (direct.inference - plain.inference)
    inner = 512 // 8
    assert published.inference - plain.inference == 4 * 2 * 4 * (35 * 512 * inner + 3 * inner)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_grouped_convolutions_cost_as_much_as_the_convolution(groups, stride):
    """By the definition: every product of the forward pass appears once in each gradient. torch's own counter disagrees."""
    conv = torch.nn.Conv2d(8, 16, 3, stride=stride, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    with flop_counter() as forward:
        out = conv(x)
    with flop_counter(corrected=False) as theirs, flop_counter() as ours:
        out.sum().backward()
    side = 6 // stride
    assert forward.get_total_flops() == 2 * 2 * 16 * side * side * (8 // groups) * 9
    assert ours.get_total_flops() == 2 * forward.get_total_flops()
    assert (theirs.get_total_flops() == ours.get_total_flops()) == (groups == 1)


def test_live_bytes_count_storages_from_their_making_to_their_end():
    with LiveBytes() as live:
        a = torch.ones(1000)  # 4000 bytes
        b = a.view(10, 100)[3:]  # the same storage
        assert live.now == live.peak == 4000
        c = a + 1
        assert live.now == 8000
        del a
        assert live.now == 8000
        del b
        assert live.now == 4000
        c.mul_(2)
        del c
        assert (live.now, live.peak) == (0, 8000)
        x = torch.ones(100, requires_grad=True)
        y = (x * 2).exp()  # exp keeps its result, and nothing needs the product
        assert live.now == 800
        y.sum().backward()
        del y
        assert live.now == 800  # x and its gradient


@pytest.mark.parametrize("case", ["plain", "all", "all" + AGAIN, "all_filter"])
def test_memory_followed_without_data_is_that_of_real_tensors(case):
    followed = memory_of(on_meta("resnet18", case), batch=3, size=64, precision="fp32")
    net = build("resnet18", case).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)
    x, y, ids = torch.randn(3, 3, 64, 64), torch.zeros(3, 14), torch.arange(3)
    x = x.to(memory_format=torch.channels_last)
    step(net, optimizer, x, y, ids)
    gc.collect()
    live = LiveBytes()
    live.hold(x, y, ids, *net.parameters(), *net.buffers(), *(v for s in optimizer.state.values() for v in s.values()))
    assert live.now == followed.held
    with live:
        step(net, optimizer, x, y, ids)
    assert live.peak == pytest.approx(followed.peak, rel=0.01)


def test_half_precision_and_checkpointing_need_less_memory_and_moments_are_in():
    def memory(case, precision="fp32"):
        return memory_of(on_meta("resnet50", case), batch=16, size=96, precision=precision)

    single, half, again = memory("plain"), memory("plain", "fp16"), memory("plain" + AGAIN)
    weights = sum(p.numel() for p in on_meta("resnet50", "plain").parameters()) * 4
    assert single.held == half.held == pytest.approx(3 * weights, rel=0.03)
    # half the activations, and autocast's copies of the weights beside them
    assert half.peak - half.held == pytest.approx((single.peak - single.held + weights) / 2, rel=0.1)
    assert again.peak - again.held < 0.6 * (single.peak - single.held)  # gradients of the weights stay


def test_cases_are_what_they_are_called():
    assert set(cases_of("mobilenet_v2")) == set(CASES)
    assert build("resnet18", "all" + AGAIN).grad_checkpointing and not build("resnet18", "all").grad_checkpointing
    assert type(build("resnet18", "attention_published").attention) is LayeredAttention
    for case, parts in (("bank", {"bank"}), ("momentum", {"momentum"}), ("attention_filter", {"attention"}),
                        ("all", {"bank", "momentum", "attention"}), ("plain", set())):
        net = build("resnet18", case)
        assert {part for part in ("bank", "momentum", "attention") if getattr(net, part) is not None} == parts


def test_presets_have_a_row_for_each_phase():
    rows = preset_rows("ag_cnn")
    assert [(row["phase"], row["batch"]) for row in rows] == [("g", 32), ("l", 16), ("f", 16)]
    half, path, fusion = (row["trained"] for row in rows)
    assert half == path and 2 * half + fusion == rows[0]["parameters"] and fusion == (2 * 2048 + 1) * 15
    g, local, f = (row["training_gflops"] for row in rows)
    assert local == pytest.approx(g * 4 / 3, rel=0.02) and f == pytest.approx(2 * g / 3, rel=0.02)  # a path without gradients
    assert rows[0]["inference_gflops"] == pytest.approx(rows[1]["inference_gflops"] / 2, rel=0.01)
