"""What of a grid is on Kaggle, kept in a file, so that any process can ask, fetch or go on."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import AcquireReturnProxy, Timeout

from charmlib.files import lock, write_json
from charmlib.grid.cells import CellFolder
from charmlib.grid.spec import refuse_names
from kaggle_setup.client import KaggleError
from kaggle_setup.kernel import id_of, slug_of

FORMAT = 2
READY, PUSHING, RUNNING, ENDED, FETCHED, VOID = "waiting", "pushing", "running", "ended", "fetched", "void"


@dataclass
class Kernel:
    """One round of one shard, a notebook of its own on Kaggle; ``said`` is why it waits or failed."""

    shard: int
    round: int
    cells: list[str]
    id: str
    title: str
    state: str = READY
    url: str = ""
    outcome: str = ""
    said: str = ""
    merged: bool = False


@dataclass
class State:
    """All that a push has on Kaggle.

    ``settings`` are those of all kernels: the grid's ``name`` and ``files``, ``user``, ``shards``, ``assignments``, ``budget``,
    ``data``, ``notebook_outputs``, ``dataset``, ``accelerator``, ``internet``. ``tag`` makes the kernels' names this push's
    own: a push of the same grid to another folder must not become their next version. ``uploaded`` is the wheel's digest.
    """

    folder: Path
    settings: dict[str, Any]
    tag: str
    uploaded: str = ""
    kernels: list[Kernel] = field(default_factory=list)

    def add(self, shard: int, cells: list[str]) -> Kernel:
        """A further round of a shard, not yet pushed."""
        number, name = len(self.rounds(shard)) + 1, slug_of(self.settings["name"])[:20].strip("-")
        title = f"charmlib {name} {self.tag} s{shard}of{self.settings['shards']} r{number}".replace("  ", " ")
        self.kernels.append(Kernel(shard, number, cells, id_of(self.settings["user"], title), title))
        return self.kernels[-1]

    @property
    def shards(self) -> range:
        """Their numbers, from 1."""
        return range(1, self.settings["shards"] + 1)

    def rounds(self, shard: int) -> list[Kernel]:
        """The kernels of a shard, the latest last."""
        return [kernel for kernel in self.kernels if kernel.shard == shard]

    def place(self, kernel: Kernel) -> Path:
        """The folder of a kernel's files."""
        return self.folder / f"s{kernel.shard:d}-r{kernel.round:d}"  # refuses texts, which might lead elsewhere

    def grid(self, kernel: Kernel) -> Path:
        """The grid's folder in a kernel's output."""
        return self.place(kernel) / "output" / "runs" / self.settings["name"]

    def cells(self, kernel: Kernel) -> list[CellFolder]:
        """The cells of a kernel in its output, whether they are there or not."""
        return [CellFolder(self.grid(kernel) / cell) for cell in kernel.cells]

    def progress(self, kernel: Kernel) -> tuple[int, int]:
        """How far a kernel got: done cells, then epochs of all its cells."""
        cells = self.cells(kernel)
        return sum(cell.done for cell in cells), sum(cell.progress for cell in cells)

    def best(self, shard: int) -> Kernel | None:
        """The fetched round of a shard that got furthest; a later one may have died before it took over the earlier cells."""
        fetched = [kernel for kernel in self.rounds(shard) if self.grid(kernel).is_dir()]
        return max(fetched, key=lambda kernel: (self.progress(kernel), kernel.round), default=None)

    def left(self, *shards: int) -> list[str]:
        """Cells of these shards, or of all, that no fetched round has finished."""
        best = [self.best(shard) or self.rounds(shard)[0] for shard in shards or self.shards]
        return [cell.name for kernel in best for cell in self.cells(kernel) if not cell.done]

    def save(self) -> None:
        """Write the state, whole or not at all."""
        write_json(self.folder / "state.json", {"format": FORMAT, "settings": self.settings, "tag": self.tag,
                                                "uploaded": self.uploaded, "kernels": [asdict(k) for k in self.kernels]})


def locked(out: Path) -> AcquireReturnProxy:
    """Only one process at a time pushes or fetches in a grid's folder: two would each push what the other has not yet written.

    Raises KaggleError where another one does.
    """
    try:
        return lock(out / "kaggle" / "state.lock", blocking=False)
    except Timeout:
        raise KaggleError(f"another `kaggle_setup push` or `fetch` works in {out / 'kaggle'}: wait for it, or look with "
                          "`kaggle_setup status`, which disturbs nothing") from None


def load_state(out: Path) -> State:
    """The state of a grid's folder. Raises KaggleError where there is none, or one that this version does not write."""
    path = out / "kaggle" / "state.json"
    if not path.is_file():
        raise KaggleError(f"nothing was pushed from {out}: there is no {path}")
    try:
        content = json.loads(path.read_text())
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        state = State(path.parent, **{**content, "kernels": [Kernel(**kernel) for kernel in content["kernels"]]})
        for kernel in state.kernels:
            refuse_names(kernel.cells, state.place(kernel))
        return state
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KaggleError(f"{path} is damaged or of another version ({error}): move it away, and look on kaggle.com for what "
                          "was pushed") from error
