"""What each part of CHARM costs: weights, operations, memory and time, for every backbone at 224 pixels.

    python -m benchmarks.costs                      # about 8 minutes on two idle cores
    python -m benchmarks.costs --only mobilenet_v2  # one backbone, printed and not kept
    python -m benchmarks.costs --presets            # a row for each phase of the presets of other systems
    python -m benchmarks.costs --no-time            # without real steps, which need idle cores

Operations and memory are followed on tensors without data (``benchmarks/tracing.py``), at batch 32 and, for memory, in half
precision with AdamW; on a GPU memory is measured instead. Times are of real steps with a small batch, all cases of a backbone
taking turns. The bank has 512 slots, k is 5. Real processes on the CPU say how far the followed memory is from what such a
process takes.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.loops import PARTS, LayeredAttention, network
from benchmarks.measure import interleaved, median_ratio, save
from benchmarks.tracing import Flops, Memory, flops_of, memory_of, step
from charmlib.models import CharmNet, create
from charmlib.nih import NIH14, NIH15
from charmlib.nn import make_attention
from charmlib.param_sources import load_params
from charmlib.params import ARCHS, resolve
from charmlib.training.device import pick_device, pick_precision, place
from charmlib.training.recipes import phases

SIZE, BATCH, PRECISION = 224, 32, "fp16"
MOMENTUM, ATTENTION, BANK = ((part,) for part in PARTS)
CASES = {"plain": {}, "bank": {"on": BANK}, "momentum": {"on": MOMENTUM},
         "attention_published": {"on": ATTENTION, "layered": True}, "attention_layers": {"on": ATTENTION},
         "attention_filter": {"on": ATTENTION, "attention": "filter"},
         "all": {"on": PARTS}, "all_filter": {"on": PARTS, "attention": "filter"}}
"""Attention as published (four convolutions one after another), as charmlib computes the same weights, and as one filter."""
CHECKPOINTED = ("efficientnet_v2_s", "efficientnet_v2_m", "efficientnet_v2_l", "resnet50", "densenet121")
AGAIN = "_checkpointed"
VALIDATED = (("mobilenet_v2", "all", 16), ("resnet50", "plain", 8), ("resnet50", "plain" + AGAIN, 8),
             ("efficientnet_v2_s", "all", 8), ("efficientnet_v2_s", "all" + AGAIN, 8))
"""Network, case and batch of real processes on the CPU."""
T4_BYTES = int(14.7 * 2**30)
PUBLISHED = {"source": "MemAug, table II", "training_gflops": 0.0032, "training_percent": 0.04, "inference_gflops": 0.0033,
             "inference_percent": 0.11}


PRESETS = ("ag_cnn", "ag_cnn_paper", "dual_path", "vgg16_lka", "vgg16_cbam", "longtail_standard", "longtail_csra")


def cases_of(arch: str) -> list[str]:
    """The cases, and plain and all of them with gradient checkpointing where that is asked for."""
    return [*CASES, *(case + AGAIN for case in ("plain", "all") if arch in CHECKPOINTED)]


def build(arch: str, case: str) -> CharmNet:
    """The network of a case."""
    net = network(arch, **CASES[case.removesuffix(AGAIN)])
    net.grad_checkpointing = case.endswith(AGAIN)
    return net


@dataclass(frozen=True)
class Traced:
    """Weights, and what was followed without computing."""

    parameters: int
    trained: int
    flops: Flops
    memory: Memory


def traced(arch: str, case: str) -> Traced:
    """All that is known of a case without running it."""
    net = on_meta(arch, case)
    numbers = [p.numel() for p in net.parameters()], [p.numel() for p in net.parameters() if p.requires_grad]
    flops = flops_of(on_meta(arch, case), batch=BATCH, size=SIZE)
    return Traced(*map(sum, numbers), flops, memory_of(net, batch=BATCH, size=SIZE, precision=PRECISION))


def on_meta(arch: str, case: str) -> CharmNet:
    """The network of a case without data."""
    with torch.device("meta"):
        return build(arch, case)


def preset_rows(name: str) -> list[dict]:
    """Weights, operations of one image and memory of a parameter file, a row for each of its phases, at its own image size and
    the phase's batch. Frozen parts have no gradients, as in training."""
    params, rows = load_params(Path(__file__).parents[1] / f"params/{name}.yaml"), []
    params = {**resolve(params), "weights": "none", "norm": "half"}
    for phase in phases(params, 1e-3):
        def made(phase=phase):
            with torch.device("meta"):
                net = create(params, NIH15 if params["classes"] == "nih15" else NIH14)
            for key, value in phase.sets.items():  # enter would read a value, and there are none
                setattr(net, key, value)
            for part, module in net.parts().items():
                module.requires_grad_(not phase.trains or part in phase.trains)
            return net

        size, net = {"batch": phase.batch, "size": params["image_size"]}, made()
        flops = flops_of(made(), **size)
        weights = [p.numel() for p in net.parameters()], [p.numel() for p in net.parameters() if p.requires_grad]
        memory = memory_of(net, precision=PRECISION, **size)
        rows.append({"preset": name, "arch": params["arch"], "phase": phase.name, **size, "parameters": sum(weights[0]),
                     "trained": sum(weights[1]), "training_gflops": round(flops.training / phase.batch / 1e9, 3),
                     "inference_gflops": round(flops.inference / phase.batch / 1e9, 3),
                     "peak_gib": round(memory.peak / 2**30, 3), "held_gib": round(memory.held / 2**30, 3)})
    return rows


