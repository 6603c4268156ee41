"""``python -m charmlib.training.probe``: seconds and operations of an epoch of each phase and of scoring, from a few steps on
this machine."""

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from torch.utils.flop_counter import FlopCounterMode

from charmlib.data.phantom import make_phantoms
from charmlib.training.callbacks import Trains
from charmlib.training.recipes import batches, validations
from charmlib.training.run import Run

FIRST, STEPS = 3, 20  # steps before the clock starts, and steps timed


class _Clock(Callback):
    """Counts the operations of a fit's first forward pass, times the later steps, ends it after them, and skips validation."""

    def before_fit(self):
        self.count, self.flops = 0, FlopCounterMode(display=False)

    def before_batch(self):
        if self.count == 0:
            self.flops.__enter__()

    def after_pred(self):
        if self.count == 0:
            self.flops.__exit__(None, None, None)

    def after_batch(self):
        self.count += 1
        if self.count in (FIRST, FIRST + STEPS):
            if self.dls.device.type == "cuda":
                torch.cuda.synchronize()
            self.start, self.seconds = time.perf_counter(), time.perf_counter() - getattr(self, "start", 0.0)
        if self.count == FIRST + STEPS:
            raise CancelFitException

    def before_validate(self):
        raise CancelValidException


def measured(params: Mapping, images: Mapping[str, int], folder: Path) -> dict:
    """``epochs`` (phase -> an epoch with its validation), ``scoring``, and ``looks`` (all validations), in ``seconds`` and in
    ``tflop``, 10^12 operations: a training step counts as three forward passes, or as one where only a head trains. (Torch
    counts backward passes of grouped convolutions as if they had no groups.)

    ``images`` are the numbers of training images 'all' and 'findings', and those of 'valid' and 'test'. Steps are those of
    training, on drawn images of 64 pixels in ``folder``, enlarged to ``image_size``, from random weights.
    """
    batch = max(params["stage1_batch"], params["stage2_batch"])
    drawn = folder / f"phantoms{batch}"
    if not drawn.is_dir():
        make_phantoms(drawn, images=6 * batch, size=64)
    own = {"data_root": str(drawn), "csv": "", "classes": "nih14", "split": "official", "never_test": "", "limit": 0,
           "weights": "none", "norm": "half", "stage1_lr": 1e-3, "adjust": 0.0, "cache_dir": str(folder / "cache"),
           "run_dir": str(folder / "run"), "labels": "real", "normal_class": "", "resume": False}
    run, epochs, step = Run.open({**params, **own}), {}, {}
    for phase in run.phases():
        learner, clock, trains = run.learner(phase), _Clock(), Trains(phase.trains, phase.train_norms)
        trains.apply(learner)
        with learner.no_bar(), learner.no_logging():
            learner.fit(FIRST + STEPS, 1e-6, cbs=[clock, trains])
        passes = 1 if phase.head_only else 3
        step[phase.name] = np.array([clock.seconds / STEPS, passes * clock.flops.get_total_flops() / 1e12])
    rows = run.data.rows("train")
    with FlopCounterMode(display=False) as flops:
        run.views("train", ["id"], rows[:batch])
    start = time.perf_counter()
    run.views("train", ["id"], rows[:2 * batch])
    image = np.array([(time.perf_counter() - start) / min(len(rows), 2 * batch),
                      flops.get_total_flops() / 1e12 / min(len(rows), batch)])
    slots = run.net.bank.size if getattr(run.net, "bank", None) is not None else 0
    look, plan = image * (images["valid"] + min(slots, images["all"])), run.phases()
    counts = validations(plan, params["monitor"] if params["valid_fraction"] else "last")
    for phase in plan:
        epochs[phase.name] = step[phase.name] * batches(phase, images) + look * counts[phase.name] / phase.epochs
    found = {"scoring": image * (images["valid"] + images["test"]), "looks": look * sum(counts.values())}
    return {unit: {"epochs": {name: float(each[i]) for name, each in epochs.items()},
                   **{name: float(each[i]) for name, each in found.items()}} for i, unit in enumerate(("seconds", "tflop"))}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, redirect_stdout(sys.stderr):
        found = [measured(one["params"], one["images"], Path(place)) for one in json.load(sys.stdin)]
    print(json.dumps(found))
