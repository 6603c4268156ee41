"""What of a grid is on Kaggle, as a file, so that any process can ask, fetch or go on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from charmlib.files import write_json
from charmlib.kaggle.errors import KaggleError
from charmlib.kaggle.metadata import T4, slug_of

READY, PUSHING, RUNNING, ENDED, FETCHED, VOID = "waiting", "pushing", "running", "ended", "fetched", "void"


@dataclass(frozen=True)
class Settings:
    """What a push was asked for; all rounds and shards of a grid have the same. ``digest`` is over the grid's files."""

    user: str
    grid: str
    name: str
    shards: int = 1
    assignments: tuple[str, ...] = ()
    budget: str = "11h"
    data: tuple[str, ...] = ()
    notebook_outputs: tuple[str, ...] = ()
    dataset: str = "charmlib wheel"
    accelerator: str = T4
    internet: bool = False
    digest: str = ""


@dataclass
class Kernel:
    """One round of one shard: a notebook of its own on Kaggle."""

    shard: int
    round: int
    id: str
    title: str
    state: str = READY
    version: int = 0
    url: str = ""
    outcome: str = ""
    said: str = ""
    left: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    progress: list[int] = field(default_factory=lambda: [0, 0])
    merged: bool = False

    @property
    def place(self) -> str:
        """The folder of its files."""
        return f"s{self.shard}-r{self.round}"


@dataclass
class State:
    """All of it: ``cells`` are the ids of each shard's cells, ``uploaded`` the digest of the wheel that is there."""

    folder: Path
    settings: Settings
    tag: str
    cells: dict[int, list[str]]
    uploaded: str = ""
    kernels: list[Kernel] = field(default_factory=list)
    only_looked_at: bool = False

    @property
    def out(self) -> Path:
        """The grid's folder."""
        return self.folder.parent

    def add(self, shard: int) -> Kernel:
        """A further round of a shard, not yet pushed.

        The tag makes its name this push's own: one of the same grid to another folder must not become its next version.
        """
        number = 1 + sum(kernel.shard == shard for kernel in self.kernels)
        name = slug_of(self.settings.name)[:20].strip("-")
        title = f"charmlib {name} {self.tag} s{shard}of{self.settings.shards} r{number}".replace("  ", " ")
        kernel = Kernel(shard, number, f"{self.settings.user}/{slug_of(title)}", title)
        self.kernels.append(kernel)
        return kernel

    def latest(self, shard: int) -> Kernel:
        """The last round of a shard."""
        return [kernel for kernel in self.kernels if kernel.shard == shard][-1]

    def best(self, shard: int) -> Kernel | None:
        """The fetched round of a shard that got furthest; a later one may have died before it took over the earlier cells."""
        fetched = [kernel for kernel in self.kernels if kernel.shard == shard and self.fetched_grid(kernel).is_dir()]
        return max(fetched, key=lambda kernel: (kernel.progress, kernel.round), default=None)

    def fetched_grid(self, kernel: Kernel) -> Path:
        """The grid's folder in a kernel's output."""
        return self.folder / kernel.place / "output" / "runs" / self.settings.name

    def save(self) -> None:
        """Write the state, whole or not at all; one that was loaded to be looked at stays as it is."""
        if self.only_looked_at:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "state.json", {
            "format": 1, "settings": asdict(self.settings), "tag": self.tag, "cells": self.cells, "uploaded": self.uploaded,
            "kernels": [asdict(kernel) for kernel in self.kernels]})


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one process at a time pushes or fetches in a grid's folder: two would each push what the other has not yet written.

    Raises
    ------
    KaggleError
        Another one does.
    """
    folder = out / "kaggle"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "state.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise KaggleError(f"another `kaggle push` or `fetch` works in {folder}: wait for it, or look with `kaggle "
                              "status`, which disturbs nothing") from None
        yield


def new_state(out: Path, settings: Settings, cells: dict[int, list[str]]) -> State:
    """A push that has not begun, with a first round of each shard."""
    state = State(out / "kaggle", settings, secrets.token_hex(2), cells)
    for shard in cells:
        state.add(shard)
    return state


def load_state(out: Path) -> State | None:
    """The state of a grid's folder; None where nothing was pushed from it.

    Raises
    ------
    KaggleError
        The file is not one that this version writes.
    """
    path = out / "kaggle" / "state.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in content["settings"].items()}
        return State(path.parent, Settings(**settings), content["tag"], {int(k): v for k, v in content["cells"].items()},
                     content["uploaded"], [Kernel(**kernel) for kernel in content["kernels"]])
    except (ValueError, KeyError, TypeError) as error:
        raise KaggleError(f"{path} is damaged or of another version ({error}): move it away, and look on kaggle.com for what "
                          "was pushed") from error
