"""What the second path of a network sees of images, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from charmlib.data.loaders import grey_to_network
from charmlib.nih import NO_FINDING
from charmlib.training.views import tensors


@dataclass(frozen=True)
class Look:
    """An image: what each path saw of it, (S, S) uint8; ``heat`` (h, w) or None; ``box``, top, left, bottom and right of the
    crop as shares of the view. ``labels`` are its findings, ``top`` the likeliest class of each branch and its probability.
    """

    image: str
    labels: tuple[str, ...]
    view: np.ndarray = field(repr=False)
    heat: np.ndarray | None = field(repr=False)
    box: tuple[float, ...]
    crop: np.ndarray = field(repr=False)
    top: dict[str, tuple[str, float]]


def as_grey(x: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> np.ndarray:
    """Normalised images (n, 3, H, W) as pictures (n, H, W) uint8."""
    return ((x.float() * std + mean).mean(1) * 255).round().clamp(0, 255).byte().cpu().numpy()


@torch.no_grad()
def looks(run, images: Sequence[str]) -> list[Look]:
    """What a run's network sees of images, given by their file names, in one batch; ValueError for a network of one path, or
    an image that the data do not have."""
    frame, data, net = run.data.index.frame, run.data, run.net.eval()
    row_of = dict(zip(frame["id"], range(len(frame))))
    if not hasattr(net, "local_path"):
        raise ValueError(f"{run.folder} has one path; system two_path has two")
    if missing := [image for image in images if image not in row_of]:
        raise ValueError(f"no image {missing[0]!r} in {data.index.root}: give file names as its table has them")
    rows = np.array([row_of[image] for image in images])
    mean, std = tensors(net, run.device)
    with torch.autocast("cuda", torch.float16, enabled=run.precision == "fp16"):
        seen = net.read(grey_to_network(torch.from_numpy(data.images.take(rows)).to(run.device)[:, None], mean, std))[1]
    grey = {name: as_grey(seen[name], mean, std) for name in ("view", "crop")}
    seen |= {name: torch.sigmoid(seen[name].float()) for name in ("global", "local", "fusion")}
    seen = {name: values.cpu().numpy() for name, values in seen.items()} | grey
    best = {name: [data.classes[c] for c in seen[name].argmax(1)] for name in ("global", "local", "fusion")}
    return [Look(image, tuple(c for c, y in zip(data.classes, data.labels[row]) if y == 1) or (NO_FINDING,), seen["view"][i],
                 seen["heat"][i] if "heat" in seen else None, tuple(seen["box"][i].tolist()), seen["crop"][i],
                 {name: (classes[i], float(seen[name][i].max())) for name, classes in best.items()})
            for i, (image, row) in enumerate(zip(images, rows))]
