"""Small fastai callbacks, each with one job."""

import hashlib
import math
import random
import time
from functools import partial

import numpy as np
import pandas as pd
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.callback.mixup import MixHandler
from fastai.torch_core import norm_types
from fastcore.basics import store_attr
from torch import Tensor

from charmlib import session
from charmlib.data.loaders import GreyToNetwork, grey_to_network
from charmlib.evaluation.runs import HISTORY, RunFolder, monitored, number
from charmlib.files import write_whole
from charmlib.nih import finding_columns
from charmlib.nn.losses import MultiLabelLoss
from charmlib.nn.votes import VotingBank
from charmlib.training import cards
from charmlib.training.recipes import Phase


class NetworkHooks(Callback):
    """Calls a network's ``see``, ``follow`` and ``renew``; see :class:`charmlib.models.registry.Network`.

    ``renew`` runs in the batch size and precision of validation, and only after training: validating, scoring or predicting
    without training changes nothing, since the learner's data may be other data.

    ``see`` comes before callbacks that mix images (fastai's ``MixUp``): a voting bank is renewed from the images as they were.
    A bank of features would keep those of mixtures, which ``before_fit`` refuses with ValueError.
    """

    order = -5

    def before_fit(self):
        self.trained = self.cancelled = False
        mixes = [type(cb).__name__ for cb in self.learn.cbs if isinstance(cb, MixHandler)]
        if mixes and not isinstance(getattr(self.model, "bank", None), VotingBank | None):
            raise ValueError(f"{mixes[0]} mixes images, and the memory bank of answer: features would store the mixtures under "
                             "the names of images: say answer: votes, or use_bank: False")

    def before_train(self):
        self.trained = True

    def before_batch(self):
        ids = getattr(self.dl, "ids", None)
        if hasattr(self.model, "see") and ids is not None and len(ids) == len(self.xb[0]):
            own = cards.own(len(ids)) if self.training else slice(None)
            self.model.see(ids[own], self.yb[0][own] if len(self.yb) else None)

    def after_loss(self):
        if others := self.training and getattr(self.model, "also", None):
            self.learn.loss_grad = sum((self.loss_func(logits, *self.yb) for logits in others), self.learn.loss_grad)
            self.learn.loss, self.model.also = self.loss_grad.clone(), []

    def before_backward(self):
        self.cancelled = False

    def after_cancel_step(self):
        self.cancelled = True  # by fastai's own MixedPrecision, after which fastai still calls after_step

    def after_step(self):
        if hasattr(self.model, "follow") and not self.cancelled:
            self.model.follow(getattr(self.opt, "skipped", None))

    @property
    def renews(self) -> bool:
        """Whether the next validation begins with ``renew``."""
        return self.trained and getattr(self.dls.train.dataset, "known", False) and hasattr(self.model, "renew")

    def before_validate(self):
        if self.renews:
            self.trained = False
            self.renew()

    def renew(self):
        """Call the network's ``renew``, after a bank of votes has chosen its images."""
        images = self.dls.train.dataset
        if not hasattr(self.model, "renew"):
            return
        if isinstance(bank := getattr(self.model, "bank", None), VotingBank):
            bank.choose(torch.from_numpy(images.rows), torch.from_numpy(images.labels[images.rows]))
        scale = next(t for t in self.dls.valid.after_batch.fs if isinstance(t, GreyToNetwork))
        device = self.dls.device

        def encoded(ids):
            return grey_to_network(images.pixels(ids.cpu().numpy()).to(device), scale.mean.to(device), scale.std.to(device))

        with torch.autocast(torch.device(device).type, torch.float16, enabled=hasattr(self.learn, "half_precision")):
            self.model.renew(encoded, batch=self.dls.valid.bs)


class Trains(Callback):
    """Trains only the named parts of a network, all if none is named.

    The norm layers of the other parts keep learning, as after fastai's ``freeze()``. With ``norms=False`` the other parts stay
    in eval mode.
    """

    order = -5  # after fastai's TrainEvalCallback

    def __init__(self, parts=(), norms: bool = True):
        self.parts, self.norms = parts, norms

    def apply(self, learn) -> None:
        """Set which parameters get gradients, and start the optimizer's state anew, as fastai's ``freeze()`` does.

        Raises
        ------
        ValueError
            The network has no part of that name.
        """
        parts = learn.model.parts()
        if unknown := [name for name in self.parts if name not in parts]:
            raise ValueError(f"a phase trains {unknown[0]!r}; the network's parts are {', '.join(parts)}")
        if learn.opt is None:
            learn.create_opt()
        for name, part in parts.items():
            for module in part.modules():
                trains = not self.parts or name in self.parts or (self.norms and isinstance(module, norm_types))
                for p in module.parameters(recurse=False):
                    p.requires_grad_(trains)
        learn.opt.clear_state()

    def before_train(self):
        if self.parts and not self.norms:
            for name, part in self.model.parts().items():
                part.train(name in self.parts)


