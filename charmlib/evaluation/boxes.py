"""Heat maps against boxes: does the map point at the finding, and better than a guess that never saw the image?

Maps (n, h, w) are of any size; cell (i, j) covers the share [j/w, (j+1)/w] x [i/h, (i+1)/h] of the picture. Boxes (n, 4) are
x0, y0, x1, y1 in the same shares. The measures are those of Wang et al. (CVPR 2017, section 4), T(IoU) and T(IoBB), and the
pointing game of Zhang et al. (ECCV 2016).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.ndimage import label

from charmlib.evaluation.intervals import RESAMPLES, SEED, draws, interval
from charmlib.files import reading

IOU, IOBB = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), (0.1, 0.25, 0.5)
MEASURES = ["hit", "iou", *(f"iou>{t}" for t in IOU), *(f"iobb>{t}" for t in IOBB)]
MEAN = "mean of findings"
FEW = 10
"""Patients below which a table shows no limits."""
HOW = ("A hit is a map whose largest cell lies in the box; IoU compares the box around the cells above 0.7 of the map's range "
       "with the radiologist's. Below the map stand guesses that it must beat: another finding's map, a network with an "
       "untrained head, a box learnt from other patients without the image, and the picture's centre. Limits are 95 % over "
       f"patients, of {FEW} or more.")
"""How to read :func:`box_table`."""
_AROUND = np.ones((3, 3), int)  # cells that touch at a corner are one region


def hits(maps: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n,): the share of a map's largest cells whose centre lies in the box, 0 or 1 without ties."""
    h, w = maps.shape[1:]
    x, y = (np.arange(w) + 0.5) / w, (np.arange(h) + 0.5) / h
    x0, y0, x1, y1 = boxes.T[:, :, None]
    inside = ((y >= y0) & (y <= y1))[:, :, None] & ((x >= x0) & (x <= x1))[:, None, :]
    largest = maps == maps.max((1, 2), keepdims=True)
    return (inside & largest).sum((1, 2)) / largest.sum((1, 2))


def boxes_of(maps: np.ndarray, tau: float = 0.7) -> np.ndarray:
    """(n, 4): the bounding box of the largest region of cells above ``tau`` of the way from a map's minimum to its maximum.

    Cells touch at sides and corners; of regions of one size that with the largest sum is taken. A flat map gives the whole
    picture.
    """
    n, h, w = maps.shape
    out = np.tile([0.0, 0.0, 1.0, 1.0], (n, 1))
    for i, heat in enumerate(maps):
        low, high = heat.min(), heat.max()
        if not high > low:
            continue
        regions, count = label(heat > low + tau * (high - low), _AROUND)
        numbers = np.arange(1, count + 1)
        size, total = ((np.bincount(regions.ravel(), weights=v)[1:]) for v in (np.ones(heat.size), heat.ravel()))
        rows, columns = np.nonzero(regions == numbers[np.lexsort((total, size))[-1]])
        out[i] = columns.min() / w, rows.min() / h, (columns.max() + 1) / w, (rows.max() + 1) / h
    return out


