"""The two published stages as phases of fastai training that can stop and continue at any epoch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner

from charmlib import session
from charmlib.training.callbacks import EpochRecord, KeepBest, RestoreScaler, SaveProgress, SeedEpoch
from charmlib.training.checkpoint import differences, fill, load_resume, save_resume

FORMAT = 1


@dataclass(frozen=True)
class Phase:
    """One call of fastai's ``fit_one_cycle``."""

    name: str
    stage: int
    epochs: int
    frozen: bool
    lr: float | slice
    cycle: Mapping[str, float]
    patience: int
    before: int = 0  # epochs of the stage that earlier phases had


def plan(params: Mapping, lr: float) -> list[Phase]:
    """The phases that parameters ask for, those without epochs left out.

    Stage 1 is fastai's ``fine_tune``: the new layers alone, then everything at half the rate, first layers at a
    hundredth of it (a backbone without pretrained weights gets the full rate everywhere, having nothing to keep).
    Stage 2 is one cycle from ``stage2_lr_min`` (first layers) to ``stage2_lr_max`` (head).
    """
    frozen, epochs = params["stage1_frozen_epochs"], params["stage1_epochs"]
    full = slice(lr / 2 / 100, lr / 2) if params["weights"] != "none" else lr
    phases = [
        Phase("stage1_frozen", 1, frozen, True, slice(lr), {"pct_start": 0.99}, 0),
        Phase("stage1", 1, epochs, False, full, {"pct_start": 0.3, "div": 5.0}, params["patience"], frozen),
        Phase("stage2", 2, params["stage2_epochs"], False, slice(params["stage2_lr_min"], params["stage2_lr_max"]), {},
              params["patience"]),
    ]
    return [phase for phase in phases if phase.epochs > 0]


class StageRunner:
    """Runs phases in turn and saves after every epoch what a later start needs to end in the same bits.

    Parameters
    ----------
    make_learner : callable
        stage -> Learner around the one network.
    resume_path : Path
        ``resume.pt``.
    identity : dict
        What must agree between the file and this run (parameters, split hash, versions of the format).
    monitor, seed
        See :mod:`charmlib.params`; monitor None, for a split without a validation part, keeps each stage's last epoch.
    lr : float
        The rate that stage 1 found, kept for a resumed run.
    on_row : callable
        Called with the history so far after each epoch.
    bars : bool
        fastai's progress bars, for a person at a notebook.
    """

    def __init__(self, make_learner: Callable[[int], Learner], net: torch.nn.Module, resume_path: Path, identity: dict, *,
                 monitor: str | None, seed: int, lr: float | None = None, on_row=None, bars: bool = False):
        self.make_learner, self.net, self.path, self.identity = make_learner, net, resume_path, identity
        self.monitor, self.seed, self.lr, self.on_row, self.bars = monitor, seed, lr, on_row, bars
        self.history: list[dict] = []

    def saved(self, resume: bool) -> dict | None:
        """The resume state if there is one that belongs to this run.

        Raises
        ------
        ValueError
            The file is of a run with other parameters or another split; says which differ.
        """
        state = load_resume(self.path) if resume else None
        if state is not None and (wrong := differences(state["identity"], self.identity)):
            raise ValueError(f"{self.path} belongs to a run with other settings ({wrong}). Name another run_dir, or say "
                             "resume=False to train from the start.")
        return state

    def run(self, phases: list[Phase], state: dict | None = None) -> list[dict]:
        """Train; returns the history. The network ends with the best epoch's weights of its last stage (the last
        epoch's without a monitor).

        Raises
        ------
        charmlib.session.OutOfTime
            A deadline is set, and the next epoch would not fit; everything finished is saved.
        """
        done = phases.index(next(p for p in phases if p.name == state["phase"])) if state else -1
        if state:
            self.history = list(state["history"])
        learner, stage, best, longest = None, None, None, 0.0
        for i, phase in enumerate(phases):
            start = 0
            if i < done or (i == done and state["over"]):
                if i == done:  # the next phase starts from what this one left
                    fill(self.net, state["model"], str(self.path))
                    best, stage = state["best"], phase.stage
                    last_of_stage = i + 1 == len(phases) or phases[i + 1].stage != phase.stage
                    if last_of_stage:
                        fill(self.net, best["state"], str(self.path))
                    else:
                        learner = self.make_learner(phase.stage)
                        learner.create_opt()
                        learner.opt.load_state_dict(state["opt"])
                continue
            if phase.stage != stage:
                learner = None  # what it holds on the device may be needed
                learner, stage, best = self.make_learner(phase.stage), phase.stage, None
            if i == done:
                start = state["epochs"]
                best = state["best"]
                fill(self.net, state["model"], str(self.path))
            session.stop_unless(longest, f"{phase.name}")
            best, longest = self._fit(learner, phase, start, best, state if i == done else None)
            if i + 1 == len(phases) or phases[i + 1].stage != phase.stage:
                fill(self.net, best["state"], "the best epoch")
        return self.history

    def _fit(self, learner: Learner, phase: Phase, start: int, best: dict | None,
             state: dict | None) -> tuple[dict, float]:
        """Train a phase; returns its best epoch, and the seconds of its longest."""
        learner.freeze() if phase.frozen else learner.unfreeze()
        if state is not None:
            learner.opt.load_state_dict(state["opt"])
        keep = KeepBest(self.monitor, phase.patience, start=start)
        if best is not None:
            keep.best, keep.state = best["value"], best["state"]
            keep.waited = best["waited"] if state is not None else 0
        record = EpochRecord(str(phase.stage), self.history, self._on_row, before=phase.before, start=start)

        def save(epochs: int, over: bool):
            scaler = getattr(learner, "scaler", None)
            save_resume(self.path, {
                "format": FORMAT, "identity": self.identity, "phase": phase.name, "epochs": epochs, "over": over,
                "model": self.net.state_dict(), "opt": learner.opt.state_dict(),
                "best": {"value": keep.best, "waited": keep.waited, "state": keep.state},
                "scaler": scaler.state_dict() if scaler is not None else None, "lr": self.lr, "history": self.history})

        progress = SaveProgress(save, start=start)
        scaler = RestoreScaler(state["scaler"] if state else None)
        callbacks = [SeedEpoch(self.seed, phase.name), record, keep, progress, scaler]
        hidden = () if self.bars else learner._grab_cbs(ProgressCallback)
        with learner.no_logging(), learner.removed_cbs(hidden):
            learner.fit_one_cycle(phase.epochs, phase.lr, cbs=callbacks, start_epoch=start, **phase.cycle)
        if keep.state is None:
            raise ValueError(f"{phase.name}: {self.monitor} was not a number in any epoch; lower the learning rate "
                             f"(now {phase.lr}) or check the labels")
        return {"value": keep.best, "waited": keep.waited, "state": keep.state}, progress.margin * progress.longest

    def _on_row(self, row: dict) -> None:
        if self.on_row is not None:
            self.on_row(self.history)
