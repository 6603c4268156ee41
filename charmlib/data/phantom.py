"""Drawn chest radiographs: the embedded data set of the demo and the fixture of the tests.

Each image is drawn from geometry: lungs, heart, mediastinum, ribs, diaphragm, and the 14 findings as lesions with known boxes.
The folder has the layout of the NIH data set on Kaggle, plus ``PHANTOM.json``. Tables and figures made from a folder with that
file are labelled as drawn. Phantoms test software; they say nothing about patients.
"""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from charmlib.files import json_or_empty, write_text
from charmlib.nih import NIH14, NO_FINDING, PHANTOM_MARK, TABLES, TEST_LISTS, TRAIN_LISTS

PREVALENCE = {name: 0.16 * (count / 19894) ** 0.4 for name, count in zip(NIH14, (
    11559, 2776, 13317, 19894, 5782, 6331, 1431, 5302, 4667, 2303, 2516, 1686, 3385, 227))}
"""Share of patients with a finding: NIH's order, with the tail lifted so that small sets hold some of every class."""

_NIH_PIXELS = 1024


class _Canvas:
    """One image being drawn, in body coordinates of about [0, 1], x to the right and y downwards.

    The body is slightly rotated, shifted and scaled in the picture, differently in every image.
    """

    def __init__(self, size: int, rng: np.random.Generator):
        self.size, self.rng = size, rng
        line = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
        v, u = np.meshgrid(line, line, indexing="ij")
        angle, scale = np.radians(rng.normal(0, 6)), rng.uniform(0.87, 1.12)
        self.turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
        self.shift = rng.normal(0, 0.035, 2)
        back = np.linalg.inv(self.turn)
        u, v = u - self.shift[0], v - self.shift[1]
        self.x, self.y = ((row[0] * u + row[1] * v + 0.5).astype(np.float32) for row in back)
        self.light = np.zeros((size, size), np.float32)

    def box_in_picture(self, box) -> np.ndarray:
        """(x0, y0, x1, y1) of the body -> the upright box around it in the picture, within [0, 1]."""
        corners = np.array([(x, y) for y in box[1::2] for x in box[::2]]) - 0.5
        seen = corners @ self.turn.T + self.shift + 0.5
        return np.clip(np.concatenate([seen.min(0), seen.max(0)]), 0.0, 1.0)

    def soft(self, value, edge) -> np.ndarray:
        """1 where ``value`` < 0, 0 where it is above ``edge``, smooth between."""
        t = np.clip(0.5 - value / max(edge, 1e-6), 0, 1)
        return t * t * (3 - 2 * t)

    def ellipse(self, cx, cy, rx, ry, edge=0.03, angle=0.0) -> np.ndarray:
        """A filled ellipse as a soft mask; ``edge`` is the width of its border."""
        dx, dy = self.x - cx, self.y - cy
        if angle:
            c, s = np.cos(angle), np.sin(angle)
            dx, dy = c * dx + s * dy, -s * dx + c * dy
        radius = np.sqrt((dx / rx) ** 2 + (dy / ry) ** 2)
        return self.soft((radius - 1) * min(rx, ry), edge)

    def texture(self, cells: int) -> np.ndarray:
        """Smooth noise in [-1, 1] with about ``cells`` blobs a side."""
        grid = self.rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
        return np.asarray(Image.fromarray(grid).resize((self.size, self.size), Image.Resampling.BICUBIC))


def _anatomy(rng: np.random.Generator) -> SimpleNamespace:
    """The shape of a patient's body, the same in all images: centres, radii, distance of the ribs, fat."""
    middle, spread = rng.normal(0, 0.008), rng.uniform(0.205, 0.235)
    return SimpleNamespace(
        lung_x=(0.5 - spread + middle, 0.5 + spread + middle), lung_rx=rng.uniform(0.155, 0.18),
        lung_ry=rng.uniform(0.30, 0.35), lung_y=rng.uniform(0.44, 0.48), heart_r=rng.uniform(0.105, 0.13), 
        heart_x=rng.uniform(0.53, 0.56), ribs=rng.uniform(0.075, 0.09), fat=rng.uniform(0.0, 0.10))


def _place(a: SimpleNamespace, rng, low=-0.6, high=0.6) -> tuple[float, float]:
    """A random point inside a lung."""
    side, v = int(rng.integers(2)), rng.uniform(low, high)
    reach = 0.62 * np.sqrt(max(1 - v * v, 0.1))
    return a.lung_x[side] + a.lung_rx * rng.uniform(-reach, reach), a.lung_y + a.lung_ry * v


