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


def test_the_full_metadata_reads_as_published(shared):
    """Labels and official lists of all 112,120 images, without the images."""
    from charmlib.data.labels import read_labels
    from charmlib.data.patients import read_patients
    from charmlib.data.tables import Report, read_table
    from charmlib.nih import NIH14

    raw = read_table(shared / "nih_meta/Data_Entry_2017_v2020.csv.gz")
    ids = raw["Image Index"]
    frame = read_labels(raw, ids, shared / "x.csv", Report()).assign(id=ids, patient=read_patients(raw, ids, ids)[0])
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
            pairs = [(net.encode(x.as_subclass(torch.Tensor)).z, y) for x, y in dl]
        return torch.cat([p[0] for p in pairs]).numpy(), torch.cat([p[1] for p in pairs]).numpy()

    train = dls.train.new(shuffle=False, drop_last=False, after_batch=dls.valid.after_batch)
    (x, y), (xt, yt) = features(train), features(dls.test)
    column = data.classes.index("Effusion")
    model = LogisticRegression(C=0.001, max_iter=500).fit(x, y[:, column])
    assert roc_auc_score(yt[:, column], model.decision_function(xt)) > 0.6


def test_full_size_files_go_through_the_cache_as_pillow_reads_them(shared, tmp_path, monkeypatch):
    """Real 1024-pixel files of all modes, in processes; and a later epoch costs nothing beside decoding."""
    import time

    from PIL import Image

    from benchmarks.loader import repeated, worst_difference
    from charmlib.data import cache_build
    from charmlib.data.cache import open_images
    from charmlib.data.loaders import ChestDL, ChestImages

    monkeypatch.setattr(cache_build, "_WORTH_PROCESSES", 0)
    ids, paths = repeated(shared / "nih_full", tmp_path / "images", 64)
    images = open_images(ids, paths, 224, cache_dir=tmp_path / "cache")
    assert worst_difference(ids, paths, images, 224) <= 1 and images.bad == {}
    loader = ChestDL(ChestImages(images, np.zeros((64, 1), np.float32), np.arange(64), ["a"]), bs=64)
    next(iter(loader))
    start = time.perf_counter()
    (grey, _), = loader
    cached = time.perf_counter() - start
    start = time.perf_counter()
    for path in paths[:17]:
        with Image.open(path) as picture:
            np.asarray(picture.convert("RGB").resize((224, 224), Image.Resampling.BILINEAR))
    decoded = (time.perf_counter() - start) / 17 * 64
    assert grey.shape == (64, 1, 224, 224) and decoded > 40 * cached


def test_a_second_epoch_of_nih64_opens_no_file(shared, tmp_path):
    import sys

    from charmlib.data.loaders import chest_dataloaders

    data = open_dataset(data_root=str(shared / "nih64"), image_size=64, cache_dir=str(tmp_path))
    dls, opened, watching = chest_dataloaders(data, bs=64), [], [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching[0] and event == "open" else None)
    for _ in dls.train:
        pass
    first, opened[:] = list(opened), []
    for _ in dls.train:
        pass
    watching[0] = False
    assert opened == [] and not [name for name in first if name.endswith(".png")]


def test_published_test_auc_of_real_logits(shared):
    """Means over classes of public predictions on the whole official test part, exact to 1e-4."""
    from charmlib.evaluation.metrics import mean_auc

    for name, want in (("densenet121_seed0", 0.7025), ("densenet121_seed1", 0.7151), ("resnet18_seed0", 0.7007),
                       ("resnet18_seed1", 0.7120)):
        with np.load(shared / f"casp_logits/{name}.npz") as file:
            labels = next(file[k] for k in file.files if "label" in k)
            logits = next(file[k] for k in file.files if "logit" in k)
        assert mean_auc(labels, logits) == pytest.approx(want, abs=1e-4)


def test_bootstrap_of_all_official_predictions_is_fast_and_right(shared):
    """1,000 resamples of AUC and AP on 25,596 x 14 in the time that scikit-learn takes for a few."""
    import time

    from benchmarks.official_logits import NAMES, naive, read
    from charmlib.evaluation.intervals import bootstrap, interval, mean_of_defined

    test = read(shared / f"casp_logits/{NAMES[0]}.npz")
    start = time.perf_counter()
    found = bootstrap(test.labels, test.logits, test.patients)
    seconds = time.perf_counter() - start
    auc, ap, slow = naive(test, 2)
    np.testing.assert_allclose(found.auc[:2], auc, atol=1e-12)
    np.testing.assert_allclose(found.ap[:2], ap, atol=1e-12)
    assert seconds < 100 * slow / 2  # ten times as fast, where 200 times were measured
    low, high, undefined = interval(mean_of_defined(found.auc))
    assert (low, high, undefined) == (pytest.approx(0.6923, abs=2e-4), pytest.approx(0.7117, abs=2e-4), 0)


def test_what_the_view_position_alone_scores(shared):
    from benchmarks.official_logits import view_alone

    assert view_alone(shared)["AUC"] == pytest.approx(0.575, abs=1e-3)


def test_architectures_differ_less_than_seeds(shared):
    """The paired difference of DenseNet-121 and ResNet-18 holds 0; that of two seeds of one network does not."""
    from benchmarks.official_logits import read
    from charmlib.evaluation.compare import MEAN, compare

    def row(a, b):
        table = compare(*(read(shared / f"casp_logits/{name}.npz") for name in (a, b))).set_index(["figure", "class"])
        return table.loc[("AUC", MEAN)]

    networks, seeds = row("resnet18_seed0", "densenet121_seed0"), row("densenet121_seed0", "densenet121_seed1")
    assert networks["low"] < 0 < networks["high"] and 0 < seeds["low"] < seeds["high"]


def test_a_bank_drawn_at_random_from_real_images_is_not_enriched(shared):
    """512 slots of the official training part, by patient: the groups' intervals hold 1, and those of a bank of rare findings
    do not."""
    from charmlib.evaluation.enrichment import enrichment

    index = read_index(shared / "nih64")
    rows = make_split(index, "official").rows("train")
    labels, patients = index.labels()[rows], index.frame["patient"].to_numpy(str)[rows]
    slots = np.random.default_rng(0).choice(len(rows), 512, replace=False)
    found = enrichment(labels[slots], patients[slots], labels, patients, index.classes)
    for figure in (found["no_finding"], *found["groups"].values()):
        assert figure["interval"][0] < 1 < figure["interval"][1] and figure["interval"][2] == 0
    hernia = np.flatnonzero(labels[:, index.classes.index("Hernia")] == 1)
    found = enrichment(labels[hernia], patients[hernia], labels, patients, index.classes)
    assert found["groups"]["tail"]["interval"][0] > 5 and found["classes"]["Hernia"]["prevalence"] < 0.01
