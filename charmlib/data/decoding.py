"""Source files into rows of the image cache: in this process, or in several that this module starts of itself.

Processes, not threads, because the fast PNG decoder holds the interpreter's lock. They get their work as JSON lines on
standard input and answer each line with one; pixels go straight into the cache's memory map.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from charmlib.data.images import fit, open_grey
from charmlib.session import PARENT, die_with_parent, with_this_package

PIXELS, ROWS = "pixels.npy", "rows.npy"
ROW = np.dtype([("state", "u1"), ("bytes", "<i8"), ("width", "<i4"), ("height", "<i4"), ("source_crc", "<u4"),
                ("pixel_crc", "<u4")])
DONE, BAD = 1, 2  # states of a row; 0 is still to be decoded


def decode_row(pixels: np.ndarray, rows: np.ndarray, i: int, path: str, aspect: str) -> str | None:
    """Decode a file into row ``i`` of ``pixels`` (n, S, S) and describe it in ``rows``; returns why it could not be read.

    An unreadable file leaves a black row.
    """
    reason, state, width, height = None, DONE, 0, 0
    rows["bytes"][i], rows["source_crc"][i] = file_size(path), 0  # stays so for a file that is there and cannot be read
    try:
        source = Path(path).read_bytes()
        rows["bytes"][i], rows["source_crc"][i] = len(source), zlib.crc32(source)
        grey = open_grey(source)
        pixels[i] = fit(grey, pixels.shape[1], aspect)
        width, height = grey.size
    except Exception as error:
        # Pillow raises OSError, SyntaxError, ValueError, struct.error ... for damaged files
        reason, state = f"{type(error).__name__}: {error}", BAD
        pixels[i] = 0
    rows["width"][i], rows["height"][i], rows["pixel_crc"][i] = width, height, zlib.crc32(pixels[i])
    rows["state"][i] = state  # last: a row that says it is done has all the rest
    return reason


def file_size(path: str) -> int:
    """Bytes of a file, -1 where it is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


class Decoders:
    """Child processes that decode into the cache in ``folder``, one for each thread that calls :meth:`decode`."""

    def __init__(self, folder: Path, aspect: str):
        self.folder, self.aspect = folder, aspect
        self._own, self._children, self._lock = threading.local(), [], threading.Lock()

    def __enter__(self) -> Decoders:
        return self

    def __exit__(self, *_) -> None:
        for child in self._children:
            child.kill()
        for child in self._children:
            child.communicate()

    def decode(self, work: Sequence[tuple[int, str]]) -> dict[int, str]:
        """Decode (row, path) pairs; returns row -> reason of those that cannot be read.

        Should the decoder crash the child, the pairs are tried one by one and the guilty one is among the unreadable.
        """
        try:
            return self._ask(work)
        except (EOFError, BrokenPipeError):
            self._own.child = None
        if len(work) > 1:
            return {row: reason for pair in work for row, reason in self.decode([pair]).items()}
        (row, _), pixels, rows = work[0], *open_rows(self.folder)
        pixels[row], rows["pixel_crc"][row] = 0, zlib.crc32(np.zeros(pixels.shape[1:], np.uint8))
        rows["state"][row] = BAD
        return {row: "the decoder crashed on it"}

    def _ask(self, work: Sequence[tuple[int, str]]) -> dict[int, str]:
        child = getattr(self._own, "child", None)
        if child is None:
            child = subprocess.Popen([sys.executable, "-m", "charmlib.data.decoding", str(self.folder), self.aspect],
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                     env=with_this_package(os.environ))
            self._own.child = child
            with self._lock:
                self._children.append(child)
        child.stdin.write(json.dumps([(int(row), str(path)) for row, path in work]) + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
        if not answer.endswith("\n"):
            raise EOFError
        return {int(row): reason for row, reason in json.loads(answer).items()}


def open_rows(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Writable maps of a cache's pixels and rows."""
    return (np.load(folder / PIXELS, mmap_mode="r+", allow_pickle=False),
            np.load(folder / ROWS, mmap_mode="r+", allow_pickle=False))


def main() -> None:
    die_with_parent(int(os.environ[PARENT]))
    folder, aspect = Path(sys.argv[1]), sys.argv[2]
    pixels, rows = open_rows(folder)
    for line in sys.stdin:
        bad = {}
        for row, path in json.loads(line):
            reason = decode_row(pixels, rows, row, path, aspect)
            if reason is not None:
                bad[row] = reason
        try:
            print(json.dumps(bad), flush=True)
        except BrokenPipeError:  # who asked was killed
            os._exit(1)


if __name__ == "__main__":
    main()
