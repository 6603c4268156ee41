"""What a training step of fastai's Learner with CHARM costs beside a plain PyTorch loop, and each component's share.

    python -m benchmarks.step ../shared/nih_full

The plain loop is the same backbone and head with the same batch, memory layout and fused AdamW, on a batch that is ready. The
Learner's step is all that its own loop does from one batch to the next: reading, sending, turning and scaling the images, its
callbacks and records, the optimizer and the momentum branch. All cases take turns inside the Learner's loop; times are medians.
The last table gives the bank's read and write by themselves.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.vision.core import imagenet_stats

from benchmarks.loops import PARTS, BareLoop, network
from benchmarks.measure import save
from charmlib.data.augment import Augment
from charmlib.data.cache import open_images
from charmlib.data.loaders import ChestDataLoaders, ChestDL, ChestImages, GreyToNetwork
from charmlib.nn import MultiScaleAttention, RareMemoryBank
from charmlib.training.device import pick_device, pick_precision
from charmlib.training.learner import charm_learner
from charmlib.training.run import peak_memory_mb

SETTINGS = (("efficientnet_v2_s", 224, 16, 12), ("resnet50", 224, 16, 8), ("mobilenet_v2", 64, 64, 30))


def timed(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class TakeTurns(Callback):
    """After each of the Learner's batches, a step of every other case; the Learner's own time is what lies between."""

    order = 1000

    def __init__(self, others: dict, rounds: int, device: torch.device):
        self.others, self.rounds, self.device = others, rounds, device
        self.seconds = {name: [] for name in ("learner", *others)}
        self.mark = None

    def after_batch(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.mark is not None:
            self.seconds["learner"].append(now - self.mark)
        for name, run in self.others.items():
            self.seconds[name].append(timed(run, self.device))
        if len(self.seconds["learner"]) == self.rounds + 1:
            raise CancelFitException
        self.mark = time.perf_counter()


def loaders(folder: Path, work: Path, size: int, batch: int, steps: int, device: torch.device) -> ChestDataLoaders:
    """The cached loader over enough links to the folder's files."""
    files, links = sorted(folder.rglob("*.png")), work / f"images{size}"
    links.mkdir(exist_ok=True)
    count = batch * (steps + 2)
    for i in range(count):
        if not (links / f"{i:05}.png").is_symlink():
            (links / f"{i:05}.png").symlink_to(files[i % len(files)].resolve())
    paths = sorted(links.iterdir())[:count]
    ids = [p.name for p in paths]
    cache = open_images(ids, [str(p) for p in paths], size, cache_dir=work / "cache")
    labels = (np.random.default_rng(0).random((count, 14)) < 0.1).astype(np.float32)
    part = ChestImages(cache, labels, np.arange(count), [str(c) for c in range(14)], train=True)
    scale = GreyToNetwork(*imagenet_stats)
    train = ChestDL(part, bs=batch, shuffle=True, drop_last=True, after_batch=[Augment(), scale], device=device)
    few = ChestImages(cache, labels, np.arange(batch), part.classes)
    valid = ChestDL(few, bs=batch, after_batch=[scale], device=device)
    return ChestDataLoaders(train, valid, device=device)


