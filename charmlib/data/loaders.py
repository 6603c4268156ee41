"""fastai DataLoaders over the image cache: one indexed read a batch, everything else on the device.

A thread reads batches ahead, each into one uint8 tensor (page-locked for a GPU, so that nothing waits for its copy). One byte
a pixel goes to the device. Augmentation, scaling and the expansion to three channels happen there, for a whole batch at once.
"""

import gc
import itertools
import math
import numbers
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partialmethod
from pathlib import Path

import numpy as np
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import MultiCategory, Transform
from fastai.learner import replacing_yield
from fastai.torch_core import TensorImage, TensorMultiCategory
from fastai.vision.core import imagenet_stats
from fastcore.basics import detuplify
from PIL import Image
from torch import Tensor

from charmlib.data.augment import Augment
from charmlib.data.dataset import ChestData
from charmlib.data.images import read_grey
from charmlib.data.sampling import draw, expected_draws
from charmlib.nih import NO_FINDING, PARTS

READ_AHEAD = 2  # batches that are read while the network computes


class ChestImages:
    """A part of a data set as (image uint8 (1, S, S), labels float32 (C,)) pairs, with the row of each.

    ``images`` is an ImageCache or an array (n, S, S) uint8, ``labels`` (n, C) float32. ``rows`` (m,) of the two belong to this
    part; the bank stores them as image ids. ``train`` says whether training transforms apply. Images from elsewhere are not
    ``known``; their rows are reported as -1. ``note`` is the title of every figure of these images.
    """

    def __init__(self, images, labels, rows, classes: Sequence[str], *, train: bool = False, known: bool = True,
                 note: str = ""):
        self.images, self.labels, self.rows, self.classes = images, labels, np.asarray(rows), tuple(classes)
        self.known, self.note = known, note
        self.split_idx = 0 if train else 1  # fastai's name for training (0) and validation (1) transforms
        self.held: tuple[Tensor, Tensor, Tensor] | None = None  # images, labels and rows on the device

    def __len__(self) -> int:
        return len(self.rows)

    items = property(lambda self: self.rows.tolist(), doc="Row numbers of the data set, which ``test_dl`` takes.")

    set_split_idx = partialmethod(contextmanager(replacing_yield), "split_idx")  # for fastai's tta

    def decode(self, sample: tuple, full: bool = True) -> tuple[TensorImage, MultiCategory]:
        """An image and its labels (C,) -> the image and the names of its positive classes, for fastai's ``predict``."""
        return sample[0], MultiCategory(name for name, value in zip(self.classes, sample[1]) if value == 1)

    def read(self, index: Sequence[int], *, pin: bool = False) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Images (B, 1, S, S) uint8, labels (B, C) float32 and rows (B,) int64, page-locked if ``pin``.

        Of a preloaded part the first two are None and the third counts within the part.
        """
        index = np.asarray(index, dtype=np.int64)
        if self.held is not None:
            return None, None, _pinned(index, pin)
        rows = self.rows[index]
        images = torch.empty((len(rows), 1, *self.images.shape[1:]), dtype=torch.uint8, pin_memory=pin)
        self.images.take(rows, axis=0, out=images.numpy()[:, 0])
        return images, _pinned(self.labels[rows], pin), _pinned(rows, pin)

    def pixels(self, rows) -> Tensor:
        """Images (n, 1, S, S) uint8 of any rows of the data set, also outside this part."""
        return torch.from_numpy(self.images.take(np.asarray(rows), axis=0))[:, None]

    def send(self, images, labels, rows, device) -> tuple[tuple[TensorImage, TensorMultiCategory], Tensor]:
        """The result of :meth:`read` on the device, as a batch and its rows; never waits for a GPU."""
        rows = rows.to(device, non_blocking=True)
        if self.held is not None:
            images, labels, rows = (held[rows] for held in self.held)
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (images, labels))
        return (TensorImage(images), TensorMultiCategory(labels)), rows if self.known else torch.full_like(rows, -1)

    def preload(self, device) -> None:
        """Hold the whole part as uint8 on a device; batches are then gathered there.

        Raises MemoryError if the GPU has too little free memory; names the gigabytes needed and free.
        """
        device, size = torch.device(device), self.images.shape[1:]
        if device.type == "cuda":
            gc.collect()  # a Learner is a reference cycle, and an earlier one may hold another stage's images
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # in torch's own cache
            needed, free = len(self) * math.prod(size), torch.cuda.mem_get_info(device)[0] + unused
            if needed > 0.6 * free:
                raise MemoryError(f"preload: {len(self):,} images of {size[0]} pixels are {needed / 1e9:.1f} GB, the GPU has "
                                  f"{free / 1e9:.1f} GB free, and training needs its part of it: say preload=False")
        images = torch.empty((len(self), 1, *size), dtype=torch.uint8, device=device)
        for start in range(0, len(self), 1024):
            part = images[start:start + 1024]
            part.copy_(self.pixels(self.rows[start:start + len(part)]))
        self.held = images, *(torch.from_numpy(a).to(device) for a in (self.labels[self.rows], self.rows.astype(np.int64)))

    def __getitem__(self, i: int):
        (x, y), _ = self.send(*self.read([i]), "cpu" if self.held is None else self.held[0].device)
        return x[0], y[0]


def _pinned(array: np.ndarray, pin: bool) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if pin else tensor


class ChestDL(TfmdDL):
    """A fastai loader that reads whole batches.

    ``ids`` are the rows of the last batch, (B,) int64 on the device; -1 for images from outside the data set. Shuffling draws
    from torch's generator, so that one seed fixes order and augmentation together. ``expected`` are the mean draws of each
    image in a shuffled epoch (:func:`charmlib.data.sampling.expected_draws`); None takes each once. ``share`` (i, N) gives
    every N-th batch from the i-th on.
    """

    def __init__(self, dataset: ChestImages, bs: int = 64, shuffle: bool = False, num_workers: int = 0,
                 expected: np.ndarray | None = None, **kwargs):
        # no worker processes: reading is one copy from memory, which a thread does ahead
        super().__init__(dataset, bs=bs, shuffle=shuffle, num_workers=0, **{**kwargs, "pin_memory": False})
        self._n_inp, self._types, self.ids = 1, {tuple: [TensorImage, TensorMultiCategory]}, None
        self.expected, self.share = expected, (0, 1)

    def shuffle_fn(self, idxs):
        if self.expected is not None:
            return draw(self.expected, lambda n: torch.rand(n, dtype=torch.float64).numpy()).tolist()
        return [idxs[i] for i in torch.randperm(len(idxs)).tolist()]

    def create_batches(self, samps):
        device = torch.device("cpu" if self.device is None else self.device)
        ahead = deque()
        with ThreadPoolExecutor(1) as reader:
            for chunk in itertools.islice(self.chunkify(iter(samps)), self.share[0], None, self.share[1]):
                ahead.append(reader.submit(self.dataset.read, chunk, pin=device.type == "cuda"))
                if len(ahead) > READ_AHEAD:
                    yield self._next(ahead, device)
            while ahead:
                yield self._next(ahead, device)

    def _next(self, ahead, device):
        batch, self.ids = self.dataset.send(*ahead.popleft().result(), device)
        return batch

    def show_batch(self, b=None, max_n: int = 9, ctxs=None, show: bool = True, **kwargs):
        """Draw images with their findings; returns the figure, or with ``show=False`` what fastai's does."""
        if not show:
            return super().show_batch(b, max_n=max_n, show=False)
        x, y = self.decode(self.one_batch() if b is None else b)[:2]
        return self._drawn(x, ["\n".join(self._names(row)) for row in y], max_n, ctxs)

    def show_results(self, b, out, max_n: int = 9, ctxs=None, show: bool = True, **kwargs):
        """Draw images with their findings, and below them the findings predicted at probability 0.5."""
        if not show:
            return super().show_results(b, out, max_n=max_n, show=False)
        x, y = self.decode(b)[:2]
        pairs = zip(y, detuplify(out))
        titles = ["\n".join(self._names(truth)) + "\n-> " + ", ".join(self._names(call)) for truth, call in pairs]
        return self._drawn(x, titles, max_n, ctxs)

    def _pre_show_batch(self, b, max_n: int = 9):
        from fastai.vision import learner  # noqa: F401  (registers plot_top_losses, and takes a second that training does without)

        return super()._pre_show_batch(b, max_n)

    def _drawn(self, x, titles, max_n, axes):
        from charmlib.data.show import show_images

        return show_images(x[:max_n].numpy(), titles[:max_n], axes=axes, note=self.dataset.note)

    def _names(self, row) -> list[str]:
        return list(self.dataset.decode((None, row))[1]) or [NO_FINDING if (row == row).any() else "labels unknown"]


