"""Which cell runs when: places filled as they come free, failures retried or kept, the time budget kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from charmlib.evaluation.runs import RunFolder, valid_auc
from charmlib.files import write_text
from charmlib.grid import estimate, lease
from charmlib.grid.budget import Budget, hours
from charmlib.grid.cells import Ended, GridError, epochs_done, finished
from charmlib.grid.cluster import Cluster
from charmlib.grid.spec import Cell
from charmlib.grid.worker import WRAP_UP, Outcome

_LOOK = 0.3
_LOOK_ELSEWHERE = 3.0
"""Seconds between looks at cells that another runner works on."""
_NO_WORKERS = 600.0
"""Seconds without any worker after which a cluster counts as lost."""


class Schedule:
    """Runs jobs (a cell and the dict that its worker gets) on a cluster; see :meth:`run`."""

    def __init__(self, cells: list[Cell], jobs: list[dict], folder: Path, cluster: Cluster, *, budget: Budget,
                 refresh: Callable[[], object], say: Callable[[str], None]):
        self.cells, self.folder, self.cluster = {c.id: c for c in cells}, folder, cluster
        self.budget, self._refresh, self.say = budget, refresh, say
        self.waiting = list(jobs)
        self.running: dict = {}  # Dask's future -> job
        self.elsewhere: dict[str, tuple[dict, float]] = {}  # cell -> its job, and when to look again
        self.tries: dict[str, tuple[int, int]] = {}  # cell -> epochs done at its last failure, failures since
        self.tails = {job["id"]: _Tail(Path(job["folder"]) / "log.txt") for job in jobs}
        self.total, self.over, self.start = len(jobs), 0, time.monotonic()

    def run(self) -> None:
        """Until no cell is left that may run.

        Raises
        ------
        GridError
            The disk is full, or the cluster is lost; everything finished is on disk.
        """
        seen_places = time.monotonic()
        try:
            while self.waiting or self.running or self.elsewhere:
                for future in [f for f in self.running if f.done()]:
                    self._settle(future, self.running.pop(future))
                self._look_elsewhere()
                places = self.cluster.places()
                if places or not (self.running or self.waiting):
                    seen_places = time.monotonic()
                elif time.monotonic() - seen_places > _NO_WORKERS:
                    raise GridError(f"the cluster has had no workers for {hours(_NO_WORKERS)}; start the same command again "
                                    "when it has some")
                none_fits = False
                while self.waiting and len(self.running) < places and not none_fits:
                    none_fits = not self._start_one()
                self._tell()
                if not self.running and ((none_fits and not self.elsewhere) or self.budget.left() <= 0):
                    break  # nothing that is left fits the budget; what others work on is theirs to finish
                time.sleep(_LOOK)
        except BaseException:
            self._stop()
            raise

    def _start_one(self) -> bool:
        pace = self._paces()
        job = next((j for j in self._order(pace) if self._fits(j, pace)), None)
        if job is None:
            return False
        self.waiting.remove(job)
        job = {**job, "deadline": self.budget.deadline, "scoring_seconds": pace[job["id"]].scoring}
        self.running[self.cluster.submit(job)] = job
        return True

    def _order(self, pace) -> list[dict]:
        """Longest first under a budget, so that no long one is left for the end; else as in the grid file."""
        if self.budget.seconds is None:
            return self.waiting
        return sorted(self.waiting, key=lambda job: -self._remaining(job, pace))

    def _remaining(self, job: dict, pace) -> float:
        left = estimate.remaining(self.cells[job["id"]], Path(job["folder"]), pace[job["id"]])
        return float("inf") if left is None else left

    def _fits(self, job: dict, pace) -> bool:
        left = self.budget.left()
        if left == float("inf"):
            return True
        return left > WRAP_UP + estimate.next_step(self.cells[job["id"]], Path(job["folder"]), pace[job["id"]])

    def _paces(self) -> dict[str, estimate.Pace]:
        return estimate.paces(self.folder, list(self.cells.values()))

    def _settle(self, future, job: dict) -> None:
        """What becomes of a cell whose process has ended."""
        outcome = self._outcome(future)
        cell, folder = job["id"], Path(job["folder"])
        job = {k: v for k, v in job.items() if k not in ("deadline", "scoring_seconds")}
        if outcome.ended is Ended.BUSY:
            if cell not in self.elsewhere:
                self.say(f"{outcome.words}; looked at again when that has ended")
            self.elsewhere[cell] = job, time.monotonic() + _LOOK_ELSEWHERE
            return
        self._show_log(cell)
        if outcome.ended is Ended.DISK_FULL:
            raise GridError(f"{cell}: {outcome.words}\nno space left in {folder.parent}: what was finished is kept; make room "
                            "and start the same command again")
        if outcome.ended is Ended.OUT_OF_TIME:
            words = outcome.words or "stopped at the end of the time budget; it goes on from its last finished epoch"
            self._count(f"{cell}: {words}")
            return
        if outcome.ended is not Ended.DONE and outcome.ended is not Ended.FAILED and self._may_retry(cell, folder):
            self.say(f"{cell}: {_WORDS[outcome.ended]}{f' ({outcome.words})' if outcome.words else ''}; started again")
            self.waiting.insert(0, job)
            return
        if outcome.ended is Ended.DONE:
            metrics = RunFolder(folder).metrics
            score = valid_auc(metrics)
            self._count(f"{cell}: no validation part" if metrics["valid"] is None else
                        f"{cell}: valid AUC " + ("undefined" if score != score else f"{score:.4f}"))
        else:
            self._keep_error(folder, outcome)
            self._count(f"{cell} FAILED ({outcome.words or _WORDS[outcome.ended]}); see {folder}/error.txt")
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

    def _may_retry(self, cell: str, folder: Path) -> bool:
        """Once more, and again after each time that it got further."""
        done = epochs_done(folder)
        before, failures = self.tries.get(cell, (-1, 0))
        failures = failures + 1 if done <= before else 1
        self.tries[cell] = done, failures
        return failures <= 1

    def _keep_error(self, folder: Path, outcome: Outcome) -> None:
        if (outcome.ended is Ended.FAILED and (folder / "error.txt").is_file()) or lease.holder(folder):
            return  # the cell's process wrote its own; or another works on it by now
        log = folder / "log.txt"
        last = "\n".join(log.read_text(errors="replace").splitlines()[-20:]) if log.is_file() else "(no log)"
        folder.mkdir(parents=True, exist_ok=True)
        twice = "" if outcome.ended is Ended.FAILED else ", twice without getting further"
        write_text(folder / "error.txt", f"{_WORDS[outcome.ended]}{twice}\n{outcome.words}\n\nthe end of its log:\n{last}\n")

    def _look_elsewhere(self) -> None:
        """Take back cells whose other runner has ended or finished them."""
        for cell, (job, due) in list(self.elsewhere.items()):
            if time.monotonic() < due:
                continue
            folder = Path(job["folder"])
            if finished(folder, job["hash"]):
                del self.elsewhere[cell]
                self._count(f"{cell}: done by another runner")
                self._refresh_board()
            elif not lease.holder(folder):
                del self.elsewhere[cell]
                self.waiting.append(job)
            else:
                self.elsewhere[cell] = job, time.monotonic() + _LOOK_ELSEWHERE

    def _count(self, text: str) -> None:
        self.over += 1
        pace = self._paces()
        left = sum(self._remaining(job, pace) for job in [*self.waiting, *self.running.values()])
        more = f", at most {hours(left / max(1, self.cluster.places()))} left" if 0 < left < float("inf") else ""
        self.say(f"[{self.over}/{self.total}] {text}{more}")

    def _refresh_board(self) -> None:
        start = time.monotonic()
        self._refresh()
        self.budget.saw_report(time.monotonic() - start)

    def _tell(self) -> None:
        for job in self.running.values():
            self._show_log(job["id"])

    def _show_log(self, cell: str) -> None:
        for line in self.tails[cell].new():
            self.say(f"  {cell}  {line}")

    def _stop(self) -> None:
        """End what runs, politely: the epoch in hand is lost, nothing else."""
        try:
            self.cluster.client.cancel(list(self.running), force=True)
        except Exception:  # a lost scheduler cannot be told; its workers notice by themselves
            return
        end = time.monotonic() + 12.0
        while time.monotonic() < end and any(lease.holder(job["folder"]) for job in self.running.values()):
            time.sleep(0.1)


_WORDS = {Ended.HUNG: "showed no sign of life and was ended", Ended.CRASHED: "its process or kernel was killed",
          Ended.LEASE_LOST: "lost its folder to another process", Ended.STOPPED: "was stopped from outside",
          Ended.FAILED: "failed"}


class _Tail:
    """The lines that were added to a log since the last look."""

    def __init__(self, path: Path):
        self.path = path
        self.at = path.stat().st_size if path.is_file() else 0

    def new(self) -> list[str]:
        if not self.path.is_file():
            return []
        with open(self.path, errors="replace") as file:
            file.seek(self.at)
            text = file.read()
        whole, newline, _ = text.rpartition("\n")
        self.at += len((whole + newline).encode())
        return whole.splitlines() if newline else []