def _around(x, y, rx, ry) -> tuple[float, float, float, float]:
    return x - rx, y - ry, x + rx, y + ry


def _lung(c, a) -> tuple[float, int]:
    """The middle of a random lung, and the way outwards: -1 or 1."""
    side = int(c.rng.integers(2))
    return a.lung_x[side], 2 * side - 1


# Each lesion adds to the canvas and returns its box (x0, y0, x1, y1) in [0, 1].
def _atelectasis(c, a, lungs):
    x, y = _place(a, c.rng, 0.0, 0.65)
    angle, length, thick = c.rng.uniform(-0.5, 0.5), c.rng.uniform(0.075, 0.11), c.rng.uniform(0.010, 0.015)
    for offset in (0.0, c.rng.uniform(0.035, 0.05)):
        c.light += 0.34 * c.ellipse(x, y + offset, length, thick, 0.02, angle) * lungs
    return x - length, y - length * 0.6, x + length, y + length * 0.6 + 0.05


def _cardiomegaly(c, a, lungs):
    r = a.heart_r * c.rng.uniform(1.25, 1.5)
    c.light += 0.24 * c.ellipse(a.heart_x + 0.03, 0.64, r * 1.25, r, 0.03, 0.35) * lungs
    return _around(a.heart_x + 0.03, 0.64, r * 1.25, r)


def _effusion(c, a, lungs):
    (x, outwards), level = _lung(c, a), a.lung_y + a.lung_ry * c.rng.uniform(0.48, 0.68)
    surface = level - 0.07 * np.clip((c.x - x) * outwards / a.lung_rx, -1, 1.2) ** 3  # highest at the rib cage
    c.light += 0.40 * (c.soft(surface - c.y, 0.025) * (np.abs(c.x - x) < a.lung_rx * 1.1)) * lungs
    return x - a.lung_rx, level - 0.07, x + a.lung_rx, a.lung_y + a.lung_ry


def _infiltration(c, a, lungs):
    (x, y), r = _place(a, c.rng, -0.4, 0.6), c.rng.uniform(0.10, 0.13)
    c.light += 0.50 * c.ellipse(x, y, r, r * 1.2, 0.1) * np.clip(c.texture(26), 0, 1) * lungs
    return _around(x, y, r, r * 1.2)


def _mass(c, a, lungs):
    (x, y), r = _place(a, c.rng), c.rng.uniform(0.045, 0.065)
    c.light += 0.42 * c.ellipse(x, y, r, r * c.rng.uniform(0.85, 1.1), 0.02)
    return _around(x, y, r, r)


def _nodule(c, a, lungs):
    spots = [(*_place(a, c.rng), c.rng.uniform(0.017, 0.024)) for _ in range(int(c.rng.integers(1, 4)))]
    for x, y, r in spots:
        c.light += 0.46 * c.ellipse(x, y, r, r, 0.012)
    return _around(*spots[0], spots[0][2])


def _pneumonia(c, a, lungs):
    (x, y), r = _place(a, c.rng, -0.2, 0.55), c.rng.uniform(0.065, 0.085)
    for _ in range(7):  # confluent fluffy spots
        dx, dy = c.rng.normal(0, r * 0.55, 2)
        c.light += 0.24 * c.ellipse(x + dx, y + dy, r * 0.42, r * 0.42, 0.04) * lungs
    return _around(x, y, r, r)


def _pneumothorax(c, a, lungs):
    (x, outwards), shrink, shift = _lung(c, a), c.rng.uniform(0.72, 0.82), c.rng.uniform(0.05, 0.09)
    inner = np.sqrt(((c.x - x + 0.025 * outwards) / (a.lung_rx * shrink)) ** 2
                    + ((c.y - a.lung_y - shift) / (a.lung_ry * shrink)) ** 2)
    near = (np.abs(c.x - x) < a.lung_rx * 1.05) & (c.y < a.lung_y + 0.12)
    c.light += near * lungs * (0.40 * np.exp(-(((inner - 1) / 0.05) ** 2)) - 0.07 * c.soft(1.04 - inner, 0.05))
    return x - a.lung_rx, a.lung_y - a.lung_ry, x + a.lung_rx, a.lung_y + 0.1


