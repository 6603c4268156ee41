"""Whether a torch build supports a GPU, with a remedy if it does not.

On an unsupported GPU ``torch.cuda.is_available()`` is True and the first kernel fails. The architecture list of the build is
therefore compared instead. Only functions that read the current machine import torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

_TENSOR_CORES = (7, 0)
_OLDEST_OF_CU128 = (7, 5)


@dataclass(frozen=True)
class Verdict:
    """Whether a torch build can use a GPU, and a sentence with the capability or the remedy."""

    usable: bool
    text: str


def sm(capability: tuple[int, int]) -> str:
    """Name of an architecture: ``sm_75`` for (7, 5)."""
    return f"sm_{capability[0]}{capability[1]}"


def has_kernels(capability: tuple[int, int], architectures: Iterable[str]) -> bool:
    """Whether a build with these architectures runs on a GPU of this compute capability.

    It needs binary code (``sm_``) of the same major and at most the same minor version, or PTX (``compute_``) of at most the
    same version.
    """
    major, minor = capability
    for name in architectures:
        kind, _, digits = name.partition("_")
        digits = "".join(c for c in digits if c.isdigit())
        if not digits:
            continue
        theirs = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and theirs[0] == major and theirs[1] <= minor) or (kind == "compute" and theirs <= (major, minor)):
            return True
    return False


def verdict(name: str, capability: tuple[int, int] | None, architectures: Iterable[str], torch_version: str,
            cuda_version: str | None) -> Verdict:
    """The verdict on one GPU.

    Parameters
    ----------
    name, capability
        Name and compute capability of the GPU; None if torch sees no GPU.
    architectures
        ``torch.cuda.get_arch_list()``.
    torch_version, cuda_version
        ``torch.__version__`` and ``torch.version.cuda``, which is None in a CPU build.
    """
    if capability is None and cuda_version is None:
        return Verdict(False, f"torch {torch_version} is a build for CPUs only. On Kaggle choose Settings, Accelerator, GPU "
                              "T4 x2 and leave the image's torch alone; elsewhere install a CUDA build of torch.")
    if capability is None:
        return Verdict(False, f"torch {torch_version} sees no GPU. On Kaggle choose Settings, Accelerator, GPU T4 x2; "
                              "elsewhere look at nvidia-smi and CUDA_VISIBLE_DEVICES.")
    built_for = list(architectures)
    if not has_kernels(capability, built_for):
        return Verdict(False, f"{name} is {sm(capability)}, and torch {torch_version} has kernels for "
                              f"{', '.join(built_for)} only. {_remedy(capability)}")
    cores = ("fp16 on tensor cores" if capability >= _TENSOR_CORES else
             "fp16 without tensor cores, and no torch.compile")
    return Verdict(True, f"{name} is {sm(capability)}, and torch {torch_version} has kernels for it: {cores}.")


def _remedy(capability: tuple[int, int]) -> str:
    if capability < _OLDEST_OF_CU128:
        return ("On Kaggle choose GPU T4 x2 and leave the image's torch alone. On a machine of your own install the build for "
                'CUDA 12.6, which has kernels for it up to torch 2.14: pip install "torch<2.15" torchvision --index-url '
                "https://download.pytorch.org/whl/cu126")
    return "Install a newer torch, built for this card: https://pytorch.org/get-started/locally"


def verdict_on(device: int | None = None) -> Verdict:
    """The verdict on a GPU of this machine, by default torch's current device."""
    import torch

    about_torch = torch.cuda.get_arch_list(), torch.__version__, torch.version.cuda
    if not torch.cuda.is_available():
        return verdict("", None, *about_torch)
    return verdict(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), *about_torch)


def gpu_report(*, required: bool = False) -> str:
    """One line for each GPU that torch sees, or one line with the reason why there is none.

    Raises
    ------
    RuntimeError
        ``required`` is true and no GPU is usable.
    """
    import torch

    found = [verdict_on(i) for i in range(torch.cuda.device_count())] or [verdict_on()]
    text = "\n".join(f"GPU {i}: {one.text}" if one.usable else one.text for i, one in enumerate(found))
    if required and not any(one.usable for one in found):
        raise RuntimeError(text)
    return text
