import pytest
import torch
import torchvision

from charmlib.models import CharmNet
from charmlib.nn.scales import maps_of
from charmlib.nn.votes import RAREST

SMALL = {"arch": "timm:test_resnet", "weights": "none", "norm": "half", "attention": "layers", "momentum_form": "branch",
         "bank_size": 16, "k": 2, "hidden": 16}
PLAIN = {"use_momentum": False, "use_attention": False}


def make(**changes):
    torch.manual_seed(0)
    return CharmNet(classes=5, **{**SMALL, **changes})


def test_forward_is_the_written_pipeline():
    net = make(answer="features", strategy="rarity", threshold=0.0).train()
    net(torch.randn(8, 3, 32, 32))  # fills the bank
    net.eval()
    x = torch.randn(4, 3, 32, 32)
    shared = net.trunk(x)
    q = net.final(shared)
    region = (q * net.attention(q)).flatten(2).mean(2)
    z = region + net.momentum.encoder(shared).flatten(2).mean(2)
    assert net.bank.filled.item() > 0
    torch.testing.assert_close(net(x), net.head(net.bank(z)))


@pytest.mark.parametrize("off", ["use_momentum", "use_attention", "use_bank"])
def test_each_part_can_be_left_out(off):
    net = make(**{off: False})
    part = getattr(net, off.removeprefix("use_"))
    assert part is None
    net(torch.randn(4, 3, 32, 32)).sum().backward()
    net.follow()


def test_without_all_three_it_is_the_plain_network():
    net = make(use_momentum=False, use_attention=False, use_bank=False).eval()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(net(x), net.head(net.final(net.trunk(x)).mean((2, 3))))
    assert {name.split(".")[0] for name, _ in net.named_parameters()} == {"trunk", "final", "head"}


def test_groups_hold_every_trained_parameter_once_and_the_momentum_branch_never():
    net = make(retrieval="gated")
    grouped = [p for group in net.parameter_groups() for p in group]
    trained = {id(p) for n, p in net.named_parameters() if not n.startswith("momentum.")}
    assert len(grouped) == len(trained) and {id(p) for p in grouped} == trained


def test_a_bare_loop_trains_it():
    net, x = make(answer="features", threshold=0.0), torch.randn(16, 3, 32, 32)
    y = torch.stack([(x.mean((1, 2, 3)) > 0).float()] * 5, 1)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(40):
        net.bank.expect(torch.arange(16), y)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        net.follow()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert net.momentum.updates.item() == 40 and net.bank.steps.item() == 40
    assert set(net.bank.slot_ids[: net.bank.filled].tolist()) <= set(range(16))


def test_all_that_training_changes_is_in_the_state_dict():
    net = make(threshold=0.0)
    for _ in range(3):
        net(torch.randn(8, 3, 32, 32))
        net.follow()
    other = make(threshold=0.0)
    other.load_state_dict(net.state_dict())
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(net.eval()(x), other.eval()(x))
    assert other.momentum.updates.item() == 3 and other.bank.pointer.item() == net.bank.pointer.item()


def test_auto_norm_refuses_to_guess_for_a_file(tmp_path):
    net = make()
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="norm: imagenet"):
        make(weights=tmp_path / "w.pt", norm="auto")
    assert make(weights=tmp_path / "w.pt", norm="half").mean == net.mean


def test_votes_are_added_in_eval_mode_only_by_keys_of_three_scales():
    net = make(use_momentum=False, use_attention=False, threshold=1.0)
    x, y = torch.randn(8, 3, 64, 64), (torch.rand(8, 5) < 0.5).float()
    net.bank.choose(torch.arange(8), y)
    net.renew(lambda ids: x[ids])
    torch.manual_seed(1)
    got = net.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, net.head(net.final(net.trunk(x)).mean((2, 3))), rtol=1e-4, atol=1e-4)
    assert net.bank.filled.item() == 8
    net.eval()
    _, z, keys = net.encode(x)
    blocks = list(net.trunk)
    maps = [torch.nn.functional.adaptive_avg_pool2d(torch.nn.Sequential(*blocks[:end])(x), 2).flatten(1) for end in net.ends]
    torch.testing.assert_close(keys, torch.cat(maps, 1))
    assert net.bank.slots.shape[1] == sum(m.shape[1] for m in maps) and len(maps) == 3 and not keys.requires_grad
    votes, heard = net.bank.votes(keys), net.bank.fitted
    prior = torch.logit(net.bank.shares.clamp(RAREST, 1 - RAREST))
    want = torch.where(heard, (net.head(z) + prior + votes) / 2, net.head(z))
    torch.testing.assert_close(net(x), want)
    assert heard.any()
    assert make(keys="features").bank.slots.shape[1] == net.features


@pytest.mark.parametrize("wrong", [{"answer": "labels"}, {"keys": "maps"}])
def test_other_answers_and_keys_are_refused(wrong):
    with pytest.raises(ValueError, match="answer must be one of votes, features"):
        make(**wrong)
    with pytest.raises(ValueError, match="momentum_form must be one of weights, branch"):
        make(momentum_form="copy")


def test_by_default_it_starts_as_the_plain_network_and_momentum_is_no_part_of_it():
    """Attention's last layer starts at 0, the bank votes in eval mode only, and the mean of the weights is kept outside."""
    ours, x = make(attention="scales", momentum_form="weights"), torch.randn(4, 3, 64, 64)
    plain = make(**PLAIN, use_bank=False)
    plain.load_state_dict({name: value for name, value in ours.state_dict().items() if name.split(".")[0] not in (
        "attention", "bank")})
    assert ours.momentum is None and ours.mean_decay == 0.99 and plain.mean_decay == 0 == make().mean_decay
    assert torch.equal(ours.eval()(x), plain.eval()(x))
    ours.train()(x).square().sum().backward()
    assert ours.attention.read.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ["timm:test_resnet", "timm:test_convnext", "mobilenet_v2", "timm:efficientformerv2_s0"])
