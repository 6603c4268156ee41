"""Two paths: identities that the parts promise, and training in phases on phantoms."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback

from charmlib.data.loaders import grey_to_network
from charmlib.files import Damaged
from charmlib.models.two_path import LAST, TwoPathNet
from charmlib.nn.region import crop, heat_map
from charmlib.param_sources import load_params
from charmlib.params import ParameterError, missing_need, resolve
from charmlib.training.recipes import phases
from charmlib.training.run import Run

PARAMS = Path(__file__).parents[2] / "params"
SMALL = {"arch": "timm:test_resnet", "weights": "none", "norm": "half"}
TINY = {**SMALL, "system": "two_path", "image_size": 32, "valid_fraction": 0.2, "global_epochs": 2, "local_epochs": 1,
        "fusion_epochs": 1, "phase_batch": "16,12,16", "stage2_batch": 32, "stage2_lr_min": 1e-3, "stage2_lr_max": 1e-2,
        "stage2_loss": "bce", "heat_stride": 8, "device": "cpu"}


def make(**changes):
    torch.manual_seed(0)
    return TwoPathNet(classes=5, **{**SMALL, **changes})


def test_forward_is_the_written_pipeline():
    net, x = make(pool="max", heat_stride=8).eval(), torch.randn(3, 3, 32, 32)
    net.enter("glf", "f")
    g, z, maps = net.global_path(x)
    heat = heat_map(maps[8])
    boxes, pieces = [], []
    for one, image in zip(heat, x):
        from scipy import ndimage

        mask = ((one - one.min()) > 0.7 * (one.max() - one.min())).numpy()
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        at = np.argwhere(labels == 1 + np.argmax(ndimage.sum_labels(mask, labels, range(1, count + 1))))
        boxes.append([*(at.min(0) / mask.shape), *((at.max(0) + 1) / mask.shape)])
        pieces.append(crop(image[None], torch.tensor(boxes[-1:]), 32))
    local, z_local, _ = net.local_path(torch.cat(pieces))
    logits, seen = net.read(x)
    torch.testing.assert_close(seen["box"], torch.tensor(boxes, dtype=torch.float32))
    torch.testing.assert_close(seen["local"], local)
    torch.testing.assert_close(logits, F.linear(torch.cat([z, z_local], 1), net.fusion.weight, net.fusion.bias))
    torch.testing.assert_close(logits, (g + local) / 2, atol=1e-5, rtol=1e-5)  # where a linear fusion starts


def test_the_same_weights_on_the_same_image_are_the_same_logits():
    net = make(local="same", crop=32, input_size=24).eval()
    net.local_path.load_state_dict(net.global_path.state_dict())
    seen = net.read(torch.randn(2, 3, 40, 40))[1]
    assert torch.equal(seen["global"], seen["local"]) and seen["view"].shape == (2, 3, 24, 24)
    assert seen["box"].tolist() == [[0, 0, 1, 1]] * 2


def test_larger_images_give_the_crop_detail_that_the_first_path_has_not():
    net = make(local="centre", input_size=16).eval()
    x = torch.randn(2, 3, 32, 32)
    seen = net.read(x)[1]
    torch.testing.assert_close(seen["crop"], x[:, :, 8:24, 8:24], atol=1e-5, rtol=0)
    assert seen["view"].shape[-1] == 16


def test_other_sees_the_box_of_the_image_before_it():
    x = torch.randn(4, 3, 32, 32)
    own, other = (make(local=local, heat_stride=8).eval().read(x)[1]["box"] for local in ("attention", "other"))
    assert torch.equal(own.roll(1, 0), other) and not torch.equal(own, other)


def test_a_crop_is_random_in_training_and_the_centre_otherwise():
    net, x = make(crop=24, local="same"), torch.randn(4, 3, 32, 32)
    assert torch.equal(net.eval().read(x)[1]["view"], x[..., 4:28, 4:28])
    views = [net.train().read(x)[1]["view"] for _ in range(2)]
    assert views[0].shape == (4, 3, 24, 24) and not torch.equal(*views)
    torch.manual_seed(3)
    corners = torch.randint(9, (4, 2)).tolist()
    torch.manual_seed(3)
    torch.testing.assert_close(net.read(x)[1]["view"], torch.stack([i[:, r:r + 24, c:c + 24] for i, (r, c) in zip(x, corners)]),
                               atol=1e-4, rtol=0)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, 32, 32), torch.full((2, 3, 32, 32), 1e4)])
def test_a_flat_picture_gives_finite_logits(x):
    assert torch.isfinite(make(heat="max").eval()(x)).all()


@pytest.mark.parametrize("neck, refine", [("laterals", "cbam"), ("fpn", "lka")])
def test_class_maps_of_a_neck_average_to_its_share_of_the_logits(neck, refine):
    net = make(neck=neck, refine=refine, heat="cam", heat_stride=16, fusion="mlp").eval()
    logits, _, maps = net.global_path(torch.randn(2, 3, 64, 64))
    shares = [torch.einsum("cd,bdhw->bchw", net.global_path.weight_at(s), m).mean((2, 3)) for s, m in maps.items()]
    torch.testing.assert_close(sum(shares) + net.global_path.head[-1].bias, logits, atol=1e-4, rtol=1e-4)
    assert list(maps) == [4, 8, 16, LAST] and torch.isfinite(net(torch.randn(2, 3, 64, 64))).all()


@pytest.mark.parametrize("wrong, words", [({"local": "all"}, "local must be one of attention"), ({"pool": "sum"}, "pool must"),
                                          ({"heat": "cam", "heat_stride": 8}, "say heat_stride: 32, or neck: laterals"),
                                          ({"connect": 6}, "connect must"), ({"fusion": "sum"}, "fusion must")])
def test_values_outside_the_choices_are_refused(wrong, words):
    with pytest.raises(ValueError, match=words):
        make(**wrong)


def test_a_trunk_without_maps_in_sequence_is_refused(monkeypatch):
    monkeypatch.setattr("charmlib.models.two_path.find_scales", lambda trunk: ([len(trunk)], [192]))
    with pytest.raises(ValueError, match="say neck: none"):
        make(neck="fpn")
    with pytest.raises(ValueError, match="say heat_stride: 32"):
        make(heat_stride=8)


def test_groups_hold_every_parameter_once():
    for changes in ({}, {"neck": "fpn", "refine": "cbam", "fusion": "mlp"}, {"fusion": "mean"}):
        net = make(**changes)
        grouped = [p for group in net.parameter_groups() for p in group]
        assert {id(p) for p in grouped} == {id(p) for p in net.parameters()} and len(grouped) == len(list(net.parameters()))


def test_gradient_checkpointing_gives_the_same_bits():
    x, found = torch.randn(4, 3, 32, 32), []
    for again in (False, True):
        net = make(heat_stride=8, grad_checkpointing=again).train()
        net.enter("glf", "f")
        (net(x).sum() + sum(other.sum() for other in net.also)).backward()
        found.append([p.grad for p in net.parameters()] + list(net.buffers()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- recipes ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order, want", [
    ("g,l,f", [("g", ("global",), 2, 16, "g"), ("l", ("local",), 1, 12, "l"), ("f", ("fusion",), 1, 16, "f")]),
    ("glf", [("glf", ("global", "local", "fusion"), 2, 12, "f")]),
    ("gl,f", [("gl", ("global", "local"), 2, 12, "l"), ("f", ("fusion",), 1, 16, "f")]),
    ("g,lf", [("g", ("global",), 2, 16, "g"), ("lf", ("local", "fusion"), 1, 12, "f")]),
    ("g,l,glf", [("g", ("global",), 2, 16, "g"), ("l", ("local",), 1, 12, "l"),
                 ("glf", ("global", "local", "fusion"), 2, 12, "f")])])
def test_an_order_is_its_phases(order, want):
    plan = phases(resolve({**TINY, "order": order}))
    assert [(p.name, p.trains, p.epochs, p.batch, p.sets["shows"]) for p in plan] == want
    assert all(not p.train_norms and p.stage == p.name == p.sets["losses"] for p in plan)


def test_a_mean_has_nothing_to_train_and_is_what_the_last_phase_keeps():
    plan = phases(resolve({**TINY, "fusion": "mean"}))
    assert [(p.name, p.sets["shows"]) for p in plan] == [("g", "g"), ("l", "f")]
    assert [p.name for p in phases(resolve({**TINY, "fusion": "mean", "order": "g,l,glf"}))] == ["g", "l", "gl"]


def test_parameters_of_the_other_system_have_no_effect():
    p = resolve(TINY)
    for name in ("stage1_lr", "stage1_epochs", "stage2_epochs", "stage2_frozen", "k", "use_bank"):
        assert missing_need(name, p), name
    for name in ("stage2_lr_min", "stage2_lr_max", "stage2_loss", "tau", "refine", "weights"):
        assert not missing_need(name, p), name
    assert missing_need("tau", resolve()) == "system: two_path" and not missing_need("stage2_lr_min", resolve())
    assert missing_need("stage2_lr_min", resolve({"stage2_epochs": 0})) == \
        "stage2_epochs: above 0"
    none = {"global_epochs": 0, "local_epochs": 0, "fusion_epochs": 0}
    for wrong, words in (({"phase_batch": "3,x"}, "phase_batch: 32,16,16"), (none, "of two paths global_epochs")):
        with pytest.raises(ParameterError, match=words):
            phases(resolve({**TINY, **wrong}))
    for wrong, words in (({"input_size": 64}, "input_size"), ({"crop": 64}, "crop"),
                         ({"heat": "cam"}, "heat cam reads a map that the last layer reads")):
        with pytest.raises(ParameterError, match=words):
            resolve({**TINY, **wrong})


# -- training -----------------------------------------------------------------------------------------------------------------


class Keep(Callback):
    """The weights at the end of each phase."""

    def __init__(self):
        self.states = {}

    def after_fit(self):
        self.states[self.model.losses] = {k: v.clone() for k, v in self.model.state_dict().items()}


def moved(first, second):
    return {k.partition(".")[0] for k in first if not torch.equal(first[k], second[k])}


def test_what_is_frozen_keeps_its_bits_and_its_norm_statistics(phantoms, tmp_path):
    run = Run.open(TINY, data_root=str(phantoms), run_dir=str(tmp_path), patience=0, monitor="valid_loss")
    start, keep = {k: v.clone() for k, v in run.net.state_dict().items()}, Keep()
    history = run.train([keep])
    assert [row["stage"] for row in history] == ["g", "g", "l", "f"]
    assert moved(start, keep.states["g"]) == {"global_path"}
    kept_g = {k: v for k, v in keep.states["l"].items() if k.startswith("global_path")}
    assert moved(keep.states["g"], keep.states["l"]) <= {"global_path", "local_path"}  # of g, the best epoch goes on
    assert all(torch.equal(v, keep.states["f"][k]) and torch.equal(v, run.net.state_dict()[k]) for k, v in kept_g.items())
    assert moved(keep.states["l"], keep.states["f"]) == {"fusion", "joined"}


def test_the_loss_of_a_joint_phase_is_the_sum(phantoms, tmp_path):
    run = Run.open(TINY, order="glf", data_root=str(phantoms), run_dir=str(tmp_path))
    found = []

    class Look(Callback):
        order = -10  # before the losses are added

        def after_loss(self):
            if self.training:
                self.parts = [self.loss_func(v, *self.yb).item() for v in (self.pred, *self.model.also)]

        def before_backward(self):
            found.append((sum(self.parts), len(self.parts), self.loss_grad.item(), self.loss.item(), len(self.model.also)))

    learner = run.learner()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1, 1e-3, cbs=Look())
    for total, count, graded, logged, left in found:
        assert count == 3 and left == 0 and total == pytest.approx(graded) == pytest.approx(logged)
    assert run.net.eval().also == []


@pytest.mark.parametrize("changes", [{}, {"order": "g,l,glf", "crop": 28, "optimizer": "sgd", "schedule": "steps"}])
def test_a_killed_run_ends_in_the_same_bits_in_every_phase(phantoms, tmp_path, monkeypatch, changes):
    from tests.training.test_run import Killed, bits, killed_after

    params = {**TINY, **changes, "data_root": str(phantoms), "patience": 0}
    Run.open(params, run_dir=str(tmp_path / "quiet")).train()
    epochs = sum(p.epochs for p in phases(resolve(params)))
    for _ in range(epochs):  # one epoch a start
        with monkeypatch.context() as m, pytest.raises(Killed):
            killed_after(m, 1)
            Run.open(params, run_dir=str(tmp_path / "run")).train()
    Run.open(params, run_dir=str(tmp_path / "run")).train()
    (state, thresholds, history), (want, want_thresholds, _) = bits(tmp_path / "run"), bits(tmp_path / "quiet")
    assert state.keys() == want.keys() and all(torch.equal(state[name], value) for name, value in want.items())
    assert thresholds == want_thresholds and len(history) == epochs


@pytest.mark.parametrize("half", [False, True])
def test_no_batch_of_any_phase_waits_for_the_device(phantoms, tmp_path, half):
    from charmlib.training.no_wait import HalfPrecision
    from tests.training.test_step import watched

    run = Run.open(TINY, order="g,l,glf", crop=28, data_root=str(phantoms), run_dir=str(tmp_path))
    for phase in run.phases():
        learner = run.learner(phase)
        if half:
            learner.add_cb(HalfPrecision())
        with learner.no_bar():
            assert watched(learner) == []


SHRUNK = {"arch": "timm:test_resnet", "weights": "none", "norm": "half", "image_size": 40, "workers": 0, "device": "cpu",
          "stage2_batch": 16}


@pytest.mark.parametrize("name, changes", [
    ("ag_cnn", {"crop": 32, "global_epochs": 2, "local_epochs": 1, "fusion_epochs": 1, "phase_batch": "16,8,16"}),
    ("ag_cnn_paper", {"crop": 32, "global_epochs": 1, "local_epochs": 1, "fusion_epochs": 1, "phase_batch": "16,8,16"}),
    ("dual_path", {"global_epochs": 1, "local_epochs": 1, "fusion_epochs": 1, "image_size": 32}),
    ("vgg16_lka", {"stage1_frozen_epochs": 1, "stage1_epochs": 1, "stage2_epochs": 1, "stage1_batch": 16}),
    ("vgg16_cbam", {"stage1_frozen_epochs": 1, "stage1_epochs": 1, "stage2_epochs": 1, "stage1_batch": 16})])
def test_each_preset_trains_and_is_scored_on_phantoms(phantoms, tmp_path, name, changes):
    params = load_params(PARAMS / f"{name}.yaml")
    try:
        run = Run.open(params, **SHRUNK | changes, data_root=str(phantoms), run_dir=str(tmp_path / name))
    except ImportError as error:  # without kornia_rs 0.2 and OpenCV there is no clahe
        pytest.skip(str(error))
    run.train()
    metrics = Run.load(tmp_path / name).score()
    assert 0 <= metrics["test"]["mean_auc"] <= 1
    assert len(metrics["classes"]) == (15 if name.startswith("ag_cnn") else 14)
    if run.params["system"] == "two_path":
        from charmlib.evaluation.branches import branch_table, read_branches

        fusion, branches = run.folder.test, read_branches(run.folder)
        assert set(branches) == {"global", "local"} and np.isfinite(branches["local"].logits).all()
        assert branches["global"].logits.shape == fusion.logits.shape
        table = branch_table(run.folder, resamples=50)
        assert list(table.index) == ["global", "local", "fusion"]
        assert table.loc["fusion", "mean AUC"] == pytest.approx(metrics["test"]["mean_auc"])
        assert table.loc["global", "fusion less it"] == pytest.approx(
            table.loc["fusion", "mean AUC"] - table.loc["global", "mean AUC"])


def test_what_is_stored_and_shown_is_the_networks(phantoms, tmp_path):
    from charmlib.evaluation.branches import read_branches
    from charmlib.training.looks import looks
    from charmlib.viz.looks import plot_looks

    run = Run.open(TINY, data_root=str(phantoms), run_dir=str(tmp_path / "run"))
    run.train()
    run.score()
    ids = run.data.index.frame["id"].tolist()
    images = run.bank.cases(6)
    rows = np.array([ids.index(image) for image in images])
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (run.net.mean, run.net.std))
    pixels = run.data.images.take(rows)
    with torch.no_grad():
        seen = run.net.eval().read(grey_to_network(torch.from_numpy(pixels)[:, None], mean, std))[1]
    for name, one in read_branches(run.folder).items():
        at = [one.ids.tolist().index(image) for image in images]
        np.testing.assert_allclose(one.logits[at], seen[name].numpy(), atol=1e-4)
    cases = looks(run, images)
    assert [case.image for case in cases] == images and all((case.view == p).all() for case, p in zip(cases, pixels))
    for i, case in enumerate(cases):
        np.testing.assert_allclose(case.box, seen["box"][i])
        np.testing.assert_allclose(case.heat, seen["heat"][i])
        top, left, bottom, right = (round(32 * edge) for edge in case.box)
        if bottom - top == right - left == 32:
            assert (case.crop == case.view).all()
    figure = plot_looks(cases)
    assert len(figure.axes) == 18
    boxes = [axis.patches[0].get_bbox() for axis in figure.axes[:6]]
    np.testing.assert_allclose([[b.y0 + 0.5, b.x0 + 0.5, b.y1 + 0.5, b.x1 + 0.5] for b in boxes],
                               32 * np.array([case.box for case in cases]), atol=1e-4)
    with pytest.raises(ValueError, match="no image 'x.png'"):
        looks(run, ["x.png"])
    (tmp_path / "run/branches.npz").write_bytes(b"no")
    with pytest.raises(Damaged, match="branches.npz.*score again"):
        read_branches(run.folder)
