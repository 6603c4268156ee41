"""Atomic and durable file writes: write to a temporary name, sync, rename, sync the folder."""

import errno
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEASE = ".lease"
TOKEN = "CHARM_LEASE_TOKEN"  # environment variable: the token of this process's lease
FOLDER = "CHARM_LEASE_FOLDER"  # environment variable: the folder of that lease
TEMPORARY = ".tmp"
_FULL = 2**16  # bytes left on a disk that counts as full


class DiskFull(OSError):
    """No space for a file. The message names the folder and the remedy; the previous file is kept."""


class LeaseLost(RuntimeError):
    """This process no longer holds the lease of the folder and must not write there."""


def read_lease(folder: Path) -> dict:
    """The lease of a folder (:mod:`charmlib.grid.lease`); empty if it is missing or damaged."""
    try:
        return json.loads((folder / LEASE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def check_lease(path: str | Path, environment=os.environ) -> None:
    """Refuse to write into a leased folder whose lease this process has lost.

    Raises
    ------
    LeaseLost
        The lease has another token or is missing.
    """
    token, folder = environment.get(TOKEN), environment.get(FOLDER)
    if not token or Path(path).resolve().parent != Path(folder):
        return
    found = read_lease(Path(folder)).get("token")
    if found != token:
        raise LeaseLost(f"{path} was not written: the lease of {folder} "
                        + ("was taken over by another process" if found else "is gone")
                        + ". Nothing is lost; its holder goes on from the last finished epoch.")


def sync(path: str | Path) -> None:
    """Flush a file, or the renames in a folder, to the disk, so that they survive a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: str | Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename the result to ``path``.

    Raises
    ------
    DiskFull
        No space is left; the previous file is kept.
    LeaseLost
        The lease of the folder has another token or is missing.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files with mode 600
        check_lease(path)
        os.replace(temporary, path)
    except DiskFull:
        raise
    except Exception as error:  # torch and safetensors raise errors of their own classes for a full disk
        if is_disk_full(error) or shutil.disk_usage(path.parent).free < _FULL:
            raise DiskFull(errno.ENOSPC, f"no space left to write {path.name}; make room and start the same command again",
                           str(path.parent)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error reports a full disk or quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def remove_temporaries(folder: str | Path) -> None:
    """Remove the temporary files of killed writers. The caller must be the only writer in the folder."""
    for path in Path(folder).glob(f".*{TEMPORARY}"):
        path.unlink(missing_ok=True)


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


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically. NaN and infinities become null; numpy values become plain numbers."""
    write_text(path, json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist") and not isinstance(value, str):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    return value