def bank_flops(features: int, *, slots: int = 512, k: int = 5, training: bool) -> int:
    """Of one image, as the counter counts: similarities to all slots (2 N D), to the k chosen ones again (2 k D), their
    weighted sum (2 k D); in training the gradients of the last two, to the query and to the weights (4 k D)."""
    return 2 * slots * features + (8 if training else 4) * k * features


def row_of(arch: str, case: str, this: Traced, plain: Traced, device: torch.device) -> dict:
    """Weights, operations of one image (of a batch, divided) and memory of a case, beside the plain network."""
    peak = measured_on_gpu(arch, case, device) if device.type == "cuda" else this.memory.peak

    def giga(flops):
        return round(flops / BATCH / 1e9, 5)

    return {"arch": arch, "case": case, "parameters": this.parameters, "trained": this.trained,
            "training_gflops": giga(this.flops.training),
            "training_percent": round(100 * (this.flops.training / plain.flops.training - 1), 3),
            "training_gflops_torch": giga(this.flops.training_uncorrected),
            "inference_gflops": giga(this.flops.inference),
            "inference_percent": round(100 * (this.flops.inference / plain.flops.inference - 1), 3),
            "peak_gib": round(peak / 2**30, 3), "held_gib": round(this.memory.held / 2**30, 3)}


def measured_on_gpu(arch: str, case: str, device: torch.device) -> int:
    """Bytes that torch's allocator had in use at most in two real steps."""
    net = place(build(arch, case), device).train()
    run = real_step(net, BATCH, device, PRECISION)
    run()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device)


def real_step(net: CharmNet, batch: int, device: torch.device, precision: str = "fp32") -> Callable[[], None]:
    """A step on a batch that is ready; the bank, if there is one, is full."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    x = torch.randn(batch, 3, SIZE, SIZE, device=device).to(memory_format=layout)
    y, ids = (torch.rand(batch, 14, device=device) < 0.1).float(), torch.arange(batch, device=device)
    if net.bank is not None:
        net.bank.slots.normal_()
        net.bank.filled.fill_(net.bank.size)

    def run():
        step(net, optimizer, x, y, ids, precision)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def times(arch: str, device: torch.device, rounds: int) -> dict[str, dict]:
    """Milliseconds of a step of each case, and times the plain network's step.

    One network whose parts are taken out and put in: the cases share weights and memory. AdamW passes over what has no
    gradient.
    """
    batch = 2 if arch == "efficientnet_v2_l" and device.type == "cpu" else 4 if device.type == "cpu" else BATCH
    net = place(build(arch, "all"), device).train()
    momentum, bank, layers = net.momentum, net.bank, net.attention
    published = make_attention("layers", net.features).to(device)
    published.__class__ = LayeredAttention
    forms = {"published": published, "layers": layers, "filter": make_attention("filter", net.features).to(device)}
    net.forms = torch.nn.ModuleDict(forms)  # the optimizer's from the start
    run = real_step(place(net, device), batch, device, "fp16" if device.type == "cuda" else "fp32")

    def one(case):
        wanted = CASES[case.removesuffix(AGAIN)]
        on = wanted.get("on", ())
        form = "published" if wanted.get("layered") else wanted.get("attention", "layers")
        net.momentum, net.bank = momentum if MOMENTUM[0] in on else None, bank if BANK[0] in on else None
        net.attention = forms[form] if ATTENTION[0] in on else None
        net.grad_checkpointing = case.endswith(AGAIN)
        run()

    seconds = interleaved({case: partial(one, case) for case in cases_of(arch)}, rounds)
    return {case: {"batch": batch, "milliseconds": round(statistics.median(v) * 1e3, 1),
                   "times_plain": round(median_ratio(v, seconds["plain"]), 3)} for case, v in seconds.items()}


def fits_a_t4(arch: str, case: str, batch: int = BATCH) -> dict:
    """Peak at two batches, and about the largest batch in a T4's memory: every image adds the same."""
    small, large = (memory_of(on_meta(arch, case), batch=n, size=SIZE, precision=PRECISION).peak
                    for n in (batch, 2 * batch))
    image = (large - small) / batch
    return {"peak_gib_at_32": round(small / 2**30, 2), "mib_an_image": round(image / 2**20, 1),
            "largest_batch": batch + int((T4_BYTES - small) / image), "fits_at_32": small < T4_BYTES}


