"""What votes cost: one image with them beside the plain network, and 16,384 slots until they can vote beside another commit.

    python -m benchmarks.votes      # two minutes on two cores

One image: MobileNetV2 at 224 pixels, CHARM's default with so many slots, and plain; turns of one process, median ratios.
Slots: what :meth:`VotingBank.calibrate` takes here, and ``solve`` in b5f82ba, whose votes were a kernel ridge regression. Each
has a process of its own on drawn keys, for its CPU seconds and for the memory that it needs beyond the bank. The votes of
both cannot be compared, because the reading is another. The result is ``results/votes_*.json``.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import interleaved, median_ratio, save
from charmlib.models import CharmNet
from charmlib.training.device import pick_device, pick_precision, place

ROOT, SLOTS, CLASSES, BEFORE = Path(__file__).parents[1], 16384, 14, "b5f82ba"


def drawn(features: int, images: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids (n,), keys (n, K) and labels (n, C), half of whose rows have no finding."""
    draw = torch.Generator().manual_seed(0)
    labels = (torch.rand(images, CLASSES, generator=draw) < 0.1).float()
    labels[::2] = 0
    return torch.arange(images), torch.randn(images, features, generator=draw), labels


def fill(bank: torch.nn.Module, images: int) -> None:
    """Let a voting bank of this commit choose its slots among so many drawn images."""
    ids, keys, labels = drawn(bank.slots.shape[1], images)
    bank.choose(ids, labels)
    held = bank.slot_ids[:int(bank.filled)]
    bank.renew(torch.arange(len(held), device=held.device), keys[held.cpu()].to(held.device))


def ready(features: int) -> None:
    """In a process of its own, of either commit: print CPU seconds and bytes until a filled bank can vote."""
    from charmlib.nn import VotingBank

    bank = VotingBank(features, CLASSES, size=SLOTS)
    if hasattr(bank, "calibrate"):
        bank.threshold = 1.0
        fill(bank, 3 * SLOTS)
        make = bank.calibrate
    else:
        ids, keys, labels = drawn(features, SLOTS)
        for store, new in ((bank.slots, keys), (bank.slot_ids, ids), (bank.slot_labels, labels), (bank.filled, SLOTS)):
            store.copy_(torch.as_tensor(new))
        make = bank.solve
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    before, start = megabytes("VmRSS"), time.process_time()
    make()
    print(json.dumps({"filled": int(bank.filled), "cpu_seconds": round(time.process_time() - start, 2),
                      "megabytes": megabytes("VmHWM") - before}))


def megabytes(line: str) -> int:
    """A figure of this process from the kernel."""
    return int(re.search(rf"{line}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ready", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.ready:
        return ready(given.ready)
    device = pick_device(given.device)
    plain = CharmNet("mobilenet_v2", weights="none", norm="half", use_momentum=False, use_attention=False, use_bank=False)
    nets = {"plain": plain} | {slots: CharmNet("mobilenet_v2", weights="none", norm="half", bank_size=slots, threshold=1.0)
                               for slots in (4096, SLOTS)}
    for slots, net in nets.items():
        place(net.eval(), device)
        if slots != "plain":
            fill(net.bank, 3 * slots)
            net.bank.calibrate()
    image = torch.randn(1, 3, 224, 224, device=device).to(memory_format=torch.channels_last)

    def score(net):
        with torch.inference_mode():
            net(image).cpu()

    seconds = interleaved({name: lambda net=net: score(net) for name, net in nets.items()}, 100, warm=5)
    image_rows = [{"slots": slots, "milliseconds": round(1e3 * statistics.median(seconds[slots]), 1), "times_plain": round(
        median_ratio(seconds[slots], seconds["plain"]), 3)} for slots in nets]
    features, made = nets[SLOTS].bank.slots.shape[1], {}
    with tempfile.TemporaryDirectory() as place_:
        archive = subprocess.run(["git", "archive", BEFORE], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x"], cwd=place_, input=archive, check=True)
        for name, code in ((BEFORE, place_), ("now", ROOT)):
            done = subprocess.run([sys.executable, "-W", "ignore", __file__, "--ready", str(features)], cwd=code, check=True,
                                  capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{code}:{ROOT}"})
            made[name] = json.loads(done.stdout.splitlines()[-1])
    print(*image_rows, made, sep="\n")
    save("votes", device, pick_precision("auto", device), {
        "one_image": {"asked": 1.3, "arch": "mobilenet_v2", "image_size": 224, "rows": image_rows},
        "ready": {"asked": 0.5, "slots": SLOTS, "features": features, **made, "share_of_seconds": round(
            made["now"]["cpu_seconds"] / made[BEFORE]["cpu_seconds"], 3), "share_of_memory": round(
            made["now"]["megabytes"] / made[BEFORE]["megabytes"], 3)}})


if __name__ == "__main__":
    main()
