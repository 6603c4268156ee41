"""Pushing the shards of a grid, round after round, and bringing their cells home.

Every step is written down before and after it is done (:mod:`charmlib.kaggle.state`), so a killed push goes on and pushes
nothing twice: a kernel that was being pushed is asked for before it is pushed again.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

from charmlib.grid.cells import CellFolder
from charmlib.kaggle.client import CANCELLED, Client
from charmlib.kaggle.client import RUNNING as SESSION_RUNNING
from charmlib.kaggle.errors import KaggleError, NotThere, Refused, SessionLimit, StartedWithout
from charmlib.kaggle.metadata import slug_of
from charmlib.kaggle.prepare import check_budget, write_kernel
from charmlib.kaggle.redaction import redact
from charmlib.kaggle.state import ENDED, FETCHED, PUSHING, READY, RUNNING, VOID, Kernel, State
from charmlib.kaggle.upload import upload
from charmlib.kaggle.wheel import write_dataset

SESSIONS = 2
"""GPU sessions that Kaggle runs at once for an account."""
_GRACE = 1800
_PATIENCE = 10

Say = Callable[[str], None]


def push(state: State, client: Client, say: Say = print) -> None:
    """Bring the state up to date, fetch what has ended, then push what can run now; more rounds for shards with cells left.

    Raises
    ------
    Refused
        Kaggle did not take a kernel or the wheel; what went before it counts.
    """
    refresh(state, client, say)
    fetch(state, client, say)
    for shard in state.cells:
        latest = state.latest(shard)
        if latest.state == VOID or (latest.state == FETCHED and latest.left):
            _next_round(state, shard, say)
    if any(kernel.state == READY for kernel in state.kernels):
        _upload_wheel(state, client, say)
    _launch(state, client, say)


def wait(state: State, client: Client, say: Say = print, poll: float = 60) -> None:
    """Until every shard is done or goes no further: ask, fetch, push what waits and the next rounds.

    Raises
    ------
    KaggleError
        Kaggle refused something, or could not be asked many times running.
    """
    troubles = 0
    while any(kernel.state in (READY, PUSHING, RUNNING, ENDED) for kernel in state.kernels):
        time.sleep(poll)
        try:
            refresh(state, client, say)
            fetch(state, client, say)
            troubles = 0
        except KaggleError as error:
            troubles += 1
            if troubles > _PATIENCE:
                raise
            say(f"{error} (trying again)")
            continue
        for shard in state.cells:
            if _goes_on(state, shard):
                _next_round(state, shard, say)
        try:
            _launch(state, client, say)
        except Refused:
            if not any(kernel.state == RUNNING for kernel in state.kernels):
                raise  # what runs is still fetched first


def refresh(state: State, client: Client, say: Say = print) -> None:
    """Ask Kaggle for each kernel that is there, or may be there because its push was cut off.

    Raises
    ------
    KaggleError
        The client failed.
    """
    for kernel in state.kernels:
        if kernel.state not in (PUSHING, RUNNING):
            continue
        try:
            session = client.session(kernel.id)
        except NotThere:
            if kernel.state == RUNNING:
                raise KaggleError(f"{kernel.id} was pushed and is not there any more: is `kaggle` logged in as "
                                  f"{state.settings.user}? If you deleted it, push again to another --out.") from None
            kernel.state = READY
        else:
            ended = session.state != SESSION_RUNNING
            kernel.state, kernel.said = ENDED if ended else RUNNING, session.message
            kernel.outcome = session.state if ended else ""
            kernel.url = kernel.url or f"https://www.kaggle.com/code/{kernel.id}"
            if ended:
                say(f"{kernel.id}: {kernel.outcome}" + (f" ({kernel.said})" if kernel.said else ""))
        state.save()


def fetch(state: State, client: Client, say: Say = print) -> None:
    """Download the grid folders of sessions that have ended, and merge the shards into the grid's folder.

    Raises
    ------
    KaggleError
        A download failed; the next call goes on with it.
    charmlib.grid.cells.GridError
        The shards are not of one grid.
    """
    ended = [kernel for kernel in state.kernels if kernel.state == ENDED]
    for kernel in ended:
        into = state.folder / kernel.place / "output"
        client.output(kernel.id, into, rf"runs/{re.escape(state.settings.name)}/")
        _judge(state, kernel)
        if not state.fetched_grid(kernel).is_dir():
            kernel.said = kernel.said or _last_words(into / f"{slug_of(kernel.title)}.log")
            say(f"{kernel.id}: no grid in its output; {kernel.said or kernel.url}")
        kernel.state = FETCHED
        state.save()
        say(f"{kernel.id}: fetched, {kernel.progress[0]} of {len(state.cells[kernel.shard])} cells done"
            + (f", failed: {', '.join(kernel.failed)}" if kernel.failed else ""))
    _merge(state, say)


def _merge(state: State, say: Say) -> None:
    """Merge what each shard got furthest with, if any of it was not merged yet."""
    best = [kernel for kernel in map(state.best, state.cells) if kernel]
    if all(kernel.merged for kernel in best):
        return
    from charmlib.grid.bring import merge_grids

    merge_grids(state.out, [state.fetched_grid(kernel) for kernel in best], say=say)
    for kernel in best:
        kernel.merged = True
    state.save()


def cells_left(state: State) -> list[str]:
    """Ids of the cells that no fetched round has finished."""
    left = []
    for shard, ids in state.cells.items():
        best = state.best(shard)
        left += best.left if best else ids
    return left


def report(state: State) -> str:
    """A line for each kernel: shard, round, how it is, what is left."""
    lines = []
    for kernel in state.kernels:
        words = [f"shard {kernel.shard}/{state.settings.shards} round {kernel.round}: {kernel.state}"]
        words += [kernel.outcome] if kernel.outcome else []
        if kernel.state == FETCHED:
            words.append(f"{kernel.progress[0]} of {len(state.cells[kernel.shard])} cells done")
        words += [f"failed: {', '.join(kernel.failed)}"] if kernel.failed else []
        words += [kernel.url] if kernel.url else []
        words += [kernel.said] if kernel.said else []
        lines.append(", ".join(words))
    return redact("\n".join(lines))


def _launch(state: State, client: Client, say: Say) -> None:
    """Push waiting kernels while sessions are free."""
    for kernel in [kernel for kernel in state.kernels if kernel.state == READY]:
        if sum(other.state in (PUSHING, RUNNING) for other in state.kernels) >= SESSIONS:
            _waits(kernel, f"{SESSIONS} sessions run", say)
            continue
        try:
            _push_one(state, kernel, client, say)
        except SessionLimit:
            break
    state.save()


def _waits(kernel: Kernel, why: str, say: Say) -> None:
    if kernel.said != why:  # once, not at each turn of a wait
        say(f"{kernel.id}: {kernel.state}, {why}")
    kernel.said = why


def _push_one(state: State, kernel: Kernel, client: Client, say: Say) -> None:
    folder = state.folder / kernel.place / "kernel"
    kernel.state = PUSHING
    state.save()
    try:
        pushed = client.push(folder, int(min(check_budget(state.settings.budget) + _GRACE, 12 * 3600)))
    except Refused as error:
        # a session that lacks its data holds this name, so the next push needs another one
        kernel.state = VOID if isinstance(error, StartedWithout) else READY
        _waits(kernel, str(error), say)
        state.save()
        raise
    kernel.state, kernel.version, kernel.url, kernel.said = RUNNING, pushed.version, pushed.url, ""
    state.save()
    say(f"{kernel.id}: pushed, {kernel.url}")


def _upload_wheel(state: State, client: Client, say: Say) -> None:
    """Upload the wheel of this checkout if Kaggle does not have it from this push."""
    folder = state.folder / "wheel"
    digest = write_dataset(folder, state.settings.user, state.settings.dataset)
    if digest != state.uploaded:
        upload(folder, f"charmlib wheel {digest}", client, say)
        state.uploaded = digest
        state.save()


def _next_round(state: State, shard: int, say: Say) -> None:
    left = state.latest(shard).left or state.cells[shard]
    kernel = state.add(shard)
    write_kernel(state, kernel)
    state.save()
    say(f"shard {shard}: round {kernel.round} for {len(left)} cells")


def _goes_on(state: State, shard: int) -> bool:
    """Whether another round is worth GPU hours unasked: cells are left that did not fail, and the last one got on."""
    rounds = [kernel for kernel in state.kernels if kernel.shard == shard and kernel.state != VOID]
    last, before = rounds[-1], rounds[-2].progress if len(rounds) > 1 else [0, 0]
    return (last.state == FETCHED and last.outcome != CANCELLED and set(last.left) > set(last.failed)
            and last.progress > before)


def _judge(state: State, kernel: Kernel) -> None:
    """Which cells of its shard a fetched kernel has left, and how far it got: done cells, then epochs."""
    folder, ids = state.fetched_grid(kernel), state.cells[kernel.shard]
    status = {cell: CellFolder(folder / cell).status for cell in ids}
    kernel.left = [cell for cell in ids if status[cell] != "done"]
    kernel.failed = [cell for cell in ids if status[cell] == "failed"]
    histories = [folder / cell / "history.csv" for cell in ids]
    epochs = sum(len(path.read_text().splitlines()) for path in histories if path.is_file())
    kernel.progress = [len(ids) - len(kernel.left), epochs]


def _last_words(log: Path, lines: int = 4) -> str:
    """The end of a session's log: JSON records with a piece of text each, or plain text."""
    if not log.is_file():
        return ""
    text = log.read_text(errors="replace")
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        text = "".join(record.get("data", "") for record in json.loads(text))
    return redact(" | ".join(line.strip() for line in text.strip().splitlines()[-lines:]))
