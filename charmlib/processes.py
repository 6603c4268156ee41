"""Child processes that find this package and never outlive the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

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


def end_children(pid: int | None = None, *, itself: bool = False) -> None:
    """Kill all that a process (this one, unless told another) started, directly or not, and wait until it is gone.

    ``itself`` first, so that it starts nothing more.
    """
    try:
        parent = psutil.Process(pid)
        family = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [parent, *family] if itself else family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
