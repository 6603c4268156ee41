"""Training steps that never wait for the GPU: optimizer, half precision, and fastai's running figures.

fastai copies the loss and the predictions of every batch to the CPU and asks twice a step whether gradients overflowed; each
time the CPU waits for the GPU. Here all of it stays on the device until somebody reads it.
"""

import time

import torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import AvgLoss, AvgSmoothLoss, Learner, Metric, Recorder
from fastai.optimizer import OptimWrapper
from torch import Tensor

from charmlib.evaluation.metrics import ap_by_class, mean_auc
from charmlib.nih import finding_columns
from charmlib.training import cards


class _Verdict:
    """Keeps the gradient scaler's verdict on a fused step: ``skipped``, a tensor that is 1 if gradients overflowed."""

    skipped: Tensor | None = None

    def step(self, closure=None):
        found = getattr(self, "found_inf", None)  # there during a scaler's step only
        self.skipped = None if found is None else found.clone()
        return super().step(closure)


class _AdamW(_Verdict, torch.optim.AdamW):
    pass


class _SGD(_Verdict, torch.optim.SGD):
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if self.state[p].get("momentum_buffer") is None:  # of a first step that is skipped, torch keeps what memory held
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return super().step(closure)


class AdamW(OptimWrapper):
    """torch's AdamW, all tensors in one kernel, with fastai's learning rates by group and freezing.

    Norm layers and biases decay unless the Learner's ``wd_bn_bias`` is False; then ``betas=(0.9, 0.99), eps=1e-5`` give
    fastai's own Adam. With a ``scaler`` (``torch.amp.GradScaler``) the kernel skips steps whose gradients overflowed, without
    telling the CPU; ``skipped`` is then a 0-dim tensor on the device, 1 for such a step.
    """

    scaler: torch.amp.GradScaler | None = None
    of_torch = _AdamW

    def __init__(self, params, lr: float = 1e-3, **kwargs):
        super().__init__(params, self.of_torch, lr=lr, fused=True, **kwargs)

    @property
    def hypers(self) -> list[dict]:
        """The hyperparameters of each group that are numbers, which is all that fastai's loggers can write."""
        return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in super().hypers]

    @property
    def skipped(self) -> Tensor | None:
        return self.opt.skipped

    def step(self) -> None:
        groups, spared = self.opt.param_groups, {p for p, kept in self.state.items() if not kept.get("do_wd", True)}
        if spared:  # for this step, those without decay are groups of their own
            self.opt.param_groups = [{**group, "params": [p for p in group["params"] if (p in spared) == without],
                                      "weight_decay": 0.0 if without else group["weight_decay"]}
                                     for group in groups for without in (False, True)]
        try:
            self.opt.step() if self.scaler is None else self.scaler.step(self.opt)
        finally:
            self.opt.param_groups = groups


class SGD(AdamW):
    """torch's SGD in the same way: ``momentum`` 0.9 unless a schedule sets it, and weight decay as a gradient."""

    of_torch = _SGD

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.9, **kwargs):
        super().__init__(params, lr, momentum=momentum, **kwargs)


class HalfPrecision(MixedPrecision):
    """fastai's fp16 autocast with a gradient scaler; needs an optimizer that takes the scaler, such as :class:`AdamW`, which
    decides on the device whether gradients overflowed."""

    def before_fit(self):
        kind = next(self.model.parameters()).device.type
        self.autocast, self.learn.scaler = torch.autocast(kind, torch.float16), torch.amp.GradScaler(kind)
        self.unscaled = False
        if self.opt is not None:  # there is none yet where a new Learner is only asked to validate
            self.opt.scaler = self.learn.scaler

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
        self.total = self.total + learn.loss.detach().mean() * size  # get_preds(with_loss=True) does not reduce the loss
        self.count += size

    @property
    def value(self):
        total, count = (sum(cards.in_order([torch.as_tensor(of_process)])) for of_process in (self.total, self.count))
        return total / count if count else None


class MeanAUC(Metric):
    """Mean ROC-AUC over the findings on a whole validation part."""

    name = "mean_auc"

    def __init__(self, classes, normal_class: str = ""):
        self.classes, self.normal_class = tuple(classes), normal_class
        self.reset()

    def reset(self):
        self.logits, self.labels = [], []

    def accumulate(self, learn):
        if not hasattr(learn, "gather_preds"):  # predictions are asked for, of one image perhaps
            self.logits.append(learn.pred.detach())
            self.labels.append(learn.yb[0].detach())

    @property
    def value(self) -> float:
        found = [cards.in_order(parts) for parts in (self.labels, self.logits)]
        if not found[0]:
            return float("nan")
        labels, logits = (torch.cat(parts).float().cpu().numpy() for parts in found)
        return self.mean(labels, logits)

    def mean(self, labels, logits) -> float:
        return mean_auc(labels, logits, self.classes, self.normal_class)


class MeanAP(MeanAUC):
    """Mean average precision over the findings on a whole validation part."""

    name = "mean_ap"

    def mean(self, labels, logits) -> float:
        found = list(ap_by_class(labels, logits, self.classes).values())
        defined = [found[c] for c in finding_columns(self.classes, self.normal_class) if found[c] == found[c]]
        return sum(defined) / len(defined) if defined else float("nan")  # the AUC has warned of the others


class Progress(ProgressCallback):
    """fastai's progress bars, which read the loss once a second; without a bar for a validation that is empty or left out."""

    name = "progress"
    _read = 0.0

    def before_validate(self):
        if len(self.dl):
            super().before_validate()

    def after_validate(self):
        if len(self.dl) and not self.recorder.cancel_valid:
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
        if new := [loss for loss in self.recorder.losses if isinstance(loss, Tensor)]:
            self.recorder.losses[-len(new):] = torch.stack(new).tolist()

    after_fit = after_epoch  # the learning-rate finder ends within an epoch


def record_on_device(learn: Learner) -> Learner:
    """Replace the callbacks of a Learner that wait for the GPU at every batch; returns the Learner."""
    learn.recorder.smooth_loss, learn.recorder.loss = SmoothLoss(learn.recorder.smooth_loss.beta), MeanLoss()
    learn.add_cb(LossesToHost())
    if hasattr(learn, "progress"):
        learn.remove_cb(learn.progress)
        learn.add_cb(Progress())
    return learn
