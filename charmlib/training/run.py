"""One run: parameters, data, network and a folder. What the train and test notebooks are written with."""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml

import charmlib
from charmlib import watch
from charmlib.data.dataset import ChestData, open_dataset
from charmlib.data.labels import same_order
from charmlib.data.loaders import ChestDataLoaders, ChestDL, ChestImages, GreyToNetwork, chest_dataloaders
from charmlib.data.paths import resolve_data_root
from charmlib.evaluation.finish import PART_FILE
from charmlib.evaluation.metrics import mean_auc, prevalence
from charmlib.evaluation.results import (
    Predictions,
    choices,
    chosen_on_validation,
    load_card,
    save_predictions,
    save_resamples,
)
from charmlib.evaluation.score import score_part
from charmlib.files import write_json, write_text, write_whole
from charmlib.models.charm import CharmNet
from charmlib.params import UNHASHED, read_yaml, resolve, with_absolute_paths
from charmlib.processes import die_with_parent
from charmlib.training.callbacks import seed_everything, write_history
from charmlib.training.checkpoint import differences, load_model, load_weights, network_params, save_model
from charmlib.training.device import compile_backbone, pick_device, pick_precision, place
from charmlib.training.learner import charm_learner
from charmlib.training.stages import StageRunner, plan
from charmlib.viz.person import person_watches


