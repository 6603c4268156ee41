"""A data set ready for use: index, split and decoded images together. Needs no torch."""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.boxes import CORNERS, read_boxes
from charmlib.data.boxes import FILE as BOXES
from charmlib.data.cache import open_images
from charmlib.data.cache_file import ImageCache, read_rows
from charmlib.data.images import read_grey
from charmlib.data.index import Index, read_index
from charmlib.data.paths import default_cache_dir, resolve_data_root
from charmlib.data.phantom import make_phantoms
from charmlib.data.splits import SPLIT_SEED, Split, make_split, training_rows
from charmlib.nih import PARTS, people
from charmlib.params import PARAMS, READING, coerce, resolve

LABELS, PICTURES, WEIGHTS = "labels as read", "pictures as cached", "weights as loaded"  # what :func:`digests` are of


@dataclass
class ChestData:
    """Index, split and images, row for row: ``images[rows]`` is uint8 (rows, size, size), ``labels`` (n, classes) float32."""

    index: Index
    split: Split
    images: ImageCache
    labels: np.ndarray

    classes = property(lambda self: self.index.classes)

    @property
    def source(self) -> str:
        """Label of tables and figures: the folder's name, or that the images are drawn."""
        return "drawn phantoms" if self.index.drawn else self.index.root.resolve().name

    def rows(self, part: str, *, findings_only: bool = False) -> np.ndarray:
        """Row numbers of 'train', 'valid' or 'test'; with ``findings_only`` of its images with a finding (stage 1)."""
        rows = self.split.rows(part)
        return rows[self.index.has_finding()[rows]] if findings_only else rows

    def train_images(self) -> dict[str, int]:
        """Numbers of training images: 'all', and those with 'findings'."""
        return {"all": len(self.rows("train")), "findings": len(self.rows("train", findings_only=True))}

    def log_odds(self) -> np.ndarray:
        """Log-odds (C,) of the classes among the known training labels, with half an image added to positives and negatives."""
        labels = self.labels[self.rows("train")]
        return np.log((labels == 1).sum(0) + 0.5) - np.log((labels == 0).sum(0) + 0.5)

    def note(self, part: str) -> str:
        """Caption for scores on a part: data, split, images, patients and share of images with a finding."""
        count, split = self.split.counts[part], f"{self.source}, split '{self.split.name}' ({self.split.hash[:8]})"
        if part == "valid" and not self.split.has_valid:
            return f"{split}: no validation part"
        return (f"{split}: {count['images']:,} {part} images of {people(count['patients'], self.split.patients_from)}, "
                f"{count['positive_share']:.1%} with a finding")

    def __str__(self) -> str:
        drawn = "DRAWN PHANTOMS, not radiographs: " if self.index.drawn else ""
        return (f"{drawn}{len(self.index.frame)} images from {self.index.root}, {len(self.classes)} classes, "
                f"{self.images.shape[1]} pixels\n{self.split}\nreport: {self.index.report}")


def find_data(data_root: str | Path = "", csv: str | Path = "", **where) -> Path:
    """The data folder of :func:`charmlib.data.paths.resolve_data_root`; without data, drawn phantoms, which it announces.

    Raises ValueError for a table of one's own (``csv``) without data.
    """
    if root := resolve_data_root(data_root, **where):
        return root
    if csv:
        raise ValueError(f"csv: {csv} needs data_root, the folder of its images")
    folder = default_cache_dir() / "phantoms_64"
    print(f"no data_root given and no NIH data found: taking DRAWN PHANTOMS in {folder}", flush=True)
    return make_phantoms(folder)


def open_dataset(params: Mapping | None = None, **changes) -> ChestData:
    """The data set that parameters describe (group *data* of :mod:`charmlib.params`).

    Images that cannot be decoded are left out before the split is made, and named in ``index.report``.

    >>> data = open_dataset(data_root='data/phantoms', image_size=64)      # doctest: +SKIP
    """
    p = resolve({"patience": 0}, dict(params or {}), changes)  # no training here, so valid_fraction 0 needs no check
    index = read_index(find_data(p["data_root"], p["csv"]), **{name: p[name] for name in READING})
    parts = {name: p[name] for name in ("valid_fraction", "never_test")}
    images = open_images(index.frame["id"].tolist(), index.frame["path"].tolist(), p["image_size"], aspect=p["aspect"],
                         contrast=p["contrast"], cache_dir=p["cache_dir"], workers=p["workers"],
                         train=lambda: training_rows(index, p["split"], **parts))
    return assemble(index, images, split=p["split"], limit=p["limit"], labels=p["labels"], **parts)


def count_images(params: Mapping) -> dict[str, int]:
    """Numbers of images by the label table alone: 'all' for training, those of them with 'findings', 'valid' and 'test'."""
    p, given = resolve({"patience": 0}, dict(params)), ("valid_fraction", "never_test", "limit")
    index = read_index(find_data(p["data_root"], p["csv"]), **{name: p[name] for name in READING})
    split = make_split(index, p["split"], **{name: p[name] for name in given})
    train = split.rows("train")
    return {"all": len(train), "findings": int(index.has_finding()[train].sum()),
            **{part: len(split.rows(part)) for part in ("valid", "test")}}