def validate(arch: str, case: str, batch: int) -> dict:
    """The followed peak beside what a process of its own really grows by in float32 on the CPU."""
    command = [sys.executable, "-m", "benchmarks.costs", "--grow", arch, case, str(batch)]
    # blocks of more than 64 KiB go back to the system when freed, as the followed memory takes for granted
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    grown = json.loads(output.splitlines()[-1])
    followed = memory_of(on_meta(arch, case), batch=batch, size=SIZE, precision="fp32").peak
    return {"arch": arch, "case": case, "batch": batch, "followed_mb": round(followed / 2**20),
            "process_mb": round(grown / 2**20), "ratio": round(grown / followed, 3)}


def grow(arch: str, case: str, batch: int) -> None:
    """Print the bytes that this process grows by in two real steps, after a small step that loads what every step needs."""
    def memory(field):
        return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    cpu = torch.device("cpu")
    real_step(build("resnet18", "all"), 2, cpu)()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory("VmRSS")
    run = real_step(place(build(arch, case), cpu).train(), batch, cpu)
    run(), run()
    print(memory("VmHWM") - before)


def write_table(rows: list[dict], path: Path) -> Path:
    """The rows as CSV beside the JSON."""
    path = path.with_suffix(".csv")
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def main() -> None:
    if sys.argv[1:2] == ["--grow"]:
        grow(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=ARCHS, help="one backbone; printed and not kept")
    parser.add_argument("--presets", action="store_true", help="the phases of presets; followed, not timed")
    parser.add_argument("--no-time", action="store_true", help="no real steps but those that check the followed memory")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each case that are timed")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.presets:
        rows = [row for name in PRESETS for row in preset_rows(name)]
        path = save("costs_presets", torch.device("cpu"), PRECISION, {"precision_of_memory": PRECISION, "rows": rows})
        print(path, write_table(rows, path))
        return
    archs = ARCHS if args.only is None else (args.only,)
    which = [(arch, case) for arch in archs for case in cases_of(arch)]
    tight = [(arch, case) for arch in archs if arch in CHECKPOINTED for case in ("all", "all" + AGAIN)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = dict(zip(which, pool.map(traced, *zip(*which))))
        t4 = dict(zip(map(" ".join, tight), pool.map(fits_a_t4, *zip(*tight)))) if tight else {}
    rows = []
    for arch in archs:
        mine = {case: row_of(arch, case, found[arch, case], found[arch, "plain"], device) for case in cases_of(arch)}
        if not args.no_time:
            for case, measured in times(arch, device, args.rounds).items():
                mine[case] |= measured
        for row in mine.values():
            print(row, flush=True)
        rows += mine.values()
    checks = []
    if device.type == "cpu":
        checks = [validate(*real) for real in VALIDATED if real[0] in archs]
    print(json.dumps({"t4": t4, "validation": checks}, indent=1))
    if args.only is None:
        path = save("costs", device, pick_precision("auto", device), {
            "image_size": SIZE, "batch": BATCH, "precision_of_memory": PRECISION, "bank_slots": 512, "k": 5,
            "flops": "a multiplication and an addition are two; torch's counter with its formula for the weights of grouped "
                     "convolutions corrected (training_gflops_torch: as it is)",
            "published": PUBLISHED, "t4_gib": 14.7, "t4": t4, "validation": checks, "rows": rows})
        print(path, write_table(rows, path))


if __name__ == "__main__":
    main()
