"""What the second path of a network sees of images, and why."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from charmlib.data.loaders import grey_to_network
from charmlib.nih import NO_FINDING


@dataclass(frozen=True)
class Look:
    """An image: what each path saw of it, (S, S) uint8, and why.

    ``box`` holds top, left, bottom and right of the crop as shares of the view, ``heat`` (h, w) the first path's, None without
    a heat map. ``labels`` are its findings, ``top`` the two likeliest classes of each branch with their probabilities.
    """

    image: str
    labels: tuple[str, ...]
    view: np.ndarray = field(repr=False)
    heat: np.ndarray | None = field(repr=False)
    box: tuple[float, ...]
    crop: np.ndarray = field(repr=False)
    top: dict[str, list[tuple[str, float]]]


@torch.no_grad()
def looks(run, images: Sequence[str]) -> list[Look]:
    """What a run's network sees of images, given by their file names, in one batch.

    Raises
    ------
    ValueError
        The network has no second path, or the data have no such image.
    """
    frame, data, net = run.data.index.frame, run.data, run.net.eval()
    if not hasattr(net, "local_path"):
        raise ValueError(f"{run.folder} has one path; system two_path has two")
    row_of = dict(zip(frame["id"], range(len(frame))))
    if missing := [image for image in images if image not in row_of]:
        raise ValueError(f"no image {missing[0]!r} in {data.index.root}: give file names as its table has them")
    rows = [row_of[image] for image in images]
    mean, std = (torch.tensor(v, device=run.device).view(1, -1, 1, 1) for v in (net.mean, net.std))
    grey = torch.from_numpy(data.images.take(np.asarray(rows))).to(run.device)[:, None]
    with torch.autocast("cuda", torch.float16, enabled=run.precision == "fp16"):
        seen = net.read(grey_to_network(grey, mean, std))[1]
    view, crop = (((seen[name].float() * std + mean).mean(1) * 255).round().clamp(0, 255).byte().cpu().numpy()
                  for name in ("view", "crop"))
    heat = seen["heat"].float().cpu().numpy() if "heat" in seen else [None] * len(rows)
    chances = {name: torch.sigmoid(seen[name].float()).cpu().numpy() for name in ("global", "local", "fusion")}

    def top(values: np.ndarray) -> list[tuple[str, float]]:
        return [(data.classes[c], float(values[c])) for c in np.argsort(-values)[:2]]

    return [Look(image, tuple(c for c, y in zip(data.classes, data.labels[row]) if y == 1) or (NO_FINDING,), view[i], heat[i],
                 tuple(seen["box"][i].tolist()), crop[i], {name: top(values[i]) for name, values in chances.items()})
            for i, (image, row) in enumerate(zip(images, rows))]
