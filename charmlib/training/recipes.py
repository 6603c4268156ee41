"""Recipes: the phases of training that parameters ask for. Imports no torch, so that a grid can plan with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from charmlib.params import ParameterError
from charmlib.systems import find, load

WATCHED = ("patience", "min_delta", "save_delta", "schedule")


@dataclass(frozen=True)
class Phase:
    """One call of fastai's ``fit_one_cycle``, or of its ``fit`` with another schedule.

    - ``name``: unique in its recipe.
    - ``stage``: successive phases of one stage share loaders, optimizer and best epoch; a column of ``history.csv``.
    - ``epochs``: the most epochs; ``batch``: images a batch.
    - ``lr``: learning rate; a slice runs from the first parameter group to the last.
    - ``images``: 'all' training and validation images, or those with 'findings'.
    - ``loss``: see :func:`charmlib.nn.make_loss`; ``sampler``: see :func:`charmlib.data.sampling.expected_draws`.
    - ``trains``: names of the network's parts that train; empty for all.
    - ``train_norms``: whether the norm layers of frozen parts keep learning, as after fastai's ``freeze()``. False freezes
      those parts entirely: they stay in eval mode.
    - ``schedule``: the learning rate within the phase, a choice of the parameter ``schedule``.
    - ``warmup``: epochs in which the rates rise from a tenth, in schedules other than ``one_cycle``.
    - ``cycle``: further arguments of ``fit_one_cycle``, for ``one_cycle`` alone.
    - ``patience``: epochs without improvement after which the phase ends; 0 never ends it early.
    - ``min_delta``, ``save_delta``: the smallest improvements for patience, and to replace the kept epoch.
    - ``sets``: handed to the network's ``enter`` before the phase.
    """

    name: str
    stage: str
    epochs: int
    lr: float | slice
    batch: int
    images: str = "all"
    loss: str = "bce"
    sampler: str = "natural"
    trains: tuple[str, ...] = ()
    train_norms: bool = True
    schedule: str = "one_cycle"
    warmup: int = 0
    cycle: Mapping[str, float] = field(default_factory=dict)
    patience: int = 0
    min_delta: float = 0.0
    save_delta: float = 0.0
    sets: Mapping[str, Any] = field(default_factory=dict)

    @property
    def head_only(self) -> bool:
        """Whether no gradient goes further back than the head or the fusion."""
        return bool(self.trains) and {*self.trains} <= {"head", "fusion"}


def phases(params: Mapping, rate: float = 0.0) -> list[Phase]:
    """The phases of a system's recipe that have epochs; ``rate`` is the learning rate of stage 1.

    Raises
    ------
    charmlib.params.ParameterError
        No phase has epochs.
    """
    found = [phase for phase in load(find(params["system"]).recipe)(params, rate) if phase.epochs > 0]
    if not found:
        raise ParameterError(f"system '{params['system']}': every phase has 0 epochs, nothing would be trained; raise "
                             "stage1_frozen_epochs, stage1_epochs or stage2_epochs, or of two paths global_epochs.")
    return found


def two_stages(params: Mapping, rate: float) -> list[Phase]:
    """CHARM and MemAug: stage 1 is fastai's ``fine_tune``, stage 2 one cycle on all images.

    Stage 1 trains the head alone, then the whole network at half the rate, the first layers at a hundredth of it. Without
    pretrained weights the whole network trains at the full rate. Stage 2 runs from ``stage2_lr_min`` (first layers) to
    ``stage2_lr_max`` (head). With ``stage2_frozen`` trunk and final block stay to the bit, and the head goes on from stage 1
    (cRT, arXiv 1910.09217, draws it anew). With ``one_group`` all layers train throughout, at the head's rates.
    """
    watched = {name: params[name] for name in WATCHED} | {"warmup": params["warmup_epochs"]}
    first = {"stage": "1", "batch": params["stage1_batch"], "images": params["stage1_images"], "loss": params["stage1_loss"],
             "sampler": params["stage1_sampler"], "sets": {"bank_momentum": params["bank_momentum"]}}
    whole = slice(rate / 2 / 100, rate / 2) if params["weights"] != "none" else rate
    return [
        Phase("stage1_frozen", epochs=params["stage1_frozen_epochs"], lr=slice(rate), cycle={"pct_start": 0.99},
              trains=() if params["one_group"] else ("head",), save_delta=params["save_delta"],
              schedule=params["schedule"], warmup=params["warmup_epochs"], **first),
        Phase("stage1", epochs=params["stage1_epochs"], lr=whole, cycle={"pct_start": 0.3, "div": 5.0}, **watched, **first),
        Phase("stage2", "2", params["stage2_epochs"], slice(params["stage2_lr_min"], params["stage2_lr_max"]),
              params["stage2_batch"], loss=params["stage2_loss"], sampler=params["stage2_sampler"], **watched,
              trains=("head",) if params["stage2_frozen"] else (), train_norms=not params["stage2_frozen"],
              sets={"bank_momentum": params["stage2_bank_momentum"]}),
    ]


LETTERS = {"g": "global", "l": "local", "f": "fusion"}


def in_order(params: Mapping, rate: float) -> list[Phase]:
    """Two paths: a phase, and a stage of its name, for each group of letters in ``order``, with the sum of their losses.

    All other parts are frozen entirely, norm statistics too. A joint phase has the most epochs and the smallest batch of its
    letters. Each phase keeps the best epoch of its last letter's branch; the last phase that of the fusion. A mean has nothing
    to train and leaves the order. Backbones have the rate ``stage2_lr_min``, new layers ``stage2_lr_max``; ``rate`` is unused.
    """
    epochs = {letter: params[f"{name}_epochs"] * (letter != "f" or params["fusion"] != "mean")
              for letter, name in LETTERS.items()}
    groups = ["".join(letter for letter in group if epochs[letter]) for group in params["order"].split(",")]
    groups = [group for i, group in enumerate(groups) if group and group not in groups[:i]]
    batch = phase_batches(params)
    return [Phase(group, group, max(epochs[letter] for letter in group),
                  slice(params["stage2_lr_min"], params["stage2_lr_max"]), min(batch[letter] for letter in group),
                  loss=params["stage2_loss"], sampler=params["stage2_sampler"], trains=tuple(LETTERS[n] for n in group),
                  train_norms=False, warmup=params["warmup_epochs"], **{name: params[name] for name in WATCHED},
                  sets={"losses": group, "shows": "f" if group is groups[-1] else group[-1]})
            for group in groups]


def phase_batches(params: Mapping) -> dict[str, int]:
    """The batch of each letter from ``phase_batch``, which ParameterError refuses if it is not three numbers of 2 or more."""
    given = params["phase_batch"].split(",") if params["phase_batch"] else [str(params["stage2_batch"])] * 3
    if len(given) != 3 or not all(n.strip().isdecimal() and int(n) > 1 for n in given):
        raise ParameterError(f"parameter 'phase_batch': {params['phase_batch']!r} is not three numbers of 2 or more, for the "
                             "global path, the local path and the fusion; say phase_batch: 32,16,16, or leave it empty.")
    return dict(zip(LETTERS, map(int, given)))


def epochs_before(plan: Sequence[Phase], phase: Phase) -> int:
    """Epochs that earlier phases of the same stage have."""
    return sum(p.epochs for p in plan[:plan.index(phase)] if p.stage == phase.stage)


def validations(plan: Sequence[Phase], monitor: str) -> dict[str, int]:
    """How many of each phase's epochs, the last ones, end with a validation: all; with ``monitor`` 'last' one a stage."""
    if monitor != "last":
        return {p.name: p.epochs for p in plan}
    last = {p.stage: p.name for p in plan}
    return {p.name: int(last[p.stage] == p.name) for p in plan}


def phase_of(plan: Sequence[Phase], row: Mapping) -> Phase:
    """The phase that a row of ``history.csv`` (its ``stage`` and ``epoch``) belongs to."""
    of_stage = [p for p in plan if p.stage == str(row["stage"])]
    return next((p for p in of_stage if int(row["epoch"]) <= epochs_before(plan, p) + p.epochs), of_stage[-1])


def steps(plan: Sequence[Phase], images: Mapping[str, int]) -> int:
    """The most optimizer steps; ``images`` are the numbers of training images, 'all' and 'findings'."""
    return sum(p.epochs * batches(p, images) for p in plan)


def batches(phase: Phase, images: Mapping[str, int]) -> int:
    """Training batches of one epoch: the last, smaller batch is dropped unless it is the only one."""
    return max(1, images[phase.images] // phase.batch)