def digests(data: ChestData, weights: str = "none") -> dict[str, str]:
    """16 hex digits each of the labels and pictures in the parts of the split, and of a file of ``weights``.

    They are equal wherever the same table and pictures lie. Pictures count by the checksums in their cache, so nothing is read
    but the cache's rows and the weights, those once in a process.
    """
    used, rows = data.split.part != "", read_rows(data.images.folder, data.images.manifest)
    content = {LABELS: (repr(data.classes) + "\n".join(data.index.frame["id"][used])).encode("utf-8", "surrogateescape")
               + np.nan_to_num(data.labels[used], nan=-1).astype("<f4").tobytes(),
               PICTURES: rows["pixel_crc"][data.images.rows[used]].astype("<u4").tobytes()}
    if weights not in PARAMS["weights"].choices and Path(weights).is_file():
        content[WEIGHTS] = _file_digest(weights, *(getattr(os.stat(weights), f"st_{of}") for of in ("size", "mtime_ns")))
    return {name: hashlib.sha256(value).hexdigest()[:16] for name, value in content.items()}


@lru_cache
def _file_digest(path: str, size: int, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def readable_only(index: Index, images: ImageCache) -> tuple[Index, ImageCache]:
    """Index and cache without the images that cannot be read, which ``index.report`` then names.

    Raises ValueError if none can be read; names what the files are instead.
    """
    if len(images.bad) == len(images):
        example, reasons = next(iter(images.bad)), Counter(why.partition(": ")[2] for why in images.bad.values())
        raise ValueError(f"none of the {len(images)} images under {index.root} can be read, such as {example}. They are: "
                         + "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(3)))
    if images.scale:
        index.report.add("values of more than 8 bits that are black and white", map("{:g}".format, images.scale))
    index.report.add("no radiographs by their look, kept as they are", (f"{name}: {why}" for name, why in images.odd.items()))
    if not images.bad:
        return index, images
    index.report.add("unreadable, left out", (f"{name}: {why}" for name, why in images.bad.items()))
    kept = ~index.frame["id"].isin(images.bad.keys()).to_numpy()
    return replace(index, frame=index.frame[kept].reset_index(drop=True)), images.only(kept)


def assemble(index: Index, images: ImageCache, *, split: str = "official", labels: str = "real", **options) -> ChestData:
    """The data set of an index and the cache of its images, row for row; unreadable images are left out before the split.

    ``options`` are those of :func:`charmlib.data.splits.make_split`.

    ``labels`` 'shuffled' is a control: label rows are permuted within each part, with the seed of the splits. Prevalence and
    co-occurrence stay as they are. A test AUC whose interval excludes 0.5 therefore shows a leak of labels.

    Raises what :func:`charmlib.data.splits.make_split` and :func:`readable_only` raise.
    """
    index, images = readable_only(index, images)
    parts = make_split(index, coerce("split", split), **options)
    if labels == "shuffled":
        frame, generator, classes = index.frame.copy(), np.random.default_rng(SPLIT_SEED), list(index.classes)
        for rows in map(parts.rows, PARTS):
            frame.loc[rows, classes] = index.frame.loc[generator.permutation(rows), classes].to_numpy()
        index = replace(index, frame=frame)
    return ChestData(index, parts, images, index.labels())


class ImageReader:
    """``reader(metrics, image_id)`` -> (size, size) uint8, from the files of the data set of the run with these metrics.

    ``data_root`` is the folder of the images; '' takes that of each run's parameters. Pictures that are not square are
    fitted as for the run's network. A call raises OSError, ValueError or KeyError if the data is missing or lacks the image.
    """

    def __init__(self, data_root: str | Path = "", size: int = 384):
        self.data_root, self.size = data_root, size
        self._found: dict[tuple, tuple[dict[str, str], list[Path]]] = {}

    def root(self, metrics: Mapping) -> Path:
        """The folder where the images of the run are looked for."""
        return Path(self.data_root or metrics["params"]["data_root"]).expanduser()

    def path(self, metrics: Mapping, image_id: str) -> str:
        """The file of an image."""
        return self._read(metrics)[0][image_id]

    def boxes(self, metrics: Mapping, ids: Sequence[str], labels: np.ndarray) -> pd.DataFrame:
        """The boxes of some images: :func:`charmlib.data.boxes.read_boxes`; an empty table for a data set without."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            if path := next(filter(Path.is_file, (folder / BOXES for folder in self._read(metrics)[1])), None):
                return read_boxes(path, ids, labels, metrics["classes"])[0]
        return pd.DataFrame(columns=["row", "id", "finding", *CORNERS])

    def _read(self, metrics: Mapping) -> tuple[dict[str, str], list[Path]]:
        key = str(self.root(metrics)), *(metrics["params"][name] for name in READING)
        if key not in self._found:
            self._found[key] = {}, []  # missing data is searched once, too
            index = read_index(key[0], **dict(zip(READING, key[1:])))
            self._found[key] = dict(zip(index.frame["id"], index.frame["path"])), [index.root, index.table.parent]
        return self._found[key]

    def find(self, metrics: Mapping, image_id: str | None) -> np.ndarray | None:
        """An image as a call gives it, None if it is not there."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return self(metrics, image_id)
        return None

    def __call__(self, metrics: Mapping, image_id: str) -> np.ndarray:
        return read_grey(self.path(metrics, image_id), self.size, metrics["params"]["aspect"], scale=metrics["data"]["scale"])
