"""Who may work on a run's folder: a lease with a token, renewed while its holder lives, checked before each result is written.

Two runners of one grid on a shared folder, or a runner and what an earlier one left behind, so never work on a cell at once:
the second finds the lease taken, and whoever lost it (its machine slept, its disk was away) is stopped at its next file.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from charmlib.files import FOLDER, LEASE, TOKEN, LeaseLost, check_lease, read_lease

_KEYS = {"token", "host", "place", "pid", "born", "folder", "number"}
RENEW, PATIENCE = 5.0, 60.0
"""Seconds between renewals, and without one after which the lease of another machine counts as lost."""


class Busy(RuntimeError):
    """Another living process holds the lease; the message says which."""


class Lease:
    """A lease that was taken; :meth:`keep` renews it in a thread until :meth:`release`."""

    def __init__(self, folder: Path, token: str):
        self.folder, self.token = folder, token
        self._over = threading.Event()

    def keep(self, lost: Callable[[], None]) -> None:
        """Renew it every few seconds; ``lost()`` is called from the renewing thread if another took it."""

        def renew():
            while not self._over.wait(RENEW):
                try:
                    check_lease(self.folder / LEASE, self.environment)
                    os.utime(self.folder / LEASE)
                except LeaseLost:
                    return lost()
                except OSError:  # a disk that is away for a moment; should another take the lease, the next turn sees it
                    continue

        threading.Thread(target=renew, daemon=True, name="lease").start()

    @property
    def environment(self) -> dict[str, str]:
        """For processes that write on this one's behalf."""
        return {TOKEN: self.token, FOLDER: str(self.folder)}

    def release(self) -> None:
        """Give it back; one that was lost stays its new holder's."""
        self._over.set()
        with alone(self.folder):
            if _read(self.folder).get("token") == self.token:
                (self.folder / LEASE).unlink(missing_ok=True)


def take(folder: str | Path, *, patience: float = PATIENCE) -> Lease:
    """Take the lease of a folder, if it is free or its holder is gone.

    Gone is a holder of this machine whose process has ended, or any that has not renewed its lease for ``patience`` seconds.

    Raises
    ------
    Busy
        A living process holds it; says which.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    mine = {"token": token, "host": platform.node(), "place": _place(), "pid": os.getpid(), "born": _born(os.getpid()),
            "folder": str(folder), "number": folder.stat().st_ino}
    temporary = folder / f"{LEASE}.{token}.tmp"
    with alone(folder) as sure:
        if words := holder(folder, patience=patience):
            raise Busy(f"{folder.name} is being worked on by {words}")
        try:
            temporary.write_text(json.dumps(mine))
            os.replace(temporary, folder / LEASE)
        finally:
            temporary.unlink(missing_ok=True)
    if not sure:  # no locks here: the last of several writers wins, and each looks who that was
        time.sleep(2.0)
        if _read(folder).get("token") != token:
            raise Busy(f"{folder.name} was taken by another process at the same moment")
    return Lease(folder, token)


def holder(folder: str | Path, *, patience: float = PATIENCE) -> str:
    """'process 123 on HOST' for the living holder of a folder's lease, or an empty text."""
    folder = Path(folder)
    held = _read(folder)
    if not held or _is_copy(folder, held):
        return ""
    words = f"process {held['pid']} on {held['host']}"
    if held["place"] == _place():
        return words if abs(_born(held["pid"]) - held["born"]) < 5 else ""
    try:
        age = _now(folder) - (folder / LEASE).stat().st_mtime
    except FileNotFoundError:
        return ""
    return words if age < patience else ""


def _is_copy(folder: Path, held: dict) -> bool:
    """Whether a lease came with a copied folder, such as a fetched output: then nobody works in it.

    A shared folder may have another path on another machine, or (not on NFS) another number, but not both.
    """
    return held["folder"] != str(folder.resolve()) and held["number"] != folder.stat().st_ino


@contextmanager
def alone(folder: Path) -> Iterator[bool]:
    """One process at a time takes, gives back or replaces a folder; False where the file system knows no locks.

    The lock lies beside the folder, since that may be replaced; the system frees the lock of a process that was killed.
    """
    with open(folder.with_name(f".{folder.name}.lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            sure = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            sure = False
        yield sure


def _read(folder: Path) -> dict:
    held = read_lease(folder)
    return held if held.keys() >= _KEYS else {}  # written in one piece, so anything else is damage


def _now(folder: Path) -> float:
    """The file system's time, which on a shared folder need not be this machine's; where one may only read, this one's."""
    probe = folder / f"{LEASE}.{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def _place() -> str:
    """This machine since its start, and the space in which process numbers mean something (containers have their own)."""
    parts = [platform.node()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if path.endswith("pid") else Path(path).read_text().strip())
        except OSError:
            parts.append("")
    return "/".join(parts)


def _born(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        return 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return 0.0
