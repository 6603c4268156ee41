"""From a grid file to what is pushed: settings checked, a notebook and metadata a shard, the wheel's dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from charmlib.files import write_json, write_text
from charmlib.grid.budget import KAGGLE_WEEK, seconds_of
from charmlib.grid.spec import Grid, load_grid
from charmlib.kaggle.errors import KaggleError
from charmlib.kaggle.metadata import CODE_FILE, NO_GPU, T4, check_source, check_user, kernel_metadata, slug_of
from charmlib.kaggle.render import grid_files, shard_notebook
from charmlib.kaggle.state import READY, VOID, Kernel, Settings, State, load_state, new_state
from charmlib.nih import KAGGLE_DATASETS

SESSION_HOURS = 12
_ON_KAGGLE = "/kaggle/"
_DRAWN = "data/phantoms"
_PLACES = ("data_root", "cache_dir", "csv", "weights", "split")


def prepare(grid: str | Path, *, user: str = "", shards: int = 1, assignments: Iterable[str] = (),
            out: str | Path | None = None, budget: str = "11h", data: Iterable[str] = (),
            notebook_outputs: Iterable[str] = (), dataset: str = "charmlib wheel", accelerator: str = T4,
            internet: bool | None = None) -> State:
    """The state of this push: a new one, or the one that its folder holds. Nothing is sent.

    Parameters
    ----------
    data
        Datasets to attach, ``owner/slug``; the NIH one by default, none for a grid on drawn phantoms.
    notebook_outputs
        Notebooks whose output is attached, such as ``prepare.ipynb``'s with the cache.
    internet
        By default only where the weights have to be downloaded.

    Raises
    ------
    charmlib.params.ParameterError
        The grid or an assignment is wrong.
    KaggleError
        A setting cannot work on Kaggle, or is not that of the push which has begun.
    """
    assignments = tuple(assignments)
    loaded = _checked_grid(grid, assignments)
    out = grid_folder(grid, out)
    before = load_state(out)
    if not user and not before:
        raise KaggleError("--user is missing: your name as in the address of your profile, kaggle.com/NAME")
    if not 1 <= shards <= len(loaded.cells):
        raise KaggleError(f"--shards {shards}: the grid has {len(loaded.cells)} cells, so 1 to {len(loaded.cells)} shards")
    check_budget(budget)
    if internet is None:
        internet = any(cell.params["weights"] == "imagenet" for cell in loaded.cells)
    settings = Settings(user=check_user(user or before.settings.user), grid=str(loaded.path.resolve()), name=loaded.name,
                        shards=shards, assignments=assignments, budget=budget, data=tuple(data) or _default_data(loaded),
                        notebook_outputs=tuple(notebook_outputs), dataset=dataset, accelerator=accelerator, internet=internet,
                        digest=_digest(loaded.path))
    _refuse_bad_sources(settings)
    state = before
    if before is None or (_nothing_begun(before) and before.settings != settings):
        cells = {i: [cell.id for cell in loaded.shard(i, shards).cells] for i in range(1, shards + 1)}
        state = new_state(out, settings, cells)
    _refuse_other_settings(state, settings)
    for kernel in state.kernels:
        if kernel.state == READY:
            write_kernel(state, kernel)
    state.save()
    return state


def grid_folder(grid: str | Path, out: str | Path | None = None) -> Path:
    """Where a grid's results go: ``out``, or ``runs/<name>``.

    Raises
    ------
    charmlib.params.ParameterError
        The grid file is wrong.
    """
    return Path(out or Path("runs") / load_grid(grid).name).expanduser().resolve()


def gpu_hours(settings: Settings) -> str:
    """What a push may cost of the week's hours."""
    hours = settings.shards * check_budget(settings.budget) / 3600
    return (f"{settings.shards} sessions of at most {settings.budget}: up to {hours:g} of the week's {KAGGLE_WEEK} GPU hours "
            "a round")