@pytest.mark.parametrize("use_bank", [False, True])
def test_attention_reads_the_last_maps_of_the_trunk_and_the_final_one(arch, use_bank):
    net = make(arch=arch, attention="scales", use_bank=use_bank, use_momentum=False).eval()
    torch.nn.init.normal_(net.attention.read.weight)
    x = torch.randn(2, 3, 64 if "former" not in arch else 224, 64 if "former" not in arch else 224)
    shared, maps = maps_of(net.trunk, net.ends, x, torch.nn.Module.__call__)
    last = net.final(shared)
    want = last.mean((2, 3)) + net.attention([*maps[-2:], last])
    torch.testing.assert_close(net.encode(x).z, want)
    assert not torch.allclose(want, last.mean((2, 3)), atol=1e-2)


def test_a_bank_by_labels_is_chosen_then_renewed_and_then_votes():
    net = make(threshold=1.0, use_momentum=False)
    images, y = torch.randn(12, 3, 64, 64), torch.zeros(12, 5)
    y[:6, 0] = 1
    net.bank.choose(torch.arange(12), y)
    net.train().renew(lambda ids: images[ids])
    assert net.training and net.bank.filled == 12 and net.bank.fitted.tolist() == [True] + [False] * 4
    slots = net.bank.slots[:12].clone()
    torch.testing.assert_close(slots, net.eval().encode(images).keys)
    head, logits = net.classify(net.encode(images).z), net(images)
    assert torch.equal(head[:, 1:], logits[:, 1:]) and not torch.equal(head[:, 0], logits[:, 0])


def test_encode_names_what_it_gives():
    net, x = make(**PLAIN).eval(), torch.randn(3, 3, 64, 64)
    encoded = net.encode(x)
    assert torch.equal(encoded.map, net.final(net.trunk(x))) and torch.equal(encoded.z, encoded.map.mean((2, 3)))
    assert encoded.keys.shape == (3, net.bank.slots.shape[1]) and make(**PLAIN, use_bank=False).encode(x).keys is None


@pytest.mark.parametrize("attended", [False, True])
def test_a_csra_head_reads_the_map_and_votes_are_added_to_it(attended):
    net = make(use_momentum=False, use_attention=attended, head="csra", csra_heads=2, threshold=1.0)
    x, y = torch.randn(8, 3, 64, 64), (torch.rand(8, 5) < 0.5).float()
    net.train()(x).sum().backward()
    net.bank.choose(torch.arange(8), y)
    net.renew(lambda ids: x[ids])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    q = net.final(net.trunk(x))
    head = net.head(q * net.attention(q) if attended else q)
    logits, seen = net.read(x)
    torch.testing.assert_close(seen["head"], head)
    _, _, keys = net.encode(x)
    votes, heard = net.bank.votes(keys), net.bank.fitted
    torch.testing.assert_close(logits, torch.where(heard, (head + net.bank.prior() + votes) / 2, head))
    assert heard.any() and not torch.equal(logits, head)
    alone = make(use_momentum=False, use_attention=attended, head="csra", use_bank=False).eval()
    q = alone.final(alone.trunk(x))
    torch.testing.assert_close(alone(x), alone.head(q * alone.attention(q) if attended else q))


def test_other_heads_train_in_the_head_group_and_a_bare_loop():
    for head in ("standard", "csra"):
        net = make(**PLAIN, use_bank=False, head=head)
        assert {id(p) for p in net.head.parameters()} == {id(p) for p in net.parameter_groups()[-1]}
        x = torch.randn(8, 3, 32, 32)
        y = torch.stack([(x.mean((1, 2, 3)) > 0).float()] * 5, 1)
        optimizer, losses = torch.optim.AdamW(net.parameters(), 3e-3), []
        for _ in range(30):
            loss = torch.nn.functional.binary_cross_entropy_with_logits(net(x), y)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0], head


@pytest.mark.parametrize("pooled", [{"use_momentum": True}, {"use_attention": True, "attention": "scales"},
                                    {"answer": "features"}])
def test_csra_is_refused_where_features_have_no_positions(pooled):
    with pytest.raises(ValueError, match="csra reads a map"):
        make(**{**PLAIN, "head": "csra", **pooled})


def test_half_precision_csra():
    net = make(**PLAIN, head="csra", csra_heads=8, use_bank=False).train()
    x = torch.randn(4, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(x)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.float(), net(x), atol=0.2, rtol=0.1)


def test_the_default_head_and_backbone_draw_the_random_numbers_that_they_always_drew():
    """Stored runs of torchvision's backbones can be repeated: the layers written out, in the order in which they are made."""
    torch.manual_seed(0)
    net = CharmNet("resnet18", 5, weights="none", use_bank=False, use_attention=False)
    torch.manual_seed(0)
    body = torchvision.models.resnet18(weights=None)
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(512), torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Dropout(0.3),
                               torch.nn.Linear(512, 5))
    want = {f"head.{name}": value for name, value in head.state_dict().items()}
    want |= {f"{'final' if 'layer4' in name else 'trunk'}.{name.removeprefix('layer4.')}": value
             for name, value in body.state_dict().items() if not name.startswith("fc.")}
    got = net.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(value, want[name]) for name, value in got.items())
