"""On real radiographs, where the development data is there."""

import numpy as np
import pytest

from charmlib.data.dataset import open_dataset
from charmlib.data.images import read_grey
from charmlib.data.index import read_index
from charmlib.data.splits import make_split


def test_nih64_index_and_official_split(shared):
    index = read_index(shared / "nih64")
    assert len(index.frame) == 11899 and index.frame["patient"].nunique() == 3104 and not index.drawn
    split = make_split(index, "official")
    assert (split.counts["test"]["images"], split.counts["test"]["patients"]) == (2009, 122)
    assert split.counts["train"]["images"] + split.counts["valid"]["images"] == 9890
    assert not index.report.found


def test_the_full_metadata_reads_as_published(shared, tmp_path):
    """Labels and official lists of all 112,120 images, without the images."""
    import gzip

    import pandas as pd

    from charmlib.data.index import Report, _read_labels, _read_meta
    from charmlib.data.labels import NIH14

    with gzip.open(shared / "nih_meta/Data_Entry_2017_v2020.csv.gz", "rt") as file:
        raw = pd.read_csv(file, dtype=str, keep_default_na=False)
    frame, report = pd.DataFrame({"id": raw["Image Index"]}), Report()
    _read_meta(raw, frame, shared / "x.csv", report)
    _read_labels(raw, frame, shared / "x.csv", report, "nih14")
    counts = frame[list(NIH14)].sum().astype(int)
    assert (len(frame), frame["patient"].nunique()) == (112120, 30805)
    assert (counts["Infiltration"], counts["Effusion"], counts["Hernia"]) == (19894, 13317, 227)
    test = set((shared / "nih_meta/test_list.txt").read_text().split())
    part = frame[frame["id"].isin(test)]
    assert (len(part), part["patient"].nunique(), int(part["Hernia"].sum())) == (25596, 2797, 86)
    assert (part[list(NIH14)].max(axis=1) > 0).mean() == pytest.approx(0.615, abs=0.001)


def test_full_size_files_of_all_modes(shared):
    from PIL import Image

    modes = set()
    for path in sorted((shared / "nih_full").glob("*.png")):
        with Image.open(path) as image:
            modes.add(image.mode)
        grey = read_grey(path, 224)
        assert grey.shape == (224, 224) and 5 < grey.std() < 120
    assert modes == {"L", "RGBA"}


def test_the_real_backbone_transfers(shared):
    """ImageNet MobileNetV2 loads, and its features tell real radiographs with cardiomegaly from those without."""
    import torch
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    from charmlib import CharmNet
    from charmlib.data.loaders import chest_dataloaders

    net = CharmNet("mobilenet_v2", weights=shared / "weights/mobilenet_v2_imagenet1001.pt", norm="half",
                   use_momentum=False, use_attention=False, use_bank=False).eval()
    data = open_dataset(data_root=str(shared / "nih64"), image_size=64, limit=3000)
    dls = chest_dataloaders(data, bs=100, mean=net.mean, std=net.std)

    def features(dl):
        with torch.no_grad():
            pairs = [(net.embed(x.as_subclass(torch.Tensor)), y) for x, y in dl]
        return torch.cat([p[0] for p in pairs]).numpy(), torch.cat([p[1] for p in pairs]).numpy()

    train = dls.train.new(shuffle=False, drop_last=False, after_batch=dls.valid.after_batch)
    (x, y), (xt, yt) = features(train), features(dls.test)
    column = data.classes.index("Effusion")
    model = LogisticRegression(C=0.001, max_iter=500).fit(x, y[:, column])
    assert roc_auc_score(yt[:, column], model.decision_function(xt)) > 0.6


def test_published_test_auc_of_real_logits(shared):
    """Means over classes of public predictions on the whole official test part, exact to 1e-4."""
    from charmlib.evaluation.metrics import mean_auc

    for name, want in (("densenet121_seed0", 0.7025), ("densenet121_seed1", 0.7151), ("resnet18_seed0", 0.7007),
                       ("resnet18_seed1", 0.7120)):
        with np.load(shared / f"casp_logits/{name}.npz") as file:
            labels = next(file[k] for k in file.files if "label" in k)
            logits = next(file[k] for k in file.files if "logit" in k)
        assert mean_auc(labels, logits) == pytest.approx(want, abs=1e-4)