class LossMode(Callback):
    """Puts the loss into training and eval mode with the network: class weights and the prior of a sample act in training mode
    only. Class weights act after a share ``weight_from`` of the epochs, in [0, 1]: below 1 in the last epoch at least, at 1
    never.

    A stage of several phases says in ``before`` and ``epochs`` how many epochs it had before this fit and has in all. With
    uneven draws, ``shares`` (C,) are the images' own of each class, which a voting bank gets after each epoch of training.
    """

    order = -5

    def __init__(self, weight_from: float = 0.0, shares: Tensor | None = None):
        if not 0 <= weight_from <= 1:
            raise ValueError(f"weight_from must be in [0, 1], got {weight_from}")
        self.weight_from, self.shares, self.before, self.epochs = weight_from, shares, 0, 0

    def before_train(self):
        if isinstance(self.loss_func, MultiLabelLoss):
            self.loss_func.train()
            self.loss_func.weighted = self.epoch + self.before >= self.first

    @property
    def first(self) -> int:
        """The stage's first epoch, from 0, in which class weights act; the number of its epochs if they never do."""
        epochs = self.epochs or self.n_epoch
        return epochs if self.weight_from >= 1 else min(math.ceil(self.weight_from * epochs - 1e-6), epochs - 1)

    def after_train(self):
        if self.shares is not None and isinstance(bank := getattr(self.model, "bank", None), VotingBank):
            bank.shares.copy_(self.shares)

    def before_validate(self):
        if isinstance(self.loss_func, MultiLabelLoss):
            self.loss_func.eval()


class ValidatesFrom(Callback):
    """Leaves out the validation of the epochs of a fit before ``first``, which counts from 0."""

    order = NetworkHooks.order - 1  # a bank of votes is renewed for a validation only

    def __init__(self, first: int):
        store_attr()

    def before_validate(self):
        if self.epoch < self.first:
            raise CancelValidException

    def after_cancel_validate(self):
        self.learn.recorder.log += [math.nan] * (1 + len(self.learn.metrics))  # other callbacks read these columns


class SeedEpoch(Callback):
    """Derives every epoch's randomness (order, augmentation, dropout) from the seed, the phase and the epoch alone: a resumed
    run draws the numbers of an uninterrupted one without stored generator states."""

    order = -20

    def __init__(self, seed: int, phase: str = ""):
        store_attr()

    def before_epoch(self):
        seed_everything(self.seed, self.phase, self.epoch)


def seed_everything(*parts) -> int:
    """Seed torch, numpy and random from a hash of ``parts``; returns the 63-bit seed."""
    seed = int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:8], "big") >> 1
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return seed


class EpochRecord(Callback):
    """One row of the history an epoch: losses, validation AUC and AP, learning rate, seconds, filled slots and share stored.

    The training loss is the mean over the epoch's batches: a resumed run could not repeat fastai's smoothed one. Skipped
    epochs before ``start`` get no row. Of an epoch that is not validated the three figures are NaN.

    A row also holds ``bank_labels`` for ``bank_history.csv``: class -> number of slots, ``no_finding`` last; empty without a
    bank.
    """

    order = 55  # after fastai's Recorder, which computes validation loss and metrics

    def __init__(self, stage: str, rows: list[dict], on_row, *, before: int = 0, start: int = 0):
        store_attr()

    def before_epoch(self):
        self.clock, self.losses = time.monotonic(), []
        bank = getattr(self.model, "bank", None)
        self.counts = None if bank is None else (bank.seen.clone(), bank.accepted.clone())

    def after_batch(self):
        if self.training:
            self.losses.append(self.loss.detach())

    def after_epoch(self):
        if self.epoch < self.start:
            return
        values = dict(zip(self.recorder.metric_names[1:], self.recorder.log[1:]))
        row = {"stage": self.stage, "epoch": self.epoch + self.before + 1,
               "train_loss": torch.stack(self.losses).mean().item() if self.losses else float("nan"),
               "valid_loss": number(values["valid_loss"]), "valid_auc": number(values.get("mean_auc")),
               "valid_ap": number(values.get("mean_ap")), "lr": float(self.recorder.lrs[-1]) if self.recorder.lrs else 0.0,
               "seconds": round(time.monotonic() - self.clock, 3), "bank_filled": "", "bank_accepted": "", "bank_labels": {}}
        if (bank := getattr(self.model, "bank", None)) is not None:
            classes = list(self.dls.vocab)
            held = bank.label_counts(finding_columns(classes, self.dls.normal_class))
            counts = torch.stack([bank.seen - self.counts[0], bank.accepted - self.counts[1], bank.filled])
            seen, accepted, row["bank_filled"], *held = torch.cat([counts, held]).tolist()  # one wait for the device
            row["bank_accepted"] = round(accepted / seen, 4) if seen else ""
            row["bank_labels"] = dict(zip([*classes, "no_finding"], held))
        self.rows.append(cards.same(row))
        self.on_row(self.rows)


