"""Which cell runs when: seats filled as they come free, failures retried or kept, the time budget kept."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from charmlib.evaluation.runs import valid_auc
from charmlib.files import write_text
from charmlib.grid import lease
from charmlib.grid.budget import Budget, hours, next_step, paces, remaining
from charmlib.grid.cells import CellFolder, Ended, GridError
from charmlib.grid.cluster import Cluster
from charmlib.grid.sharing import rest
from charmlib.grid.spec import Cell
from charmlib.grid.worker import WRAP_UP

_LOOK = 0.3  # seconds between looks at the cluster
_LOOK_ELSEWHERE = 3.0  # seconds between looks at a cell of another runner
_NO_WORKERS = 600.0  # seconds without any worker after which a cluster counts as lost
_WORDS = {Ended.HUNG: "showed no sign of life and was ended", Ended.CRASHED: "its process or kernel was killed",
          Ended.LEASE_LOST: "lost its folder to another process", Ended.STOPPED: "was stopped from outside (SIGTERM)",
          Ended.FAILED: "failed"}


class Schedule:
    """Runs jobs on a cluster; see :meth:`run`. A job is the dict that a cell's worker gets, with ``members`` if other cells
    share its training (:func:`charmlib.grid.sharing.shared_jobs`); ``cells`` are all of the grid."""

    def __init__(self, cells: Sequence[Cell], jobs: list[dict], folder: Path, cluster: Cluster, *, budget: Budget,
                 refresh: Callable[[], object], say: Callable[[str], None]):
        self.cells, self.folder, self.cluster = {cell.id: cell for cell in cells}, folder, cluster
        self.budget, self._refresh, self.say = budget, refresh, say
        self.waiting, self.over = list(jobs), 0
        cells = [one for job in jobs for one in (job, *job.get("members", ()))]
        self.total = len(cells)
        self.running: dict = {}  # Dask's future -> job
        self.elsewhere: dict[str, float] = {}  # waiting cell of another runner -> when to look again
        self.progress: dict[str, int] = {}  # cell -> its progress when it was started again
        self.shown = {job["id"]: len(_log(CellFolder(job["folder"]))) for job in cells}  # lines of its log

    def run(self) -> None:
        """Run until every cell is finished, failed, or out of the budget.

        Raises GridError if the disk is full or the cluster is lost; everything finished is on disk.
        """
        seen_seats = time.monotonic()
        try:
            while self.waiting or self.running:
                for future in [f for f in self.running if f.done()]:
                    self._settle(future, self.running.pop(future))
                seats, some_start = self.cluster.seats(), True
                if seats:
                    seen_seats = time.monotonic()
                elif time.monotonic() - seen_seats > _NO_WORKERS:
                    raise GridError(f"the cluster has had no workers for {hours(_NO_WORKERS)}; start the same command again "
                                    "when it has some")
                while self.waiting and len(self.running) < seats and some_start:
                    some_start = self._start_one()
                for job in self.running.values():
                    self._show_log(CellFolder(job["folder"]))
                if not self.running and (not (some_start or self.elsewhere) or self.budget.left() <= 0):
                    break  # no cell fits the budget; other runners finish theirs
                time.sleep(_LOOK)
        except BaseException:
            self._stop()
            raise

    def _start_one(self) -> bool:
        """Start the next free cell that fits the budget: the longest under a budget, else in the order of the grid file."""
        free = [job for job in self.waiting if not self._is_elsewhere(job)]
        if not free:
            return False
        pace, runs = paces(self.folder, self.cells.values()), {job["id"]: CellFolder(job["folder"]) for job in free}
        if self.budget.seconds is not None:
            free.sort(key=lambda job: remaining(self.cells[job["id"]], runs[job["id"]], pace[job["id"]]), reverse=True)
        for job in free:
            cell = runs[job["id"]]
            done = cell.done  # by another runner
            if not done and self.budget.left() <= WRAP_UP + next_step(self.cells[cell.name], cell, pace[cell.name]):
                continue
            self.waiting.remove(job)
            if done:
                self._count(f"{cell.name}: done by another runner", board=True)
                self._settle_members(job)
            else:
                for member in job.get("members", ()):  # of an earlier try
                    CellFolder(member["folder"]).error_file.unlink(missing_ok=True)
                start = {**job, "deadline": self.budget.deadline, "scoring_seconds": pace[cell.name].scoring}
                self.running[self.cluster.submit(start)] = job
            return True
        return False

    def _is_elsewhere(self, job: dict) -> bool:
        cell, now = CellFolder(job["folder"]), time.monotonic()
        if now < self.elsewhere.get(cell.name, 0.0):
            return True
        of_training = job.get("tape", {}).get("folder", cell)
        if cell.done_as(job["hash"]) or not (holder := lease.holder(cell) or lease.holder(of_training)):
            self.elsewhere.pop(cell.name, None)
            return False
        if cell.name not in self.elsewhere:
            self.say(f"{cell.name} is being worked on by {holder}; looked at again when that has ended")
        self.elsewhere[cell.name] = now + _LOOK_ELSEWHERE
        return True

    def _settle(self, future, job: dict) -> None:
        ended, words = self._outcome(future)
        cell = CellFolder(job["folder"])
        self._show_log(cell)
        if ended is Ended.DISK_FULL:
            raise GridError(f"{cell.name}: {words}\nno space left in {self.folder}: finished epochs and cells are kept; make "
                            "room and start the same command again")
        if cell.done:
            self._count_done(cell)
            if ended is not Ended.DONE:  # another cell of its training
                self.say(f"the training of {cell.name}: {words or _WORDS[ended]}")
        elif ended is Ended.OUT_OF_TIME:
            self._count(f"{cell.name}: "
                        + (words or "stopped at the end of the time budget; it goes on from its last finished epoch"))
        elif ended is Ended.BUSY:
            self.say(f"{words}; looked at again when that has ended")
            self.elsewhere[cell.name] = time.monotonic() + _LOOK_ELSEWHERE
            self.waiting.append(job)
        elif ended is not Ended.FAILED and cell.progress > self.progress.get(cell.name, -1):
            self.progress[cell.name] = cell.progress
            self.say(f"{cell.name}: {_WORDS[ended]}{f' ({words})' if words else ''}; started again")
            self.waiting.insert(0, job)
        else:
            self._keep_error(cell, ended, words)
            said = [words] if words and ended is Ended.FAILED else filter(None, [_WORDS[ended], words])
            self._count(f"{cell.name} FAILED ({', '.join(said)}); see {cell.error_file}", board=True)
        if job not in self.waiting:
            self._settle_members(job, again=ended is not Ended.OUT_OF_TIME)

    def _settle_members(self, job: dict, again: bool = True) -> None:
        """Count the other cells of a job's training; if ``again``, those that it has left wait for a job of their own."""
        failed = []
        for member in job.get("members", ()):
            cell = CellFolder(member["folder"])
            if cell.status == "failed":
                failed.append(member)
                self._count(f"{cell.name} FAILED ({cell.reason}); see {cell.error_file}", board=True)
            elif cell.done:
                self._count_done(cell)
        if again and (left := rest(job, without=failed)):
            self.waiting.append(left)

    def _count_done(self, cell: CellFolder) -> None:
        score = valid_auc(cell.metrics)
        self._count(f"{cell.name}: no validation part" if cell.metrics["valid"] is None else
                    f"{cell.name}: valid AUC " + ("undefined" if score != score else f"{score:.4f}"), board=True)

    def _outcome(self, future) -> tuple[Ended, str]:
        if future.status == "finished":
            return future.result()
        error = future.exception() if future.status == "error" else None
        if error is not None and type(error).__name__ == "KilledWorker":  # several workers died under it
            return Ended.CRASHED, "its Dask workers were killed"
        if error is not None:
            return Ended.FAILED, f"the worker failed: {type(error).__name__}: {error}"
        if self.cluster.client.status != "running":
            raise GridError("the connection to the Dask scheduler is lost; everything finished is on disk, start the same "
                            "command again")
        return Ended.CRASHED, "the scheduler dropped it"

    def _keep_error(self, cell: CellFolder, ended: Ended, words: str) -> None:
        if (ended is Ended.FAILED and cell.error_file.is_file()) or lease.holder(cell):
            return  # the cell's process wrote its own; or another process works on the cell by now
        cell.path.mkdir(parents=True, exist_ok=True)
        twice = "" if ended is Ended.FAILED else ", twice without getting further"
        log = _log(cell)[-20:] or ["(no log)"]
        write_text(cell.error_file, "\n".join([f"{_WORDS[ended]}{twice}", words, "", "the end of its log:", *log, ""]))

    def _count(self, text: str, *, board: bool = False) -> None:
        """Say that a cell is over, and how long the others take; bring the leaderboard up to date."""
        self.over += 1
        pace = paces(self.folder, self.cells.values())
        left = sum(remaining(self.cells[job["id"]], CellFolder(job["folder"]), pace[job["id"]])
                   for job in [*self.waiting, *self.running.values()])
        more = f", at most {hours(left / max(1, self.cluster.seats()))} left" if 0 < left < float("inf") else ""
        self.say(f"[{self.over}/{self.total}] {text}{more}")
        if board:
            start = time.monotonic()
            self._refresh()
            self.budget.saw_report(time.monotonic() - start)

    def _show_log(self, cell: CellFolder) -> None:
        lines = _log(cell)
        for line in lines[self.shown[cell.name]:]:
            self.say(f"  {cell.name}  {line}")
        self.shown[cell.name] = len(lines)

    def _stop(self) -> None:
        try:
            self.cluster.client.cancel(list(self.running), force=True)
        except Exception:  # a lost scheduler cannot be told; its workers notice by themselves
            return
        end = time.monotonic() + 12.0
        while time.monotonic() < end and any(lease.holder(job["folder"]) for job in self.running.values()):
            time.sleep(0.1)


def _log(cell: CellFolder) -> list[str]:
    """The whole lines of its log."""
    return cell.log_file.read_text(errors="replace").split("\n")[:-1] if cell.log_file.is_file() else []
