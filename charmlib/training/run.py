"""One run: parameters, data, network and a folder. The train and test notebooks are written with it."""

import hashlib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from fastai.callback.core import Callback
from fastcore.foundation import L

from charmlib import session
from charmlib.data.dataset import ChestData, digests, find_data, open_dataset
from charmlib.data.loaders import ChestDataLoaders, ChestDL, ChestImages, chest_dataloaders
from charmlib.data.views import MENUS
from charmlib.evaluation.intervals import save_resamples
from charmlib.evaluation.leaks import leaked_start
from charmlib.evaluation.metrics import mean_auc, prevalence
from charmlib.evaluation.runs import HISTORY, NUMBERS, RunFolder, about, chosen_on_validation, save_predictions, write_arrays
from charmlib.evaluation.score import score_part
from charmlib.files import write_csv, write_json, write_text
from charmlib.models.registry import Network, create, keywords
from charmlib.nih import finding_columns, same_order
from charmlib.nn.losses import make_loss
from charmlib.nn.votes import WEIGHTS
from charmlib.param_rows import WARMUPS
from charmlib.param_sources import changed, read_yaml, with_absolute_paths
from charmlib.params import PARAMS, UNHASHED, effective, missing_need, no_effect, resolve
from charmlib.training import cards
from charmlib.training.bank_evidence import BankEvidence
from charmlib.training.callbacks import Trains, seed_everything, write_history
from charmlib.training.checkpoint import differences, load_model, load_weights, save_model
from charmlib.training.device import compile_backbone, pick_device, pick_precision, place
from charmlib.training.fit import PhaseRunner
from charmlib.training.heat import keep_heat
from charmlib.training.learner import charm_learner
from charmlib.training.looks import Look, looks
from charmlib.training.machine import device_name, peak_memory_mb, versions
from charmlib.training.recipes import Phase, phases, steps
from charmlib.training.tape import tape_of_grid
from charmlib.training.views import head_share, merged, read_views, tensors

# for charm_learner
OF_LEARNER = ("optimizer", "one_group", "weight_decay", "weight_from", "average", "average_warmup", "clip_norm")


