"""Child processes that find this package and never outlive the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import charmlib


def with_this_package(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which ``python -m charmlib...`` is this package, also of a checkout that is not installed."""
    home = Path(charmlib.__file__).parents[1]
    if not (home / "pyproject.toml").is_file():
        return dict(environment)
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))}


def die_with_parent() -> None:
    """Let the kernel end this process when the one that started it is gone, so that nothing runs on unseen.

    Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