class Run:
    """A run in its folder.

    >>> run = Run.open(data_root='data/nih', run_dir='runs/mine', k=3)     # doctest: +SKIP
    >>> run.train()                                                        # doctest: +SKIP
    >>> Run.load('runs/mine').score()                                      # doctest: +SKIP

    Attributes: ``params`` (all of them), ``data`` (:class:`ChestData`), ``net``, ``folder``, ``device``,
    ``precision``, ``history`` (list of rows as in ``history.csv``).
    """

    def __init__(self, params: Mapping, data: ChestData, net: CharmNet, device: torch.device, precision: str):
        self.params, self.data, self.net = dict(params), data, net
        self.device, self.precision = device, precision
        self.folder = Path(params["run_dir"])
        self.history: list[dict] = []
        self._lr = self.params["stage1_lr"] or None

    @classmethod
    def open(cls, params: Mapping | None = None, **changes) -> Run:
        """Check the parameters, open the data, build the network. Writes nothing yet.

        Raises
        ------
        charmlib.params.ParameterError
            A parameter that is unknown, ill-typed or out of range.
        """
        if "CHARM_CELL" in os.environ:  # ipykernel's own look at its parent knows process 1 only, in older releases
            die_with_parent(int(os.environ.get("JPY_PARENT_PID", os.getppid())))
        p = with_absolute_paths(resolve(dict(params or {}), changes))
        p["data_root"] = str(resolve_data_root(p["data_root"]))
        device = pick_device(p["device"])
        precision = pick_precision(p["precision"], device)
        data = open_dataset(p)
        seed_everything(p["seed"], "weights")
        net = CharmNet(classes=len(data.classes), weights=p["weights"], norm=p["norm"],
                       grad_checkpointing=p["grad_checkpointing"], **network_params(p))
        place(net, device)
        if p["compile"]:
            compile_backbone(net, device)
        return cls(p, data, net, device, precision)

    @classmethod
    def load(cls, run_dir: str | Path, **changes) -> Run:
        """A trained run from its folder; ``changes`` may only say where things are (data_root, cache_dir, workers, device).

        A folder that is read-only is copied to where one can write, and the copy is the run's folder from then on.

        Raises
        ------
        FileNotFoundError, ValueError
            Not trained, a checkpoint that does not fit, classes in another order, or another split than in training.
        """
        folder = Path(run_dir).expanduser().resolve()
        if not (folder / "params.yaml").is_file():
            raise FileNotFoundError(f"no run in {folder}: params.yaml is not there. Train first, with run_dir={folder}")
        wrong = set(changes) - set(UNHASHED)
        if wrong:
            raise ValueError(f"a trained run cannot be loaded with another {', '.join(sorted(wrong))}")
        p = resolve(read_yaml(folder / "params.yaml"), {k: v for k, v in changes.items() if v not in ("", None)},
                    {"run_dir": str(folder)})
        if not os.access(folder, os.W_OK):
            folder = _writable_copy(folder)
            p["run_dir"] = str(folder)
        device = pick_device(p["device"])
        net, card = load_model(folder, device)
        data = open_dataset(p)
        same_order(card["classes"], data.classes, f"checkpoint {folder} and data {data.index.table}")
        if card["params"].get("split_hash") != data.split.hash:
            raise ValueError(f"{folder} was trained on split {card['params'].get('split_hash')}, {data.index.root} gives "
                             f"{data.split.hash}: scores would mix training and test images")
        return cls(p, data, net, device, pick_precision(p["precision"], device))

    # -- training ---------------------------------------------------------------------------------------------------

    def dataloaders(self, stage: int = 2) -> ChestDataLoaders:
        """fastai DataLoaders of a stage: 1 takes images with a finding only, 2 all."""
        batch = self.params["stage1_batch" if stage == 1 else "stage2_batch"]
        return chest_dataloaders(self.data, bs=batch, findings_only=stage == 1, mean=self.net.mean, std=self.net.std,
                                 preload=self.params["preload"], device=self.device, path=self.folder)

    def learner(self, stage: int = 2):
        """A fastai Learner of a stage around the run's network."""
        return charm_learner(self.dataloaders(stage), net=self.net, loss=self.params[f"stage{stage}_loss"],
                             weight_decay=self.params["weight_decay"], precision=self.precision, path=self.folder)

    def find_lr(self, *, plot: bool = False) -> float:
        """The learning rate of stage 1: ``stage1_lr``, or where that is 0 the valley of fastai's finder.

        The finder leaves network, bank and momentum branch as they were. A resumed run keeps the rate it began with.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lr is None and self.trained():
            self._lr = load_card(self.folder)["stage1_lr"]
        if self._lr is None:
            kept = self._runner().saved(self.params["resume"])
            self._lr = kept["lr"] if kept else None
        if self._lr is None:
            seed_everything(self.params["seed"], "lr_find")
            learner = self.learner(1)
            learner.freeze() if self.params["stage1_frozen_epochs"] else learner.unfreeze()
            with learner.no_bar():
                self._lr = float(learner.lr_find(show_plot=plot).valley)
            self.log(f"learning-rate finder: {self._lr:.2e}")
        return self._lr

    def train(self) -> list[dict]:
        """Both stages; continues where an earlier start was stopped, and does nothing for a run that is trained.

        Writes ``params.yaml`` and ``split.csv``, then ``history.csv`` and ``log.txt`` as it goes, ``resume.pt`` after each
        epoch, and at the end ``model.safetensors`` and ``model.json`` with the thresholds and the temperature, both chosen on
        the validation part.

        With ``resume=False`` whatever an earlier run left in the folder is removed first.

        Raises
        ------
        ValueError
            The folder holds a run with other settings; says which, and what to do.
        """
        if self.trained():
            self.log("trained already; nothing to do")
            return self._read_history()
        if not self.params["resume"]:
            for name in ("resume.pt", "model.json", "model.safetensors", "history.csv", "predictions.npz", PART_FILE,
                         "metrics.json"):
                (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        runner = self._runner()
        state = runner.saved(self.params["resume"])  # refuses a folder of other settings before writing to it
        write_text(self.folder / "params.yaml", yaml.safe_dump(self.params, sort_keys=False))
        if "CHARM_CELL" not in os.environ:  # a grid keeps one for all its cells
            frame = self.data.split.frame(self.data.index)
            write_whole(self.folder / "split.csv", lambda temporary: frame.to_csv(temporary, index=False))
        runner.lr = self._lr = state["lr"] if state else self.find_lr()
        phases = plan(self.params, self._lr)
        self.log(f"training on {self.device} in {self.precision}, {self.data.source}, split {self.data.split.name} "
                 f"{self.data.split.hash}" + (f", going on after {len(state['history'])} finished epochs" if state else ""))
        if self.params["use_momentum"] and state is None:
            self._note_warmup(phases)
        self.history = runner.run(phases, state)
        logits, labels = self.logits("valid")
        card = {**self.params, "split_hash": self.data.split.hash}
        save_model(self.net, self.folder, classes=self.data.classes, params=card, stage1_lr=self._lr, data=self._source(),
                   **chosen_on_validation(labels, logits, self.data.classes))
        return self.history

    def _note_warmup(self, phases) -> None:
        """Say so when the run is too short for its momentum: a larger one would then be the same run."""
        m = self.params["momentum"]
        needed = float("inf") if m >= 1 else max(0, math.ceil((10 * m - 1) / (1 - m)))
        batches = {stage: max(1, len(self.data.rows("train", findings_only=stage == 1))
                              // self.params[f"stage{stage}_batch"]) for stage in (1, 2)}
        steps = sum(phase.epochs * batches[phase.stage] for phase in phases)
        if steps <= needed:
            self.log(f"note: the warm-up reaches momentum {m:g} after {needed:g} steps and this run has {steps} at most, so "
                     "any larger momentum gives the same run")

    def trained(self) -> bool:
        """Whether the folder holds the checkpoint of exactly this run; it is then loaded.

        Raises
        ------
        ValueError
            It holds a checkpoint of other settings and ``resume`` is on.
        """
        if not self.params["resume"] or not (self.folder / "model.json").is_file():
            return False
        theirs = {k: v for k, v in load_card(self.folder)["params"].items() if k not in UNHASHED}
        if wrong := differences(theirs, self._identity()):
            raise ValueError(f"{self.folder} holds a trained run with other settings ({wrong}). Name another run_dir, or say "
                             "resume=False to train anew.")
        load_weights(self.net, self.folder)
        return True

    def _source(self) -> dict:
        return {"name": self.data.source, "drawn": self.data.index.drawn}

    def _identity(self) -> dict:
        return {**{k: v for k, v in self.params.items() if k not in UNHASHED}, "split_hash": self.data.split.hash}

    def _runner(self) -> StageRunner:
        return StageRunner(self.learner, self.net, self.folder / "resume.pt", self._identity(),
                           monitor=self.params["monitor"], seed=self.params["seed"], lr=self._lr, on_row=self._row,
                           bars=person_watches())

    def _row(self, history: list[dict]) -> None:
        write_history(self.folder / "history.csv", history)
        row = history[-1]
        bank = f", bank {row['bank_filled']}/{self.params['bank_size']}, took {row['bank_accepted']:.0%}" \
            if row["bank_filled"] != "" else ""
        total = (self.params["stage1_frozen_epochs"] + self.params["stage1_epochs"] if row["stage"] == "1"
                 else self.params["stage2_epochs"])
        self.log(f"stage {row['stage']} epoch {row['epoch'] + 1}/{total}: train {row['train_loss']:.4f}, "
                 f"valid {row['valid_loss']:.4f}, AUC {row['valid_auc']:.4f}, {row['seconds']:.1f} s{bank}")

    def _read_history(self) -> list[dict]:
        import pandas as pd

        path = self.folder / "history.csv"
        self.history = pd.read_csv(path).to_dict("records") if path.is_file() else []
        return self.history

    def log(self, text: str) -> None:
        """One line, shown and kept in ``log.txt``."""
        print(text, flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {text}\n")

    # -- scoring ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def logits(self, part: str, rows=None) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels (n, C) float32 of a whole part, in the order of its rows (or of the given rows)."""
        data = self.data
        images = ChestImages(data.images, data.labels, data.rows(part) if rows is None else rows, data.classes,
                             data.index.frame["id"].tolist())
        dl = ChestDL(images, bs=min(self.params["stage2_batch"], len(images)), device=self.device,
                     after_batch=[GreyToNetwork(self.net.mean, self.net.std)])
        self.net.eval()
        out, labels = [], []
        for x, y in dl:
            watch.alive()
            with torch.autocast("cuda", torch.float16, enabled=self.precision == "fp16"):
                out.append(self.net(x.as_subclass(torch.Tensor)).float())
            labels.append(y.as_subclass(torch.Tensor))
        return torch.cat(out).cpu().numpy(), torch.cat(labels).cpu().numpy()  # one wait for the device, at the end

    def quick_check(self, images: int = 100) -> float:
        """Mean ROC-AUC on so many random test images: a glance at a checkpoint, never a result."""
        rows = self.data.rows("test")
        if images < len(rows):
            rows = np.sort(np.random.default_rng(self.params["seed"]).choice(rows, images, replace=False))
        logits, labels = self.logits("test", rows)
        score = mean_auc(labels, logits, self.data.classes)
        print(f"QUICK CHECK on {len(rows)} of {self.data.split.counts['test']['images']} test images: "
              f"mean ROC-AUC {score:.3f}. Not a test score.")
        return score

    def score(self) -> dict:
        """Score the whole validation and test parts; writes ``predictions.npz`` and returns the metrics.

        The metrics also go into a part file from which ``metrics.json`` is made when the run is finished (see
        :func:`charmlib.evaluation.finish.finish`).

        Raises
        ------
        charmlib.watch.OutOfTime
            A deadline is set, and scoring would not fit.
        """
        history = self.history or self._read_history()
        watch.stop_unless(watch.scoring_seconds(guess=max((row["seconds"] for row in history), default=0.0)), "scoring")
        start = time.monotonic()
        parts = {}
        for part in ("valid", "test"):
            logits, labels = self.logits(part)
            rows = self.data.rows(part)
            frame = self.data.index.frame.iloc[rows]
            parts[part] = {"ids": frame["id"].to_numpy(str), "patients": frame["patient"].to_numpy(str),
                           "labels": labels, "logits": logits}
        save_predictions(self.folder / "predictions.npz", parts, self.data.classes)
        bank = None
        if self.net.bank is not None:
            bank = {"filled": self.net.bank.filled.item(),
                    "accepted": self.net.bank.accepted.item() / max(self.net.bank.seen.item(), 1)}
        train = prevalence(self.data.labels[self.data.rows("train")], self.data.classes)
        valid, _ = score_part(parts["valid"], self.data.classes)
        test, samples = score_part(parts["test"], self.data.classes, prevalence=train,
                                   **choices(self.folder, Predictions(**parts["valid"], classes=self.data.classes)))
        save_resamples(self.folder, samples)
        metrics = {
            "params": self.params, "data": self._source(),
            "split": {"name": self.data.split.name, "hash": self.data.split.hash, **self.data.split.counts},
            "classes": list(self.data.classes),
            "train_prevalence": train, "valid": valid, "test": test,
            "bank": bank, "stage1_lr": load_card(self.folder)["stage1_lr"],
            "seconds": {"train": round(sum(r["seconds"] for r in history), 3), "score": None, "overhead": None},
            "peak_memory_mb": peak_memory_mb(), "device": device_name(self.device), "precision": self.precision,
            "versions": versions(), "quick_check": self.params["limit"] > 0,
        }
        metrics["seconds"]["score"] = round(time.monotonic() - start, 3)
        write_json(self.folder / PART_FILE, metrics)
        return metrics


def _writable_copy(folder: Path) -> Path:
    """A copy of a run that lies where nothing can be written, such as another notebook's output on Kaggle."""
    working = Path("/kaggle/working")
    target = (working if working.is_dir() else Path("runs")).resolve() / folder.name
    if not (target / "params.yaml").is_file():
        shutil.copytree(folder, target, dirs_exist_ok=True)
    print(f"{folder} is read-only: going on with a copy in {target}")
    return target


def peak_memory_mb() -> float:
    """The GPU's peak if one was used, else this process's own.

    Where Linux tells it, not by ``getrusage``, whose figure a child takes over from the process that started it.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    return round((int(peak[1]) if peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 1024, 1)


def device_name(device: torch.device) -> str:
    """'Tesla T4', or 'cpu, 2 cores'."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Of what decides a result."""
    import fastai
    import torchvision

    return {"charmlib": charmlib.__version__, "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "fastai": fastai.__version__}