def _consolidation(c, a, lungs):
    (x, _), y = _lung(c, a), a.lung_y + a.lung_ry * c.rng.uniform(-0.45, 0.45)
    w, h = a.lung_rx * 0.85, c.rng.uniform(0.07, 0.09)
    mask = c.soft(np.abs(c.y - y) - h, 0.03) * c.soft(np.abs(c.x - x) - w, 0.03)
    bronchi = sum(np.exp(-(((c.x - x) * np.cos(tilt) + (c.y - y) * np.sin(tilt)) / 0.010) ** 2) for tilt in (0.7, -0.7))
    c.light += 0.30 * mask * lungs - 0.30 * mask * np.clip(bronchi, 0, 1) * lungs
    return _around(x, y, w, h)


def _edema(c, a, lungs):
    for x, outwards in zip(a.lung_x, (-1, 1)):
        c.light += 0.11 * c.ellipse(x - 0.09 * outwards, a.lung_y, 0.10, 0.15, 0.09) * lungs
        for i in range(5):  # Kerley lines at the edge
            at = x + a.lung_rx * 0.62 * outwards, a.lung_y + 0.06 + 0.035 * i
            c.light += 0.25 * c.ellipse(*at, 0.035, 0.006, 0.012) * lungs
    return a.lung_x[0] - a.lung_rx * 0.8, a.lung_y - 0.15, a.lung_x[1] + a.lung_rx * 0.8, a.lung_y + 0.25


def _emphysema(c, a, lungs):
    c.light -= 0.03 * lungs
    for _ in range(9):  # bullae: dark, thin-walled
        (x, y), r = _place(a, c.rng, -0.75, 0.3), c.rng.uniform(0.024, 0.036)
        c.light += lungs * (0.30 * c.ellipse(x, y, r * 1.25, r * 1.25, 0.012) - 0.42 * c.ellipse(x, y, r, r, 0.012))
    return a.lung_x[0] - a.lung_rx, a.lung_y - a.lung_ry, a.lung_x[1] + a.lung_rx, a.lung_y + a.lung_ry * 0.4


def _fibrosis(c, a, lungs):
    period = c.rng.uniform(0.042, 0.05)
    net = np.cos(2 * np.pi * (c.x + 0.6 * c.y) / period) * np.cos(2 * np.pi * (c.x - 0.6 * c.y) / period)
    c.light += (0.30 * np.abs(net) - 0.08) * c.soft(a.lung_y + 0.06 - c.y, 0.12) * lungs
    return a.lung_x[0] - a.lung_rx, a.lung_y + 0.05, a.lung_x[1] + a.lung_rx, a.lung_y + a.lung_ry


def _pleural_thickening(c, a, lungs):
    x, outwards = _lung(c, a)
    radius = np.sqrt(((c.x - x) / a.lung_rx) ** 2 + ((c.y - a.lung_y) / a.lung_ry) ** 2)
    lateral = c.soft((x - c.x) * outwards + 0.4 * a.lung_rx, 0.05)
    rim = np.exp(-(((radius - 0.90 + 0.03 * c.texture(10)) / 0.055) ** 2))
    c.light += 0.40 * rim * lateral * c.soft(np.abs(c.y - a.lung_y) - a.lung_ry * 0.65, 0.06)
    return _around(x + a.lung_rx * 0.75 * outwards, a.lung_y, 0.05, a.lung_ry * 0.65)


def _hernia(c, a, lungs):
    x, y, r = 0.5 + c.rng.normal(0, 0.01), 0.70 + c.rng.normal(0, 0.012), c.rng.uniform(0.07, 0.085)
    c.light += 0.30 * c.ellipse(x, y, r, r * 0.85, 0.015)
    c.light -= 0.50 * (c.ellipse(x, y - 0.01, r * 0.78, r * 0.6, 0.012) * c.soft(c.y - y, 0.012))  # gas above a fluid level
    return _around(x, y, r, r)


_LESIONS = dict(zip(NIH14, (_atelectasis, _cardiomegaly, _effusion, _infiltration, _mass, _nodule, _pneumonia,
                            _pneumothorax, _consolidation, _edema, _emphysema, _fibrosis, _pleural_thickening, _hernia)))


