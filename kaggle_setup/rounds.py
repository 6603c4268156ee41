"""Pushing the shards of a grid, round after round, and bringing their cells home.

Every step is written down before and after it is done (:mod:`kaggle_setup.state`), so a killed push goes on and pushes
nothing twice: a kernel that was being pushed is asked for before it is pushed again.
"""

import contextlib
import json
import re
import time
from pathlib import Path

from charmlib.grid.bring import merge_grids
from charmlib.grid.budget import seconds_of
from kaggle_setup import client
from kaggle_setup.kernel import slug_of
from kaggle_setup.prepare import SESSION_HOURS, write_kernel
from kaggle_setup.redaction import redact, say
from kaggle_setup.state import ENDED, FETCHED, PUSHING, READY, RUNNING, VOID, Kernel, State
from kaggle_setup.wheel import upload, write_dataset

SESSIONS = 2  # of a GPU, that Kaggle runs at once for an account
_GRACE, _PATIENCE = 1800, 10  # seconds beyond the budget; failures running


def push(state: State, asked: bool = True) -> None:
    """Bring the state up to date, fetch what has ended, then push what can run now; more rounds for shards with cells left.

    Unless a person ``asked``, a shard gets another round only where its last one got further than the one before. Raises
    Refused where Kaggle did not take a kernel or the wheel; what went before it counts.
    """
    refresh(state)
    fetch(state)
    for shard in state.shards:
        latest = state.rounds(shard)[-1]
        left = state.left(shard) if latest.state in (FETCHED, VOID) else []
        if left and (asked or _worth_a_round(state, latest)):
            latest = state.add(shard, latest.cells)
            write_kernel(state, latest)
            _becomes(state, latest, READY, f"round {latest.round} for {len(left)} cells")
    waiting = [kernel for kernel in state.kernels if kernel.state == READY]
    if asked and waiting:
        wheel = state.folder / "wheel"
        digest = write_dataset(wheel, state.settings["user"], state.settings["dataset"])
        if digest != state.uploaded:
            upload(wheel, digest)
            state.uploaded = digest
    for kernel in waiting:
        under_way = sum(other.state in (PUSHING, RUNNING) for other in state.kernels)
        if under_way >= SESSIONS:
            _becomes(state, kernel, READY, f"{SESSIONS} sessions run")
            continue
        _becomes(state, kernel, PUSHING, kernel.said)
        try:
            seconds = min(seconds_of(state.settings["budget"]) + _GRACE, SESSION_HOURS * 3600)
            kernel.url = client.push(state.place(kernel) / "kernel", int(seconds))
        except client.Refused as error:
            # a session that lacks its data holds this name, so the next push needs another one
            _becomes(state, kernel, VOID if isinstance(error, client.StartedWithout) else READY, str(error))
            if isinstance(error, client.SessionLimit) or (under_way and not asked):
                return  # what runs is still fetched first
            raise
        _becomes(state, kernel, RUNNING)


def wait(state: State, poll: float = 60) -> None:
    """Push, fetch and push again until every shard is done or goes no further, with ``poll`` seconds between two looks.

    Raises KaggleError where Kaggle refused a push and nothing runs, or could not be asked many times running.
    """
    troubles = 0
    while any(kernel.state in (READY, PUSHING, RUNNING, ENDED) for kernel in state.kernels):
        time.sleep(poll)
        try:
            push(state, asked=False)
            troubles = 0
        except client.KaggleError as error:
            troubles += 1
            under_way = any(kernel.state in (PUSHING, RUNNING, ENDED) for kernel in state.kernels)
            if troubles > _PATIENCE or (isinstance(error, client.Refused) and not under_way):
                raise
            say(f"{error} (trying again)")


def refresh(state: State) -> None:
    """Ask Kaggle for each kernel that is there, or may be there because its push was cut off; saves nothing."""
    for kernel in [kernel for kernel in state.kernels if kernel.state in (PUSHING, RUNNING)]:
        try:
            kernel.outcome, kernel.said = client.session(kernel.id)
        except client.NotThere:
            if kernel.state == RUNNING:
                raise client.KaggleError(f"{kernel.id} was pushed and is not there any more: is `kaggle` logged in as "
                                         f"{state.settings['user']}? If you deleted it, push again to another --out.") from None
            kernel.state = READY
            continue
        kernel.state = ENDED if kernel.outcome else RUNNING
        kernel.url = kernel.url or f"https://www.kaggle.com/code/{kernel.id}"


def fetch(state: State) -> None:
    """Download the grid folders of sessions that have ended, and merge what each shard got furthest with.

    Raises KaggleError where a download failed; the next call goes on with it. Raises GridError for shards of different grids.
    """
    state.save()
    for kernel in [kernel for kernel in state.kernels if kernel.state == ENDED]:
        into = state.place(kernel) / "output"
        client.output(kernel.id, into, rf"^runs/{re.escape(state.settings['name'])}/(?!(.*/)?\.\./)")  # no name leads elsewhere
        said = kernel.said
        if not state.grid(kernel).is_dir():
            said = f"no grid in its output; {said or _last_words(into / f'{slug_of(kernel.title)}.log')}"
        _becomes(state, kernel, FETCHED, said)
    best = [kernel for kernel in map(state.best, state.shards) if kernel]
    if not all(kernel.merged for kernel in best):
        merge_grids(state.folder.parent, [state.grid(kernel) for kernel in best], say=say)
        for kernel in best:
            kernel.merged = True
        state.save()


def report(state: State) -> None:
    """Print a line for each kernel: how it is, how far it got, its address, why it waits or failed."""
    for kernel in state.kernels:
        say(_line(state, kernel))


def _line(state: State, kernel: Kernel) -> str:
    cells = state.cells(kernel) if kernel.state == FETCHED else []
    failed = ", ".join(cell.name for cell in cells if cell.status == "failed")
    words = [f"{kernel.id}: {kernel.state}", cells and f"{sum(cell.done for cell in cells)} of {len(cells)} cells done",
             failed and f"failed: {failed}", kernel.outcome, kernel.url, kernel.said]
    return ", ".join(filter(None, words))


def _becomes(state: State, kernel: Kernel, new: str, said: str = "") -> None:
    """Write down how a kernel is now; print it, but at each turn of a wait only a new reason."""
    news = said != kernel.said or new not in (READY, PUSHING)
    kernel.state, kernel.said = new, said
    state.save()
    if news:
        say(_line(state, kernel))


def _worth_a_round(state: State, latest: Kernel) -> bool:
    """Whether cells are left that did not fail, and the last round got further than the one before."""
    before = [state.progress(kernel) for kernel in state.rounds(latest.shard)[:-1] if kernel.state == FETCHED]
    return (latest.state == FETCHED and latest.outcome != client.CANCELLED
            and any(cell.status in ("started", "pending") for cell in state.cells(latest))
            and state.progress(latest) > (before[-1] if before else (0, 0)))


def _last_words(log: Path, lines: int = 4) -> str:
    """The end of a session's log: JSON records with a piece of text each, or plain text."""
    text = log.read_text(errors="replace") if log.is_file() else ""
    with contextlib.suppress(ValueError, AttributeError, TypeError):
        text = "".join(record.get("data", "") for record in json.loads(text))
    return redact(" | ".join(line.strip() for line in text.strip().splitlines()[-lines:]))