def write_kernel(state: State, kernel: Kernel) -> Path:
    """Write a kernel's notebook and metadata; returns their folder.

    From the second round on, the round of this shard that got furthest is attached, whose output the grid goes on from.
    """
    settings, earlier = state.settings, state.best(kernel.shard)
    place, files = grid_files(settings.grid)
    parameters = {"grid": place, "out": f"runs/{settings.name}", "overrides": list(settings.assignments),
                  "shard": f"{kernel.shard}/{settings.shards}" if settings.shards > 1 else "", "budget": settings.budget}
    book = shard_notebook(parameters, files, gpu=settings.accelerator != NO_GPU)
    metadata = kernel_metadata(settings.user, kernel.title, accelerator=settings.accelerator, internet=settings.internet,
                               datasets=[f"{settings.user}/{slug_of(settings.dataset)}", *settings.data],
                               kernels=[*settings.notebook_outputs, *([earlier.id] if earlier else [])])
    folder = state.folder / kernel.place / "kernel"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CODE_FILE, json.dumps(book, indent=1) + "\n")
    write_json(folder / "kernel-metadata.json", metadata)
    return folder


def check_budget(budget: str) -> float:
    """``11h`` or ``90m`` in seconds.

    Raises
    ------
    charmlib.params.ParameterError
        Not a time.
    KaggleError
        More than a session lasts.
    """
    seconds = seconds_of(budget)
    if seconds >= SESSION_HOURS * 3600:
        raise KaggleError(f"--budget {budget!r}: less than the {SESSION_HOURS} hours of a session is wanted, such as 11h: "
                          "its end loses what is not written")
    return seconds


def _checked_grid(path: str | Path, assignments: tuple[str, ...]) -> Grid:
    """The grid, with every path in it one that can be there on Kaggle."""
    there = {name.strip() for name, _, value in (pair.partition("=") for pair in assignments)
             if value.strip().startswith(_ON_KAGGLE)}
    # what lies on Kaggle cannot be looked for here, so something that is here stands for it while the rest is checked
    grid = load_grid(path, [f"{pair.partition('=')[0]}={Path(__file__).parent}" if pair.partition("=")[0].strip() in there
                            else pair for pair in assignments])
    for cell in grid.cells:
        for name in (name for name in _PLACES if name not in there):
            value = str(cell.params[name])
            local = Path(value).is_absolute() or (name != "csv" and "/" in value)  # a csv may be relative to data_root
            if local and not value.startswith(_ON_KAGGLE) and value != _DRAWN:
                raise KaggleError(f"parameter '{name}' of {cell.id} is {value}, which is not on Kaggle: attach it "
                                  f"there and name its mount with -p {name}=/kaggle/input/...")
    return grid


def _default_data(grid: Grid) -> tuple[str, ...]:
    drawn = all(cell.params["data_root"] == _DRAWN for cell in grid.cells)
    return () if drawn else ("/".join(KAGGLE_DATASETS[0]),)


def _refuse_bad_sources(settings: Settings) -> None:
    for option, names in (("--data", settings.data), ("--notebook-outputs", settings.notebook_outputs)):
        for name in names:
            check_source(name, option)


def _digest(path: Path) -> str:
    return hashlib.sha256(json.dumps(grid_files(path)).encode()).hexdigest()[:16]


def _nothing_begun(state: State) -> bool:
    return all(kernel.state in (READY, VOID) for kernel in state.kernels)


def _refuse_other_settings(state: State, settings: Settings) -> None:
    before, now = asdict(state.settings), asdict(replace(settings, grid=state.settings.grid))
    for name in before:
        if before[name] != now[name]:
            what = "the grid file or one that it is based on has changed since" if name == "digest" else \
                f"{name} was {before[name]!r} and is {now[name]!r} now"
            raise KaggleError(f"{state.out} was pushed with other settings: {what}. Give the same ones to go on, or another "
                              "--out to start anew.")
