"""Small fastai callbacks, each with one job."""

from __future__ import annotations

import csv
import hashlib
import io
import random
import time
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException

from charmlib import session
from charmlib.data.loaders import GreyToNetwork, grey_to_network
from charmlib.files import write_whole
from charmlib.nih import NO_FINDING

HISTORY = ("stage", "epoch", "train_loss", "valid_loss", "valid_auc", "lr", "seconds", "bank_filled", "bank_accepted")


class BankFeed(Callback):
    """Tells the bank which images the batch holds, so that none meets itself and every slot knows its image."""

    order = -5

    def before_batch(self):
        ids = getattr(self.dl, "ids", None)
        bank = getattr(self.model, "bank", None)
        if bank is None or ids is None or len(ids) != len(self.xb[0]):
            return
        bank.expect(ids, self.yb[0] if len(self.yb) else None)


class RefreshBank(Callback):
    """After each epoch of training, before it is validated, has a bank that votes encode its images with the weights of the
    moment, as scoring sees them: in the batches and the precision of validation.

    Validating, scoring or predicting without training leaves the bank alone: what it holds was encoded then, and the learner's
    data may be other data.
    """

    def before_fit(self):
        self.trained = False

    def before_train(self):
        self.trained = True

    def before_validate(self):
        images = self.dls.train.dataset
        if not self.trained or not getattr(images, "known", False) or not hasattr(self.model, "refresh_bank"):
            return
        self.trained = False
        scale = next(t for t in self.dls.valid.after_batch.fs if isinstance(t, GreyToNetwork))
        device = self.dls.device

        def encoded(ids):
            grey = images.pixels(ids.cpu().numpy()).to(device)
            return grey_to_network(grey, scale.mean.to(device), scale.std.to(device))

        with torch.autocast(torch.device(device).type, torch.float16, enabled=hasattr(self.learn, "half_precision")):
            self.model.refresh_bank(encoded, batch=self.dls.valid.bs)


class SignOfLife(Callback):
    """Tells whoever watches this process that batches are being worked on."""

    order = 70

    def after_batch(self):
        session.alive()


class FollowStep(Callback):
    """Moves the momentum branch after each optimizer step that was made.

    fastai calls ``after_step`` also when the gradient scaler skipped the step: by cancelling it (fastai's own
    ``MixedPrecision``), or on the device, where only a tensor of the optimizer's tells (:class:`HalfPrecision`).
    """

    order = 20

    def before_backward(self):
        self.cancelled = False

    def after_cancel_step(self):
        self.cancelled = True

    def after_step(self):
        if not self.cancelled:
            self.model.update_momentum(getattr(self.opt, "skipped", None))


class HalfPrecision(Callback):
    """fp16 autocast with a gradient scaler, as fastai's ``MixedPrecision``, without its two waits for the GPU a step.

    Needs an optimizer that takes the scaler (:class:`charmlib.training.optimizer.AdamW`): whether gradients overflowed is then
    decided on the device.
    """

    order = 10

    def before_fit(self):
        kind = next(self.model.parameters()).device.type
        self.autocast, self.learn.scaler = torch.autocast(kind, torch.float16), torch.amp.GradScaler(kind)
        self.unscaled = False
        if self.opt is not None:  # there is none yet where a new Learner is only asked to validate
            self.opt.scaler = self.learn.scaler

    def before_batch(self):
        self.autocast.__enter__()

    def after_pred(self):
        self.learn.pred = self.pred.float()

    def after_loss(self):
        self.autocast.__exit__(None, None, None)

    def before_backward(self):
        self.learn.loss_grad = self.scaler.scale(self.loss_grad)

    def before_step(self):
        self.scaler.unscale_(self.opt.opt)  # for callbacks that look at gradients or clip them; the step then does not
        self.unscaled = True

    def after_step(self):
        if self.unscaled:  # not where another callback cancelled the step before
            self.scaler.update()
        self.unscaled = False

    def after_fit(self):
        if self.opt is not None:
            self.opt.scaler = None
        self.learn.scaler = self.autocast = None


class SeedEpoch(Callback):
    """Derives every epoch's randomness (order, augmentation, dropout) from the seed, the phase and the epoch alone.

    So a resumed run needs no stored generator states to draw what an uninterrupted one drew.
    """

    order = -20

    def __init__(self, seed: int, phase: str = ""):
        self.seed, self.phase = seed, phase

    def before_epoch(self):
        seed_everything(self.seed, self.phase, self.epoch)


def seed_everything(*parts) -> int:
    """Seed torch, numpy and random from a hash of ``parts``; returns the 63-bit seed."""
    text = "/".join(map(str, parts)).encode()
    seed = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return seed


