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
