"""Which cell runs when: seats filled as they come free, failures retried or kept, the time budget kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from charmlib.evaluation.runs import valid_auc
from charmlib.files import write_text
from charmlib.grid.budget import Budget, hours, next_step, paces, remaining
from charmlib.grid.cells import CellFolder, Ended, GridError
from charmlib.grid.cluster import Cluster
from charmlib.grid.spec import Cell
from charmlib.grid.worker import WRAP_UP, Outcome

_LOOK = 0.3
_LOOK_ELSEWHERE = 3.0
"""Seconds between looks at cells of another runner."""
_NO_WORKERS = 600.0
"""Seconds without any worker after which a cluster counts as lost."""
_WORDS = {Ended.HUNG: "showed no sign of life and was ended", Ended.CRASHED: "its process or kernel was killed",
          Ended.LEASE_LOST: "lost its folder to another process", Ended.STOPPED: "was stopped from outside",
          Ended.FAILED: "failed"}


class Schedule:
    """Runs jobs on a cluster; see :meth:`run`. A job is the dict that a cell's worker gets; ``cells`` are all of the grid."""

    def __init__(self, cells: Sequence[Cell], jobs: list[dict], folder: Path, cluster: Cluster, *, budget: Budget,
                 refresh: Callable[[], object], say: Callable[[str], None]):
        self.cells, self.folder, self.cluster = {cell.id: cell for cell in cells}, folder, cluster
        self.budget, self._refresh, self.say = budget, refresh, say
        self.waiting, self.total, self.over = list(jobs), len(jobs), 0
        self.running: dict = {}  # Dask's future -> job
        self.elsewhere: dict[str, tuple[dict, float]] = {}  # cell -> its job, and when to look again
        self.tries: dict[str, tuple[int, int]] = {}  # cell -> progress at its last failure, failures since
        self.tails = {job["id"]: _Tail(CellFolder(job["folder"]).log_file) for job in jobs}

    def run(self) -> None:
        """Run until every cell is finished, failed, or out of the budget.

        Raises
        ------
        GridError
            The disk is full, or the cluster is lost; everything finished is on disk.
        """
        seen_seats = time.monotonic()
        try:
            while self.waiting or self.running or self.elsewhere:
                for future in [f for f in self.running if f.done()]:
                    self._settle(future, self.running.pop(future))
                self._look_elsewhere()
                seats = self.cluster.seats()
                if seats or not (self.running or self.waiting):
                    seen_seats = time.monotonic()
                elif time.monotonic() - seen_seats > _NO_WORKERS:
                    raise GridError(f"the cluster has had no workers for {hours(_NO_WORKERS)}; start the same command again "
                                    "when it has some")
                some_fit = True
                while self.waiting and len(self.running) < seats and some_fit:
                    some_fit = self._start_one()
                for job in self.running.values():
                    self._show_log(job["id"])
                if not self.running and (not (some_fit or self.elsewhere) or self.budget.left() <= 0):
                    break  # no cell fits the budget; other runners finish theirs
                time.sleep(_LOOK)
        except BaseException:
            self._stop()
            raise

    def _start_one(self) -> bool:
        """Start the next cell that fits the budget: the longest under a budget, else in the order of the grid file."""
        pace = paces(self.folder, self.cells.values())
        order = self.waiting if self.budget.seconds is None else sorted(
            self.waiting, key=lambda job: self._remaining(job, pace), reverse=True)
        for job in order:
            cell = job["id"]
            if self.budget.left() > WRAP_UP + next_step(self.cells[cell], CellFolder(job["folder"]), pace[cell]):
                self.waiting.remove(job)
                job = {**job, "deadline": self.budget.deadline, "scoring_seconds": pace[cell].scoring}
                self.running[self.cluster.submit(job)] = job
                return True
        return False

    def _remaining(self, job: dict, pace: dict) -> float:
        left = remaining(self.cells[job["id"]], CellFolder(job["folder"]), pace[job["id"]])
        return float("inf") if left is None else left

    def _settle(self, future, job: dict) -> None:
        """Record how a cell's process ended, or have it started again."""
        ended, words = self._outcome(future)
        cell = CellFolder(job["folder"])
        if ended is Ended.BUSY:
            if cell.name not in self.elsewhere:
                self.say(f"{words}; looked at again when that has ended")
            self.elsewhere[cell.name] = job, time.monotonic() + _LOOK_ELSEWHERE
            return
        self._show_log(cell.name)
        if ended is Ended.DISK_FULL:
            raise GridError(f"{cell.name}: {words}\nno space left in {self.folder}: finished epochs and cells are kept; make "
                            "room and start the same command again")
        if ended is Ended.OUT_OF_TIME:
            self._count(f"{cell.name}: "
                        + (words or "stopped at the end of the time budget; it goes on from its last finished epoch"))
        elif ended is Ended.DONE:
            score = valid_auc(cell.metrics)
            self._count(f"{cell.name}: no validation part" if cell.metrics["valid"] is None else
                        f"{cell.name}: valid AUC " + ("undefined" if score != score else f"{score:.4f}"))
            self._refresh_board()
        elif ended is not Ended.FAILED and self._may_retry(cell):
            self.say(f"{cell.name}: {_WORDS[ended]}{f' ({words})' if words else ''}; started again")
            self.waiting.insert(0, job)
        else:
            self._keep_error(cell, ended, words)
            self._count(f"{cell.name} FAILED ({words or _WORDS[ended]}); see {cell.error_file}")
            self._refresh_board()

    def _outcome(self, future) -> Outcome:
        if future.status == "finished":
            return future.result()
        error = future.exception() if future.status == "error" else None
        if error is not None and type(error).__name__ == "KilledWorker":  # several workers died under it
            return Outcome(Ended.CRASHED, "its Dask workers were killed")
        if error is not None:
            return Outcome(Ended.FAILED, f"the worker failed: {type(error).__name__}: {error}")
        if self.cluster.client.status != "running":
            raise GridError("the connection to the Dask scheduler is lost; everything finished is on disk, start the same "
                            "command again")
        return Outcome(Ended.CRASHED, "the scheduler dropped it")

    def _may_retry(self, cell: CellFolder) -> bool:
        """Once, and again each time that the cell got further."""
        before, failures = self.tries.get(cell.name, (-1, 0))
        failures = failures + 1 if cell.progress <= before else 1
        self.tries[cell.name] = cell.progress, failures
        return failures <= 1

    def _keep_error(self, cell: CellFolder, ended: Ended, words: str) -> None:
        if (ended is Ended.FAILED and cell.error_file.is_file()) or cell.holder:
            return  # the cell's process wrote its own; or another process works on the cell by now
        log = cell.log_file.read_text(errors="replace").splitlines()[-20:] if cell.log_file.is_file() else ["(no log)"]
        cell.path.mkdir(parents=True, exist_ok=True)
        twice = "" if ended is Ended.FAILED else ", twice without getting further"
        write_text(cell.error_file, "\n".join([f"{_WORDS[ended]}{twice}", words, "", "the end of its log:", *log, ""]))

    def _look_elsewhere(self) -> None:
        """Take back cells that another runner has finished or left."""
        for name, (job, due) in list(self.elsewhere.items()):
            if time.monotonic() < due:
                continue
            cell = CellFolder(job["folder"])
            if cell.done_as(job["hash"]):
                del self.elsewhere[name]
                self._count(f"{name}: done by another runner")
                self._refresh_board()
            elif not cell.holder:
                del self.elsewhere[name]
                self.waiting.append(job)
            else:
                self.elsewhere[name] = job, time.monotonic() + _LOOK_ELSEWHERE

    def _count(self, text: str) -> None:
        self.over += 1
        pace = paces(self.folder, self.cells.values())
        left = sum(self._remaining(job, pace) for job in [*self.waiting, *self.running.values()])
        more = f", at most {hours(left / max(1, self.cluster.seats()))} left" if 0 < left < float("inf") else ""
        self.say(f"[{self.over}/{self.total}] {text}{more}")

    def _refresh_board(self) -> None:
        start = time.monotonic()
        self._refresh()
        self.budget.saw_report(time.monotonic() - start)

    def _show_log(self, cell: str) -> None:
        for line in self.tails[cell].new():
            self.say(f"  {cell}  {line}")

    def _stop(self) -> None:
        """End all running cells politely: only unfinished epochs are lost."""
        try:
            self.cluster.client.cancel(list(self.running), force=True)
        except Exception:  # a lost scheduler cannot be told; its workers notice by themselves
            return
        end = time.monotonic() + 12.0
        while time.monotonic() < end and any(CellFolder(job["folder"]).holder for job in self.running.values()):
            time.sleep(0.1)


class _Tail:
    """The whole lines added to a log since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.at = path.stat().st_size if path.is_file() else 0

    def new(self) -> list[str]:
        if not self.path.is_file():
            return []
        with open(self.path, "rb") as file:
            file.seek(self.at)
            text = file.read()
        whole = text[:text.rfind(b"\n") + 1]
        self.at += len(whole)
        return whole.decode(errors="replace").splitlines()