class EpochRecord(Callback):
    """One row of the history an epoch: losses, validation AUC, learning rate, time, and what the bank took.

    The training loss is the plain mean over the epoch's batches; fastai's smoothed one carries over from epoch to
    epoch, which a resumed run could not repeat. Epochs before ``start`` are being skipped and get no row. Without a
    validation part its two figures are NaN.

    Beside the columns of ``history.csv`` a row holds ``bank_labels``: class -> filled slots with it, and ``no_finding`` last;
    empty without a bank. They end up in ``bank_history.csv``.
    """

    order = 55  # after fastai's Recorder, which computes validation loss and metrics

    def __init__(self, stage: str, rows: list[dict], on_row=None, *, before: int = 0, start: int = 0):
        self.stage, self.rows, self.on_row, self.before, self.start = stage, rows, on_row, before, start

    def before_epoch(self):
        self.clock = time.monotonic()
        self.losses = []
        bank = getattr(self.model, "bank", None)
        self.counts = None if bank is None else (bank.seen.clone(), bank.accepted.clone())

    def after_batch(self):
        if self.training:
            self.losses.append(self.loss.detach())

    def after_epoch(self):
        if self.epoch < self.start:
            return
        values = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:]))
        row = {"stage": self.stage, "epoch": self.epoch + self.before,
               "train_loss": torch.stack(self.losses).mean().item() if self.losses else float("nan"),
               "valid_loss": _number(values["valid_loss"]), "valid_auc": _number(values.get("mean_auc")),
               "lr": float(self.recorder.lrs[-1]) if self.recorder.lrs else 0.0,
               "seconds": round(time.monotonic() - self.clock, 3), "bank_filled": "", "bank_accepted": "", "bank_labels": {}}
        bank = getattr(self.model, "bank", None)
        if bank is not None:
            classes = list(self.dls.vocab)
            held = bank.label_counts([c for c, name in enumerate(classes) if name != NO_FINDING])
            counts = torch.stack([bank.seen - self.counts[0], bank.accepted - self.counts[1], bank.filled])
            seen, accepted, row["bank_filled"], *held = torch.cat([counts, held]).tolist()  # one wait for the device
            row["bank_accepted"] = round(accepted / max(seen, 1), 4)
            row["bank_labels"] = dict(zip([*classes, "no_finding"], held))
        self.rows.append(row)
        if self.on_row is not None:
            self.on_row(row)


def _number(value) -> float:
    return float("nan") if value is None else float(value)


class KeepBest(Callback):
    """Remembers the best epoch's weights in memory, and says when ``patience`` epochs brought nothing better.

    fastai's ``SaveModelCallback`` does this through files that it loads with pickles allowed.

    Without a ``monitor`` (None: there is no validation part) every epoch replaces the one before, so the last one stays.

    Raises
    ------
    ValueError
        Without a monitor: an epoch left weights that are not finite, which no figure would show.
    """

    order = 60

    def __init__(self, monitor: str | None = "valid_loss", patience: int = 0, *, start: int = 0):
        self.monitor, self.patience, self.start = monitor, patience, start
        self.best, self.waited, self.state = float("inf"), 0, None

    def after_epoch(self):
        if self.epoch < self.start:
            return
        if self.monitor is None:
            self._keep()
            if not all(torch.isfinite(self.state[name]).all() for name, _ in self.model.named_parameters()):
                raise ValueError(f"epoch {self.epoch + 1} left weights that are not finite, and without a validation part no "
                                 "earlier epoch is chosen instead; lower the learning rate or check the labels")
            return
        row = self.learn.epoch_record.rows[-1]
        value = -row["valid_auc"] if self.monitor == "valid_auc" else row["valid_loss"]
        if value < self.best:
            self.best, self.waited = value, 0
            self._keep()
        else:
            self.waited += 1

    def _keep(self):
        self.state = {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}

    @property
    def stop(self) -> bool:
        return self.patience > 0 and self.waited >= self.patience


class SaveProgress(Callback):
    """Hands each finished epoch to ``save(epochs_done, over)``, then ends the phase if early stopping says so.

    The last of the epoch's callbacks, so that what is saved is complete. Where a deadline is set, the next epoch is only begun
    if there is time for it and its save.

    Raises
    ------
    charmlib.session.OutOfTime
        There is not.
    """

    order = 90
    margin = 1.15
    """Epochs scatter."""

    def __init__(self, save, *, start: int = 0):
        self.save, self.start, self.longest = save, start, 0.0

    def before_epoch(self):
        self.clock = time.monotonic()

    def after_epoch(self):
        if self.epoch < self.start:
            return
        stop = self.learn.keep_best.stop
        over = stop or self.epoch + 1 == self.n_epoch
        self.save(self.epoch + 1, over)
        self.longest = max(self.longest, time.monotonic() - self.clock)
        if not over:
            session.stop_unless(self.margin * self.longest, "the next epoch")
        if stop:
            raise CancelFitException


class RestoreScaler(Callback):
    """Gives a resumed fp16 phase the gradient scale that it had; fastai starts each fit with a new scaler."""

    order = 15  # after MixedPrecision made one

    def __init__(self, state: dict | None):
        self.state = state

    def before_fit(self):
        if self.state and getattr(self.learn, "scaler", None) is not None:
            self.learn.scaler.load_state_dict(self.state)


def write_history(path: Path, rows: list[dict]) -> None:
    """``history.csv``, whole or not at all."""
    _write_table(path, HISTORY, [[row[name] for name in HISTORY] for row in rows])


def write_bank_history(path: Path, rows: list[dict]) -> None:
    """``bank_history.csv``, whole or not at all: stage, epoch, filled slots, those of each class, those without a finding.

    Nothing is written without a bank. Counts are those of the epoch's end.
    """
    rows = [row for row in rows if row.get("bank_labels")]  # a history begun by an older version lacks them
    if rows:
        header = ["stage", "epoch", "filled", *rows[0]["bank_labels"]]
        _write_table(path, header, [[row["stage"], row["epoch"], row["bank_filled"], *row["bank_labels"].values()]
                                    for row in rows])


def _write_table(path: Path, header, rows) -> None:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([header, *rows])
    write_whole(path, lambda temporary: temporary.write_text(text.getvalue(), newline=""))
