"""What the benchmarks share: interleaved medians, and result files that say where they were made."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from charmlib.files import write_json
from charmlib.training.run import device_name, versions

RESULTS = Path(__file__).parent / "results"


def interleaved(cases: Mapping[str, Callable[[], object]], rounds: int, *, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of each case in each round, one after the other in turn, so that a busy machine is busy for all."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warm + rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median over rounds of one case's time over another's."""
    return statistics.median(a / b for a, b in zip(above, below))


def save(name: str, device: torch.device, precision: str, figures: Mapping) -> Path:
    """``results/<name>_<device>_<precision>_torch<version>.json`` with the device and all versions in it."""
    import numpy
    import PIL

    where = device_name(device)
    if device.type == "cpu":
        info = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
        where += f" ({model[1].strip() if model else platform.processor()})"
    slug = f"cpu{os.cpu_count()}" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower())
    version = torch.__version__.split("+")[0]
    path = RESULTS / f"{name}_{slug}_{precision}_torch{version}.json"
    RESULTS.mkdir(exist_ok=True)
    write_json(path, {"device": where, "precision": precision, "threads": torch.get_num_threads(),
                      "versions": {**versions(), "pillow": PIL.__version__, "numpy": numpy.__version__}, **figures})
    return path
