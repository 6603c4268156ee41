"""Which device, and which precision it can really do."""

import torch

from charmlib.gpu_support import Unsupported, verdict_on


def pick_device(wish: str = "auto") -> torch.device:
    """'cpu', 'cuda', or 'auto': the GPU if this torch has kernels for it.

    On a card that this torch was not built for (a P100 with a cu128 build) ``torch.cuda.is_available()`` is True and
    the first kernel fails, so the architecture list is asked.

    Raises
    ------
    Unsupported
        'cuda' where there is no usable GPU; says what is wrong.
    """
    if wish == "cpu":
        return torch.device("cpu")
    found = verdict_on()
    if found.usable:
        return torch.device("cuda")
    if wish == "cuda":
        raise Unsupported(f"device 'cuda': {found.text}")
    if torch.cuda.is_available():
        print(f"{found.text} Going on with the CPU.")
    return torch.device("cpu")


def place(net: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """A network on a device, its convolutions' weights laid out channels last where that is faster.

    On CPUs a step takes 0.52 (MobileNetV2 at 64 pixels) to 0.77 (ResNet-50 at 224) of the time that it takes otherwise
    (``benchmarks/step.py``). Tensor cores (sm_70 and newer) want it for fp16; a P100 has none and keeps torch's usual layout.
    On a GPU cuDNN then times its kernels for each shape of a batch and keeps the quickest, unless it was told to be
    deterministic.
    """
    device = torch.device(device)
    if device.type == "cuda" and not torch.backends.cudnn.deterministic:
        torch.backends.cudnn.benchmark = True
    last = device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0))
    return net.to(device, memory_format=torch.channels_last if last else torch.contiguous_format)


def compile_backbone(net: torch.nn.Module, device: torch.device) -> None:
    """``torch.compile`` of trunk and final block, in place; names and weights stay as they are.

    Raises
    ------
    Unsupported
        A card older than sm_70, which torch's compiler has no code for.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        raise Unsupported(f"compile: {torch.cuda.get_device_name(device)} is older than sm_70, for which torch.compile has no "
                          "code: say compile=False")
    for part in net.compile_parts() if hasattr(net, "compile_parts") else net.parts().values():
        part.compile()


def pick_precision(wish: str, device: torch.device) -> str:
    """'fp16' or 'fp32'. 'auto' is fp16 on a GPU. Never bf16: a T4 claims it and emulates it.

    Raises
    ------
    Unsupported
        fp16 asked for on a CPU.
    """
    if wish == "fp16" and device.type != "cuda":
        raise Unsupported("precision 'fp16' needs a GPU; say precision: auto or fp32")
    return ("fp16" if device.type == "cuda" else "fp32") if wish == "auto" else wish