class KeepProgress(Callback):
    """Ends each epoch: keeps the best weights in memory, saves the run's state, and stops the phase early.

    fastai's ``SaveModelCallback`` keeps weights in files that it loads with pickles allowed.

    ``best`` is changed in place: ``value`` and ``state`` (weights on the CPU) of the kept epoch, with a mean of the weights
    ``raw`` (the network's own), and ``at`` (its place on a tape); ``mark`` (the value that patience compares with), ``waited``
    (epochs since) and ``values`` (of all epochs of the phase; small is good). ``phase`` says the patience and the smallest
    improvements. ``save`` gets the number of finished epochs and whether the phase is over, after the epoch's other callbacks.
    With ``monitor`` 'last' it is the last epoch. Epochs before ``start`` are skipped. ``scale`` is the state of a resumed
    phase's gradient scaler, since each fit starts with a new one.

    Raises
    ------
    ValueError
        With monitor 'last': an epoch's weights are not finite.
    charmlib.session.OutOfTime
        A deadline is set, and the next epoch with its save would not fit.
    """

    order = 90
    longest = 0.0  # seconds of the longest epoch with its save, and a margin because epochs scatter

    def __init__(self, best: dict, save, monitor: str, phase: Phase, *, start: int = 0, scale: dict | None = None):
        store_attr()

    def before_fit(self):
        self.kept = len(self.learn.epoch_record.rows)
        if self.scale and getattr(self.learn, "scaler", None) is not None:
            self.learn.scaler.load_state_dict(self.scale)

    def before_epoch(self):
        self.clock = time.monotonic()

    def after_cancel_fit(self):
        if self.kept < len(self.learn.epoch_record.rows):  # another callback ended the fit, so that after_epoch was skipped
            self.after_epoch(ended=True)

    def after_epoch(self, ended: bool = False):
        if self.epoch < self.start:
            return
        self.kept = len(self.learn.epoch_record.rows)
        row = self.learn.epoch_record.rows[-1]
        last, value = self.monitor == "last", monitored(row, self.monitor)
        self.best["waited"] += 1
        self.best["values"].append(value)
        if last or value < self.best["mark"] - self.phase.min_delta:
            self.best.update(mark=value, waited=0)
        if last or value < self.best["value"] - self.phase.save_delta:
            state = {k: v.detach().to("cpu", copy=True) for k, v in self.model.state_dict().items()}
            if last and not all(state[name].isfinite().all() for name, _ in self.model.named_parameters()):
                raise ValueError(f"epoch {self.epoch + 1} ended with weights that are not finite, and the last epoch is the "
                                 "one that is kept. Lower the learning rate or check the labels")
            mean, tape = getattr(self.learn, "average_weights", None), getattr(self.learn, "tape", None)
            raw = {} if mean is None else {k: v.detach().to("cpu", copy=True) for k, v in mean.raw.items()}
            self.best.update(value=value, state=state, raw=raw, at=tape.at if tape else "")
        stop = 0 < self.phase.patience <= self.best["waited"]
        over = ended or stop or self.epoch + 1 == self.n_epoch
        self.save(self.epoch + 1, over)
        self.longest = max(self.longest, 1.15 * (time.monotonic() - self.clock))
        if not over:
            session.stop_unless(self.longest, "the next epoch")
        if stop and not ended:
            raise CancelFitException


class FallingRate(Callback):
    """Divides the learning rates of a fit by 10, once or more, at the start of an epoch; momentum stays.

    'steps': after half and after three quarters of the epochs (the shares of ResNet's schedule on CIFAR, arXiv 1512.03385).
    'plateau': after each epoch without a new best among ``values``, the list that :class:`KeepProgress` fills; so does
    fastai's ``ReduceLROnPlateau`` with its defaults, which does nothing to a torch optimizer in fastai's ``OptimWrapper``.

    In the first ``warmup`` epochs the rates rise in even steps from a tenth.

    Both follow from the epoch and the history alone, so that a resumed run has the same rates.
    """

    def __init__(self, schedule: str, values: list[float], warmup: int = 0):
        store_attr()

    def before_fit(self):
        self.rates = [group["lr"] for group in self.opt.hypers]

    def before_epoch(self):
        falls = sum(self.epoch >= share * self.n_epoch for share in (0.5, 0.75)) if self.schedule == "steps" else \
            sum(not v < min((u for u in self.values[:i] if u == u), default=math.inf) for i, v in enumerate(self.values))
        share = min(1.0, 0.1 + 0.9 * self.epoch / self.warmup) if self.warmup else 1.0
        self.opt.set_hyper("lr", [rate * share / 10**falls for rate in self.rates])


def write_history(folder: RunFolder, rows: list[dict]) -> None:
    """Write ``history.csv``, and with a bank ``bank_history.csv``: the filled slots of each epoch, in all and by class."""
    tables = {folder.history_file: pd.DataFrame(rows, columns=list(HISTORY))}
    if rows[0]["bank_labels"]:
        tables[folder.bank_history_file] = pd.DataFrame([
            {"stage": row["stage"], "epoch": row["epoch"], "filled": row["bank_filled"], **row["bank_labels"]} for row in rows])
    for path, table in tables.items():
        write_whole(path, partial(table.to_csv, index=False, na_rep="nan", lineterminator="\r\n"))
