"""Starts from torchxrayvision's weights: one grey channel, inputs of -1024 to 1024."""

import pytest
import torch
import torchvision
from torch import nn

from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.leaks import LeakError, leaked_start
from charmlib.models import CharmNet
from charmlib.nn.backbone import XRV, split_backbone
from charmlib.params import resolve


def saved(path, name, prefix=""):
    """A file as torchxrayvision's state dicts, from a network with one input channel; and that network."""
    net = torchvision.models.get_model(name, weights=None, num_classes=18)
    if name == "resnet50":
        net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    else:
        net.features.conv0 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    state = {prefix + k: v for k, v in net.state_dict().items()} | {"op_threshs": torch.zeros(18)}
    torch.save(state, path)
    return net.eval()


@pytest.mark.parametrize("name, prefix", [("densenet121", ""), ("resnet50", "model.")])
def test_features_equal_those_of_the_network_with_one_channel(tmp_path, name, prefix):
    torch.manual_seed(0)
    net = saved(tmp_path / "chex-state.pt", name, prefix)
    own = split_backbone(name, tmp_path / "chex-state.pt")
    assert (own.mean, own.std) == XRV
    grey = torch.rand(2, 1, 64, 64) * 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in XRV)
    x = (2 * (grey / 255) - 1) * 1024  # torchxrayvision.utils.normalize
    scaled = grey_to_network(grey, mean, std)
    torch.testing.assert_close(scaled[:, :1], x, atol=1e-3, rtol=1e-5)
    with torch.no_grad():
        ours = own.final.eval()(own.trunk.eval()(scaled)).mean((2, 3))
        last = net.classifier if name == "densenet121" else net.fc
        last.weight.data, last.bias.data = torch.eye(own.features), torch.zeros(own.features)  # the features themselves
        torch.testing.assert_close(ours, net(x), rtol=1e-4, atol=1e-4 * net(x).abs().max().item())
    with pytest.raises(ValueError, match="one grey channel.*say norm: xrv"):
        CharmNet(name, 2, weights=tmp_path / "chex-state.pt", norm="imagenet", use_bank=False)
    assert CharmNet(name, 2, weights=tmp_path / "chex-state.pt", norm="xrv", use_bank=False).std == XRV[1]


def test_a_pickled_module_is_refused_with_the_line_that_converts_it(tmp_path):
    torch.save(nn.Linear(1, 1), tmp_path / "nih-densenet121.pt")
    with pytest.raises(ValueError, match=r"torch.save\(torch.load\('.*nih-densenet121.pt', weights_only=False\)"):
        split_backbone("densenet121", tmp_path / "nih-densenet121.pt")


def test_scoring_nih_images_from_a_start_that_saw_them_is_refused_or_marked():
    def leaks(file, table="Data_Entry_2017.csv", **more):
        return leaked_start(resolve({"weights": f"/w/{file}", "norm": "xrv", **more}), table)

    for file in ("nih-densenet121-d121-best.pt", "nih-pc-chex-mimic_ch-google-openi-kaggle-densenet121-state.pt",
                 "pc-nih-rsna-siim-vin-resnet50-test512-e400-state.pt", "densenet121-res224-all.pt", "mine.pt"):
        with pytest.raises(LeakError, match="allow_leak: true"):
            leaks(file)
        assert leaks(file, allow_leak=True) and not leaks(file, "mimic.csv") and not leaks(file, norm="half")
    for file in ("chex-densenet121-best.pt", "mimic_nb-densenet121-state.pt", "pc-densenet121-state.pt"):
        assert not leaks(file)