class GreyToNetwork(Transform):
    """Grey (B, 1, S, S), uint8 or float, of 0 to 255 on the device -> float32 (B, 3, S, S), normalised as the weights expect.

    The result is laid out channels last in memory, which is how convolutions are fastest (:mod:`charmlib.training.device`).
    """

    order = 10

    def __init__(self, mean: Sequence[float], std: Sequence[float], **kwargs):
        super().__init__(**kwargs)
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in (mean, std))

    def to(self, device):
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def encodes(self, x: TensorImage):
        return TensorImage(grey_to_network(x.as_subclass(Tensor), self.mean.to(x.device), self.std.to(x.device)))

    def decodes(self, x: TensorImage):
        """Back to one grey channel in [0, 1]."""
        return TensorImage((x.as_subclass(Tensor) * self.std.to(x.device) + self.mean.to(x.device)).mean(1, keepdim=True))


def grey_to_network(grey: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(B, 1, H, W) of 0 to 255 -> float32 (B, 3, H, W) = (grey / 255 - mean) / std, channels last; mean, std (1, 3, 1, 1)."""
    scale, shift = 1 / (255 * std), -mean / std
    pixels = grey.permute(0, 2, 3, 1)  # (B, H, W, 1), which one pass expands to (B, H, W, 3)
    pixels = pixels if pixels.is_floating_point() else pixels.float()
    return torch.addcmul(shift.flatten(), pixels, scale.flatten()).permute(0, 3, 1, 2)


class ChestDataLoaders(DataLoaders):
    """Training, validation and, if asked for, test loaders of one data set."""

    normal_class = ""  # the class that means "no finding"

    vocab = property(lambda self: self.train.dataset.classes)
    c = property(lambda self: len(self.vocab))
    test = property(lambda self: self.loaders[2])

    def test_dl(self, items: Sequence, bs: int | None = None, **kwargs) -> ChestDL:
        """A loader over new images in their order, with unknown (NaN) labels, or over row numbers of the data set.

        A new image is a file, its bytes, a PIL image, or a uint8 array (H, W) or (H, W, channels), of any grey or colour mode;
        it is read as the images of the data set were.
        """
        data, rows = self.train.dataset, [item for item in items if isinstance(item, numbers.Integral)]
        if rows and len(rows) == len(items):
            part = ChestImages(data.images, data.labels, rows, self.vocab, note=data.note)
        else:
            rules = getattr(data.images, "manifest", {})
            rules = {name: rules[name] for name in ("aspect", "contrast", "scale") if name in rules}
            images = [read_grey(Image.fromarray(np.asarray(item)) if isinstance(item, np.ndarray | Tensor) else item,
                                data.images.shape[1], **rules) for item in items]
            labels = np.full((len(items), self.c), np.nan, np.float32)
            part = ChestImages(np.stack(images), labels, np.arange(len(items)), self.vocab, known=False)
        return self.valid.new(part, bs=bs or self.valid.bs)

    def new_empty(self):
        """Refuses fastai's ``learn.export``, which asks for this."""
        raise NotImplementedError("export would write a pickle, which runs code when it is loaded. Run.train() writes "
                                  "model.safetensors and model.json, which Run.load(folder) and `python -m charmlib predict` "
                                  "read; learn.save(name) and learn.load(name) keep the weights of any Learner")


def chest_dataloaders(data: ChestData, *, bs: int = 64, findings_only: bool = False,
                      mean: Sequence[float] = imagenet_stats[0], std: Sequence[float] = imagenet_stats[1],
                      augment: str = "light", degrees: float = 10.0, flip: float = 0.5, sampler: str = "natural",
                      repeat_threshold: float = 0.01, preload: bool = False, device=None,
                      path: str | Path = ".") -> ChestDataLoaders:
    """fastai DataLoaders ``[train, valid, test]`` over a :class:`ChestData`.

    The last, smaller batch of a training epoch is dropped (batch norm), unless it is the only one. With ``findings_only``
    (stage 1), training and validation take only images with a finding. The test part is always complete. The validation loader
    of a split without a validation part gives no batch. ``mean`` and ``std`` (3,) are the normalisation that the network
    expects for RGB in [0, 1]. ``augment``, ``degrees`` and ``flip`` augment the training part, and any part in fastai's ``tta``
    (:class:`charmlib.data.augment.Augment`). ``sampler`` 'class_aware' or 'repeat' draws the training images unevenly
    (:mod:`charmlib.data.sampling`, ``repeat_threshold`` is its ``threshold``). ``preload`` holds the training images as uint8
    on the device (50 KB an image at 224 pixels); see :meth:`ChestImages.preload`.

    Raises ValueError for a part without images or fewer than two training images.
    """
    device = torch.device("cpu" if device is None else device)
    loaders = []
    for part in PARTS:
        train = part == "train"
        rows = data.rows(part, findings_only=findings_only and part != "test")
        if len(rows) < (2 if train else 1) and (part != "valid" or data.split.has_valid):
            raise ValueError(f"the {part} part has {len(rows)} images" + (
                " with a finding: set stage1_images: all, or train on more data" if findings_only else ""))
        dataset = ChestImages(data.images, data.labels, rows, data.classes, train=train,
                              note=data.source if data.index.drawn else "")
        if train and preload:
            dataset.preload(device)
        expected = expected_draws(data.labels[rows], sampler, threshold=repeat_threshold, names=data.classes) if train else None
        change = [Augment(augment, degrees, flip)] if degrees or flip or augment != "light" else []
        loaders.append(ChestDL(dataset, bs=min(bs, len(rows)) or bs, shuffle=train, drop_last=train, device=device,
                               expected=expected, after_batch=[GreyToNetwork(mean, std), *change]))
    dls = ChestDataLoaders(*loaders, path=path, device=device)
    dls.normal_class = data.index.normal_class
    return dls
