"""What a result was made with: device, versions, peak memory."""

import os
import platform
import re
import resource
from pathlib import Path

import torch

import charmlib


def peak_memory_mb() -> float:
    """Peak memory of the GPU if one was used, else of this process.

    Read from Linux's own record: ``getrusage`` would inherit the figure of the process that started this one.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return round((int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024, 1)


def device_name(device: torch.device) -> str:
    """'Tesla T4', or 'cpu, 2 cores'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Versions of the packages that influence a result."""
    import fastai
    import torchvision

    return {"charmlib": charmlib.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "fastai": fastai.__version__}
