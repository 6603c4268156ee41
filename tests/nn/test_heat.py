"""Grad-CAM beside class activation maps, finite differences, and a network whose answer is known."""

import copy
import time

import pytest
import torch
import torch.nn.functional as F

from charmlib.models import CharmNet
from charmlib.nn.heat import grad_cam, own_map

TINY = {"arch": "timm:test_resnet", "classes": 3, "weights": "none", "norm": "half", "head": "standard",
        "use_attention": False, "momentum_form": "branch", "use_momentum": False}


def network(**changes):
    torch.manual_seed(0)
    return CharmNet(**{**TINY, **changes})


def test_behind_pooling_and_a_linear_head_it_is_the_class_activation_map():
    net, x = network(use_bank=False), torch.randn(4, 3, 64, 64)
    net.head = torch.nn.Linear(net.features, 3)
    net.classify = net.head
    found = grad_cam(net, x, [2, 0])
    with torch.no_grad():
        f = net.eval().final(net.trunk(x))
        want = torch.einsum("kc,bchw->kbhw", net.head.weight[[2, 0]], f).relu() / (f.shape[2] * f.shape[3])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stride", [8, 16, 32])
@pytest.mark.parametrize("changes", [{"use_bank": False}, {}, {"use_attention": True, "use_momentum": True, "head": "charm"},
                                     {"use_attention": True, "attention": "layers"}, {"head": "csra"}],
                         ids=["plain", "votes", "parts", "layers", "csra"])
def test_weights_are_the_slopes_of_the_heads_logit(changes, stride):
    """Beside a twin that lets autograd run through the whole network from the same map."""
    net, x = network(**changes), torch.randn(2, 3, 64, 64)
    before = copy.deepcopy(net.state_dict())
    found = grad_cam(net, x, [1], stride)
    kept, maps = net.eval(), []
    part = dict(net.named_children())["final"] if stride == 32 else None
    target = part or next(block for block in reversed(net.trunk) if block is not None and _stride(net, block, x) == stride)
    hook = target.register_forward_hook(lambda _, __, out: maps.append(out))
    logits, seen = kept.read(x)
    hook.remove()
    slope, = torch.autograd.grad(seen.get("head", logits)[:, 1].sum(), maps[0])
    want = (slope.mean((2, 3), keepdim=True) * maps[0]).sum(1).relu()
    torch.testing.assert_close(found[0], want, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and found.shape[-1] == 64 // stride


def _stride(net, block, x):
    for each in net.trunk:
        x = each(x)
        if each is block:
            return 64 // x.shape[-1]


def test_the_network_is_left_as_it_was_and_gradients_stay_empty():
    net = network().train()
    net.final.requires_grad_(False)
    names = {name: p.requires_grad for name, p in net.named_parameters()}
    with pytest.raises(ValueError, match=r"the network has maps at the strides .*32, not at 5"):
        grad_cam(net, torch.randn(2, 3, 64, 64), [0], 5)
    grad_cam(net, torch.randn(2, 3, 64, 64), [0])
    assert net.training and {name: p.requires_grad for name, p in net.named_parameters()} == names
    assert all(p.grad is None for p in net.parameters())


def test_it_costs_little_more_than_scoring():
    net, x = network(arch="mobilenet_v2", use_bank=False).eval(), torch.randn(16, 3, 96, 96)
    seconds = {"score": [], "heat": []}
    for _ in range(5):
        for name, run in (("score", lambda: net(x)), ("heat", lambda: grad_cam(net, x, [0]))):
            start = time.process_time()
            with torch.no_grad():
                run()
            seconds[name].append(time.process_time() - start)
    assert min(seconds["heat"]) < 1.5 * min(seconds["score"])


def test_a_network_shows_the_maps_that_it_makes_for_itself():
    """The attention's weights, recomputed from its definition; a gate as it multiplies; the heat that a crop is cut by."""
    from charmlib.models.two_path import TwoPathNet

    torch.manual_seed(0)
    net, x = network(arch="mobilenet_v2", use_bank=False, use_attention=True).eval(), torch.randn(2, 3, 96, 96)
    for layer in net.attention.scores:
        torch.nn.init.normal_(layer.weight)
    seen = {}
    net.attention.register_forward_pre_hook(lambda module, given: seen.update(maps=given[0]))
    net(x)
    for stride, i in ((8, 0), (16, 1), (32, 2)):
        attention, f = net.attention, net.attention.reduce[i](seen["maps"][i])
        place = attention.places[i].repeat_interleave(-(-f.shape[2] // 2), 1).repeat_interleave(-(-f.shape[3] // 2), 2)
        if f.shape[2] % 2:  # nearest takes the first of two quarters for the middle row and column
            place = F.interpolate(attention.places[i][None], f.shape[2:])[0]
        score = torch.einsum("hc,bcij->bhij", attention.scores[i].weight[:, :, 0, 0], f) + place
        share = (score.exp() / score.exp().sum((2, 3), keepdim=True)).mean(1)
        found = own_map(net, x, "attention", stride)
        torch.testing.assert_close(found, share.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(found.sum((1, 2)), torch.ones(2))
    with pytest.raises(ValueError, match="strides 8, 16, 32, not at 4"):
        own_map(net, x, "attention", 4)
    with pytest.raises(ValueError, match="no crop of this network follows a map"):
        own_map(net, x, "crop")
    with pytest.raises(ValueError, match="use_attention: true"):
        own_map(network(arch="mobilenet_v2", use_bank=False, use_attention=False).eval(), x, "attention")
    gate = network(arch="mobilenet_v2", use_bank=False, use_attention=True, attention="filter").eval()
    with torch.no_grad():
        want = gate.attention(gate.final(gate.trunk(x)))[:, 0]
    torch.testing.assert_close(own_map(gate, x, "attention"), want)
    two = TwoPathNet("timm:test_resnet", 3, weights="none", norm="half").eval()
    with torch.no_grad():
        torch.testing.assert_close(own_map(two, x, "crop"), two.read(x)[1]["heat"])


def test_of_two_paths_it_is_the_first():
    from charmlib.models.two_path import TwoPathNet

    torch.manual_seed(0)
    net, x = TwoPathNet("timm:test_resnet", 3, weights="none", norm="half").eval(), torch.randn(2, 3, 64, 64)
    path, weight = net.global_path, net.global_path.head[-1].weight
    with torch.no_grad():
        f = path.final(path.trunk(x))
        want = torch.einsum("c,bchw->bhw", weight[1], f).relu() / (f.shape[2] * f.shape[3])
    torch.testing.assert_close(grad_cam(net, x, [1])[0], want, rtol=1e-4, atol=1e-6)
