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
    """For children: ``python -m charmlib...`` is this package, also of a checkout not installed, and this their parent."""
    home = Path(charmlib.__file__).parents[1]
    environment = {**environment, PARENT: str(os.getpid())}
    if not (home / "pyproject.toml").is_file():
        return environment
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))}


PARENT = "CHARM_PARENT"
"""Environment variable with the number of the process that started this one."""


def die_with_parent(parent: int) -> None:
    """Let the kernel end this process when the one that started it is gone, so that nothing runs on unseen.

    Ends at once where ``parent`` was gone before this was called. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


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
