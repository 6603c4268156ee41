"""fastai DataLoaders over the image cache: one indexed read a batch, everything else on the device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Transform
from fastai.torch_core import TensorImage, TensorMultiCategory
from torch import Tensor

from charmlib.data.dataset import ChestData
from charmlib.data.images import read_grey

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ChestImages:
    """A part of a data set as (image uint8 (1, S, S), labels float32 (C,)) pairs, with the row each came from.

    Parameters
    ----------
    images : array (n, S, S) uint8
    labels : array (n, C) float32
    rows : array (m,)
        Which rows of the two belong to this part; also the image ids that the bank's slots remember.
    classes : sequence of str
    ids : sequence of str
        File names of all n rows.
    known : bool
        False for images from elsewhere, whose rows must not be taken for those of a data set.
    note : str
        Stands over every picture of these images (that they are drawn).
    """

    n_inp = 1

    def __init__(self, images, labels, rows, classes: Sequence[str], ids: Sequence[str], *, train: bool = False,
                 known: bool = True, note: str = ""):
        self.images, self.labels, self.rows = images, labels, np.asarray(rows)
        self.known, self.note = known, note
        self.classes, self.ids = tuple(classes), ids
        self.split_idx = 0 if train else 1  # fastai's name for training (0) and validation (1) transforms

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Sequence[int]) -> tuple[TensorImage, TensorMultiCategory]:
        """Images (B, 1, S, S) uint8 and labels (B, C) float32."""
        rows = self.rows[np.asarray(index, dtype=np.int64)]
        return (TensorImage(torch.from_numpy(self.images[rows][:, None])),
                TensorMultiCategory(torch.from_numpy(self.labels[rows])))

    def __getitem__(self, i: int):
        x, y = self.batch([i])
        return x[0], y[0]


class ChestDL(TfmdDL):
    """A fastai loader that reads whole batches.

    ``ids`` are the rows of the batch that it gave last, (B,) int64, -1 for images that are not of the data set.

    Shuffling draws from torch's generator, so that one seed fixes order and augmentation together.
    """

    def __init__(self, dataset: ChestImages, bs: int = 64, shuffle: bool = False, num_workers: int = 0, **kwargs):
        super().__init__(dataset, bs=bs, shuffle=shuffle, num_workers=0, **kwargs)  # reading is one copy from memory
        self._n_inp, self._types, self.ids = 1, {tuple: [TensorImage, TensorMultiCategory]}, None

    def shuffle_fn(self, idxs):
        return [idxs[i] for i in torch.randperm(len(idxs)).tolist()]

    def create_batches(self, samps):
        for chunk in self.chunkify(iter(samps)):
            rows = torch.from_numpy(self.dataset.rows[np.asarray(chunk)])
            self.ids = rows if self.dataset.known else torch.full_like(rows, -1)
            yield self.dataset.batch(chunk)

    def show_batch(self, b=None, max_n: int = 9, ctxs=None, show: bool = True, **kwargs):
        """Draw images with their findings; returns the figure, or the decoded batch with ``show=False``."""
        from charmlib.viz.images import show_images

        b = self.one_batch() if b is None else b
        x, y = self.decode(b)[:2]
        titles = ["\n".join(self._names(row)) for row in y[:max_n].numpy()]
        return show_images(x[:max_n].numpy(), titles, axes=ctxs, note=self.dataset.note) if show else (x, y)

    def show_results(self, b, out, max_n: int = 9, ctxs=None, show: bool = True, **kwargs):
        """Draw images with their findings, and below them what the network calls at probability 0.5."""
        from charmlib.viz.images import show_images

        x, y = self.decode(b)[:2]
        titles = ["\n".join(self._names(truth)) + "\n-> " + ", ".join(self._names(call))
                  for truth, call in zip(y[:max_n].numpy(), out[:max_n].float().numpy())]
        return show_images(x[:max_n].numpy(), titles, axes=ctxs, note=self.dataset.note) if show else (x, y, out)

    def _names(self, row) -> list[str]:
        return [c for c, v in zip(self.dataset.classes, row) if v == 1] or ["No Finding"]


class GreyToNetwork(Transform):
    """uint8 (B, 1, S, S) on the device -> float32 (B, 3, S, S), normalised as the weights expect."""

    order = 0

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs):
        super().__init__(**kwargs)
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)

    def to(self, device):
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def encodes(self, x: TensorImage):
        mean, std = self.mean.to(x.device), self.std.to(x.device)
        grey = x.as_subclass(Tensor)
        return TensorImage((grey.float() / 255 - mean) / std) if grey.dtype == torch.uint8 else x

    def decodes(self, x: TensorImage):
        """Back to one grey channel in [0, 1]."""
        return TensorImage((x.as_subclass(Tensor) * self.std.to(x.device) + self.mean.to(x.device)).mean(1, keepdim=True))


class FlipRotate(Transform):
    """Training only, a whole batch at once: horizontal flip for half of the images, rotation by up to ``degrees``.

    Turned-in corners repeat the border. Angles are drawn on the CPU, so that a run is the same on every device.
    """

    order, split_idx = 10, 0

    def __init__(self, degrees: float = 10.0, flip: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        self.degrees, self.flip = degrees, flip

    def encodes(self, x: TensorImage):
        flip = (torch.rand(len(x)) < self.flip).float() * -2 + 1
        angle = (torch.rand(len(x)) * 2 - 1) * math.radians(self.degrees)
        return TensorImage(flip_rotate(x.as_subclass(Tensor), flip, angle))


def flip_rotate(x: Tensor, flip: Tensor, angle: Tensor) -> Tensor:
    """Images (B, C, H, W), mirrored where ``flip`` (B,) is -1 and turned by ``angle`` (B,) radians, bilinear."""
    c, s, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    theta = torch.stack([torch.stack([c * flip, -s, zero], 1), torch.stack([s * flip, c, zero], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta.to(x.device, x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


class ChestDataLoaders(DataLoaders):
    """Training, validation and, where asked for, test loaders of one data set."""

    @property
    def vocab(self) -> tuple[str, ...]:
        return self.train.dataset.classes

    c = property(lambda self: len(self.vocab))
    test = property(lambda self: self.loaders[2])

    def test_dl(self, items: Sequence, bs: int | None = None, **kwargs) -> ChestDL:
        """A loader over image files (any grey or colour mode), in their order, with unknown (NaN) labels."""
        size = self.train.dataset.images.shape[1]
        images = np.stack([read_grey(path, size) for path in items])
        labels = np.full((len(items), self.c), np.nan, np.float32)
        part = ChestImages(images, labels, np.arange(len(items)), self.vocab, [Path(p).name for p in items], known=False)
        dl = self.valid.new(part, bs=bs or self.valid.bs)
        return dl


def chest_dataloaders(data: ChestData, *, bs: int = 64, findings_only: bool = False,
                      mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
                      degrees: float = 10.0, flip: float = 0.5, device=None, path: str | Path = ".") -> ChestDataLoaders:
    """fastai DataLoaders ``[train, valid, test]`` over a :class:`ChestData`.

    Parameters
    ----------
    bs : int
        Batch. The last, smaller batch of a training epoch is dropped (batch norm), unless it is the only one.
    findings_only : bool
        Stage 1: training and validation take only images with a finding. The test part is always whole.
    mean, std : sequences of 3
        What the network expects of RGB in [0, 1] (``net.mean``, ``net.std``); ImageNet's by default.
    degrees, flip : float
        Augmentation of the training part.

    Raises
    ------
    ValueError
        Fewer training images than 2.
    """
    device = torch.device("cpu") if device is None else torch.device(device)
    ids = data.index.frame["id"].tolist()
    loaders = []
    for part in ("train", "valid", "test"):
        train = part == "train"
        rows = data.rows(part, findings_only=findings_only and part != "test")
        if len(rows) < (2 if train else 1):
            raise ValueError(f"the {part} part has {len(rows)} images" + (" with a finding" if findings_only else ""))
        dataset = ChestImages(data.images, data.labels, rows, data.classes, ids, train=train,
                              note=data.source if data.index.drawn else "")
        transforms = [GreyToNetwork(mean, std)] + ([FlipRotate(degrees, flip)] if train and (degrees or flip) else [])
        size = min(bs, len(rows))
        loaders.append(ChestDL(dataset, bs=size, shuffle=train, drop_last=train, after_batch=transforms, device=device,
                               pin_memory=device.type == "cuda"))
    return ChestDataLoaders(*loaders, path=path, device=device)