def overlaps(found: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection over union, and over the area of what was found (IoBB), of boxes (..., 4)."""
    sides = np.clip(np.minimum(found[..., 2:], boxes[..., 2:]) - np.maximum(found[..., :2], boxes[..., :2]), 0, None)
    shared, area, true = sides.prod(-1), *((b[..., 2:] - b[..., :2]).prod(-1) for b in (found, boxes))
    return shared / (area + true - shared), shared / np.maximum(area, 1e-12)


def ceilings(boxes: np.ndarray, h: int, w: int) -> np.ndarray:
    """(n,): the largest IoU that any box of whole cells of an h x w grid can have."""
    (x0, x1), (y0, y1) = (np.stack(np.triu_indices(side + 1, 1)) / side for side in (w, h))
    grid = np.stack(np.broadcast_arrays(x0[:, None], y0[None], x1[:, None], y1[None]), -1).reshape(-1, 4)
    return np.array([overlaps(grid, box)[0].max() for box in boxes])


def constant_guess(boxes: np.ndarray, findings: Sequence[str], patients: Sequence[str], side: int = 32
                   ) -> tuple[np.ndarray, np.ndarray]:
    """For each box a guess from the same finding's boxes in other patients: the share of them (n, side, side) that covers each
    cell, whose largest cell is the point; and the box (n, 4) among them with the largest mean IoU with the others. Both are 0
    where no other patient has a box of the finding."""
    findings, patients = np.asarray(findings), np.asarray(patients)
    at = (np.arange(side) + 0.5) / side
    inside = [(at >= boxes[:, i, None]) & (at <= boxes[:, i + 2, None]) for i in (1, 0)]  # rows, columns
    covers = inside[0][:, :, None] & inside[1][:, None, :]
    maps, found = np.zeros(covers.shape), np.zeros(boxes.shape)
    for i in range(len(boxes)):
        others = np.flatnonzero((findings == findings[i]) & (patients != patients[i]))
        if len(others):
            maps[i] = covers[others].mean(0)
            found[i] = boxes[others[overlaps(boxes[others][:, None], boxes[others][None])[0].mean(1).argmax()]]
    return maps, found


def check_boxes(maps: Mapping[str, np.ndarray], boxes: np.ndarray, findings: Sequence[str], patients: Sequence[str], *,
                tau: float = 0.7, resamples: int = RESAMPLES, seed: int = SEED) -> pd.DataFrame:
    """Hit rate, mean IoU and shares of boxes above each threshold, by finding and in the mean over findings.

    ``maps`` are methods by name, each (n, h, w), a map for each of the ``boxes`` (n, 4), with finding and patient (n,). Two
    guesses without the image stand beside them: 'constant box', :func:`constant_guess`, and 'centre', the middle half of
    the picture. ``ceiling`` is the mean of the largest possible IoU on the map's grid.

    Returns a row a method and finding: method, finding, boxes, patients, :data:`MEASURES`, ceiling; and for hit and IoU the
    limits of their 95 % intervals over patients and, for methods after the first, the paired difference of the first less this
    method with its limits (``hit_less``, ``hit_less_low``, ...).
    """
    findings = np.asarray(findings)
    names, who = np.unique(np.asarray(patients), return_inverse=True)
    weights = np.concatenate(list(draws(len(names), resamples, seed, 64)), 1)[who]  # (n, resamples)
    values = {name: _values(hits(heat, boxes), boxes_of(heat, tau), boxes) for name, heat in maps.items()}
    likely, constant = constant_guess(boxes, findings, patients)
    values["constant box"] = _values(hits(likely, boxes), constant, boxes)
    values["centre"] = _values(hits(np.ones((len(boxes), 1, 1)), boxes), np.array([[0.25, 0.25, 0.75, 0.75]]), boxes)
    groups = {name: findings == name for name in dict.fromkeys(findings.tolist())}
    first, rows = next(iter(values)), []
    drawn = {name: _resampled(v[:, :2], groups, weights) for name, v in values.items()}
    for method, found in values.items():
        best = ceilings(boxes, *maps[method].shape[1:]) if method in maps else np.full(len(boxes), np.nan)
        by_finding = {name: np.column_stack([found, best])[held].mean(0) for name, held in groups.items()}
        for g, name in enumerate([MEAN, *groups]):
            here = np.mean(list(by_finding.values()), 0) if name == MEAN else by_finding[name]
            chosen = groups.get(name, np.ones(len(boxes), bool))
            row = {"method": method, "finding": name, "boxes": int(chosen.sum()), "patients": len({*who[chosen].tolist()}),
                   **dict(zip([*MEASURES, "ceiling"], here.tolist()))}
            for m, measure in enumerate(MEASURES[:2]):
                row[f"{measure}_low"], row[f"{measure}_high"], _ = interval(drawn[method][g, m])
                if method != first:
                    other = rows[g][measure]
                    row[f"{measure}_less"] = other - row[measure]
                    low, high, _ = interval(drawn[first][g, m] - drawn[method][g, m])
                    row |= {f"{measure}_less_low": low, f"{measure}_less_high": high}
            rows.append(row)
    return pd.DataFrame(rows)


def margin_of(params: Mapping) -> float:
    """Share of each side of a picture outside the map, where the network of these parameters reads a window in the middle."""
    window = params["crop"] if params["system"] == "two_path" else 0
    return max(0.0, 1 - window / params["image_size"]) / 2 if window else 0.0


def box_table(path: str | Path) -> pd.DataFrame:
    """For display, from the file of a table of :func:`check_boxes`: its methods in the mean over findings, then its first
    method, the map, by finding."""
    with reading(path, "table of heat maps and boxes", "score again with the test notebook"):
        table = pd.read_csv(path)
        table = table[(table["finding"] == MEAN) | (table["method"] == table["method"][0])].copy()
        table.loc[table["patients"] < FEW, [c for c in table if c.endswith(("_low", "_high"))]] = np.nan
        named = {f"{measure}_{end}": f"{name} {end}" for measure, name in (("hit", "hit rate"), ("iou", "mean IoU"))
                 for end in ("low", "high")}
        return table.sort_values("finding", key=lambda c: c != MEAN, kind="stable").rename(
            columns={**named, "hit": "hit rate", "iou": "mean IoU", "ceiling": "largest possible IoU",
                     "iou>0.1": "share of IoU > 0.1", "iou>0.5": "> 0.5"})[[
                "method", "finding", "boxes", "patients", "hit rate", "hit rate low", "hit rate high", "mean IoU",
                "mean IoU low", "mean IoU high", "largest possible IoU", "share of IoU > 0.1", "> 0.5"]]


def _values(hit: np.ndarray, found: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """:data:`MEASURES` of each box (n, 12)."""
    iou, iobb = overlaps(found, boxes)
    return np.column_stack([hit, iou, *(iou > t for t in IOU), *(iobb > t for t in IOBB)])


def _resampled(values: np.ndarray, groups: Mapping[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Means in resamples of patients (1 + findings, k, resamples) of values (n, k); the first is their mean over findings."""
    with np.errstate(invalid="ignore"):  # a resample without the finding
        by_finding = np.stack([values[rows].T @ weights[rows] / weights[rows].sum(0) for rows in groups.values()])
    return np.concatenate([np.nanmean(by_finding, 0)[None], by_finding])