class Run:
    """A run in its folder.

    >>> run = Run.open(data_root='data/nih', run_dir='runs/mine', k=3)     # doctest: +SKIP
    >>> run.train()                                                        # doctest: +SKIP
    >>> Run.load('runs/mine').score()                                      # doctest: +SKIP

    Attributes: ``params`` (all of them), ``data`` (:class:`ChestData`), ``net``, ``folder`` (:class:`RunFolder`), ``device``,
    ``precision``, ``history`` (list of rows as in ``history.csv``), ``bank`` (:class:`BankEvidence`: what the network's memory
    bank holds and answers).
    """

    def __init__(self, params: Mapping, data: ChestData, net: Network, device: torch.device, precision: str):
        self.params, self.data, self.net = dict(params), data, net
        self.device, self.precision = device, precision
        self.folder, self.bank = RunFolder(params["run_dir"]), BankEvidence(self)
        self.history: list[dict] = []
        self.tape = tape_of_grid()
        if self.tape and hasattr(net, "encode"):
            self.tape.remember(net)
        no_stage1 = self.params["system"] in PARAMS["stage1_lr"].not_of
        self._rate = self.params["stage2_lr_max"] if no_stage1 else self.params["stage1_lr"] or None

    @classmethod
    def open(cls, params: Mapping | None = None, **changes) -> "Run":
        """Check the parameters, open the data, build the network. Writes nothing yet.

        Raises :class:`charmlib.params.ParameterError` for a parameter that is unknown, ill-typed or out of range.
        """
        if session.in_grid():  # older releases of ipykernel notice the end of their parent only if it was process 1's child
            session.die_with_parent(int(os.environ.get("JPY_PARENT_PID", os.getppid())))
        p = with_absolute_paths(resolve(dict(params or {}), changes))
        phases(p)  # refuses parameters that would train nothing
        if not session.in_grid() and (words := no_effect({name: missing_need(name, p) for name in changed(p)})):
            print(words, flush=True)
        p["data_root"] = str(find_data(p["data_root"], p["csv"]))
        cards.join(device := pick_device(p["device"]), p["run_dir"])
        precision, data = pick_precision(p["precision"], device), open_dataset(p)
        leaked_start(p, data.index.table.name)
        seed_everything(p["seed"], "weights")
        net = place(create(p, data.classes), device)
        if p["adjust"] and hasattr(net, "start_at"):
            net.start_at(torch.tensor(p["adjust"] * data.log_odds()))
        _refuse_small(net, p, device)
        if p["compile"]:
            compile_backbone(net, device)
        return cls(p, data, net, device, precision)

    @classmethod
    def load(cls, run_dir: str | Path, **changes) -> "Run":
        """A trained run from its folder; ``changes`` may only say where things are (data_root, cache_dir, workers, device).

        A read-only folder is copied to a writable place, and the copy is the run's folder from then on. Raises
        FileNotFoundError or ValueError: not trained, a checkpoint that does not fit, classes in another order, another split.
        """
        folder = RunFolder(Path(run_dir).expanduser().resolve())
        if not folder.params_file.is_file():
            raise FileNotFoundError(f"no run in {folder}: params.yaml is not there. Train first, with run_dir={folder}")
        if wrong := set(changes) - set(UNHASHED):
            raise ValueError(f"a trained run cannot be loaded with another {', '.join(sorted(wrong))}")
        p = resolve(read_yaml(folder.params_file), {k: v for k, v in changes.items() if v not in ("", None)},
                    {"run_dir": str(folder.path if os.access(folder, os.W_OK) else _writable_copy(folder.path))})
        cards.join(device := pick_device(p["device"]), p["run_dir"])
        net, card = load_model(p["run_dir"], device)
        data = open_dataset(p)
        same_order(card["classes"], data.classes, f"checkpoint {folder} and data {data.index.table}")
        if card["params"]["split_hash"] != data.split.hash:
            raise ValueError(f"{folder} was trained on split {card['params']['split_hash']}, {data.index.root} gives "
                             f"{data.split.hash}: scores would mix training and test images")
        if (trained := card["data"]["scale"]) != (here := data.images.scale and list(data.images.scale)):
            raise ValueError(f"{folder} was trained with pictures of more than 8 bits scaled by {trained}, "
                             f"{data.images.folder} scales them by {here}. Name the cache_dir that it was trained with")
        return cls(p, data, net, device, pick_precision(p["precision"], device))

    # -- training ---------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """The phases of the run's recipe."""
        return phases(self.params, self._rate or 0.0)

    def phase(self, name: str = "") -> Phase:
        """A phase by name; the first by default."""
        return next(phase for phase in self.phases() if name in ("", phase.name))

    def dataloaders(self, phase: Phase | None = None) -> ChestDataLoaders:
        """fastai DataLoaders of a phase; of the first by default."""
        phase = phase or self.phase()
        return chest_dataloaders(self.data, bs=phase.batch, findings_only=phase.images == "findings", mean=self.net.mean,
                                 std=self.net.std, augment=self.params["augment"], sampler=phase.sampler,
                                 repeat_threshold=self.params["repeat_threshold"], preload=self.params["preload"],
                                 device=self.device, path=self.folder.path)

    def learner(self, phase: Phase | None = None):
        """A fastai Learner around the run's network, with loss and loaders of a phase; of the first by default.

        What its callbacks write goes into the folder ``fastai`` of the run's.
        """
        phase = phase or self.phase()
        if phase.sets:
            self.net.enter(**phase.sets)
        path = session.own_temporary_folder() / f"process{cards.rank()}" if cards.rank() else \
            self.folder / "fastai"  # CSVLogger's history.csv is another file than the run's
        path.mkdir(parents=True, exist_ok=True)
        given = {name: self.params[name] for name in OF_LEARNER} | keywords(make_loss, self.params)
        del given["ldam_scale"]  # as the network has it: 1 with another loss
        return charm_learner(self.dataloaders(phase), net=self.net, loss=phase.loss, precision=self.precision, path=path,
                             **given)

    def find_lr(self, *, plot: bool = False) -> float:
        """The learning rate of stage 1: ``stage1_lr``, or if that is 0 the valley of fastai's finder; of two paths the largest.

        The finder restores network, bank and momentum encoder. A resumed run keeps its first rate.
        """
        self._train_in_processes()
        self.folder.path.mkdir(parents=True, exist_ok=True)
        if self._rate is None and self.trained():
            self._rate = self.folder.card["stage1_lr"]
        if self._rate is None and (kept := self._runner().saved(self.params["resume"])):
            self._rate = kept["rate"]
        if self._rate is None:
            seed_everything(self.params["seed"], "lr_find")
            phase = self.phase()
            learner, plan = self.learner(phase), self.phases()
            learner.loss_mode.epochs = sum(p.epochs for p in plan if p.stage == phase.stage)
            Trains(phase.trains, phase.train_norms).apply(learner)
            rank = os.environ.pop("RANK", "")  # fastai's finder restores weights that fastai saves in the first process alone
            try:
                with nullcontext() if session.person_watches() else learner.no_bar():
                    self._rate = cards.same(float(learner.lr_find(show_plot=plot).valley))
            finally:
                os.environ |= {"RANK": rank} if rank else {}
            self.log(f"learning-rate finder: {self._rate:.2e}")
        return self._rate

    def train(self, cbs: Callback | Sequence[Callback] = ()) -> list[dict]:
        """Train all phases, from the last finished epoch of an earlier start on; a trained run is left as it is.

        ``cbs`` are further callbacks of every phase, such as fastai's ``CSVLogger()``, ``TensorBoardCallback()``,
        ``WandbCallback()`` or ``MixUp()``. They are no part of the run's settings: a run that goes on needs them again.

        Writes ``params.yaml`` and ``split.csv``; after each epoch ``history.csv``, ``bank_history.csv``, ``log.txt`` and
        ``resume.pt``; at the end ``model.safetensors``, ``bank.csv`` (the bank's slots), and ``model.json`` with the weight of
        the votes (if ``vote_weight`` is -1), thresholds and temperature, chosen in this order on the validation part. Without
        one (``valid_fraction`` 0) each stage ends with its last epoch's weights and nothing is chosen. ``resume=False`` first
        removes the files of an earlier run.

        Raises ValueError for a folder of a run with other settings; names them and the remedy.
        """
        folder, cbs = self.folder, L(cbs)
        if (folder / "grid.yaml").is_file():
            raise ValueError(f"{folder} is the folder of a grid, whose cells a run there would hide: name another run_dir")
        self._train_in_processes(cbs)
        if self.trained():
            self.log("trained already; nothing to do")
            self.history = self._read_history()
            return self.history
        if not self.params["resume"]:
            for file in (folder.resume_file, folder.card_file, folder.weights_file, folder.history_file, folder.bank_file,
                         folder.bank_history_file, folder.predictions_file, folder.branches_file, folder.heat_file,
                         folder.boxes_file, folder.scored_file, folder.metrics_file):
                file.unlink(missing_ok=True)
        folder.path.mkdir(parents=True, exist_ok=True)
        runner = self._runner()
        state = runner.saved(self.params["resume"])  # refuses a folder of other settings before writing to it
        write_text(folder.params_file, yaml.safe_dump(self.params, sort_keys=False))
        if not session.in_grid():  # a grid keeps one for all its cells
            write_csv(folder.split_file, self.data.split.frame(self.data.index))
        runner.rate = self._rate = state["rate"] if state else self.find_lr()
        plan = self.phases()
        self.log(f"training on {self.device} in {self.precision}, {self.data.source}, split {self.data.split.name} "
                 f"{self.data.split.hash}" + ("" if self.data.split.has_valid else ", no validation part: nothing is chosen")
                 + (f", going on after {len(state['history'])} finished epochs" if state else ""))
        if state is None:
            self._note_effective(steps(plan, self.data.train_images()))
        if cbs:
            self.log(f"with the callbacks {', '.join(type(cb).__name__ for cb in cbs)}")
        self.history = [{name: row[name] for name in HISTORY} for row in runner.run(plan, state, cbs)]
        if self.tape and self.tape.trained < len(self.history):
            self.log(f"trained {self.tape.trained} of {len(self.history)} epochs, took the others from {self.tape.folder}")
        with suppress(OSError):  # not empty: a callback has written there
            (self.folder / "fastai").rmdir()
        if getattr(self.bank.bank, "chooses", False) and self.data.split.has_valid:
            self._choose_vote_weight()
        logits, labels = self.logits("valid")  # thresholds and temperature are of the logits with that weight
        self.bank.write()
        if cards.rank() == 0:
            save_model(self.net, folder.path, classes=self.data.classes, normal_class=self.data.index.normal_class,
                       params={**self.params, "split_hash": self.data.split.hash},
                       stage1_lr=self._rate, data=self._source(), **chosen_on_validation(labels, logits, self.data.classes))
        cards.same(None)  # nobody looks for the card before it is there
        self.folder = RunFolder(folder.path)
        return self.history

    def _train_in_processes(self, cbs: Sequence = ()) -> None:
        """Under ``processes`` above 1: leave the training to that many, after which this run is trained."""
        if self.params["processes"] == 1 or cards.RUN in os.environ or self.trained():
            return
        if cbs or session.in_grid():
            raise ValueError("parameter 'processes': a grid gives each card a cell, and callbacks reach no other process; say "
                             "processes: 1, or start a script that trains this one run with torchrun")
        cards.launch(self.params)
        self.params["resume"] = True  # the folder holds this run now

    def _choose_vote_weight(self) -> None:
        """Give the votes the weight of :data:`charmlib.nn.votes.WEIGHTS` with the lowest mean log loss over the known labels of
        findings in the validation part, the smallest of equals."""
        columns, weight, ends = finding_columns(self.data.classes, self.data.index.normal_class), self.net.bank.weight, []
        for end in (0, 1):  # the head alone, and prior and votes alone
            weight.fill_(end)
            logits, labels = (torch.from_numpy(values[:, columns]) for values in self.logits("valid"))
            ends.append(logits)
        known = ~torch.isnan(labels)
        loss = {w: F.binary_cross_entropy_with_logits(torch.lerp(*ends, w)[known].double(), labels[known].double()).item()
                for w in WEIGHTS}
        weight.fill_(best := cards.same(min(loss, key=loss.get)))
        self.log(f"vote_weight {best} chosen on the validation part: log loss {loss[0]:.6f} at 0, {loss[0.5]:.6f} at 0.5, "
                 f"{loss[best]:.6f} at {best}")

    def _note_effective(self, total: int) -> None:
        """Log parameters that amount to another value in so few steps: a larger momentum would be the same run."""
        acts = effective(self.params, total)
        for name, value in self.params.items():
            if name in WARMUPS and acts[name] not in (None, value):
                self.log(f"note: in at most {total} steps the warm-up reaches {name} {acts[name]:.5f} and not {value:g}: any "
                         "larger value gives the same run")

    def trained(self) -> bool:
        """Whether the folder holds the checkpoint of exactly this run, which is then loaded.

        Raises ValueError if it holds one of other settings and ``resume`` is on.
        """
        self.folder = RunFolder(self.folder)
        if not self.params["resume"] or not self.folder.trained:
            return False
        card = self.folder.card
        if wrong := differences({**_hashed(card["params"]), **card["data"].get("digests", {})}, self._identity()):
            raise ValueError(f"{self.folder} holds a trained run with other settings ({wrong}). Name another run_dir, or say "
                             "resume=False to train anew.")
        load_weights(self.net, self.folder.path)
        return True

    def _source(self) -> dict:
        return {"name": self.data.source, "drawn": self.data.index.drawn, "scale": self.data.images.scale,
                "digests": self._digests}

    @cached_property
    def _digests(self) -> dict[str, str]:
        return digests(self.data, self.params["weights"])

    def _identity(self) -> dict:
        return {**_hashed({**self.params, "split_hash": self.data.split.hash}), **self._digests}

    def _runner(self) -> PhaseRunner:
        return PhaseRunner(self.learner, self.net, self.folder.resume_file, self._identity(),
                           monitor=self.params["monitor"] if self.data.split.has_valid else "last",
                           seed=self.params["seed"], rate=self._rate, on_row=self._on_row, bars=session.person_watches(),
                           tape=self.tape)

    def _on_row(self, history: list[dict]) -> None:
        write_history(self.folder, history)
        row = history[-1]
        bank = f", bank {row['bank_filled']}/{self.net.bank.size}, stored {row['bank_accepted']:.0%}" \
            if row["bank_accepted"] != "" else ""
        total = sum(phase.epochs for phase in self.phases() if phase.stage == row["stage"])
        valid = f"valid {row['valid_loss']:.4f}, AUC {row['valid_auc']:.4f}, " \
            if row["valid_loss"] == row["valid_loss"] else ""
        self.log(f"stage {row['stage']} epoch {row['epoch']}/{total}: train {row['train_loss']:.4f}, {valid}"
                 f"{row['seconds']:.1f} s{bank}")

    def _read_history(self) -> list[dict]:
        return [{**row, "epoch": int(row["epoch"]), **{name: float(row[name] or "nan") for name in NUMBERS}}
                for row in RunFolder(self.folder).history]

    def log(self, text: str) -> None:
        """Print one line and append it to ``log.txt``."""
        if cards.rank():
            return
        print(text, flush=True)
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with open(self.folder.log_file, "a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    # -- scoring ----------------------------------------------------------------------------------------------------

    def logits(self, part: str, rows=None) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels (n, C) float32 of a whole part, in the order of its rows (or of the given rows), with the views of
        parameter ``tta``."""
        views, labels = self.views(part, MENUS[self.params["tta"]], rows)
        return self._merged(views), labels

    def _merged(self, views: Mapping[str, np.ndarray]) -> np.ndarray:
        return merged(views, self.params["tta"], self.params["tta_merge"], head_share(self.net))

    @torch.no_grad()
    def views(self, part: str, names: Sequence[str], rows=None) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Logits (n, C) float32 of each view as :func:`charmlib.training.views.read_views` names them, and labels (n, C)."""
        data, rows = self.data, self.data.rows(part) if rows is None else rows
        if not len(rows):  # a split without a validation part
            empty = np.empty((0, len(data.classes)), np.float32)
            branches = (f"{names[0]}_{branch}" for branch in getattr(self.net, "branches", ()))
            return dict.fromkeys([*names, *branches], empty), empty
        images = ChestImages(data.images, data.labels, rows, data.classes)
        dl = ChestDL(images, bs=min(self.params["stage2_batch"], len(images)), device=self.device)
        dl.share, scale = (cards.rank(), cards.size()), tensors(self.net, self.device)
        self.net.eval()
        out, labels = [], []
        for x, y in dl:
            session.alive()
            with torch.autocast("cuda", torch.float16, enabled=self.precision == "fp16"):
                out.append(read_views(self.net, x.as_subclass(torch.Tensor), names, *scale))
            labels.append(y.as_subclass(torch.Tensor))
        whole = {name: [batch[name] for batch in out] for name in cards.same([*out[0]] if out else [])} | {"": labels}
        # the first copy waits for the device, at the end
        found = {name: torch.cat(cards.in_order(batches)).cpu().numpy() for name, batches in whole.items()}
        return found, found.pop("")

    def quick_check(self, images: int = 100) -> float:
        """Mean ROC-AUC on so many random test images, to see that a checkpoint works; never a result."""
        rows = self.data.rows("test")
        if images < len(rows):
            rows = np.sort(np.random.default_rng(self.params["seed"]).choice(rows, images, replace=False))
        logits, labels = self.logits("test", rows)
        score = mean_auc(labels, logits, self.data.classes, self.data.index.normal_class)
        print(f"QUICK CHECK on {len(rows)} of {self.data.split.counts['test']['images']} test images: "
              f"mean ROC-AUC {score:.3f}. Not a test score.")
        return score

    def looks(self, images: Sequence[str]) -> list[Look]:
        """What the second of two paths sees of images: :func:`charmlib.training.looks.looks`."""
        return looks(self, images)

    def score(self, *, maps: bool = True) -> dict:
        """Score the whole validation and test parts; writes ``predictions.npz``, ``branches.npz`` for a network with branches,
        and with ``maps``, by parameter ``heat_maps``, what :func:`charmlib.training.heat.keep_heat` writes; returns the
        metrics.

        Without a validation part its arrays are empty, ``valid`` of the metrics is None, and the test part has no operating
        points. :func:`charmlib.evaluation.runs.finish` turns the metrics into ``metrics.json``.

        Raises :class:`charmlib.session.OutOfTime` if a deadline is set and scoring would not fit.
        """
        history = self.history or self._read_history()
        session.stop_unless(session.scoring_seconds(guess=max((row["seconds"] for row in history), default=0.0)), "scoring")
        start = time.monotonic()
        parts, branches, names = {}, {}, getattr(self.net, "branches", ())
        for part in ("valid", "test"):
            views, labels = self.views(part, MENUS[self.params["tta"]])
            parts[part] = about(self.data.index.frame.iloc[self.data.rows(part)]) | {
                "logits": self._merged(views), "labels": labels}
            branches |= {f"{part}_ids": parts[part]["ids"], **{f"{part}_{name}": views[f"id_{name}"] for name in names}}
        if names:
            write_arrays(self.folder.branches_file, **branches)
        normal = self.data.index.normal_class
        save_predictions(self.folder.predictions_file, parts, self.data.classes, normal)
        if maps:
            keep_heat(self)
        train = prevalence(self.data.labels[self.data.rows("train")], self.data.classes)
        test, samples = score_part(parts["test"], self.data.classes, prevalence=train, normal_class=normal,
                                   **self.folder.choices)
        save_resamples(self.folder.resamples_file, samples)
        metrics = {
            "params": self.params, "data": self._source(), "split": self.data.split.record()
            | ({"leak": True} if leaked_start(self.params, self.data.index.table.name) else {}),
            "classes": list(self.data.classes), "normal_class": normal, "images": self.data.train_images(),
            "train_prevalence": train, "valid": score_part(parts["valid"], self.data.classes, normal_class=normal)[0]
            if self.data.split.has_valid else None, "test": test,
            "bank": self.bank.summary(history), "stage1_lr": self.folder.card["stage1_lr"],
            "seconds": {"train": round(sum(r["seconds"] for r in history), 3), "score": round(time.monotonic() - start, 3),
                        "overhead": None},
            "peak_memory_mb": peak_memory_mb(), "device": device_name(self.device), "precision": self.precision,
            "versions": versions(), "quick_check": self.params["limit"] > 0,
        }
        write_json(self.folder.scored_file, metrics)
        return metrics


@torch.no_grad()
def _refuse_small(net: torch.nn.Module, params: Mapping, device: torch.device) -> None:
    """Refuse images that a backbone shrinks to nothing, before the first step; all read 64 pixels."""
    if params["image_size"] >= 64:
        return
    try:
        net.eval()(torch.zeros(1, 3, params["image_size"], params["image_size"], device=device))
    except RuntimeError as error:
        raise ValueError(f"image_size {params['image_size']} is too small for {params['arch']} ({error}): try 64"
                         ) from error
    net.train()


def _hashed(params: Mapping) -> dict:
    return {name: value for name, value in params.items() if name not in UNHASHED}


def _writable_copy(folder: Path) -> Path:
    """A copy of a read-only run, such as another notebook's output on Kaggle; one for each path and content of a run."""
    working, source = Path("/kaggle/working"), hashlib.sha256(os.fsencode(folder))
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as content:
            source.update(os.fsencode(file.relative_to(folder)) + hashlib.file_digest(content, "sha256").digest())
    target = (working if working.is_dir() else Path("runs")).resolve() / f"{folder.name}-{source.hexdigest()[:8]}"
    if not target.is_dir():
        shutil.rmtree(partial := target.with_name(f".{target.name}.partial"), ignore_errors=True)
        shutil.copytree(folder, partial)
        partial.chmod(partial.stat().st_mode | 0o700)
        partial.rename(target)
    print(f"{folder} is read-only: going on with a copy in {target}")
    return target
