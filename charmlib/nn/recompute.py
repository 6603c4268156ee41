"""Gradient checkpointing: a stack of blocks whose activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)`` with only the inputs of its :func:`segments` kept for the backward pass (Chen et al., arXiv 1604.06174).

    The backward pass runs one segment forward again at a time, so its memory is that of the segments' inputs and of one
    segment's activations instead of all. Outputs, gradients, buffers and the stream of random numbers are bit by bit those
    of ``module(x)``: the second forward pass draws the first one's random numbers (dropout, stochastic depth), and its batch
    norms leave their running statistics and counters alone, which would otherwise take each batch twice.

    Hooks of ``module`` itself and of the ``nn.Sequential`` inside it are not called, those of the blocks are.

    Raises
    ------
    RuntimeError
        A segment changes its input in place, so that it cannot be run again.
    """
    for parts in segments(module):
        before = x._version
        out = checkpoint(_run, parts, x, use_reentrant=False, preserve_rng_state=True,
                         context_fn=lambda parts=parts: (nullcontext(), _statistics_kept(parts)))
        if x._version != before:
            raise RuntimeError(f"grad_checkpointing: {type(parts[0]).__name__} changes its input in place and cannot be run "
                               "again; say grad_checkpointing: false for this arch")
        x = out
    return x


def segments(module: nn.Module) -> list[list[nn.Module]]:
    """A module as runs of blocks, one after another what the module does.

    Plain ``nn.Sequential`` is opened, at any depth; its subclasses and everything else are blocks, since they may do more than
    run their children. A block without a weight matrix or filter (norm, activation, pool) joins the segment before it: it
    keeps little to itself, and may change its input in place, which is that segment's output.
    """
    found: list[list[nn.Module]] = []
    for block in _blocks(module):
        if found and all(p.dim() < 2 for p in block.parameters()):
            found[-1].append(block)
        else:
            found.append([block])
    return found


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    if type(module) is nn.Sequential:
        for child in module:
            yield from _blocks(child)
    else:
        yield module


def _run(parts: list[nn.Module], x: Tensor) -> Tensor:
    for part in parts:
        x = part(x)
    return x


@contextmanager
def _statistics_kept(parts: list[nn.Module]) -> Iterator[None]:
    """Batch norms write their statistics into scratch tensors and count nothing.

    Switching them off would be simpler, but autograd keeps the two tensors and must find as many of them the second time.
    """
    norms = [m for part in parts for m in part.modules()
             if isinstance(m, _BatchNorm) and m.training and m.running_mean is not None]
    own = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, own):
        norm._buffers.update(running_mean=torch.empty_like(buffers["running_mean"]),
                             running_var=torch.empty_like(buffers["running_var"]), num_batches_tracked=None)
    try:
        yield
    finally:
        for norm, buffers in zip(norms, own):
            norm._buffers.update(buffers)
