"""Augmentation: today's outputs to the bit, and each step against a slow twin of one image at a time."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fastai.torch_core import TensorImage

from charmlib import Run, charm_learner
from charmlib.data.augment import MENUS, Augment, clahe, punch, warp
from charmlib.data.dataset import open_dataset
from charmlib.data.images import _clahe
from charmlib.data.loaders import chest_dataloaders
from tests.training.conftest import HALF, NET
from tests.training.test_step import Reads, Waits, watched


def grey(images=6, size=64, seed=0):
    """Smooth drawings of whole grey levels (n, 1, S, S)."""
    g = torch.Generator().manual_seed(seed)
    return (F.interpolate(torch.rand(images, 1, 9, 9, generator=g), size, mode="bicubic").clamp(0, 1) * 255).round()


def augmented(menu, x, seed=3, off=(), **kwargs):
    step = Augment(menu, **kwargs)
    step.p |= dict.fromkeys(off, 0.0)
    torch.manual_seed(seed)
    return step.encodes(TensorImage(x)).as_subclass(torch.Tensor)


def before(x, degrees=10.0, share=0.5):
    """The flip and turn that there was before the menus, line by line."""
    flip = (torch.rand(len(x)) < share).float() * -2 + 1
    angle = (torch.rand(len(x)) * 2 - 1) * math.radians(degrees)
    size, x = x.shape[-1], x.float()
    c, s = torch.cos(angle), torch.sin(angle)
    turns = torch.stack([c * flip, -s, s * flip, c])[:, :, None, None]
    at = (torch.arange(size, dtype=x.dtype) * 2 + 1) / size - 1
    along, down = turns * at, turns * at[:, None]
    grid = torch.empty((len(x), size, size, 2), dtype=x.dtype)
    torch.add(along[0], down[1], out=grid[..., 0])
    torch.add(along[2], down[3], out=grid[..., 1])
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def test_light_is_as_before_to_the_bit():
    x = grey().to(torch.uint8)
    for degrees, flip in ((10.0, 0.5), (0.0, 1.0), (25.0, 0.0)):
        torch.manual_seed(3)
        want = before(x, degrees, flip)
        assert torch.equal(augmented("light", x, seed=3, degrees=degrees, flip=flip), want)


@pytest.mark.parametrize("menu", ["standard", "strong"])
def test_without_its_additions_each_menu_is_light(menu):
    x = grey().to(torch.uint8)
    off = ("move", "clahe", "brightness", "noise", "holes")
    torch.testing.assert_close(augmented(menu, x, off=off), augmented("light", x), rtol=0, atol=1e-4)
    for name in off if menu == "strong" else ("move", "brightness"):
        some = augmented(menu, grey(64), off=[other for other in off if other != name])
        changed = (some - augmented("light", grey(64))).abs().amax((1, 2, 3)) > 1e-3
        share = Augment(menu).p[name]
        assert abs(changed.float().mean() - share) < 3.5 * (share * (1 - share) / 64) ** 0.5, name


def slow_warp(image, flip, angle, zoom, dx, dy):
    """One image, one pixel at a time: where each output pixel comes from, bilinear, borders repeated."""
    size = len(image)
    out = np.empty_like(image)
    for row in range(size):
        for column in range(size):
            u, v = (2 * column + 1) / size - 1, (2 * row + 1) / size - 1  # from -1 to 1
            c, s = math.cos(angle), math.sin(angle)
            a, b = (c * flip * u - s * v) / zoom - 2 * dx, (s * flip * u + c * v) / zoom - 2 * dy
            x, y = (np.clip(((w + 1) * size - 1) / 2, 0, size - 1) for w in (a, b))
            left, top = min(int(x), size - 2), min(int(y), size - 2)
            p, q = x - left, y - top
            out[row, column] = ((1 - p) * (1 - q) * image[top, left] + p * (1 - q) * image[top, left + 1]
                                + (1 - p) * q * image[top + 1, left] + p * q * image[top + 1, left + 1])
    return out


def test_one_warp_flips_turns_moves_and_zooms():
    x = grey(5, 24)
    flip, angle = torch.tensor([1.0, -1, 1, -1, 1]), torch.tensor([0.0, 0.1, -0.17, 0.05, 0.0])
    zoom, shift = torch.tensor([1.0, 1.05, 0.95, 1.0, 1.2]), torch.tensor([[0.25, 0.05, -0.03, 0, 0], [0.0, -0.05, 0.02, 0, 0]])
    got = warp(x, flip, angle, zoom, shift)
    for i in range(5):
        want = slow_warp(x[i, 0].double().numpy(), *(float(v[i]) for v in (flip, angle, zoom, *shift)))
        np.testing.assert_allclose(got[i, 0].numpy(), want, atol=0.02)
    torch.testing.assert_close(got[0, 0, :, 6:], x[0, 0, :, :-6], rtol=0, atol=1e-3)  # a quarter of the side to the right
    assert (got[0, 0, :, :6] - x[0, 0, :, :1]).abs().max() < 1e-3  # where the border is repeated
    assert torch.equal(warp(x, flip, angle, torch.ones(5), torch.zeros(2, 5)), warp(x, flip, angle))


def slow_clahe(image):
    """One tile and one pixel at a time."""
    size, tile = len(image), -(-len(image) // 8)
    padded = np.pad(image, (0, tile * 8 - size), mode="reflect").astype(int)
    limit, curves = max(1, int(2.0 * tile * tile / 256)), {}
    for i in range(8):
        for j in range(8):
            counts = np.bincount(padded[i * tile:(i + 1) * tile, j * tile:(j + 1) * tile].ravel(), minlength=256)
            left = np.maximum(counts - limit, 0).sum()
            counts = np.minimum(counts, limit) + left // 256
            if rest := left % 256:
                counts[:rest * max(256 // rest, 1):max(256 // rest, 1)] += 1
            curves[i, j] = np.rint(np.cumsum(counts) * (255 / tile**2)).clip(0, 255)
    out = np.zeros(image.shape)
    for row in range(size):
        for column in range(size):
            y, x = row / tile - 0.5, column / tile - 0.5
            i, j = math.floor(y), math.floor(x)
            for a, q in enumerate((1 - (y - i), y - i)):
                for b, p in enumerate((1 - (x - j), x - j)):
                    curve = curves[min(max(i + a, 0), 7), min(max(j + b, 0), 7)]
                    out[row, column] += q * p * curve[int(image[row, column])]
    return np.rint(out)


@pytest.mark.parametrize("size", [64, 50])
def test_clahe_is_the_slow_one_and_that_of_the_reader(size):
    x = grey(3, size)
    got = clahe(x)
    for i in range(3):
        assert np.abs(got[i, 0].numpy() - slow_clahe(x[i, 0].numpy())).max() <= 1
    try:
        want = _clahe(x[0, 0].numpy().astype(np.uint8))
    except ImportError as error:
        pytest.skip(str(error))
    difference = np.abs(got[0, 0].numpy() - want.astype(float))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.03 and (want != x[0, 0].numpy()).mean() > 0.5


def test_holes_have_the_images_mean():
    x, side = grey(3, 42) + 1, 2
    corners = torch.randint(0, 41, (2, 6, 3))
    corners[:, :, 1] = 42  # not drawn
    want = x.clone()
    for i in (0, 2):
        for row, column in corners[:, :, i].T.tolist():
            want[i, 0, row:row + side, column:column + side] = x[i].mean()
    got = punch(x, corners, side)
    torch.testing.assert_close(got, want)
    assert torch.equal(got[1], x[1]) and not torch.equal(got[0], x[0])


def test_noise_brightness_and_contrast_are_in_grey_levels():
    off = ("move", "clahe", "holes")
    x = torch.full((400, 1, 40, 40), 128.0)
    x[..., :20] = 60
    noisy = augmented("strong", x, off=(*off, "brightness"), degrees=0, flip=0) - x
    deviations = noisy.std((1, 2, 3))
    drawn = deviations[deviations > 1e-3]
    assert 30 < len(drawn) < 95 and drawn.min() > 0.9 and 2.0 < drawn.max() < 2.4 and abs(drawn.mean() - 1.62) < 0.15
    changed = augmented("standard", x, off=off, degrees=0, flip=0)
    dark, bright = changed[:, 0, 5, 5], changed[:, 0, 5, 35]
    gain = (bright - dark) / 68
    bias = (dark - 60 * gain) / 255
    assert gain.min() > 0.899 and gain.max() < 1.101 and gain.std() > 0.01 and bias.abs().max() < 0.101 and bias.std() > 0.01
    full = augmented("strong", grey(200))
    assert full.min() >= 0 and full.max() <= 255


def test_one_seed_gives_one_batch_and_other_images_other_draws():
    x = grey(1).expand(32, -1, -1, -1)
    for menu in MENUS:
        once = augmented(menu, x, 5)
        assert torch.equal(once, augmented(menu, x, 5)) and not torch.equal(once, augmented(menu, x, 6))
        assert len({image.sum().item() for image in augmented(menu, x)}) > 25
    with pytest.raises(ValueError, match="augment must be one of light, standard, strong, got 'none'"):
        Augment("none")


def test_no_step_waits_for_the_device(phantoms, tmp_path):
    data = open_dataset(data_root=str(phantoms), image_size=32, valid_fraction=0.2)
    dls = chest_dataloaders(data, bs=16, mean=HALF, std=HALF, path=tmp_path, augment="strong")
    learn = charm_learner(dls, seed=1, path=tmp_path, **NET)
    with learn.no_bar():
        assert watched(learn) == []
    found = []  # of the transform itself, which runs before a batch's first callback
    with Waits(found), Reads(found):
        Augment("strong").encodes(TensorImage(grey()))
    assert found == []


def test_the_parameter_reaches_the_training_part_alone(tiny):
    for menu in MENUS:
        dls = Run.open(tiny, augment=menu).dataloaders()
        assert next(t for t in dls.train.after_batch.fs if isinstance(t, Augment)).menu == menu
        assert torch.equal(dls.valid.one_batch()[0], dls.valid.one_batch()[0])


def test_flip_and_rotation_against_torchvision():
    from torchvision.transforms.functional import InterpolationMode, hflip, rotate

    x = torch.nn.functional.interpolate(torch.rand(3, 1, 8, 8), 64, mode="bicubic")
    flips, angles = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([0.0, 0.0, 0.15])
    got = warp(x, flips, angles)
    torch.testing.assert_close(got[0], x[0], atol=1e-5, rtol=0)  # no flip, no angle: the identity
    torch.testing.assert_close(got[1], hflip(x[1]), atol=1e-5, rtol=0)
    want = rotate(hflip(x[2]), np.degrees(0.15), InterpolationMode.BILINEAR)
    middle = slice(16, 48)
    error = (got[2][:, middle, middle] - want[:, middle, middle]).abs().mean()
    other = (got[2][:, middle, middle] - rotate(hflip(x[2]), -np.degrees(0.15), InterpolationMode.BILINEAR)
             [:, middle, middle]).abs().mean()
    assert min(error, other) < 0.01
    twice = warp(warp(x, -torch.ones(3), torch.zeros(3)), -torch.ones(3), torch.zeros(3))
    torch.testing.assert_close(twice, x, atol=1e-4, rtol=0)


def test_the_grid_of_a_turn_is_torchs_affine_grid():
    x, flip, angle = torch.rand(5, 2, 24, 24), torch.tensor([1.0, -1, 1, -1, 1]), torch.tensor([0.0, 0.0, 0.17, -0.1, 0.05])
    c, s, zero = torch.cos(angle), torch.sin(angle), torch.zeros(5)
    theta = torch.stack([torch.stack([c * flip, -s, zero], 1), torch.stack([s * flip, c, zero], 1)], 1)
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    want = torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
    torch.testing.assert_close(warp(x, flip, angle), want, rtol=1e-4, atol=1e-5)
