import re

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from charmlib.nn.backbone import TORCHVISION, split_backbone


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "efficientnet_b0", "mobilenet_v2", "resnet18", "resnet50",
                                  "densenet121", "vgg16"])
def test_trunk_and_final_are_the_whole_network(name):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None).eval()
    torch.manual_seed(0)
    parts = split_backbone(name, "none")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got = parts.final.eval()(parts.trunk.eval()(x))
        if name.startswith("resnet"):
            whole = torch.nn.Sequential(*list(net.children())[:-2])
        else:
            whole = net.features
        want = whole(x)
        if name == "densenet121":
            want = want.relu()
    assert got.shape[1] == parts.features == TORCHVISION[name][1]
    torch.testing.assert_close(got, want)
    assert any(p.dim() > 1 for p in parts.final.parameters())


@pytest.mark.parametrize("name", ["efficientnet_b1", "efficientnet_v2_m", "efficientnet_v2_l"])
def test_the_others_are_there(name):
    parts = split_backbone(name, "none")
    with torch.no_grad():
        assert parts.final(parts.trunk(torch.randn(2, 3, 64, 64))).shape[:2] == (2, 1280)


@pytest.mark.parametrize("name", ["timm:resnet10t", "timm:test_efficientnet", "timm:test_convnext",
                                  "timm:mobilenetv3_small_050"])
def test_timm_models(name):
    parts = split_backbone(name, "none")
    out = parts.final(parts.trunk(torch.randn(2, 3, 64, 64)))
    assert out.dim() == 4 and out.shape[1] == parts.features
    assert any(p.dim() > 1 for p in parts.final.parameters())


@pytest.mark.parametrize("name, norm, pooled", [
    ("test_convnext", "head.norm", True), ("convnextv2_atto", "head.norm", True), ("edgenext_xx_small", "head.norm", True),
    ("convnext_tiny_hnf", "norm_pre", False), ("test_efficientnet", "", False), ("test_resnet", "", False),
    ("resnetv2_50", "norm", False), ("inception_next_atto", "", False)])
def test_a_timm_model_keeps_the_norm_before_its_classifier(tmp_path, name, norm, pooled):
    """Its features equal what timm's classifier sees: on one position, and on any map if timm's norm precedes the pool."""
    import timm

    whole = timm.create_model(name, num_classes=3).eval()
    for p in (p for n, p in whole.named_parameters() if norm and n.startswith(norm)):  # as if trained
        torch.nn.init.uniform_(p, 0.5, 2)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    parts = split_backbone(f"timm:{name}", tmp_path / "w.pt")
    kept = [n for n, _ in parts.final.named_children() if "norm" in n]
    assert kept == ([norm.replace(".", "_")] if norm else [])
    if norm:
        x = torch.randn(2, 3, *([32, 32] if pooled else [64, 96]))
        with torch.no_grad():
            got = parts.final.eval()(parts.trunk.eval()(x))
            want = whole.forward_head(whole.forward_features(x), pre_logits=True)
        torch.testing.assert_close(got.mean((2, 3)), want, rtol=1e-4, atol=1e-4)


def test_the_last_norm_leaves_the_random_numbers_where_they_were():
    import timm

    torch.manual_seed(0)
    split_backbone("timm:test_convnext", "none")
    after = torch.rand(1)
    torch.manual_seed(0)
    timm.create_model("test_convnext", features_only=True)
    assert torch.equal(after, torch.rand(1))


def test_a_timm_file_brings_its_last_norm_or_is_refused(tmp_path):
    import timm

    net = timm.create_model("test_convnext", num_classes=3)
    with torch.no_grad():
        net.head.norm.weight.uniform_(0.5, 2), net.head.norm.bias.normal_()
    torch.save(net.state_dict(), tmp_path / "t.pt")
    norm = split_backbone("timm:test_convnext", tmp_path / "t.pt").final.head_norm
    assert torch.equal(norm.weight, net.head.norm.weight) and torch.equal(norm.bias, net.head.norm.bias)
    torch.save({k: v for k, v in net.state_dict().items() if not k.startswith("head.")}, tmp_path / "without.pt")
    with pytest.raises(ValueError, match=r"without\.pt.*2 missing: head\.norm\.bias, head\.norm\.weight"):
        split_backbone("timm:test_convnext", tmp_path / "without.pt")


def test_pretrained_timm_weights_bring_norm_and_licence(tmp_path, monkeypatch, capsys):
    """timm finds its weights at a local place, as it would in its cache."""
    import timm

    net = timm.create_model("test_convnext")
    with torch.no_grad():
        net.head.norm.weight.uniform_(0.5, 2)
    torch.save(net.state_dict(), tmp_path / "cached.pt")
    find = timm.models._builder._resolve_pretrained_source
    monkeypatch.setattr(timm.models._builder, "_resolve_pretrained_source",
                        lambda config: find({**config, "file": str(tmp_path / "cached.pt")}))
    parts = split_backbone("timm:test_convnext", "imagenet")
    assert torch.equal(parts.final.head_norm.weight, net.head.norm.weight)
    assert capsys.readouterr().out == "timm:test_convnext: weights r160_in1k, licence apache-2.0 (timm)\n"
    split_backbone("timm:test_convnext", "none")
    assert capsys.readouterr().out == ""


