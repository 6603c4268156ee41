"""The lease of a run's folder: a token, renewed while its holder lives and checked before each result is written.

It keeps two runners of one grid on a shared folder, or a runner and the rest of an earlier one, from working on a cell at
once: the second finds the lease taken. A holder that lost its lease (its machine slept, its disk was away) is stopped at its
next file.
"""

import fcntl
import os
import platform
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from charmlib.files import FOLDER, LEASE, NO_LOCKS, TOKEN, LeaseLost, check_lease, json_or_empty, write_json

_KEYS = {"token", "host", "place", "pid", "born", "folder", "number"}
RENEW, PATIENCE = 5.0, 60.0  # seconds between renewals, and without any until the lease of another machine counts as lost

WAITING = "waiting for"


class Busy(RuntimeError):
    """Another living process holds the lease; the message says which."""


class Lease:
    """A taken lease; :meth:`keep` renews it in a thread until :meth:`release`."""

    def __init__(self, folder: Path, token: str):
        self.folder, self.token = folder, token
        self.environment = {TOKEN: token, FOLDER: str(folder)}  # for processes that write on this one's behalf
        self._over = threading.Event()

    def keep(self, lost: Callable[[], None]) -> None:
        """Renew it every few seconds; the renewing thread calls ``lost()`` if another process took it."""

        def renew():
            while not self._over.wait(RENEW):
                try:
                    check_lease(self.folder / LEASE, self.environment)
                    os.utime(self.folder / LEASE)
                except LeaseLost:
                    return lost()
                except OSError:  # the disk is away for a moment; the next turn sees whether another took the lease
                    continue

        threading.Thread(target=renew, daemon=True, name="lease").start()

    def release(self) -> None:
        """Give the lease back; a lost one stays with its new holder."""
        self._over.set()
        with alone(self.folder):
            if _read(self.folder).get("token") == self.token:
                (self.folder / LEASE).unlink(missing_ok=True)


def take(folder: str | Path, *, patience: float = PATIENCE) -> Lease:
    """Take the lease of a folder if it is free or its holder is gone.

    A holder on this machine is gone when its process has ended; any other when it has not renewed for ``patience`` seconds.
    Raises Busy, naming the holder, if that lives.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    mine = {"token": token, "host": platform.node(), "place": _place(), "pid": os.getpid(), "born": _born(os.getpid()),
            "folder": str(folder), "number": folder.stat().st_ino}
    with alone(folder) as sure:
        if words := holder(folder, patience=patience):
            raise Busy(f"{folder.name} is being worked on by {words}")
        write_json(folder / LEASE, mine)
    if not sure:  # without locks the last of several writers wins, and each looks who that was
        time.sleep(2.0)
        if _read(folder).get("token") != token:
            raise Busy(f"{folder.name} was taken by another process at the same moment")
    return Lease(folder, token)


def holder(folder: str | Path, *, patience: float = PATIENCE) -> str:
    """'process 123 on HOST' for the living holder of a folder's lease, or an empty text."""
    folder = Path(folder)
    held = _read(folder)
    # A shared folder may have another path on another machine, or (not on NFS) another number, but not both: a lease with
    # both came with a copied folder, such as a fetched output, in which nobody works.
    if not held or (held["folder"] != str(folder.resolve()) and held["number"] != folder.stat().st_ino):
        return ""
    if held["place"] == _place():
        alive = abs(_born(held["pid"]) - held["born"]) < 0.1
    else:
        try:  # twice, a renewal apart: the clock may have been set forward or back since the last one
            for wait in (0.0, min(RENEW + 1.0, patience)):
                time.sleep(wait)
                if alive := abs(_now(folder) - (folder / LEASE).stat().st_mtime) < patience:
                    break
        except FileNotFoundError:
            return ""
    return f"process {held['pid']} on {held['host']}" if alive else ""


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """Lets one process at a time take, give back or replace a folder; False where the file system has no locks.

    The lock lies beside the folder, which may be replaced; the system frees the lock of a killed process. A wait of more than
    five seconds is said on standard error.
    """
    path = folder.with_name(f".{folder.name}.lock")
    with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w") as file:  # a link might lead anywhere
        try:
            for _ in range(100):
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
            else:
                print(f"{WAITING} {path}, which another process holds", file=sys.stderr, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            sure = True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            sure = False
        yield sure


def _read(folder: Path) -> dict:
    held = json_or_empty(folder / LEASE)
    return held if held.keys() >= _KEYS else {}  # written in one piece, so anything else is damage


def _now(folder: Path) -> float:
    """The file system's time, which on a shared folder may differ from this machine's; this machine's on a read-only one."""
    with suppress(OSError), tempfile.NamedTemporaryFile(prefix=f"{LEASE}.", suffix=".tmp", dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime
    return time.time()


def _place() -> str:
    """This machine since its start, and its space of process numbers (each container has its own)."""
    parts = [platform.node(), "", ""]
    with suppress(OSError):
        parts[1] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        parts[2] = os.readlink("/proc/self/ns/pid")
    return "/".join(parts)


def _born(pid: int) -> float:
    """When a process started, in seconds since the machine did; 0 for one that has ended.

    Elsewhere than on Linux in Unix time, which psutil computes with the machine's clock and its steps.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return 0.0
        with suppress(OSError):  # field 22 of proc(5); the second one, the name in brackets, may hold blanks
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return process.create_time()
    except psutil.NoSuchProcess:
        return 0.0
