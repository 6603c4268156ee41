"""Atomic and durable file writes (write to a temporary name, sync, rename, sync the folder); reading what may be damaged."""

import contextlib
import errno
import json
import os
import shutil
import socket
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

LEASE = ".lease"
TOKEN = "CHARM_LEASE_TOKEN"  # environment variable: the token of this process's lease
FOLDER = "CHARM_LEASE_FOLDER"  # environment variable: the folder of that lease
TEMPORARY = ".tmp"
OTHERS: set[Path] = set()  # folders in which another process of the same training writes, and this one does not
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # of a file system without locks
_FULL = 2**16  # bytes left on a disk that counts as full


class DiskFull(OSError):
    """No space for a file. The message names the folder and the remedy; the previous file is kept."""


class LeaseLost(RuntimeError):
    """This process no longer holds the lease of the folder and must not write there."""


class Damaged(ValueError):
    """A file that is not what it should be. The message names it, what it was for, what is wrong and the remedy."""


@contextlib.contextmanager
def reading(path: str | Path, what: str, remedy: str) -> Iterator[None]:
    """Turn any error of reading a file in the ``with`` block into Damaged; those of the system (no such file, no permission,
    a disk that fails) stay, since they name the file themselves."""
    try:
        yield
    except Exception as error:  # the libraries raise errors of many classes for damaged files
        if isinstance(error, (Damaged, ImportError)) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise Damaged(f"{readable(path)} is damaged or no {what} ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its class where the message is empty."""
    return next((line for line in map(str.strip, readable(error).splitlines()) if line), type(error).__name__)


def read_json(path: str | Path, what: str, remedy: str) -> dict:
    """The mapping in a JSON file; raises as :func:`reading`."""
    with reading(path, what, remedy):
        content = json.loads(Path(path).read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        return content


def json_or_empty(path: Path) -> dict:
    """The mapping in a JSON file; empty if it is missing or damaged."""
    with contextlib.suppress(FileNotFoundError, Damaged):
        return read_json(path, "record", "")
    return {}


def check_lease(path: str | Path, environment=os.environ) -> None:
    """Raise LeaseLost for a file in a leased folder whose lease this process has lost: it has another token or is missing."""
    token, folder = environment.get(TOKEN), environment.get(FOLDER)
    if not token or Path(path).resolve().parent != Path(folder):
        return
    found = json_or_empty(Path(folder, LEASE)).get("token")
    if found != token:
        raise LeaseLost(f"{path} was not written: the lease of {folder} "
                        + ("was taken over by another process" if found else "is gone")
                        + ". Nothing is lost; its holder goes on from the last finished epoch.")


def lock(path: str | Path, **how) -> filelock.AcquireReturnProxy:
    """Hold a lock file, ``with lock(path): ...``; ``how`` goes to filelock's ``acquire``. The system frees it with its process.

    On a file system without locks, a file that is made and removed stands for the lock.
    """
    try:
        return filelock.FileLock(path).acquire(**how)
    except (OSError, NotImplementedError) as error:
        if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
            raise
        return filelock.SoftFileLock(f"{path}.soft").acquire(**how)


def sync(path: str | Path) -> None:
    """Flush a file, or the renames in a folder, to the disk, so that they survive a power failure.

    Shares (CIFS, some FUSE) that cannot flush a folder are left to their own.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename the result to ``path``; nothing in ``OTHERS``.

    Raises DiskFull if no space is left (the previous file is kept), and LeaseLost as :func:`check_lease`.
    """
    path = Path(path)
    if OTHERS and path.resolve().parent in OTHERS:
        return
    _remove_left(path)
    temporary = path.with_name(f".{path.name}.{_here()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files with mode 600
        check_lease(path)
        os.replace(temporary, path)
    except Exception as error:  # torch and safetensors raise errors of their own classes for a full disk
        if not isinstance(error, DiskFull) and (is_disk_full(error) or shutil.disk_usage(path.parent).free < _FULL):
            raise DiskFull(errno.ENOSPC, f"no space left to write {path.name}; make room and start the same command again",
                           str(path.parent)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error reports a full disk or quota."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def remove_temporaries(folder: str | Path) -> None:
    """Remove the temporary files of killed writers. The caller must be the only writer in the folder."""
    for path in Path(folder).glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


def _remove_left(path: Path) -> None:
    """Remove the temporary files of a file's earlier writers on this machine that have ended."""
    start = f".{path.name}.{_here()}-"
    with contextlib.suppress(OSError):
        for left in [name for name in os.listdir(path.parent) if name.startswith(start) and name.endswith(TEMPORARY)]:
            import psutil

            if not psutil.pid_exists(int(left.removeprefix(start).split("-")[0])):
                path.with_name(left).unlink(missing_ok=True)


def _here() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_csv(path: str | Path, table) -> None:
    """Write a DataFrame as a CSV file atomically, without its index; bytes of file names that are no text are escaped."""
    write_whole(path, lambda temporary: table.to_csv(temporary, index=False, errors="backslashreplace"))


def readable(text: str | Path) -> str:
    """A path, or a text that names one, for reading: bytes that are not UTF-8 are escaped, as in ``radiograf\\xeda.png``."""
    return os.fsencode(str(text)).decode("utf-8", "backslashreplace")


def for_papermill(path: str | Path) -> str:
    """A path as papermill takes it, which fills in parameters that stand in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically. NaN and infinities become null; numpy values become plain numbers."""
    text = json.dumps(content, default=lambda value: value.tolist() if hasattr(value, "tolist") else os.fspath(value))
    plain = json.loads(text, parse_constant=lambda constant: None)
    write_text(path, json.dumps(plain, indent=1, allow_nan=False) + "\n")
