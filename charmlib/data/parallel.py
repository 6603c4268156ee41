"""Work on many files at once, with progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from charmlib import session
from charmlib.session import person_watches

_AT_ONCE = 16  # items a task: one future an item would cost a gigabyte for a million of them
_EVERY = 20.0  # seconds between lines where no person watches


def to_stderr(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def for_each(do: Callable, items: Sequence, workers: int, verb: str, say: Callable[[str], None] = to_stderr) -> None:
    """Call ``do`` with a few of the items at a time, in threads: a progress bar for a person, now and then a line for a log.

    An exception, also an interrupt, ends it once the items that are being worked on are done.
    """
    chunks = [items[i:i + _AT_ONCE] for i in range(0, len(items), _AT_ONCE)]

    def work(chunk: Sequence) -> int:
        do(chunk)
        return len(chunk)

    watched = sys.stderr.isatty() or person_watches()
    start = last = time.monotonic()
    done = 0
    with ThreadPoolExecutor(max(1, workers)) as pool, \
            tqdm(total=len(items), desc=verb, unit="image", disable=not watched, mininterval=0.5) as bar:
        try:
            for count in pool.map(work, chunks):
                done += count
                session.alive()
                bar.update(count)
                if not watched and time.monotonic() - last > _EVERY:
                    last = time.monotonic()
                    rate = done / (last - start)
                    say(f"{verb} {done:,} of {len(items):,} images, {rate:.0f} a second, "
                        f"about {(len(items) - done) / rate / 60:.0f} min left")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
