"""Runs the phases of a recipe; training can stop and continue after any epoch."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner

from charmlib import session
from charmlib.training.callbacks import EpochRecord, KeepBest, RestoreScaler, SaveProgress, SeedEpoch, Trains
from charmlib.training.checkpoint import differences, fill, load_resume, save_resume
from charmlib.training.recipes import Phase, epochs_before

FORMAT = 2


class PhaseRunner:
    """Runs phases in turn and saves after every epoch; a resumed run ends in the same bits as an uninterrupted one.

    Parameters
    ----------
    make_learner : callable
        Phase -> Learner around the one network.
    resume_path : Path
        ``resume.pt``.
    identity : dict
        Settings in which the file and this run must agree (parameters, hash of the split).
    monitor, seed
        See :mod:`charmlib.params`. Without a validation part ``monitor`` is None, and each stage keeps its last epoch.
    rate : float
        The learning rate of stage 1, kept for a resumed run.
    on_row : callable
        Called with the history so far after each epoch.
    bars : bool
        Whether to show fastai's progress bars.
    """

    def __init__(self, make_learner: Callable[[Phase], Learner], net: torch.nn.Module, resume_path: Path, identity: dict, *,
                 monitor: str | None, seed: int, rate: float | None = None, on_row: Callable = lambda history: None,
                 bars: bool = False):
        self.make_learner, self.net, self.path, self.identity = make_learner, net, resume_path, identity
        self.monitor, self.seed, self.rate, self.on_row, self.bars = monitor, seed, rate, on_row, bars
        self.history: list[dict] = []

    def saved(self, resume: bool) -> dict | None:
        """The resume state if there is one that belongs to this run.

        Raises
        ------
        ValueError
            The file is of another format, other parameters or another split; says which differ.
        """
        state = load_resume(self.path) if resume else None
        if state is None:
            return None
        wrong = differences(state["identity"], self.identity) if state["format"] == FORMAT else f"format {state['format']}"
        if wrong:
            raise ValueError(f"{self.path} belongs to a run with other settings ({wrong}). Name another run_dir, or say "
                             "resume=False to train from the start.")
        return state

    def run(self, plan: Sequence[Phase], state: dict | None = None) -> list[dict]:
        """Train; returns the history. The network ends with the weights of the best epoch of its last stage.

        Raises
        ------
        charmlib.session.OutOfTime
            A deadline is set, and the next epoch would not fit; everything finished is saved.
        """
        done = next((i for i, phase in enumerate(plan) if state and phase.name == state["phase"]), 0)
        self.history = list(state["history"]) if state else []
        learner, best, longest = None, None, 0.0
        for i, phase in enumerate(plan[done:], start=done):
            resumed = state if i == done else None
            if learner is None or phase.stage != plan[i - 1].stage:
                learner = None  # frees what it holds on the device
                learner, best = self.make_learner(phase), None
            if phase.sets:
                self.net.enter(**phase.sets)
            Trains(phase.trains, phase.train_norms).apply(learner)
            if resumed:
                best = resumed["best"]
                fill(self.net, resumed["model"], str(self.path))
                learner.opt.load_state_dict(resumed["opt"])
            if not (resumed and resumed["over"]):
                session.stop_unless(longest, phase.name)
                best, longest = self._fit(learner, phase, epochs_before(plan, phase), best, resumed)
            if i + 1 == len(plan) or plan[i + 1].stage != phase.stage:
                fill(self.net, best["state"], "the best epoch")
        return self.history

    def _fit(self, learner: Learner, phase: Phase, before: int, best: dict | None, state: dict | None) -> tuple[dict, float]:
        """Train a phase; returns its best epoch, and the seconds of its longest with a margin."""
        start = state["epochs"] if state else 0
        keep = KeepBest(self.monitor, phase.patience, start=start)
        if best is not None:
            keep.best, keep.state = best["value"], best["state"]
            keep.waited = best["waited"] if state else 0

        def kept() -> dict:
            return {"value": keep.best, "waited": keep.waited, "state": keep.state}

        def save(epochs: int, over: bool) -> None:
            scaler = getattr(learner, "scaler", None)
            save_resume(self.path, {
                "format": FORMAT, "identity": self.identity, "phase": phase.name, "epochs": epochs, "over": over,
                "model": self.net.state_dict(), "opt": learner.opt.state_dict(), "best": kept(),
                "scaler": scaler.state_dict() if scaler is not None else None, "rate": self.rate, "history": self.history})

        progress = SaveProgress(save, start=start)
        callbacks = [SeedEpoch(self.seed, phase.name), Trains(phase.trains, phase.train_norms),
                     EpochRecord(phase.stage, self.history, self.on_row, before=before, start=start), keep, progress,
                     RestoreScaler(state["scaler"] if state else None)]
        hidden = () if self.bars else learner._grab_cbs(ProgressCallback)
        with learner.no_logging(), learner.removed_cbs(hidden):
            learner.fit_one_cycle(phase.epochs, phase.lr, cbs=callbacks, start_epoch=start, **phase.cycle)
        if keep.state is None:
            raise ValueError(f"{phase.name}: {self.monitor} was not a number in any epoch; lower the learning rate "
                             f"(now {phase.lr}) or check the labels")
        return kept(), progress.margin * progress.longest
