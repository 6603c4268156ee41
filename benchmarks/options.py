"""What each option of training costs: a step of fastai's Learner with it, as a multiple of the plain step.

    python -m benchmarks.options            # about six minutes on two idle cores

Heads, losses, samplers, augmentation, optimizers, clipping and the mean of the weights, one at a time, on MobileNetV2;
stochastic depth and its plain network on ConvNeXtV2. Options take turns; each turn is an epoch of a few steps without
validation. Images are noise: the time does not depend on them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from fastai.vision.core import imagenet_stats
from PIL import Image

from benchmarks.costs import write_table
from benchmarks.measure import interleaved, median_ratio, save
from charmlib.data.augment import Augment
from charmlib.data.cache import open_images
from charmlib.data.loaders import ChestDataLoaders, ChestDL, ChestImages, GreyToNetwork
from charmlib.data.sampling import expected_draws
from charmlib.training.device import pick_device, pick_precision
from charmlib.training.learner import charm_learner

SIZE, STEPS = 224, 4
PLAIN = {"use_bank": False, "use_attention": False, "use_momentum": False, "head": "standard"}
MOBILENET = {
    "plain": {}, "head charm": {"head": "charm"}, "head csra": {"head": "csra"},
    "head csra, 4 heads": {"head": "csra", "csra_heads": 4},
    "focal": {"loss": "focal"}, "asl": {"loss": "asl"}, "ldam": {"loss": "ldam", "ldam_scale": 30.0}, "db": {"loss": "db"},
    "class_weight effective": {"class_weight": "effective"}, "sampler class_aware": {"sampler": "class_aware"},
    "sampler repeat": {"sampler": "repeat"}, "augment standard": {"augment": "standard"},
    "augment strong": {"augment": "strong"},
    "sgd": {"optimizer": "sgd"}, "clip_norm": {"clip_norm": 1.0}, "average": {"average": 0.999}}
CONVNEXT = {"plain": {}, "drop_path": {"drop_path": 0.2}}
GROUPS = {"mobilenet_v2": MOBILENET, "timm:convnextv2_atto": CONVNEXT}


def learner(arch: str, option: dict, images: list[Path], cache: Path, batch: int, device: torch.device, precision: str):
    """A Learner with the option over images of noise."""
    rng = np.random.default_rng(0)
    option = {**PLAIN, **option}
    augment, sampler = option.pop("augment", "light"), option.pop("sampler", "natural")
    cached = open_images([p.name for p in images], [str(p) for p in images], SIZE, cache_dir=cache)
    labels = (rng.random((len(images), 14)) < 0.2).astype(np.float32)
    labels[0], labels[1] = 1, 0  # each class has both sides
    part = ChestImages(cached, labels, np.arange(len(images)), [str(c) for c in range(14)], train=True)
    none = ChestImages(cached, labels, np.arange(0), part.classes)
    scale = GreyToNetwork(*imagenet_stats)
    loaders = [ChestDL(part, bs=batch, shuffle=True, drop_last=True, device=device, expected=expected_draws(labels, sampler),
                       after_batch=[scale, Augment(augment)]),
               ChestDL(none, bs=batch, device=device, after_batch=[scale])]
    torch.manual_seed(0)
    return charm_learner(ChestDataLoaders(*loaders, device=device), arch, weights="none", norm="imagenet", precision=precision,
                         **option)


def epoch(learn) -> None:
    """Train for one epoch, in silence."""
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-4)
    if learn.dls.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each option that are timed")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    batch, rows = 32 if device.type == "cuda" else 4, []
    with tempfile.TemporaryDirectory() as scratch:
        rng, images = np.random.default_rng(0), []
        for i in range(batch * STEPS):
            images.append(Path(scratch, f"{i:04}.png"))
            Image.fromarray(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(images[-1])
        for arch, options in GROUPS.items():
            learners = {name: learner(arch, option, images, Path(scratch, "cache"), batch, device, precision)
                        for name, option in options.items()}
            seconds = interleaved({name: partial(epoch, learn) for name, learn in learners.items()}, args.rounds)
            rows += [{"arch": arch, "option": name, "batch": batch,
                      "milliseconds": round(statistics.median(v) * 1e3 / STEPS, 1),
                      "times_plain": round(median_ratio(v, seconds["plain"]), 3)} for name, v in seconds.items()]
            print(pd.DataFrame(rows).to_string(index=False), flush=True)
    path = save("options", device, precision, {"image_size": SIZE, "steps": STEPS, "rounds": args.rounds, "rows": rows})
    print(path, write_table(rows, path))


if __name__ == "__main__":
    main()
