"""Whether a torch build supports a GPU, with a remedy if it does not.

On an unsupported GPU ``torch.cuda.is_available()`` is True and the first kernel fails. The architecture list of the build is
therefore compared instead. Only functions that read the current machine import torch.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

_TENSOR_CORES = (7, 0)
_OLDEST_OF_CU128 = (7, 5)


class Unsupported(RuntimeError, ValueError):
    """What the GPU or the torch build of this machine cannot do; the message names the remedy."""


class Verdict(NamedTuple):
    """Whether a torch build can use a GPU, and a sentence with the capability or the remedy."""

    usable: bool
    text: str


def has_kernels(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Whether a build with these architectures runs on a GPU of this compute capability.

    It needs binary code (``sm_``) of the same major and at most the same minor version, or PTX (``compute_``) of at most the
    same version.
    """
    # such as sm_90, sm_90a, compute_120
    built_for = [(kind, (int(major), int(minor))) for kind, major, minor in
                 re.findall(r"\b(sm|compute)_(\d+)(\d)", " ".join(architectures))]
    return any(theirs <= capability and (kind == "compute" or theirs[0] == capability[0]) for kind, theirs in built_for)


def verdict(name: str, capability: tuple[int, int] | None, architectures: Iterable[str], torch_version: str,
            cuda_version: str | None) -> Verdict:
    """The verdict on a GPU of this name and compute capability (None if torch sees none).

    The others are ``torch.cuda.get_arch_list()``, ``torch.__version__``, and ``torch.version.cuda``, None in a CPU build.
    """
    if capability is None:
        return Verdict(False, f"torch {torch_version} " + (
            "sees no GPU. On Kaggle choose Settings, Accelerator, GPU T4 x2; elsewhere look at nvidia-smi and "
            "CUDA_VISIBLE_DEVICES." if cuda_version else
            "is a build for CPUs only. On Kaggle choose Settings, Accelerator, GPU T4 x2 and leave the image's torch alone; "
            "elsewhere install a CUDA build of torch."))
    built_for = list(architectures)
    found = f"{name} is sm_{capability[0]}{capability[1]}, and torch {torch_version} has kernels for"
    if has_kernels(capability, built_for):
        cores = "fp16 on tensor cores" if capability >= _TENSOR_CORES else "fp16 without tensor cores, and no torch.compile"
        return Verdict(True, f"{found} it: {cores}.")
    return Verdict(False, f"{found} {', '.join(built_for)} only. " + (
        "On Kaggle choose GPU T4 x2 and leave the image's torch alone. On a machine of your own install the build for "
        'CUDA 12.6, which has kernels for it up to torch 2.14: pip install "torch<2.15" torchvision --index-url '
        "https://download.pytorch.org/whl/cu126" if capability < _OLDEST_OF_CU128 else
        "Install a newer torch, built for this card: https://pytorch.org/get-started/locally"))


def verdict_on(device: int | None = None) -> Verdict:
    """The verdict on a GPU of this machine, by default torch's current device."""
    import torch

    about_torch = torch.cuda.get_arch_list(), torch.__version__, torch.version.cuda
    if not torch.cuda.is_available():
        return verdict("", None, *about_torch)
    return verdict(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), *about_torch)


def gpu_report(*, required: bool = False) -> str:
    """One line for each GPU that torch sees, or one with the reason why there is none; Unsupported if one is ``required`` and
    none is usable."""
    import torch

    found = [verdict_on(i) for i in range(torch.cuda.device_count())] or [verdict_on()]
    text = "\n".join(f"GPU {i}: {one.text}" if one.usable else one.text for i, one in enumerate(found))
    if required and not any(one.usable for one in found):
        raise Unsupported(text)
    return text
