"""From a grid file to what is pushed: settings checked, a notebook and metadata a shard."""

import json
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from charmlib.files import write_json, write_text
from charmlib.grid.budget import seconds_of
from charmlib.grid.spec import Grid, load_grid
from charmlib.param_sources import parse_assignments
from kaggle_setup.client import KaggleError
from kaggle_setup.kernel import CODE_FILE, NO_GPU, T4, grid_files, id_of, kernel_metadata, pushed_notebook
from kaggle_setup.state import READY, VOID, Kernel, State, load_state
from kaggle_setup.wheel import WHEEL_TITLE

SESSION_HOURS, DATA_TITLE = 12, "charmlib prepare"
_ON_KAGGLE, _DRAWN = "/kaggle/", "data/phantoms"
_PLACES = ("data_root", "cache_dir", "csv", "weights", "split")


def prepare(grid: str | Path, *, out: Path, user: str = "", shards: int = 1, assignments: Iterable[str] = (),
            budget: str = "11h", data: Iterable[str] = (), notebook_outputs: Iterable[str] = (), dataset: str = WHEEL_TITLE,
            accelerator: str = T4, internet: bool | None = None) -> State:
    """The state of this push: a new one, or the one that the grid's folder ``out`` holds. Nothing is sent.

    ``data`` is the NIH dataset by default, none for a grid on drawn phantoms; ``internet`` is on by default only where weights
    have to be downloaded. Raises ParameterError for a wrong grid or assignment, KaggleError for a setting that cannot work on
    Kaggle or is not that of the push which has begun.
    """
    loaded = _checked_grid(grid, assignments)
    state = load_state(out) if (out / "kaggle" / "state.json").is_file() else None
    if not user and not state:
        raise KaggleError("--user is missing: your name as in the address of your profile, kaggle.com/NAME")
    if not 1 <= shards <= len(loaded.cells):
        raise KaggleError(f"--shards {shards}: the grid has {len(loaded.cells)} cells, so 1 to {len(loaded.cells)} shards")
    if seconds_of(budget) >= SESSION_HOURS * 3600:
        raise KaggleError(f"--budget {budget!r}: less than the {SESSION_HOURS} hours of a session is wanted, such as 11h: "
                          "its end loses what is not written")
    if internet is None:
        internet = any(cell.params["weights"] == "imagenet" for cell in loaded.cells)
    if not data and not all(cell.params["data_root"] == _DRAWN for cell in loaded.cells):
        data = ["nih-chest-xrays/data"]
    settings = {"name": loaded.name, "files": grid_files(loaded.path), "user": user or state.settings["user"], "shards": shards,
                "assignments": list(assignments), "budget": budget, "data": list(data), "dataset": dataset,
                "notebook_outputs": list(notebook_outputs), "accelerator": accelerator, "internet": internet}
    if not state or (state.settings != settings and all(kernel.state in (READY, VOID) for kernel in state.kernels)):
        state = State(out / "kaggle", settings, secrets.token_hex(2))
        for shard in state.shards:
            state.add(shard, [cell.id for cell in loaded.shard(shard, shards).cells])
    for name, before in state.settings.items():
        if before != settings[name]:
            what = "the grid file or one that it is based on has changed since" if name == "files" else \
                f"{name} was {before!r} and is {settings[name]!r} now"
            raise KaggleError(f"{out} was pushed with other settings: {what}. Give the same ones to go on, or another "
                              "--out to start anew.")
    for kernel in state.kernels:
        if kernel.state == READY:
            write_kernel(state, kernel)
    state.save()
    return state


def write_kernel(state: State, kernel: Kernel) -> None:
    """Write a kernel's notebook and metadata into ``kernel`` in its folder.

    From the second round on, the round of this shard that got furthest is attached, whose output the grid goes on from.
    """
    settings, earlier = state.settings, state.best(kernel.shard)
    parameters = {"grid": next(iter(settings["files"])), "out": f"runs/{settings['name']}", "budget": settings["budget"],
                  "overrides": settings["assignments"],
                  "shard": f"{kernel.shard}/{settings['shards']}" if settings["shards"] > 1 else ""}
    book = pushed_notebook(parameters, settings["files"], gpu=settings["accelerator"] != NO_GPU)
    metadata = kernel_metadata(settings["user"], kernel.title, accelerator=settings["accelerator"],
                               datasets=[id_of(settings["user"], settings["dataset"]), *settings["data"]],
                               kernels=[*settings["notebook_outputs"], *([earlier.id] if earlier else [])],
                               internet=settings["internet"])
    _write(state.place(kernel) / "kernel", book, metadata)


def write_data_kernel(folder: Path, user: str, assignments: Iterable[str] = (), *, data: Iterable[str] = (),
                      dataset: str = WHEEL_TITLE) -> str:
    """Write ``prepare.ipynb`` for a CPU session and its metadata into ``folder``; returns its ``user/slug``.

    Its output holds the cache that grids attach. Raises ParameterError and KaggleError as :func:`prepare`.
    """
    parameters = {"cache_dir": "/kaggle/working/cache"} | parse_assignments(assignments)
    metadata = kernel_metadata(user, DATA_TITLE, accelerator=NO_GPU,
                               datasets=[id_of(user, dataset), *(data or ["nih-chest-xrays/data"])])
    _write(folder, pushed_notebook(parameters, gpu=False, name="prepare"), metadata)
    return metadata["id"]


def _write(folder: Path, book: Mapping, metadata: Mapping) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CODE_FILE, json.dumps(book, indent=1) + "\n")
    write_json(folder / "kernel-metadata.json", metadata)


def _checked_grid(path: str | Path, assignments: Iterable[str]) -> Grid:
    """The grid, with every path in it one that can be there on Kaggle."""
    given = {name.strip(): value.strip() for name, _, value in (pair.partition("=") for pair in assignments)}
    there = [name for name, value in given.items() if value.startswith(_ON_KAGGLE)]
    # what lies on Kaggle cannot be looked for here, so something that is here stands for it while the rest is checked
    grid = load_grid(path, [*assignments, *(f"{name}={Path(__file__).parent}" for name in there)])
    for cell in grid.cells:
        for name in (name for name in _PLACES if name not in there):
            value = str(cell.params[name])
            local = Path(value).is_absolute() or (name != "csv" and "/" in value)  # a csv may be relative to data_root
            if local and not value.startswith(_ON_KAGGLE) and value != _DRAWN:
                raise KaggleError(f"parameter '{name}' of {cell.id} is {value}, which is not on Kaggle: attach it "
                                  f"there and name its mount with -p {name}=/kaggle/input/...")
    return grid