def step_times(arch: str, size: int, batch: int, rounds: int, folder: Path, device: torch.device, precision: str) -> dict:
    last, plain = torch.channels_last, torch.contiguous_format

    def bare(layout=last, **parts):
        return BareLoop(network(arch, **parts), size, batch, device, precision, layout)

    others = {"plain": bare(), "momentum": bare(on=PARTS[:1]), "attention": bare(on=PARTS[1:2]),
              "attention_layered": bare(on=PARTS[1:2], layered=True), "bank": bare(on=PARTS[2:]), "charm": bare(on=PARTS),
              "plain_contiguous": bare(plain), "charm_contiguous_layered": bare(plain, on=PARTS, layered=True)}
    with tempfile.TemporaryDirectory() as scratch:
        dls = loaders(folder, Path(scratch), size, batch, rounds + 3, device)
        turns = TakeTurns(others, rounds, device)
        learn = charm_learner(dls, net=network(arch, on=PARTS), precision=precision, cbs=[turns], path=scratch)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-4)
    seconds = {name: values[-rounds:] for name, values in turns.seconds.items()}  # those before are warm-up
    base = seconds["plain"]
    ratios = {name: [a / b for a, b in zip(values, base)] for name, values in seconds.items()}
    features, step = network(arch).features, statistics.median(base)
    return {"image_size": size, "batch": batch, "rounds": rounds,
            "milliseconds": {name: round(statistics.median(v) * 1e3, 2) for name, v in seconds.items()},
            "times_plain": {name: round(statistics.median(v), 4) for name, v in ratios.items()},
            "times_plain_quartiles": {name: [round(q, 4) for q in statistics.quantiles(v)[::2]] for name, v in ratios.items()},
            "bank": bank_times(features, batch, device, step),
            "attention_by_itself": attention_times(features, size // 32, batch, device, step)}


def bank_times(features: int, batch: int, device: torch.device, step: float) -> dict:
    """The bank's read, write and backward by themselves, full, at two sizes."""
    found = {}
    for size in (512, 16384):
        torch.manual_seed(0)
        bank = RareMemoryBank(features, 14, size=size, threshold=0.02).to(device).train()
        bank.slots.normal_()
        bank.filled.fill_(size)
        z, ids, labels = torch.randn(batch, features, device=device, requires_grad=True), torch.arange(batch), None
        ids, labels = ids.to(device), torch.zeros(batch, 14, device=device)

        def use(bank=bank, z=z, ids=ids, labels=labels):
            bank.expect(ids, labels)
            bank(z).sum().backward()

        for _ in range(5):
            timed(use, device)
        seconds = statistics.median(timed(use, device) for _ in range(50))
        found[str(size)] = {"milliseconds": round(seconds * 1e3, 3), "share_of_plain_step": round(seconds / step, 5)}
    return found


def attention_times(features: int, side: int, batch: int, device: torch.device, step: float) -> dict:
    """The attention's forward and backward on a map of its own, and AdamW on its weights, which any form of it has."""
    attention = MultiScaleAttention(features).to(device, memory_format=torch.channels_last)
    x = torch.randn(batch, features, side, side, device=device).to(memory_format=torch.channels_last).requires_grad_()
    optimizer = torch.optim.AdamW(attention.parameters(), lr=1e-4, fused=True)

    def use():
        attention(x).square().sum().backward()

    found = {"weights": sum(p.numel() for p in attention.parameters())}
    for name, run in (("forward_backward", use), ("adamw", optimizer.step)):
        for _ in range(3):
            timed(run, device)
        seconds = statistics.median(timed(run, device) for _ in range(20))
        found[name] = {"milliseconds": round(seconds * 1e3, 3), "share_of_plain_step": round(seconds / step, 4)}
    return found


def one_memory(arch: str, size: int, batch: int, case: str, layout: str, device: torch.device, precision: str) -> None:
    """Three bare steps of one case; prints the peak memory in MB."""
    step = BareLoop(network(arch, on=PARTS if case == "charm" else ()), size, batch, device, precision,
                    torch.channels_last if layout == "channels_last" else torch.contiguous_format)
    for _ in range(3):
        step()
    print(round(peak_memory_mb()))


def memory(arch: str, size: int, batch: int, device: torch.device, precision: str) -> dict:
    """Peak memory of processes of their own."""
    found = {}
    for case in ("plain", "charm"):
        for layout in ("channels_last", "contiguous"):
            command = [sys.executable, "-m", "benchmarks.step", "--memory", arch, str(size), str(batch), case, layout,
                       device.type, precision]
            found[f"{case}_{layout}"] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        arch, size, batch, case, layout, device, precision = sys.argv[2:]
        one_memory(arch, int(size), int(batch), case, layout, torch.device(device), precision)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", help="one backbone")
    args = parser.parse_args()
    device = pick_device(args.device)
    precision = pick_precision("auto", device)
    figures = {}
    for arch, size, batch, rounds in SETTINGS:
        if args.only in (None, arch):
            figures[arch] = step_times(arch, size, batch, rounds, args.folder, device, precision)
            figures[arch]["peak_memory_mb"] = memory(arch, size, batch, device, precision)
            print(arch, figures[arch], flush=True)
    if not args.only:
        print(save("step", device, precision, {"asked": {"learner": 1.05, "bank_512": 0.01, "bank_16384": 0.03}, **figures}))


if __name__ == "__main__":
    main()
