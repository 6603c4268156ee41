"""The rows of the table of parameters; :mod:`charmlib.params` checks values against them. Imports no torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any


@dataclass(frozen=True)
class Param:
    """One row of the table.

    - ``choices``: the only allowed values; ``also`` describes free values besides them.
    - ``low``, ``high``: the allowed range of a number.
    - ``of``: the systems that have this parameter; all systems if empty.
    - ``not_of``: the systems that do without it.
    - ``needs``: other parameters and their values under which this one has an effect: ``{'answer': ('votes',)}``. The names of
      several joined by ``|`` ask for one of them; :data:`ABOVE_0` stands for any positive number.
    - ``effective``: (value, params, steps) -> the value that it amounts to; two values of one effective value give the same
      run. ``steps`` is the number of training steps, None where it is not known.
    - ``shown``: whether the train notebook's parameters cell has a line for it; the others go through its ``options``.
    - ``hashed``: False for parameters that say where and how a run happens: they stay out of a cell's hash.
    - ``scores``: whether it acts when scoring and choosing an epoch only: cells that differ in no other parameter share a
      training. A callable says so of the parameters.
    """

    group: str
    name: str
    type: type
    default: Any
    reason: str
    choices: tuple = ()
    also: str = ""
    low: float = -math.inf
    high: float = math.inf
    of: tuple[str, ...] = ()
    not_of: tuple[str, ...] = ()
    needs: Mapping[str, Any] = field(default_factory=dict)
    effective: Callable[[Any, Mapping, int | None], Any] | None = None
    shown: bool = False
    hashed: bool = True
    scores: bool | Callable[[Mapping], bool] = False


ABOVE_0 = "above 0"
SAMPLERS = ("natural", "class_aware", "repeat")
LOSSES = ("bce", "focal", "asl", "asl_published", "ldam", "db")
_CHARM = {"of": ("charm",)}
_MOMENTUM = {**_CHARM, "needs": {"use_momentum": (True,)}}
_BRANCH = {**_CHARM, "needs": {"momentum_form": ("branch",)}}
_BANK = {**_CHARM, "needs": {"use_bank": (True,)}}
_VOTES = {**_CHARM, "needs": {"answer": ("votes",)}}
_FEATURES = {**_CHARM, "needs": {"answer": ("features",)}}
_ASL, _LDAM, _REPEAT = ({"needs": {f"stage1_{of}|stage2_{of}": (value,)}}
                        for of, value in (("loss", "asl"), ("loss", "ldam"), ("sampler", "repeat")))
_LAYERS, _CSRA = ({**_CHARM, "needs": {"head": forms}} for forms in (("charm", "standard"), ("csra",)))
_TWO = {"of": ("two_path",)}
_REGION = {**_TWO, "needs": {"local": ("attention", "other")}}
_STAGE1 = {"not_of": ("two_path",), "needs": {"stage1_frozen_epochs|stage1_epochs": ABOVE_0}}
_STAGE2 = {"needs": {"stage2_epochs|global_epochs|local_epochs|fusion_epochs": ABOVE_0}}


def _mean_scores(params: Mapping) -> bool:
    """Whether the momentum encoder is a mean of the weights or switched off: training then goes on without it."""
    return not params["use_momentum"] or params["momentum_form"] == "weights"


def _bank_scores(params: Mapping) -> bool:
    """Whether the memory bank votes or is switched off: training then goes on without it."""
    return not params["use_bank"] or params["answer"] == "votes"


WARMUPS = {"momentum": "momentum_warmup", "average": "average_warmup"}  # decays, and what says whether each rises to its value


def warmup_end(momentum: float, params: Mapping, steps: int | None, of: str = "momentum") -> float:
    """The largest decay that a warm-up reaches in so many steps: ``min(m, steps / (9 + steps))``; ``of`` is in WARMUPS.

    See :class:`charmlib.nn.MomentumEncoder`; m = 0.99, 0.999 and 0.9999 are reached after 890, 8,990 and 89,990 steps.
    """
    without = steps is None or not params[WARMUPS[of]] or (of == "momentum" and params["momentum_form"] == "weights")
    return momentum if without else min(momentum, steps / (9 + steps))


def _share_used(fraction: float, params: Mapping, steps: int | None) -> float:
    """Random splits and lists have their own validation part, which only 0 removes."""
    drawn = params["split"] == "official" or params["split"].startswith("fold:")
    return fraction if drawn else float(fraction > 0)


ROWS: tuple[Param, ...] = (
    # data
    Param("data", "data_root", str, "",
          "folder of the images and CSVs; empty searches Kaggle's mounts and ./data, else draws phantoms", shown=True,
          hashed=False),
    Param("data", "classes", str, "nih14", "the 14 NIH findings, 'No Finding' as a 15th class, or the classes of `csv`",
          ("nih14", "nih15", "own"), shown=True),
    Param("data", "csv", str, "", "a label table of your own; empty finds the NIH table", shown=True),
    Param("data", "normal_class", str, "", "the class that means no finding; empty knows 'No Finding', 'Normal' and the like"),
    Param("data", "blank", str, "auto", "meaning of a blank among 0 and 1; auto is 0 in tables like CheXpert's, else unknown",
          ("auto", "unknown", "0", "1")),
    Param("data", "uncertain", str, "auto", "what the label -1 means; auto is unknown", ("auto", "unknown", "0", "1")),
    Param("data", "patients", str, "", "the column of the patients; empty finds one; none counts each image as a patient"),
    Param("data", "labels", str, "real", "shuffled is a control that must score 0.5 and is never ranked", ("real", "shuffled")),
    Param("data", "split", str, "official",
          "official lists, random by patient, a fold of a cross-validation, or a folder with train/valid/test.txt",
          ("official", "patient"), also="fold:I/N or a folder", shown=True),
    Param("data", "never_test", str, "", "a list of patients, one a line, who are in no test part of split fold:I/N",
          hashed=False),
    Param("data", "valid_fraction", float, 0.1, "share of the train_val patients used for validation; 0 trains on all of them",
          low=0, high=0.5, effective=_share_used),
    Param("data", "image_size", int, 224, "pixels a side; the published runs use 224", low=16, high=1024, shown=True),
    Param("data", "aspect", str, "stretch", "images that are not square: stretch, pad with black, or crop the centre",
          ("stretch", "pad", "crop")),
    Param("data", "contrast", str, "none", "contrast of the images: as they are, or adaptive histogram equalisation",
          ("none", "clahe")),
    Param("data", "cache_dir", str, "", "folder of the decoded images; empty is a scratch folder of this machine",
          hashed=False),
    Param("data", "limit", int, 0, "0 is all images; N images a part is a quick check, never ranked", low=0,
          shown=True),
    # network
    Param("network", "system", str, "charm", "which network and recipe: charm, also MemAug and the plain network; or two_path",
          shown=True),
    Param("network", "arch", str, "efficientnet_v2_s", "a torchvision name, or timm:NAME", shown=True),
    Param("network", "weights", str, "imagenet", "initial weights of the backbone", ("imagenet", "none"), also="a file",
          shown=True),
    Param("network", "norm", str, "auto", "input normalisation; auto follows the weights, half is -1 to 1, xrv -1024 to 1024",
          ("auto", "imagenet", "half", "xrv")),
    Param("network", "allow_leak", bool, False, "whether NIH images may be scored with start weights that have seen them"),
    Param("network", "use_momentum", bool, True, "momentum encoder of CHARM", **_CHARM, scores=_mean_scores),
    Param("network", "use_attention", bool, True, "multi-scale attention of CHARM", **_CHARM),
    Param("network", "use_bank", bool, True, "memory bank of CHARM and MemAug", **_CHARM, scores=_bank_scores),
    Param("network", "attention", str, "scales",
          "attention to maps at strides 8, 16 and 32, added to the feature; or the published sigmoid of one map, as four "
          "convolutions or as the one 5x5 filter that they amount to", ("scales", "layers", "filter"),
          needs={"use_attention": (True,)}, **_CHARM),
    Param("network", "momentum", float, 0.99, "momentum m of the momentum encoder", low=0, high=1, shown=True,
          effective=warmup_end, **_MOMENTUM, scores=_mean_scores),
    Param("network", "momentum_form", str, "weights",
          "a bias-corrected running mean of all weights that scores and makes the memory's keys; or as published a branch, a "
          "slow copy of the final block", ("weights", "branch"), **_MOMENTUM, scores=_mean_scores),
    Param("network", "momentum_warmup", bool, True, "whether m starts at 0.1 and rises to momentum", **_BRANCH),
    Param("network", "momentum_before_step", bool, False, "update the momentum encoder before each optimizer step", **_BRANCH),
    Param("network", "momentum_batch_norms", bool, False,
          "norms of the momentum branch use the batch's statistics in training, not averages", **_BRANCH),
    Param("network", "k", int, 5, "slots for and against each class that vote; retrieved slots of answer features", low=1,
          shown=True, **_BANK, scores=_bank_scores),
    Param("network", "threshold", float, 0.2,
          "for votes, share of the training images up to which a finding is rare; for features, rarity above which one is "
          "stored (below, for rule published), or share of the batch for ranked scores", low=0, shown=True,
          needs={"answer|strategy": ("votes", "rarity", "statistical", "entropy", "diversity", "hybrid")}, **_CHARM,
          scores=_bank_scores),
    Param("network", "bank_size", int, 4096, "number of slots; 512 in the paper", low=1, high=65536, shown=True, **_BANK,
          scores=_bank_scores),
    Param("network", "strategy", str, "rarity", "score by which the bank selects features; rarity in the paper",
          ("rarity", "statistical", "entropy", "diversity", "hybrid", "fifo", "reservoir", "hard"), **_FEATURES),
    Param("network", "answer", str, "votes",
          "what slots contribute: votes of their labels, or features added to the query as in the paper", ("votes", "features"),
          **_BANK, scores=_bank_scores),
    Param("network", "keys", str, "scales",
          "what voting slots are compared by: trunk maps at strides 4, 8 and 16, or the feature z", ("scales", "features"),
          **_VOTES, scores=_bank_scores),
    Param("network", "vote_weight", float, -1.0,
          "share of the bank's votes in the logits; -1 chooses among 0, 0.1 to 1 by the log loss on the validation part, and "
          "is 0.5 without one",
          low=-1, high=1, **_VOTES, scores=True),
    Param("network", "vote_temperature", float, 0.1,
          "what differences of similarities are divided by; small values make votes more certain", low=1e-3, **_VOTES,
          scores=True),
    Param("network", "rule", str, "rare",
          "rare stores rare features, published the common ones as the code does, angle compares directions",
          ("rare", "published", "angle"), needs={"strategy": ("rarity", "statistical", "hybrid")}, **_CHARM),
    Param("network", "retrieval", str, "softmax",
          "weights of retrieved slots: softmax of the cosines, raw cosines, gated with a learned scalar from 0, or published, "
          "raw cosines of a bank that stores a batch before it retrieves", ("softmax", "cosine", "gated", "published"),
          **_FEATURES),
    Param("network", "bank_norm", str, "both", "which side is scaled to unit length before the dot product",
          ("both", "query", "memory", "none"), **_FEATURES),
    Param("network", "normalize_retrieved", bool, False, "scale the retrieved feature to the query's length",
          **_FEATURES),
    Param("network", "bank_momentum", float, 0.9, "momentum of the running mean in strategy statistical, stage 1", low=0,
          high=1, needs={"strategy": ("statistical",)}, **_CHARM),
    Param("network", "stage2_bank_momentum", float, 0.9999, "the same in stage 2", low=0, high=1,
          needs={"strategy": ("statistical",)}, **_CHARM),
    Param("network", "adjust", float, 0.0, "the last bias starts at this share of the classes' log-odds; 1 is the prevalence",
          low=0, high=2, **_CHARM),
    Param("network", "head", str, "charm",
          "classifier: CHARM's, the standard one of long-tail recipes, csra, which weighs the positions of the map for each "
          "class, or one linear layer", ("charm", "standard", "csra", "linear"), **_CHARM),
    Param("network", "dropout", float, 0.3, "dropout rate of the head", low=0, high=0.99, **_CHARM,
          needs={"head": ("charm", "standard", "linear")}),
    Param("network", "hidden", int, 512, "hidden width of the head", low=1, **_LAYERS),
    Param("network", "csra_lambda", float, 0.1, "share of the attended score; 0 is average pooling", low=0, **_CSRA),
    Param("network", "csra_heads", int, 1, "number of heads, with the temperatures of the paper", (1, 2, 4, 6, 8), **_CSRA),
    Param("network", "csra_attention", str, "scores", "what positions are weighed by: class scores, or a layer of its own",
          ("scores", "own"), **_CSRA),
    Param("network", "drop_path", float, 0.0, "stochastic depth of a timm backbone; 0 is timm's default", low=0, high=0.9,
          **_CHARM),
    Param("network", "refine", str, "none",
          "attention behind the last blocks at strides 4, 8 and 16, or the levels of a neck: CBAM, or large kernels",
          ("none", "cbam", "lka"), of=("charm", "two_path")),
    Param("network", "refine_start", str, "identity", "where that attention starts", ("identity", "published"),
          of=("charm", "two_path"), needs={"refine": ("cbam", "lka")}),
    Param("network", "local", str, "attention",
          "what the second path sees: where the first looks; or as controls the middle half, the whole, another image's box",
          ("attention", "centre", "same", "other"), **_TWO),
    Param("network", "heat", str, "mean", "heat of the first path's map: mean or max of absolute values, or class maps",
          ("mean", "max", "cam"), **_REGION),
    Param("network", "heat_stride", int, 32, "stride of that map; 2 x 2 cells for 32 at 64 pixels", (8, 16, 32), **_REGION),
    Param("network", "tau", float, 0.7, "share of the heat's range above which cells are kept", low=0, high=1, **_REGION),
    Param("network", "connect", int, 8, "cells of a region touch at sides (4), or also at corners", (4, 8), **_REGION),
    Param("network", "input_size", int, 0, "pixels a side of each path; 0 is the image's; larger images give crops detail",
          low=0, high=1024, **_TWO),
    Param("network", "crop", int, 0, "pixels a side cut from the image, at random in training, else the centre; 0 is all of it",
          low=0, high=1024, **_TWO),
    Param("network", "neck", str, "none",
          "how maps at strides 4 to 32 are read: the last alone, each by layers of its own, or in a feature pyramid",
          ("none", "laterals", "fpn"), **_TWO),
    Param("network", "pool", str, "avg", "pooling of the maps; max in AG-CNN", ("avg", "max"), **_TWO),
    Param("network", "fusion", str, "linear", "what reads both paths: a linear layer, hidden layers, or the mean of the logits",
          ("linear", "mlp", "mean"), **_TWO),
    # training
    Param("training", "order", str, "g,l,f", "phases of the global path, the local path and the fusion, alone or jointly",
          ("g,l,f", "glf", "gl,f", "g,lf", "g,l,glf"), **_TWO),
    Param("training", "global_epochs", int, 10, "epochs of the global path; a joint phase has the most", low=0, **_TWO),
    Param("training", "local_epochs", int, 8, "epochs of the local path", low=0, **_TWO),
    Param("training", "fusion_epochs", int, 5, "epochs of the fusion", low=0, **_TWO, needs={"fusion": ("linear", "mlp")}),
    Param("training", "phase_batch", str, "",
          "batches of the three, such as 32,16,16; a joint phase has the smallest; empty is stage2_batch", **_TWO),
    Param("training", "stage1_images", str, "findings", "images of stage 1: those with a finding, or all", ("findings", "all"),
          **_STAGE1),
    Param("training", "stage1_frozen_epochs", int, 3, "epochs of stage 1 that train the head alone", low=0, shown=True,
          not_of=("two_path",)),
    Param("training", "stage1_epochs", int, 20, "largest number of further epochs of stage 1, whole network", low=0,
          shown=True, not_of=("two_path",)),
    Param("training", "stage1_batch", int, 64, "batch size of stage 1", low=2, shown=True, **_STAGE1),
    Param("training", "stage1_lr", float, 0.0, "learning rate of stage 1; 0 runs the learning-rate finder, grids pin a number",
          low=0, shown=True, **_STAGE1),
    Param("training", "stage1_loss", str, "bce", "loss of stage 1: db is distribution-balanced, ldam has margins", LOSSES,
          **_STAGE1),
    Param("training", "stage2_epochs", int, 5, "epochs of stage 2, all images, one cycle", low=0, shown=True,
          not_of=("two_path",)),
    Param("training", "stage2_batch", int, 128, "batch size of stage 2 and of scoring", low=2, shown=True),
    Param("training", "stage2_frozen", bool, False, "stage 2 trains the head alone; norm statistics stay, too", **_STAGE2,
          not_of=("two_path",)),
    Param("training", "stage2_lr_min", float, 2e-5, "learning rate of the first layers in stage 2", low=0, shown=True,
          needs={**_STAGE2["needs"], "stage2_frozen": (False,)}),
    Param("training", "stage2_lr_max", float, 8e-5, "learning rate of the head in stage 2", low=0, shown=True, **_STAGE2),
    Param("training", "stage2_loss", str, "bce", "loss of stage 2; asl as in the paper, asl_published as in the code", LOSSES,
          **_STAGE2),
    Param("training", "stage1_sampler", str, "natural", "which images an epoch of stage 1 draws: each once, classes equally "
          "often, or rare ones repeated", SAMPLERS, **_STAGE1),
    Param("training", "stage2_sampler", str, "natural", "the same in stage 2", SAMPLERS, **_STAGE2),
    Param("training", "repeat_threshold", float, 0.01, "share of images below which sampler repeat repeats a class", low=0,
          high=1, **_REPEAT),
    Param("training", "class_weight", str, "none", "weights of positives by the rarity of their class, in every loss",
          ("none", "inverse", "sqrt", "effective", "exp")),
    Param("training", "weight_from", float, 0.0, "share of a stage's epochs before class weights act; 0.8 defers them as "
          "published with ldam", low=0, high=1, needs={"class_weight": ("inverse", "sqrt", "effective", "exp")}),
    Param("training", "asl_gamma_neg", float, 4.0, "focusing of negatives in loss asl", low=0, **_ASL),
    Param("training", "asl_gamma_pos", float, 1.0, "focusing of positives in loss asl; 0 in the authors' runs on COCO", low=0,
          **_ASL),
    Param("training", "asl_clip", float, 0.05, "margin of the probability of negatives in loss asl", low=0, high=0.99, **_ASL),
    Param("training", "ldam_margin", float, 0.5, "margin of the rarest class in loss ldam", low=0, **_LDAM),
    Param("training", "ldam_scale", float, 1.0, "what the head's output is multiplied by where a stage has loss ldam; 30 as "
          "published", low=1e-3, high=1000, of=("charm",), **_LDAM),
    Param("training", "optimizer", str, "adamw",
          "AdamW; SGD with momentum 0.9; or fastai's Adam: beta2 0.99, epsilon 1e-5, no decay of norms and biases",
          ("adamw", "sgd", "fastai")),
    Param("training", "schedule", str, "one_cycle",
          "learning rate of a phase: one cycle; or a tenth after 1/2 and 3/4 of it, or after each epoch without improvement",
          ("one_cycle", "steps", "plateau")),
    Param("training", "warmup_epochs", int, 0, "first epochs of a phase, in which the learning rate rises from a tenth", low=0,
          needs={"schedule": ("steps", "plateau")}),
    Param("training", "clip_norm", float, 0.0, "largest norm of the gradients; longer ones are scaled to it; 0 is no clipping",
          low=0),
    Param("training", "one_group", bool, False,
          "one parameter group as in the published code: nothing is frozen, and all layers have the head's rate"),
    Param("training", "augment", str, "light",
          "flip and turn; standard adds shift, zoom, brightness and contrast, strong also CLAHE, noise and holes",
          ("light", "standard", "strong")),
    Param("training", "average", float, 0.0,
          "decay of a running mean of the weights that is scored and saved; 0 scores the last weights, 1 takes all steps alike",
          low=0, high=1, effective=partial(warmup_end, of="average"), scores=True),
    Param("training", "average_warmup", bool, False, "whether the decay of that mean starts at 0.1 and rises to average",
          needs={"average": ABOVE_0}, scores=True),
    Param("training", "weight_decay", float, 0.01, "decoupled weight decay; an L2 penalty with sgd", low=0),
    Param("training", "patience", int, 5, "epochs without improvement before a stage ends; 0 never ends it early", low=0,
          scores=True),
    Param("training", "min_delta", float, 0.0, "smallest improvement that patience counts; 0.001 in the published code",
          low=0, needs={"patience": ABOVE_0}, scores=True),
    Param("training", "save_delta", float, 0.0, "smallest improvement that replaces the kept epoch; 0.0001 as published",
          low=0, needs={"valid_fraction": ABOVE_0, "monitor": ("valid_loss", "valid_auc", "valid_ap")}, scores=True),
    Param("training", "monitor", str, "valid_loss",
          "validation figure for early stopping and the kept epoch; last keeps and validates the last of each stage",
          ("valid_loss", "valid_auc", "valid_ap", "last"), needs={"valid_fraction": ABOVE_0}, scores=True),
    # run
    Param("run", "run_dir", str, "runs/notebook", "folder of this run's files", shown=True, hashed=False),
    Param("run", "seed", int, 85, "seed of all randomness; 85 in the paper", low=0, shown=True),
    Param("run", "processes", int, 1, "processes that train together, one a GPU", low=1, shown=True, hashed=False),
    Param("run", "tta", str, "none", "views that scores and predictions merge: id, flip, turns of 5 degrees, zooms, brightness",
          ("none", "flip", "light", "medium", "heavy", "flip_scale"), scores=True),
    Param("run", "tta_merge", str, "mean", "how probabilities of views are merged; logit_mean takes the mean of the logits",
          ("mean", "max", "gmean", "median", "logit_mean"),
          needs={"tta": ("flip", "light", "medium", "heavy", "flip_scale")}, scores=True),
    Param("run", "heat_maps", str, "boxed", "heat maps that scoring stores: of test images with radiologists' boxes, or of all",
          ("boxed", "none", "all"), hashed=False),
    Param("run", "precision", str, "auto", "auto is fp16 on a GPU and fp32 on a CPU", ("auto", "fp16", "fp32")),
    Param("run", "workers", int, 0, "processes that decode images for the cache; 0 is one a core", low=0, hashed=False),
    Param("run", "preload", bool, False, "hold the training images as uint8 on the GPU, 50 KB an image at 224 pixels",
          hashed=False),
    Param("run", "grad_checkpointing", bool, False,
          "recompute activations in the backward pass: less GPU memory, same result, slower", hashed=False),
    Param("run", "compile", bool, False, "torch.compile of the backbone; needs sm_70 or newer (T4), so no P100"),
    Param("run", "device", str, "auto", "auto takes the GPU if this torch has kernels for it", ("auto", "cpu", "cuda"),
          hashed=False),
    Param("run", "resume", bool, True, "continue from the last finished epoch in run_dir", hashed=False),
)
