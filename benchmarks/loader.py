"""Batches from the image cache beside fastai's DataLoader, which decodes every file in every epoch; and the cache's build.

    python -m benchmarks.loader ../shared/nih_full

The full-size files of the folder are repeated to 2,000. Three things are measured in turn, in one process: an epoch of
fastai's ``ImageBlock`` + ``Resize(224)`` with two persistent workers, not its first; the cache's build with two threads; epochs
of the cached loader as uint8 batches, and as float batches ready for the network (mirrored, turned, normalised, three
channels). Files and cache are in the system's page cache for all.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fastai.vision.core import imagenet_stats
from PIL import Image

from benchmarks.measure import median_ratio, save
from charmlib.data.augment import Augment
from charmlib.data.cache import open_images
from charmlib.data.images import open_grey
from charmlib.data.loaders import ChestDL, ChestImages, GreyToNetwork
from charmlib.training.device import pick_device
from charmlib.training.run import peak_memory_mb


def repeated(folder: Path, target: Path, count: int) -> tuple[list[str], list[str]]:
    """``count`` links to the files of a folder, in turn; their names and paths."""
    files = sorted(folder.rglob("*.png"))
    target.mkdir()
    for i in range(count):
        (target / f"{i:05}.png").symlink_to(files[i % len(files)].resolve())
    paths = sorted(target.iterdir())
    return [p.name for p in paths], [str(p) for p in paths]


def fastai_loader(paths: list[str], size: int, batch: int):
    """What a fastai user writes."""
    from fastai.data.block import DataBlock, MultiCategoryBlock
    from fastai.vision.augment import Resize
    from fastai.vision.data import ImageBlock

    block = DataBlock(blocks=(ImageBlock, MultiCategoryBlock(vocab=["a", "b"])), get_y=lambda path: ["a"],
                      item_tfms=Resize(size), splitter=lambda items: (list(range(len(items))), [0]))
    return block.dataloaders([Path(p) for p in paths], bs=batch, num_workers=2, persistent_workers=True, device="cpu").train


def epoch(loader, device) -> float:
    """Images a second of one pass."""
    start, seen = time.perf_counter(), 0
    for batch in loader:
        seen += len(batch[0])
    if device.type == "cuda":
        torch.cuda.synchronize()
    return seen / (time.perf_counter() - start)


def worst_difference(ids, paths, cache, size: int) -> int:
    """Grey levels between cached pixels and Pillow's own conversion and resize."""
    worst = 0
    for i in range(min(len(ids), 34)):
        with Image.open(paths[i]) as image:
            want = np.asarray(image.convert("L").resize((size, size), Image.Resampling.BILINEAR))
        worst = max(worst, int(np.abs(cache[i].astype(int) - want).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        ids, paths = repeated(args.folder, work / "images", args.images)
        for path in paths[:64]:
            open_grey(path)
        theirs = fastai_loader(paths, args.size, args.batch)
        rates: dict[str, list[float]] = {"fastai": [], "build": [], "uint8": [], "float": []}
        for turn in range(args.rounds + 1):  # the first, which starts fastai's workers, does not count
            rates["fastai"].append(epoch(theirs, device))
            home = work / f"cache{turn}"
            start = time.perf_counter()
            cache = open_images(ids, paths, args.size, cache_dir=home, workers=2)
            rates["build"].append(len(ids) / (time.perf_counter() - start))
            data = ChestImages(cache, np.zeros((len(ids), 14), np.float32), np.arange(len(ids)), [str(c) for c in range(14)],
                               train=True)
            turned = [Augment(), GreyToNetwork(*imagenet_stats)]
            for name, transforms in (("uint8", []), ("float", turned)):
                loader = ChestDL(data, bs=args.batch, shuffle=True, drop_last=True, after_batch=transforms, device=device)
                epoch(loader, device)
                rates[name].append(epoch(loader, device))
            difference = worst_difference(ids, paths, cache, args.size)
            print(f"round {turn}: " + ", ".join(f"{k} {v[-1]:,.0f}/s" for k, v in rates.items()), flush=True)
            shutil.rmtree(home)
        rates = {k: v[1:] for k, v in rates.items()}
        figures = {
            "images": args.images, "image_size": args.size, "batch": args.batch,
            "source": f"{len(list(args.folder.rglob('*.png')))} files of {args.folder.name}, repeated",
            "images_per_second": {k: round(statistics.median(v), 1) for k, v in rates.items()},
            "times_fastai": {k: round(median_ratio(v, rates["fastai"]), 2) for k, v in rates.items() if k != "fastai"},
            "asked": {"uint8": 40, "float": 10, "build": 2.2},
            "worst_grey_level_difference_from_pillow": difference,
            "cache_bytes_per_image": args.size**2,
            "peak_memory_mb": round(peak_memory_mb()),
        }
        path = save("loader", device, "uint8", figures)
    print(f"times fastai: {figures['times_fastai']} (asked {figures['asked']}), pixels within {difference} of Pillow's; {path}")


if __name__ == "__main__":
    main()
