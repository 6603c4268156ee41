"""Floating-point operations and memory of a training step, from its operations alone: nothing is computed.

The step runs on torch's fake tensors, which have shapes, types and storages but no data. So any batch of any network
can be followed on a laptop, in the half precision of a GPU too.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from charmlib.models import CharmNet


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that are alive, ``now`` and at the ``peak``; works on real and on fake tensors.

    Counts each storage once, from the operation that made it (or from :meth:`hold`, for tensors that were there before) until
    it is freed. What a kernel takes for itself while it runs, what an allocator keeps or rounds up, and the CUDA context are
    no tensors and not counted.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that were made outside."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:  # torch keeps one Python object a storage for the storage's whole life
                size = storage.nbytes()
                self._known.add(id(storage))
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, id(storage), size).atexit = False

    def _freed(self, which: int, size: int) -> None:
        self._known.discard(which)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.hold(*(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)))
        return out


def convolution_backward_flops(grad_out, x, weight, _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups,
                               wanted, out_shape=None, **_) -> int:
    """Of a convolution's two gradients, each as much as its forward pass: 2 * outputs * filter (C_in / groups * k * k).

    torch's own formula (2.14) takes the gradient of a grouped convolution's weights for that of an ungrouped one: for a
    depthwise convolution of C channels C times too much, 4.7 times all of EfficientNetV2-S.
    """
    per_position = x if transposed else grad_out
    one = 2 * per_position[0] * prod(per_position[2:]) * prod(weight)
    return one * (bool(wanted[0]) + bool(wanted[1]))


def flop_counter(*, corrected: bool = True) -> FlopCounterMode:
    """torch's counter: matrix products and convolutions, a multiplication and an addition being 2 operations.

    Element-wise operations, norms, pools, top-k and sorts are not counted. ``corrected`` replaces one formula, see
    :func:`convolution_backward_flops`.
    """
    mapping = {torch.ops.aten.convolution_backward: convolution_backward_flops} if corrected else None
    return FlopCounterMode(display=False, custom_mapping=mapping)


@dataclass(frozen=True)
class Flops:
    """Of a batch: a step of training, the same by torch's formulas alone, and scoring."""

    training: int
    training_uncorrected: int
    inference: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, and those that are held all along (weights, buffers, AdamW's moments, the batch)."""

    peak: int
    held: int


def flops_of(net: CharmNet, *, batch: int, size: int) -> Flops:
    """Operations of a network on the meta device, which is used up."""
    with FakeTensorMode():
        net, x, y, ids = _faked(net, batch, size)
        with flop_counter(corrected=False) as uncorrected, flop_counter() as training:
            step(net, None, x, y, ids)
        with flop_counter() as inference, torch.no_grad():
            net.eval()(x)
    return Flops(training.get_total_flops(), uncorrected.get_total_flops(), inference.get_total_flops())


def memory_of(net: CharmNet, *, batch: int, size: int, precision: str) -> Memory:
    """Memory of a training step of a network on the meta device, which is used up.

    AdamW has its two moments already, as in every step but the first. 'fp16' is autocast to float16 with its half-precision
    copies of the weights; the operations are those of the CPU, which differ from a GPU's in single small tensors.

    Raises
    ------
    RuntimeError
        The step left tensors behind, so that a second one would need more.
    """
    with FakeTensorMode():
        net, x, y, ids = _faked(net, batch, size)
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-4, fused=True)
        for p in net.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        optimizer.step()
        optimizer.zero_grad()
        live = LiveBytes()
        live.hold(x, y, ids, *net.parameters(), *net.buffers())
        live.hold(*(v for state in optimizer.state.values() for v in state.values()))
        held = live.now
        with live:
            step(net, optimizer, x, y, ids, precision)
        if live.now - held > 2**20:
            raise RuntimeError(f"a step left {live.now - held} bytes of tensors behind")
    return Memory(live.peak, held)


def _faked(net: CharmNet, batch: int, size: int) -> tuple[CharmNet, Tensor, Tensor, Tensor]:
    """The network, images, labels and numbers of the images without data, laid out as in training."""
    x = torch.empty(batch, 3, size, size).to(memory_format=torch.channels_last)
    return net._apply(_fake).train(), x, torch.empty(batch, net.classes), torch.arange(batch)


def _fake(meta: Tensor) -> Tensor:
    return torch.empty(meta.shape, dtype=meta.dtype,
                       memory_format=torch.channels_last if meta.dim() == 4 else torch.contiguous_format)


def step(net: CharmNet, optimizer: torch.optim.Optimizer | None, x: Tensor, y: Tensor, ids: Tensor,
         precision: str = "fp32") -> None:
    """One step in the order of fastai's loop: forward, backward, AdamW, momentum branch, gradients dropped.

    Without an optimizer it ends with the backward pass.
    """
    if getattr(net, "bank", None) is not None:
        net.bank.expect(ids, y)
    with torch.autocast(x.device.type, torch.float16, enabled=precision == "fp16"):
        logits = [net(x), *getattr(net, "also", [])]
    sum(F.binary_cross_entropy_with_logits(each.float(), y) for each in logits).backward()
    del logits
    if hasattr(net, "also"):
        net.also = []
    if optimizer is not None:
        optimizer.step()
        if hasattr(net, "follow"):
            net.follow()
        optimizer.zero_grad()
