import numpy as np
import pytest

from charmlib.data.index import read_index
from charmlib.data.phantom import PREVALENCE, draw_phantom, make_phantoms
from charmlib.data.splits import make_split
from charmlib.nih import NIH14


@pytest.mark.parametrize("finding", NIH14)
def test_a_lesion_is_drawn_where_its_box_is(finding):
    for seed in range(6):
        plain, _ = draw_phantom([], size=96, seed=seed, anatomy_seed=seed)
        ill, boxes = draw_phantom([finding], size=96, seed=seed, anatomy_seed=seed)
        x0, y0, x1, y1 = (np.array(boxes[finding]) * 96).round().astype(int)
        change = np.abs(ill.astype(float) - plain)
        total = change.sum()
        assert total > 300, "hardly to be seen"
        assert change[max(y0 - 4, 0):y1 + 4, max(x0 - 4, 0):x1 + 4].sum() > (0.25 if finding == "Nodule" else 0.9) * total


def test_the_same_seed_draws_the_same_and_patients_differ():
    a, _ = draw_phantom(["Mass"], seed=3, anatomy_seed=1)
    assert np.array_equal(a, draw_phantom(["Mass"], seed=3, anatomy_seed=1)[0])
    assert not np.array_equal(a, draw_phantom(["Mass"], seed=4, anatomy_seed=1)[0])
    assert not np.array_equal(a, draw_phantom(["Mass"], seed=3, anatomy_seed=2)[0])
    assert draw_phantom(size=200)[0].shape == (200, 200)


def test_prevalence_is_long_tailed_in_the_nih_order():
    order = sorted(PREVALENCE, key=PREVALENCE.get, reverse=True)
    assert order[0] == "Infiltration" and order[-1] == "Hernia"
    assert PREVALENCE["Infiltration"] > 5 * PREVALENCE["Hernia"]


@pytest.mark.slow
@pytest.mark.once
def test_the_demos_phantoms_have_five_of_every_class_in_validation_and_test(tmp_path):
    index = read_index(make_phantoms(tmp_path / "p"))
    split = make_split(index, "official", valid_fraction=0.2)
    for part in ("valid", "test"):
        counts = index.labels()[split.rows(part)].sum(0)
        assert counts.min() >= 5, dict(zip(NIH14, counts))
    assert index.frame.groupby("patient").size().max() > 5


def test_writing_again_changes_nothing_and_never_mixes(tmp_path):
    root = make_phantoms(tmp_path / "p", images=30, size=32, seed=2)
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    make_phantoms(root, images=30, size=32, seed=2)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    with pytest.raises(FileExistsError, match="other settings"):
        make_phantoms(root, images=31, size=32, seed=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make_phantoms(tmp_path / "full", images=30)
    with pytest.raises(ValueError, match="at least 20"):
        make_phantoms(tmp_path / "few", images=3)
