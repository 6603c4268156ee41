"""Networks by the name of their system, and what training asks of one."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from charmlib.params import missing_need
from charmlib.systems import find, load


class Network(Protocol):
    """What a network offers to training. It is an ``nn.Module``, and all that training changes is in its ``state_dict``.

    Five methods are optional, and called if they are there:

    - ``start_at(log_odds)`` before training with ``adjust`` above 0: the values (C,) that the last bias starts with;
    - ``enter(**sets)`` before a phase, with what the phase's recipe sets;
    - ``see(ids, labels)`` before a training or validation batch: image ids (B,) int64 on the device, -1 where unknown, and
      labels (B, C) of 0, 1 or NaN;
    - ``follow(skipped)`` after an optimizer step: a 0-dim tensor, not 0 if the gradient scaler skipped the step; or None;
    - ``renew(images)`` after each epoch of training, before it is validated: a callable from ids (n,) to normalised images
      (n, 3, H, W).

    Optional too are ``also``, logits (B, C) of the last training batch whose losses are added to that of ``forward``; and
    ``branches``, names under which ``read`` gives logits, which the run's files keep.

    ``bank``, a :class:`charmlib.nn.bank.Slots` or None, is optional too: the run's files and pictures show what it holds.
    """

    arch: str
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def parts(self) -> dict[str, nn.Module]:
        """Its trained parts by name, from input to output; recipes say which of them a phase trains."""

    def parameter_groups(self) -> list[list[nn.Parameter]]:
        """Its trained parameters in groups from input to output, for learning rates that differ by depth."""

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised with ``mean`` and ``std``, -> logits (B, C)."""

    def read(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``forward``, with feature maps and features by name."""


def create(params: Mapping, classes: Sequence[str]) -> nn.Module:
    """The network that parameters describe, on the CPU."""
    if missing_need("ldam_scale", params):
        params = {**params, "ldam_scale": 1.0}
    make = load(find(params["system"]).network)
    return make(classes=len(classes), **keywords(make, params))


def keywords(make: Callable, params: Mapping) -> dict:
    """Those of the parameters that a callable's signature names."""
    return {name: params[name] for name in inspect.signature(make).parameters if name in params and name != "classes"}
