"""Gradient checkpointing of a stack of blocks, exact to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, keeping only the inputs of its :func:`segments` for the backward pass (Chen et al., arXiv 1604.06174).

    The backward pass recomputes the activations of one segment at a time. Outputs, gradients, buffers and the random number
    stream equal those of ``module(x)`` to the bit. The second forward pass repeats the random numbers of the first (dropout,
    stochastic depth) and leaves the running statistics and counters of batch norms unchanged.

    Forward hooks of the blocks are called. Those of ``module`` and of any ``nn.Sequential`` inside it are skipped.

    Raises
    ------
    RuntimeError
        A segment changes its input in place and cannot be run again.
    """
    for parts in segments(module):
        before = x._version
        out = checkpoint(parts, x, use_reentrant=False, preserve_rng_state=True,
                         context_fn=lambda parts=parts: (nullcontext(), _statistics_kept(parts)))
        if x._version != before:
            raise RuntimeError(f"grad_checkpointing: {type(parts[0]).__name__} changes its input in place and cannot be run "
                               "again; set grad_checkpointing: false for this arch")
        x = out
    return x


def segments(module: nn.Module) -> list[nn.Sequential]:
    """The consecutive blocks of a module, grouped into segments.

    Plain ``nn.Sequential`` is opened at any depth. Every other module is a block, including subclasses of ``nn.Sequential``,
    whose ``forward`` may differ. A block without a weight matrix or filter (norm, activation, pool) joins the segment before
    it, because it may change its input in place.
    """
    found: list[nn.Sequential] = []
    for block in _blocks(module):
        if found and all(p.dim() < 2 for p in block.parameters()):
            found[-1].append(block)
        else:
            found.append(nn.Sequential(block))
    return found


def _blocks(module: nn.Module) -> list[nn.Module]:
    return [block for child in module for block in _blocks(child)] if type(module) is nn.Sequential else [module]


@contextmanager
def _statistics_kept(parts: nn.Sequential) -> Iterator[None]:
    """Redirect the statistics of batch norms to temporary tensors and stop their counters.

    The statistics stay enabled because checkpointing requires both forward passes to save equally many tensors.
    """
    norms = [m for m in parts.modules() if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own):
        norm._buffers.update(running_mean=torch.empty_like(buffers["running_mean"]),
                             running_var=torch.empty_like(buffers["running_var"]), num_batches_tracked=None)
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own):
            norm._buffers.update(buffers)
