"""Runs the phases of a recipe; training can stop and continue after any epoch."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastcore.basics import store_attr

from charmlib import session
from charmlib.evaluation.metrics import NotFinite
from charmlib.files import Damaged
from charmlib.params import PARAMS
from charmlib.training.callbacks import EpochRecord, FallingRate, KeepProgress, SeedEpoch, Trains, ValidatesFrom
from charmlib.training.checkpoint import differences, fill, load_resume, save_resume
from charmlib.training.recipes import Phase, epochs_before, validations
from charmlib.training.tape import Tape

FORMAT = 7


class PhaseRunner:
    """Runs phases in turn and saves after every epoch; a resumed run ends in the same bits as an uninterrupted one.

    ``make_learner`` makes a Learner around the one network from a phase. ``path`` is that of ``resume.pt``, ``identity`` holds
    the settings in which the file and this run must agree, and ``rate`` is the learning rate of stage 1, kept for a resumed
    run. With a ``tape`` (:class:`charmlib.training.tape.Tape`), which holds all epochs, no ``resume.pt`` is written.
    ``monitor`` is the figure that chooses a stage's epoch, or 'last', which validates no other epoch. ``on_row`` gets the
    history so far after each epoch.
    """

    def __init__(self, make_learner: Callable[[Phase], Learner], net: torch.nn.Module, path: Path, identity: dict, *,
                 monitor: str, seed: int, rate: float | None, on_row: Callable, bars: bool, tape: Tape | None = None):
        store_attr()

    def saved(self, resume: bool) -> dict | None:
        """The resume state if there is one that belongs to this run; ValueError, naming the differences, for another's.

        In a grid a damaged file is set aside with a line, and the cell starts again. Elsewhere a person decides: Damaged.
        """
        try:
            if not resume or self.tape or (state := load_resume(self.path)) is None:
                return None
        except Damaged as error:
            if not session.in_grid():
                raise
            print(f"{error}. It is kept as {self.path.name}.damaged, and the cell starts again", flush=True)
            return os.replace(self.path, f"{self.path}.damaged")
        wrong = differences(state["identity"], self.identity) if state.get("format") == FORMAT else \
            f"format {state.get('format')}"
        if wrong:
            raise ValueError(f"{self.path} belongs to a run with other settings ({wrong}). Name another run_dir, or say "
                             "resume=False to train from the start.")
        return state

    def run(self, plan: Sequence[Phase], state: dict | None = None, cbs: Sequence = ()) -> list[dict]:
        """Train; returns the history. The network ends with the weights of the best epoch of its last stage.

        Raises :class:`charmlib.session.OutOfTime` if the next epoch would not end before the deadline; all finished are saved.
        """
        done = next((i for i, phase in enumerate(plan) if state and phase.name == state["phase"]), 0)
        self.history = list(state["history"]) if state else []
        if self.tape:
            self.tape.at, self.tape.trained = self.tape.training, 0
        learner, longest = None, 0.0
        for i, phase in enumerate(plan[done:], start=done):
            resumed = state if i == done else None
            if learner is None or phase.stage != plan[i - 1].stage:
                learner = None  # frees what it holds on the device
                learner = self.make_learner(phase)
                self.best = {"value": float("inf"), "mark": float("inf"), "state": None, "raw": {}, "at": ""}
            if phase.sets:
                self.net.enter(**phase.sets)
            Trains(phase.trains, phase.train_norms).apply(learner)
            self.best |= {"waited": 0, "values": []}
            if resumed:
                self.best = resumed["best"]
                fill(self.net, resumed["model"], str(self.path))
                learner.opt.load_state_dict(resumed["opt"])
            if not (resumed and resumed["over"]):
                session.stop_unless(longest, phase.name)
                before = learner.loss_mode.before = epochs_before(plan, phase)
                learner.loss_mode.epochs = sum(p.epochs for p in plan if p.stage == phase.stage)
                longest = self._fit(learner, phase, before, validations(plan, self.monitor)[phase.name],
                                    resumed or {"epochs": 0, "scaler": None}, cbs)
            if last := i + 1 == len(plan) or plan[i + 1].stage != phase.stage:
                # the next stage goes on from the weights whose mean was scored best
                own = self.best["raw"] if i + 1 < len(plan) else {}
                fill(self.net, self.best["state"] | own, "the best epoch")
                ended = self.history[-1]["epoch"] < epochs_before(plan, phase) + phase.epochs
                if i + 1 == len(plan) and self.monitor == "last" and ended:
                    learner.network_hooks.renew()  # a callback ended the stage before the epoch that is validated
            if self.tape and last:
                self.tape.at = self.best["at"]
        return self.history

    def _fit(self, learner: Learner, phase: Phase, before: int, validated: int, state: dict, cbs: Sequence) -> float:
        """Train a phase from a state on and validate after its last epochs; returns the seconds of its longest epoch with a
        margin."""
        mean = getattr(learner, "average_weights", None)
        if mean is not None:
            mean.resumed = state.get("average")

        def save(epochs: int, over: bool) -> None:
            if self.tape:
                return
            scaler = getattr(learner, "scaler", None)
            raw, average = ({}, None) if mean is None else (mean.raw, None if over else mean.mean.state())
            save_resume(self.path, {
                "format": FORMAT, "identity": self.identity, "phase": phase.name, "epochs": epochs, "over": over,
                "model": {**self.net.state_dict(), **raw}, "average": average, "opt": learner.opt.state_dict(),
                "best": self.best, "scaler": scaler and scaler.state_dict(), "rate": self.rate, "history": self.history})

        start = state["epochs"]

        def skip(_) -> None:  # in the epochs that a resumed phase skips, nothing is to log
            for cb in (learner.recorder, *cbs) if learner.epoch <= start > 0 else ():
                cb.run = learner.epoch == start

        keep = KeepProgress(self.best, save, self.monitor, phase, start=start, scale=state["scaler"])
        callbacks = [SeedEpoch(self.seed, phase.name), Trains(phase.trains, phase.train_norms), keep,
                     EpochRecord(phase.stage, self.history, self.on_row, before=before, start=start),
                     Callback(before_epoch=skip), ValidatesFrom(phase.epochs - validated),
                     *([self.tape] if self.tape else []), *cbs]
        rates = ", ".join(name for name in PARAMS if name.startswith(f"stage{phase.stage}_lr")) or "the learning rate"
        try:
            with learner.no_logging(), learner.removed_cbs(() if self.bars else learner._grab_cbs(ProgressCallback)):
                if phase.schedule == "one_cycle":
                    learner.fit_one_cycle(phase.epochs, phase.lr, cbs=callbacks, start_epoch=start, **phase.cycle)
                else:
                    learner.fit(phase.epochs, phase.lr, cbs=[*callbacks, FallingRate(
                        phase.schedule, self.best["values"], phase.warmup)],
                                start_epoch=start)
        except NotFinite as error:
            raise ValueError(f"training diverged in {phase.name} (the network's outputs are not finite): lower {rates}, now "
                             f"{phase.lr}") from error
        if self.best["state"] is None:
            raise ValueError(f"{phase.name}: {self.monitor} was not a number in any epoch; lower the learning rate "
                             f"(now {phase.lr}) or check the labels")
        if mean is not None:
            mean.put_back()
        return keep.longest
