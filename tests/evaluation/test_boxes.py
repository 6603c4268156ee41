"""Heat maps against boxes: known answers, slow twins, and the phantoms' exact boxes."""

import numpy as np
import pytest

from charmlib.data.boxes import CORNERS, FILE, read_boxes
from charmlib.data.index import read_index
from charmlib.evaluation.boxes import MEAN, boxes_of, ceilings, check_boxes, constant_guess, hits, overlaps
from charmlib.nih import NIH14


def masks(boxes, side):
    at = (np.arange(side) + 0.5) / side
    return np.array([((at >= y0) & (at <= y1))[:, None] * ((at >= x0) & (at <= x1))[None, :] for x0, y0, x1, y1 in boxes]) * 1.0


def drawn(n=30, seed=0):
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 0.6, (n, 2))
    return np.concatenate([low, low + rng.uniform(0.1, 0.4, (n, 2))], 1)


def test_a_hot_spot_and_its_region_are_found_to_the_cell():
    heat = np.zeros((2, 4, 8))
    heat[0, 1, 5] = heat[1, 3, 7] = 1.0
    heat[0, 2, 6], heat[0, 0, 0] = 0.9, 0.95  # touches at a corner; is apart
    np.testing.assert_allclose(boxes_of(heat), [[5 / 8, 1 / 4, 7 / 8, 3 / 4], [7 / 8, 3 / 4, 1, 1]])
    np.testing.assert_allclose(hits(heat, np.array([[0.6, 0.2, 0.8, 0.5], [0, 0, 0.5, 0.5]])), [1, 0])
    np.testing.assert_allclose(boxes_of(np.ones((1, 3, 3))), [[0, 0, 1, 1]])  # a flat map points nowhere
    np.testing.assert_allclose(hits(np.ones((1, 2, 2)), np.array([[0, 0, 1, 0.5]])), [0.5])


def test_overlaps_and_ceilings_equal_counted_cells():
    boxes = (drawn() * 20).round() / 20
    boxes[:, 2:] += (boxes[:, 2:] == boxes[:, :2]) / 20
    found = boxes[::-1]
    iou, iobb = overlaps(found, boxes)
    for f, b, u, o in zip(masks(found, 20), masks(boxes, 20), iou, iobb):
        assert u == pytest.approx((f * b).sum() / np.maximum(f, b).sum()) and o == pytest.approx((f * b).sum() / f.sum())
    for box, best in zip(boxes[:5], ceilings(boxes[:5], 3, 4)):
        tried = [overlaps(np.array([x0 / 4, y0 / 3, x1 / 4, y1 / 3]), box)[0] for x0 in range(4) for x1 in range(x0 + 1, 5)
                 for y0 in range(3) for y1 in range(y0 + 1, 4)]
        assert best == pytest.approx(max(tried))


def test_a_constant_guess_never_sees_the_patient_itself():
    boxes = np.array([[0, 0, 0.2, 0.2], [0.5, 0.5, 0.9, 0.9], [0.5, 0.5, 0.9, 0.8], [0, 0, 0.1, 0.1]])
    maps, found = constant_guess(boxes, ["a", "a", "a", "b"], ["p", "p", "q", "r"])
    np.testing.assert_allclose(found[[0, 1]], [boxes[2]] * 2)
    assert maps[2][3, 3] == 0.5 and maps[2][20, 20] == 0.5 and not found[3].any() and not maps[3].any()


def test_true_maps_reach_the_ceiling_and_others_do_not():
    boxes = (drawn(60) * 16).round() / 16
    patients = np.arange(60) // 2
    found = check_boxes({"true": masks(boxes, 16), "noise": rng_maps(60)}, boxes, np.repeat(["a", "b", "c"], 20), patients,
                        resamples=200)
    mean = found[found["finding"] == MEAN].set_index("method")
    assert mean.loc["true", ["hit", "iou", "ceiling", "iou>0.7", "iobb>0.5"]].tolist() == pytest.approx([1] * 5)
    assert mean.loc["noise", "hit"] < 0.3 and (mean.loc["noise", ["hit_less_low", "iou_less_low"]] > 0.5).all()
    assert mean.loc["constant box", "iou"] < 0.5 and mean["boxes"].eq(60).all() and mean["patients"].eq(30).all()
    by_hand = found[(found["method"] == "noise") & (found["finding"] == "b")].iloc[0]
    assert by_hand["iou"] == pytest.approx(overlaps(boxes_of(rng_maps(60))[20:40], boxes[20:40])[0].mean())
    assert by_hand["hit_low"] <= by_hand["hit"] <= by_hand["hit_high"]


def rng_maps(n):
    return np.random.default_rng(1).random((n, 16, 16))


def test_the_phantoms_boxes_and_rows_that_are_left_out(phantoms, tmp_path):
    index = read_index(phantoms)
    ids, labels = index.frame["id"].tolist(), index.frame[list(NIH14)].to_numpy()
    table, left = read_boxes(phantoms / FILE, ids, labels, NIH14)
    assert not left and len(table) == labels[:, :14].sum() and (table["x1"] > table["x0"]).all()
    row = table.iloc[0]
    other = next(name for name, value in zip(NIH14, labels[row["row"]]) if value == 0)
    rows = [f"{row['id']},{finding},{x},2,300,4" for finding, x in (
        (row["finding"], 1), ("Cardiomegaly|Emphysema", 1), (other, 1), (row["finding"], 1000))]
    text = ["Image Index,Finding Label,Bbox [x,y,w,h],,,", *rows, "elsewhere.png,Mass,1,2,3,4", "", ""]
    (tmp_path / FILE).write_text("\n".join(text))
    table, left = read_boxes(tmp_path / FILE, ids, labels, NIH14)
    assert table[CORNERS].to_numpy().tolist() == [[1 / 1024, 2 / 1024, 301 / 1024, 6 / 1024]]
    assert [("no class" in left[0]), ("not labelled" in left[1]), ("outside" in left[2])] == [True] * 3 and len(left) == 3
    (tmp_path / FILE).write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no list of boxes .*wanted the columns"):
        read_boxes(tmp_path / FILE, ids, labels, NIH14)