def draw_phantom(findings=(), *, size: int = 64, seed: int = 0, anatomy_seed: int = 0, view: str = "PA"
                 ) -> tuple[np.ndarray, dict[str, tuple[float, float, float, float]]]:
    """One drawn radiograph, uint8 (size, size), and for each finding its box (x0, y0, x1, y1) in [0, 1].

    ``findings`` are names of :data:`charmlib.nih.NIH14`. ``seed`` is the image, ``anatomy_seed`` the patient: the same gives
    the same body. ``view`` 'AP' enlarges the heart a little and lowers the contrast.
    """
    a, rng = _anatomy(np.random.default_rng([anatomy_seed, 1])), np.random.default_rng([seed, 2])
    c = _Canvas(size, rng)
    trunk = (np.abs((c.x - 0.5) / (0.45 + a.fat * 0.3)) ** 3 + np.abs((c.y - 0.66) / 0.62) ** 3) ** (1 / 3)
    body = c.soft((trunk - 1) * 0.45, 0.05)
    c.light += 0.58 * np.maximum(body, c.ellipse(0.5, 0.0, 0.13, 0.12, 0.05)) + 0.1 * c.texture(5) * body
    lungs = np.zeros_like(c.light)
    for middle, outwards in zip(a.lung_x, (-1, 1)):
        shape = c.ellipse(middle, a.lung_y, a.lung_rx, a.lung_ry, 0.03, 0.10 * outwards)
        dome = a.lung_y + a.lung_ry * 0.78 + 0.9 * (c.x - middle) ** 2 * 6 * 0.35
        lungs = np.maximum(lungs, shape * c.soft(c.y - dome, 0.03))
    c.light -= 0.40 * lungs
    for middle, outwards in zip(a.lung_x, (-1, 1)):  # vessels fan out of the hilum
        hilum = middle - 0.10 * outwards
        c.light += 0.10 * c.ellipse(hilum, a.lung_y, 0.035, 0.07, 0.06) * lungs
        for _ in range(7):
            angle, length = rng.uniform(-1.3, 1.3) + (np.pi if outwards < 0 else 0), rng.uniform(0.05, 0.10)
            x, y = hilum + np.cos(angle) * length, a.lung_y + np.sin(angle) * length
            c.light += rng.uniform(0.03, 0.09) * c.ellipse(x, y, length, 0.006, 0.012, angle) * lungs
    wave = np.cos(2 * np.pi * (c.y - 0.28 * np.abs(c.x - 0.5) * 1.2 + rng.uniform(0, a.ribs)) / a.ribs)
    for middle in a.lung_x:  # ribs slope outwards
        near = c.ellipse(middle, a.lung_y - 0.02, a.lung_rx * 1.2, a.lung_ry * 1.05, 0.05)
        c.light += 0.075 * np.clip(wave - 0.35, 0, 1) * near
    c.light += 0.14 * c.soft(np.abs(c.x - 0.5) - 0.055, 0.04) * c.soft(c.y - 0.95, 0.1)  # spine and mediastinum
    heart = a.heart_r * (1.10 if view == "AP" else 1.0)
    c.light += 0.30 * c.ellipse(a.heart_x, 0.64, heart * 1.2, heart, 0.03, 0.35) * np.maximum(lungs, 0.25)
    for _ in range(int(rng.integers(0, 3))):  # leads and tubes: bright thin lines without meaning
        x = rng.uniform(0.25, 0.75)
        c.light += 0.10 * np.exp(-(((c.x - x - 0.05 * np.sin(6 * c.y + x)) / 0.006) ** 2)) * (c.y < rng.uniform(0.3, 0.8))

    c.rng = np.random.default_rng([seed, 5])  # of its own, so that the rest of the picture is the same without the lesions
    boxes = {name: tuple(c.box_in_picture(_LESIONS[name](c, a, lungs)).tolist()) for name in sorted(findings, key=NIH14.index)}
    tilt = rng.normal(0, 0.2, 2)  # uneven exposure
    c.light *= 1 + tilt[0] * (c.x - 0.5) + tilt[1] * (c.y - 0.5)
    contrast = rng.uniform(0.85, 1.1) * (0.92 if view == "AP" else 1.0)
    light = np.clip(0.16 + rng.normal(0, 0.03) + contrast * c.light, 0.0, 1.0) ** rng.uniform(0.85, 1.2)
    light = light + rng.normal(0, 0.018, light.shape)
    return (np.clip(light, 0, 1) * 255 + 0.5).astype(np.uint8), boxes


