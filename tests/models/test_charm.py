import pytest
import torch

from charmlib.models import CharmNet
from charmlib.nn.votes import RAREST

SMALL = {"arch": "timm:test_resnet", "weights": "none", "norm": "half", "use_momentum": True, "use_attention": True,
         "bank_size": 16, "k": 2, "hidden": 16}


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
    net, x = make(), torch.randn(16, 3, 32, 32)
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
    net = make(use_momentum=False, use_attention=False)
    x, y = torch.randn(8, 3, 64, 64), (torch.rand(8, 5) < 0.5).float()
    net.bank.expect(torch.arange(8), y)
    torch.manual_seed(1)
    got = net.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, net.head(net.final(net.trunk(x)).mean((2, 3))), rtol=1e-4, atol=1e-4)
    assert net.bank.filled.item() == 8
    net.eval()
    z, keys = net.encode(x)
    blocks = list(net.trunk)
    maps = [torch.nn.functional.adaptive_avg_pool2d(torch.nn.Sequential(*blocks[:end])(x), 2).flatten(1) for end in net.ends]
    torch.testing.assert_close(keys, torch.cat(maps, 1))
    assert net.bank.blocks == [m.shape[1] for m in maps] and len(maps) == 3 and not keys.requires_grad
    votes, heard = net.bank.votes(keys)
    prior = torch.logit(net.bank.shares.clamp(RAREST, 1 - RAREST))
    want = torch.where(heard, (net.head(z) + prior + votes) / 2, net.head(z))
    torch.testing.assert_close(net(x), want)
    assert heard.any()
    assert make(keys="features").bank.blocks == [net.features]


@pytest.mark.parametrize("wrong", [{"answer": "labels"}, {"keys": "maps"}])
def test_other_answers_and_keys_are_refused(wrong):
    with pytest.raises(ValueError, match="answer must be one of votes, features"):
        make(**wrong)
