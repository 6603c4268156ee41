"""Between a cell and who watches it: signs of life, and a time by which it must be over. Both travel in the environment."""

from __future__ import annotations

import os
import time
from pathlib import Path

ALIVE = "CHARM_ALIVE"
"""Environment variable with a file that is touched as work goes on."""
DEADLINE = "CHARM_DEADLINE"
"""Environment variable with the Unix time by which a cell must have ended."""
SCORING = "CHARM_SCORING_SECONDS"
"""Environment variable with how long scoring is expected to take, where that is known."""

_EVERY = 1.0  # seconds
_last = 0.0


class OutOfTime(RuntimeError):
    """The time budget is spent; what was finished is saved, and the same command goes on from there."""


def alive() -> None:
    """Say that work goes on: called for each batch; touches a file once a second at most, and none where nobody watches."""
    global _last
    now = time.monotonic()
    if now - _last < _EVERY or not (path := os.environ.get(ALIVE)):
        return
    _last = now
    Path(path).touch()


def time_left() -> float:
    """Seconds until the deadline; infinite without one."""
    deadline = os.environ.get(DEADLINE)
    return float(deadline) - time.time() if deadline else float("inf")


def stop_unless(seconds: float, what: str) -> None:
    """Stop where so many seconds are not left for what comes next.

    Raises
    ------
    OutOfTime
        Says what did not fit.
    """
    left = time_left()
    if left < seconds:
        raise OutOfTime(f"stopped before {what}, which takes about {seconds:.0f} s: the time budget has {max(left, 0):.0f} s "
                        "left. The same command goes on from here.")


def scoring_seconds(guess: float) -> float:
    """How long scoring takes: as the grid's finished cells tell, else the guess."""
    return float(os.environ.get(SCORING) or guess)