def make_phantoms(out: str | Path, *, images: int = 3000, size: int = 64, seed: int = 85) -> Path:
    """Write a phantom data set in the exact NIH layout; an existing one of the same settings is kept.

    ``images_001/images/*.png`` ..., ``Data_Entry_2017.csv`` (with its trailing empty column), ``train_val_list.txt``,
    ``test_list.txt``, ``BBox_List_2017.csv`` (boxes in 1024-pixel space), ``PHANTOM.json``. Patients have one to twelve images
    and keep their anatomy and most of their findings. A fifth of them are test patients. From about 2,500 images on every class
    has positives in every part.

    Raises FileExistsError if the folder holds something else or phantoms of other settings, and ValueError for fewer than 20
    images or 16 pixels.
    """
    if images < 20 or size < 16:
        raise ValueError(f"a phantom set needs at least 20 images of 16 pixels, got {images} of {size}")
    out, mark = Path(out), Path(out) / PHANTOM_MARK
    settings = {"drawn": True, "format": 1, "images": images, "size": size, "seed": seed,
                "note": "Drawn by charmlib.data.phantom; not radiographs of anybody."}
    if mark.is_file():
        if json_or_empty(mark) == settings:
            return out
        raise FileExistsError(f"{out} holds phantoms of other settings: remove it or name another folder")
    if out.exists() and any(out.iterdir()) and not (out / "images_001").is_dir():
        raise FileExistsError(f"{out} is not empty and holds no phantoms; name another folder")
    rows, boxes = _plan(images, seed), []
    for i, row in enumerate(rows):
        folder = out / f"images_{i // 5000 + 1:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        image, found = draw_phantom(row["findings"], size=size, seed=seed * 1_000_003 + i,
                                    anatomy_seed=seed * 7919 + row["patient"], view=row["view"])
        Image.fromarray(image).save(folder / row["id"])
        for name, (x0, y0, x1, y1) in found.items():
            short = "Infiltrate" if name == "Infiltration" else name  # as in the NIH's box list
            boxes.append([row["id"], short, *(f"{v * _NIH_PIXELS:.3f}" for v in (x0, y0, x1 - x0, y1 - y0)), "", "", ""])
    _write_csv(out / TABLES[0], [
        ["Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
         "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]", ""],
        *([r["id"], "|".join(sorted(r["findings"])) or NO_FINDING, r["visit"], r["patient"], r["age"], r["sex"], r["view"],
           _NIH_PIXELS, _NIH_PIXELS, 0.143, 0.143, ""] for r in rows)])
    _write_csv(out / "BBox_List_2017.csv", [["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]", "", "", ""], *boxes])
    test = _test_patients(rows, seed)
    for name, inside in ((TRAIN_LISTS[0], False), (TEST_LISTS[0], True)):
        (out / name).write_text("".join(f"{r['id']}\n" for r in rows if (r["patient"] in test) == inside))
    write_text(mark, json.dumps(settings, indent=1))  # last: a folder with its mark is complete
    return out


def _plan(images: int, seed: int) -> list[dict]:
    """The images of all patients: rows of id, patient, visit, age, sex, view, findings."""
    rng = np.random.default_rng([seed, 3])
    rows, patient = [], 0
    while len(rows) < images:
        patient += 1
        visits = min(int(rng.geometric(0.45)), 12, images - len(rows))
        chronic = {name for name, share in PREVALENCE.items() if rng.random() < share}
        age, sex = int(rng.integers(18, 88)), "MF"[int(rng.integers(2))]
        for visit in range(visits):
            findings = {name for name in NIH14 if rng.random() < (0.85 if name in chronic else 0.04 * PREVALENCE[name])}
            view = "AP" if rng.random() < (0.5 if findings else 0.3) else "PA"
            rows.append({"id": f"{patient:08d}_{visit:03d}.png", "patient": patient, "visit": visit, "age": age + visit,
                         "sex": sex, "view": view, "findings": findings})
    return rows


def _test_patients(rows: list[dict], seed: int) -> set[int]:
    """A fifth of the patients: of 20 draws that with the largest test share of the class with the smallest one."""
    labels = np.array([[name in r["findings"] for name in NIH14] for r in rows])
    labels, patient, count = labels[:, labels.any(0)], np.array([r["patient"] for r in rows]), rows[-1]["patient"]
    draws = (np.random.default_rng([seed, 4, attempt]).permutation(count)[:max(1, count // 5)] + 1 for attempt in range(20))
    best = max(draws, key=lambda draw: (labels[np.isin(patient, draw)].sum(0) / labels.sum(0)).min(initial=1.0))
    return set(best.tolist())


def _write_csv(path: Path, rows: list[list]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
