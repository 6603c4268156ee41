"""A time budget: how long is left, and whether something still fits."""

from __future__ import annotations

import re
import time

from charmlib.params import ParameterError

KAGGLE_WEEK = 30
"""GPU hours a week of a free account; a session with two cards counts once."""

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}


def seconds_of(text: str | float, option: str = "--budget") -> float:
    """``11h``, ``1h30m``, ``90m`` or ``45s`` as seconds; a number is seconds already, but no text: ``11`` may mean hours.

    Raises
    ------
    ParameterError
        Not a time, or not more than 0.
    """
    if isinstance(text, str):
        found = re.fullmatch(r"(?:(?:\d+\.?\d*|\.\d+)[dhms])+", text.strip().lower())
        value = sum(float(n) * _UNITS[unit] for n, unit in re.findall(r"([\d.]+)([dhms])", found[0])) if found else 0.0
    else:
        value = float(text)
    if not 0 < value < float("inf"):
        raise ParameterError(f"{option} {text!r} is not a time; say 11h, 1h30m, 90m or 45s")
    return value


def hours(seconds: float) -> str:
    """'11.3 h', or '12 min' or '40 s' for less."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


class Budget:
    """So many seconds from now on, less what the report at the end takes; endless without a number."""

    _REPORT_SHARE, _REPORT_LEAST, _REPORT_TIMES = 0.005, 5.0, 3.0

    def __init__(self, seconds: float | None = None):
        self.seconds = seconds
        self.end = time.time() + seconds if seconds else float("inf")
        self._report = self._REPORT_LEAST

    def saw_report(self, seconds: float) -> None:
        """The tables alone took so long; the last page, with pictures, gets a few times that."""
        self._report = max(self._report, self._REPORT_TIMES * seconds)

    @property
    def deadline(self) -> float | None:
        """The Unix time by which cells must have ended, so that the report still fits; None for no budget."""
        return None if self.seconds is None else self.end - max(self._report, self._REPORT_SHARE * self.seconds)

    def left(self) -> float:
        """Seconds for cells."""
        return float("inf") if self.seconds is None else self.deadline - time.time()
