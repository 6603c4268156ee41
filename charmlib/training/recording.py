"""fastai's running figures, kept on the device until somebody reads them.

fastai copies the loss and the predictions of every batch to the CPU, which waits for the GPU each time.
"""

from __future__ import annotations

import time

import torch
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgLoss, AvgSmoothLoss, Learner, Metric, Recorder

from charmlib.evaluation.metrics import mean_auc


class SmoothLoss(AvgSmoothLoss):
    """The exponentially weighted training loss, as fastai's."""

    def accumulate(self, learn):
        self.count += 1
        loss = learn.loss.detach().float()
        self.val = torch.lerp(loss, self.val.to(loss.device), self.beta)


class MeanLoss(AvgLoss):
    """The mean validation loss over images, as fastai's."""

    def accumulate(self, learn):
        size = len(learn.yb[0])
        self.total = self.total + learn.loss.detach() * size
        self.count += size


class MeanAUC(Metric):
    """Mean ROC-AUC over a whole validation part."""

    name = "mean_auc"

    def __init__(self, classes):
        self.classes = tuple(classes)
        self.reset()

    def reset(self):
        self.logits, self.labels = [], []

    def accumulate(self, learn):
        self.logits.append(learn.pred.detach())
        self.labels.append(learn.yb[0].detach())

    @property
    def value(self) -> float:
        if not self.logits:
            return float("nan")
        labels, logits = (torch.cat(parts).float().cpu().numpy() for parts in (self.labels, self.logits))
        return mean_auc(labels, logits, self.classes)


class Progress(ProgressCallback):
    """fastai's bars, which read the loss once a second instead of once a batch, and none for a validation part without images.
    """

    name = "progress"
    _read = 0.0

    def before_validate(self):
        if len(self.dl):
            super().before_validate()

    def after_validate(self):
        if len(self.dl):
            super().after_validate()

    def after_batch(self):
        self.pbar.update(self.iter + 1)
        if hasattr(self, "smooth_loss") and time.monotonic() - self._read > 1:
            self._read = time.monotonic()
            self.pbar.comment = f"{self.smooth_loss.item():.4f}"


class LossesToHost(Callback):
    """Brings the recorded losses of an epoch to the CPU at its end, as plain numbers, which pictures need."""

    order = Recorder.order + 1

    def after_epoch(self):
        losses = self.recorder.losses
        start = next((i for i, value in enumerate(losses) if isinstance(value, torch.Tensor)), len(losses))
        if start < len(losses):
            losses[start:] = torch.stack(losses[start:]).tolist()

    def after_fit(self):  # the learning-rate finder ends within an epoch
        self.after_epoch()


def record_on_device(learn: Learner) -> Learner:
    """Replace those of a Learner's own callbacks that wait for the GPU at every batch; returns the Learner."""
    learn.recorder.smooth_loss, learn.recorder.loss = SmoothLoss(learn.recorder.smooth_loss.beta), MeanLoss()
    learn.add_cb(LossesToHost())
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
        learn.add_cb(Progress())
    return learn
