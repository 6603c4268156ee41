"""Views of test-time augmentation: menus, and the identities of each change."""

import numpy as np
import torch

from charmlib.data.views import MENUS, VIEWS, View
from charmlib.evaluation.combine import MERGES
from charmlib.params import PARAMS

GREY = torch.randint(0, 256, (3, 1, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
SMOOTH = torch.nn.functional.interpolate(GREY[..., :5, :5].float(), size=64, mode="bicubic").clamp(0, 255)


def test_the_menus_are_those_of_the_parameter_and_start_with_the_image_itself():
    assert tuple(MENUS) == PARAMS["tta"].choices and PARAMS["tta_merge"].choices == MERGES
    assert [len(names) for names in MENUS.values()] == [1, 2, 4, 6, 8, 6]
    assert all(names[0] == "id" and len({VIEWS[n] for n in names}) == len(names) for names in MENUS.values())
    assert [VIEWS[n] for n in MENUS["heavy"]] == [
        View(), View(True), View(degrees=5), View(degrees=-5), View(zoom=1.1), View(zoom=0.9), View(brightness=1.1),
        View(brightness=0.9)]
    assert {VIEWS[n] for n in MENUS["flip_scale"]} == {View(flip, zoom=zoom) for flip in (False, True)
                                                        for zoom in (1, 1.05, 0.95)}


def test_identities_of_views():
    assert View().of(GREY) is GREY
    flipped = View(flip=True).of(GREY)
    np.testing.assert_allclose(flipped, GREY.float().flip(3), atol=1e-2)
    np.testing.assert_allclose(View(flip=True).of(flipped), GREY.float(), atol=2e-2)
    inner = (..., slice(8, -8), slice(8, -8))
    for there, back in ((View(zoom=1.1), View(zoom=1 / 1.1)), (View(degrees=5), View(degrees=-5))):
        changed = there.of(SMOOTH)
        assert (changed - SMOOTH)[inner].abs().mean() > 1
        assert (back.of(changed) - SMOOTH)[inner].abs().mean() < 0.2 * (changed - SMOOTH)[inner].abs().mean()
    bright = View(brightness=1.1).of(GREY)
    assert torch.equal(bright, (GREY.float() * 1.1).clamp(max=255)) and bright.max() == 255
    disc = torch.zeros(1, 1, 64, 64)
    disc[..., 16:48, 16:48] = 255
    assert View(zoom=1.1).of(disc).sum() > disc.sum() > View(zoom=0.9).of(disc).sum()  # more than 1 enlarges