def test_drop_path_reaches_the_blocks_and_acts_in_training_only():
    from timm.layers import DropPath

    torch.manual_seed(0)
    deep = split_backbone("timm:convnextv2_atto", "none", drop_path=0.5)
    torch.manual_seed(0)
    plain = split_backbone("timm:convnextv2_atto", "none")
    rates = [m.drop_prob for part in (deep.trunk, deep.final) for m in part.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates) and rates[-1] == pytest.approx(0.5)
    assert not any(isinstance(m, DropPath) and m.drop_prob for m in plain.final.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(deep.final.eval()(deep.trunk.eval()(x)), plain.final.eval()(plain.trunk.eval()(x)))
        deep.trunk.train(), deep.final.train()
        assert not torch.equal(deep.final(deep.trunk(x)), deep.final(deep.trunk(x)))


@pytest.mark.parametrize("name", ["resnet18", "timm:vgg11"])
def test_drop_path_without_stochastic_depth_is_refused(name):
    with pytest.raises(ValueError, match=r"drop_path.*timm:NAME|no stochastic depth.*drop_path: 0"):
        split_backbone(name, "none", drop_path=0.1)


def test_unknown_and_unfit_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'efficientnet_v2_s'"):
        split_backbone("efficientnetv2_s", "none")
    with pytest.raises(ValueError, match="Did you mean 'timm:resnet18'"):
        split_backbone("timm:resnet_18", "none")
    with pytest.raises(ValueError, match="stages in sequence|spatial map"):
        split_backbone("timm:vit_tiny_patch16_224", "none")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_fills_everything_but_the_classifier(tmp_path, suffix):
    net = torchvision.models.resnet18(weights=None, num_classes=7)
    path = tmp_path / f"mine{suffix}"
    state = net.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"epoch": 3, "state_dict": {
        f"module.encoder.{k}": v for k, v in state.items()}}, path)
    parts = split_backbone("resnet18", path)
    assert torch.equal(parts.trunk.conv1.weight, net.conv1.weight)
    assert torch.equal(parts.final[1].conv2.weight, net.layer4[1].conv2.weight)
    assert parts.mean is None  # a file cannot say what it was normalised with


def test_densenet_files_of_before_pytorch_0_4(tmp_path):
    state = torchvision.models.densenet121(weights=None).state_dict()
    old = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", k): v for k, v in state.items()}
    torch.save({"state_dict": {f"module.densenet121.{k}": v for k, v in old.items()}}, tmp_path / "old.pth.tar")
    parts = split_backbone("densenet121", tmp_path / "old.pth.tar")
    name = "denseblock4.denselayer16.conv2.weight"
    assert torch.equal(parts.final.state_dict()[name], state[f"features.{name}"])


def test_a_file_that_does_not_fit_is_refused_by_key(tmp_path):
    state = torchvision.models.resnet18(weights=None).state_dict()
    del state["layer3.0.conv1.weight"]
    state["layer9.weight"] = torch.zeros(1)
    state["conv1.weight"] = state["conv1.weight"][:, :1]
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad\.pt") as error:
        split_backbone("resnet18", tmp_path / "bad.pt")
    for key in ("layer3.0.conv1.weight", "layer9.weight", "conv1.weight"):
        assert key in str(error.value)


def test_a_timm_file_is_checked_and_loaded(tmp_path):
    import timm

    net = timm.create_model("resnet10t", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "t.pt")
    parts = split_backbone("timm:resnet10t", tmp_path / "t.pt")
    assert torch.equal(parts.final.layer4[0].conv1.weight, net.layer4[0].conv1.weight)
    torch.save({k: v for k, v in net.state_dict().items() if "layer2" not in k}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"layer2"):
        split_backbone("timm:resnet10t", tmp_path / "part.pt")


def test_pickled_objects_are_never_loaded(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"read safely.*state_dict\(\)"):
        split_backbone("resnet18", tmp_path / "whole.pt")


def test_imagenet_offline_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(FileNotFoundError, match=r"checkpoints/resnet18-f37072fd\.pth"):
        split_backbone("resnet18", "imagenet")
    with pytest.raises(FileNotFoundError, match="no weight file"):
        split_backbone("resnet18", tmp_path / "absent.pt")


def test_imagenet_from_torchvisions_cache(tmp_path, monkeypatch):
    net = torchvision.models.resnet18(weights=None)
    (tmp_path / "checkpoints").mkdir()
    torch.save(net.state_dict(), tmp_path / "checkpoints" / "resnet18-f37072fd.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    parts = split_backbone("resnet18", "imagenet")
    assert torch.equal(parts.trunk.conv1.weight, net.conv1.weight)
    assert parts.mean == pytest.approx((0.485, 0.456, 0.406))


def test_each_imagenet_weight_brings_its_own_scale(monkeypatch):
    from charmlib.nn import backbone

    monkeypatch.setattr(backbone, "_download", lambda entry, name: torchvision.models.get_model(name).state_dict())
    assert split_backbone("efficientnet_v2_l").mean == (0.5, 0.5, 0.5)
    assert split_backbone("efficientnet_b0").std == pytest.approx((0.229, 0.224, 0.225))
