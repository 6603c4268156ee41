"""Gradient checkpointing: less memory, the same bits."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from charmlib.models import CharmNet
from charmlib.nn import recompute, split_backbone
from charmlib.nn.recompute import segments


def train(net, steps=3, side=64, hooks=nullcontext, autocast=False):
    """Losses of a few steps of a bare loop; dropout and stochastic depth draw from one seed."""
    torch.manual_seed(1)
    images, labels = torch.randn(steps, 4, 3, side, side), (torch.rand(steps, 4, 14) < 0.3).float()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for x, y in zip(images, labels):
        with hooks(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.binary_cross_entropy_with_logits(net(x).float(), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.follow()
        losses.append(loss.detach().clone())
    return losses, torch.rand(1)


def pair(arch, **changes):
    torch.manual_seed(0)
    plain = CharmNet(arch, 14, weights="none", norm="half", bank_size=16, k=2, hidden=16, threshold=0.0, **changes)
    again = copy.deepcopy(plain)
    again.grad_checkpointing = True
    return plain.train(), again.train()


def assert_same(plain, again, mine, theirs):
    assert torch.equal(torch.stack(mine[0]), torch.stack(theirs[0])) and torch.equal(mine[1], theirs[1])
    want, got = plain.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert not [name for name in want if not torch.equal(want[name], got[name])]


@pytest.mark.parametrize("arch", ["efficientnet_v2_s", "resnet50", "densenet121", "mobilenet_v2", "timm:test_resnet",
                                  "timm:test_convnext"])
def test_the_same_bits(arch):
    plain, again = pair(arch)
    start = copy.deepcopy(plain.state_dict())
    assert_same(plain, again, train(plain), train(again))
    moved = [name for name in start if not torch.equal(start[name], plain.state_dict()[name])]
    assert any(name.endswith("num_batches_tracked") for name in moved) or arch == "timm:test_convnext"  # has layer norms
    assert all(plain.state_dict()[n] == 3 for n in start if n.startswith("trunk.") and n.endswith("num_batches_tracked"))


def test_the_same_bits_with_stochastic_depth_and_a_head_that_reads_the_map():
    plain, again = pair("timm:test_convnext", head="csra", drop_path=0.3, use_attention=False)
    assert_same(plain, again, train(plain), train(again))


def test_the_same_bits_in_half_precision():
    plain, again = pair("mobilenet_v2", attention="filter")
    assert_same(plain, again, train(plain, autocast=True), train(again, autocast=True))


def test_the_same_bits_with_a_frozen_trunk_whose_norms_train():
    """fastai's freeze: weights are frozen, batch norms are not."""
    pairs = pair("resnet18", use_momentum=False)
    for net in pairs:
        for module in net.trunk.modules():
            for p in module.parameters(recurse=False):
                p.requires_grad_(isinstance(module, nn.BatchNorm2d))
    assert_same(*pairs, *(train(net) for net in pairs))


class Kept:
    """Bytes of the distinct storages that autograd keeps between forward and backward."""

    def __init__(self):
        self.storages = {}

    def __call__(self):
        def pack(t):
            self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        return saved_tensors_hooks(pack, lambda t: t)


@pytest.mark.parametrize("arch, most", [("efficientnet_v2_s", 0.25), ("resnet50", 0.35), ("densenet121", 0.35),
                                        ("mobilenet_v2", 0.3)])
def test_few_activations_are_kept(arch, most):
    """Counted without parameters, in the forward pass alone."""
    found = []
    for net in pair(arch, use_attention=False):
        own = {p.untyped_storage().data_ptr() for p in (*net.parameters(), *net.buffers())}
        kept = Kept()
        with kept():
            held = net.encode(torch.randn(4, 3, 64, 64)).z
        found.append(sum(n for where, n in kept.storages.items() if where not in own))
        del held
    assert 0 < found[1] < most * found[0], found


def test_evaluation_and_no_grad_run_once():
    _, net = pair("mobilenet_v2", keys="features", use_attention=False)  # so that the trunk is one piece
    calls = []
    net.trunk.register_forward_hook(lambda *_: calls.append("whole"))
    x = torch.randn(2, 3, 64, 64)
    net(x)
    assert calls == []  # segment by segment
    with torch.no_grad():
        net(x)
    net.eval()(x)
    assert calls == ["whole", "whole"]


@pytest.mark.parametrize("arch", ["efficientnet_v2_s", "resnet50", "densenet121", "vgg16", "timm:test_resnet"])
def test_segments_are_all_of_the_blocks_in_order(arch):
    backbone = split_backbone(arch, "none")
    for part in (backbone.trunk, backbone.final):
        flat = [p for block in segments(part) for m in block for p in m.parameters()]
        assert [id(p) for p in flat] == [id(p) for p in part.parameters()]
        assert all(any(p.dim() > 1 for p in block[0].parameters()) for block in segments(part))
    if arch == "efficientnet_v2_s":
        assert len(segments(backbone.trunk)) == 1 + 40  # the stem and the blocks of the six stages


def test_only_plain_sequentials_are_opened():
    class Twice(nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    twice = Twice(nn.Linear(3, 3), nn.Linear(3, 3))
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(inplace=True), twice))
    assert [[type(m).__name__ for m in part] for part in segments(net)] == [["Linear", "ReLU"], ["Twice"]]
    x = torch.randn(2, 3, requires_grad=True)
    assert torch.equal(recompute(net, x), net(x))


def test_a_segment_that_changes_its_input_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Flatten(), nn.Linear(3, 3)))

    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x.relu_())

    net.append(Overwrites())
    with pytest.raises(RuntimeError, match="Overwrites changes its input in place"):
        recompute(net, torch.randn(2, 3))
