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
import pandas as pd
import torch
import yaml

import charmlib
from charmlib import session
from charmlib.data.dataset import ChestData, find_data, open_dataset
from charmlib.data.loaders import ChestDataLoaders, ChestDL, ChestImages, GreyToNetwork, chest_dataloaders
from charmlib.evaluation.enrichment import enrichment, training_shares
from charmlib.evaluation.intervals import save_resamples
from charmlib.evaluation.metrics import mean_auc, prevalence
from charmlib.evaluation.runs import PART_FILE, RunFolder, chosen_on_validation, save_predictions
from charmlib.evaluation.score import score_part
from charmlib.files import write_json, write_text, write_whole
from charmlib.models.charm import CharmNet
from charmlib.nih import same_order
from charmlib.params import UNHASHED, read_yaml, resolve, stored, with_absolute_paths
from charmlib.session import die_with_parent, person_watches
from charmlib.training.callbacks import HISTORY, seed_everything, write_bank_history, write_history
from charmlib.training.checkpoint import differences, load_model, load_weights, network_params, save_model
from charmlib.training.device import compile_backbone, pick_device, pick_precision, place
from charmlib.training.explain import Explanation, explain, rare_cases
from charmlib.training.learner import charm_learner
from charmlib.training.stages import StageRunner, plan


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
        if session.in_grid():  # ipykernel's own look at its parent knows process 1 only, in older releases
            die_with_parent(int(os.environ.get("JPY_PARENT_PID", os.getppid())))
        p = with_absolute_paths(resolve(dict(params or {}), changes))
        p["data_root"] = str(find_data(p["data_root"]))
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
        p = resolve(stored(read_yaml(folder / "params.yaml")), {k: v for k, v in changes.items() if v not in ("", None)},
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
        """fastai DataLoaders of a stage: 1 takes the images that ``stage1_images`` says, 2 all."""
        batch = self.params["stage1_batch" if stage == 1 else "stage2_batch"]
        return chest_dataloaders(self.data, bs=batch, findings_only=self._findings_only(stage), mean=self.net.mean,
                                 std=self.net.std, preload=self.params["preload"], device=self.device, path=self.folder)

    def _findings_only(self, stage: int) -> bool:
        return stage == 1 and self.params["stage1_images"] == "findings"

    def learner(self, stage: int = 2):
        """A fastai Learner of a stage around the run's network, whose bank then has the stage's ``bank_momentum``."""
        if self.net.bank is not None:
            self.net.bank.bank_momentum = self.params["bank_momentum" if stage == 1 else "stage2_bank_momentum"]
        return charm_learner(self.dataloaders(stage), net=self.net, loss=self.params[f"stage{stage}_loss"],
                             weight_decay=self.params["weight_decay"], precision=self.precision, path=self.folder)

    def find_lr(self, *, plot: bool = False) -> float:
        """The learning rate of stage 1: ``stage1_lr``, or where that is 0 the valley of fastai's finder.

        The finder leaves network, bank and momentum branch as they were. A resumed run keeps the rate it began with.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lr is None and self.trained():
            self._lr = RunFolder(self.folder).card["stage1_lr"]
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

        Writes ``params.yaml`` and ``split.csv``, then ``history.csv``, ``bank_history.csv`` and ``log.txt`` as it goes,
        ``resume.pt`` after each epoch, and at the end ``model.safetensors`` and ``model.json`` with the thresholds and the
        temperature, both chosen on the validation part, and ``bank.csv``, the bank's slots. Without a validation part
        (``valid_fraction`` 0) each stage ends with its last epoch's weights, and there is nothing chosen.

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
            for name in ("resume.pt", "model.json", "model.safetensors", "history.csv", "bank_history.csv", "bank.csv",
                         "predictions.npz", PART_FILE, "metrics.json"):
                (self.folder / name).unlink(missing_ok=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        runner = self._runner()
        state = runner.saved(self.params["resume"])  # refuses a folder of other settings before writing to it
        write_text(self.folder / "params.yaml", yaml.safe_dump(self.params, sort_keys=False))
        if not session.in_grid():  # a grid keeps one for all its cells
            frame = self.data.split.frame(self.data.index)
            write_whole(self.folder / "split.csv", lambda temporary: frame.to_csv(temporary, index=False))
        runner.lr = self._lr = state["lr"] if state else self.find_lr()
        phases = plan(self.params, self._lr)
        self.log(f"training on {self.device} in {self.precision}, {self.data.source}, split {self.data.split.name} "
                 f"{self.data.split.hash}" + ("" if self.data.split.has_valid else ", no validation part: nothing is chosen")
                 + (f", going on after {len(state['history'])} finished epochs" if state else ""))
        if self.params["use_momentum"] and state is None:
            self._note_warmup(phases)
        self.history = [{name: row[name] for name in HISTORY} for row in runner.run(phases, state)]
        logits, labels = self.logits("valid")
        self._write_bank()
        card = {**self.params, "split_hash": self.data.split.hash}
        save_model(self.net, self.folder, classes=self.data.classes, params=card, stage1_lr=self._lr, data=self._source(),
                   **chosen_on_validation(labels, logits, self.data.classes))
        return self.history

    def _note_warmup(self, phases) -> None:
        """Say so when the run is too short for its momentum: a larger one would then be the same run."""
        m = self.params["momentum"]
        needed = float("inf") if m >= 1 else max(0, math.ceil((10 * m - 1) / (1 - m)))
        batches = {stage: max(1, len(self.data.rows("train", findings_only=self._findings_only(stage)))
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
        theirs = {k: v for k, v in RunFolder(self.folder).card["params"].items() if k not in UNHASHED}
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
                           monitor=self.params["monitor"] if self.data.split.has_valid else None, seed=self.params["seed"],
                           lr=self._lr, on_row=self._row, bars=person_watches())

    def _row(self, history: list[dict]) -> None:
        write_history(self.folder / "history.csv", history)
        write_bank_history(self.folder / "bank_history.csv", history)
        row = history[-1]
        bank = f", bank {row['bank_filled']}/{self.params['bank_size']}, took {row['bank_accepted']:.0%}" \
            if row["bank_filled"] != "" else ""
        total = (self.params["stage1_frozen_epochs"] + self.params["stage1_epochs"] if row["stage"] == "1"
                 else self.params["stage2_epochs"])
        valid = f"valid {row['valid_loss']:.4f}, AUC {row['valid_auc']:.4f}, " if self.data.split.has_valid else ""
        self.log(f"stage {row['stage']} epoch {row['epoch'] + 1}/{total}: train {row['train_loss']:.4f}, {valid}"
                 f"{row['seconds']:.1f} s{bank}")

    def _read_history(self) -> list[dict]:
        path = self.folder / "history.csv"
        self.history = pd.read_csv(path).to_dict("records") if path.is_file() else []
        return self.history

    def bank_table(self) -> pd.DataFrame:
        """The bank's filled slots: slot, image (file name), patient, labels as text, step, score, and one column a class.

        See :meth:`charmlib.nn.RareMemoryBank.table`.

        Raises
        ------
        ValueError
            The run has no bank.
        """
        if self.net.bank is None:
            raise ValueError(f"{self.folder} has no bank (use_bank is off), so there are no slots to show")
        frame = self.data.index.frame
        table = self.net.bank.table(frame["id"].tolist(), self.data.classes)
        table.insert(2, "patient", table["image"].map(dict(zip(frame["id"], frame["patient"]))))
        return table

    def bank_history(self) -> pd.DataFrame:
        """``bank_history.csv``: stage, epoch, filled, one column a class, no_finding; empty where the run wrote none."""
        path = self.folder / "bank_history.csv"
        return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["stage", "epoch", "filled"])

    def train_shares(self) -> dict[str, float]:
        """Prevalence of each finding, and of none, in the training part."""
        return training_shares(self.data.labels[self.data.rows("train")], self.data.classes)

    def _enrichment(self, history: list[dict]) -> dict | None:
        """What the bank holds against the training part; None while it is empty."""
        table = self.bank_table().dropna(subset="image")
        if table.empty:
            return None
        rows, classes = self.data.rows("train"), list(self.data.classes)
        slots = table[classes].to_numpy(np.float64, na_value=np.nan)
        return enrichment(slots, table["patient"], self.data.labels[rows], self.data.index.frame["patient"].to_numpy(str)[rows],
                          classes, offered=self._offered(table["step"].to_numpy(), history))

    def _offered(self, steps: np.ndarray, history: list[dict]) -> np.ndarray:
        """Weights (n,) of the training images, had each slot written at ``steps`` been drawn from its stage's images."""
        values = np.array([-row["valid_auc"] if self.params["monitor"] == "valid_auc" else row["valid_loss"]
                           for row in history if str(row["stage"]) == "2"], dtype=float)
        kept = len(values) if np.isnan(values).all() else int(np.nanargmin(values)) + 1  # the bank is of the best epoch
        rows = self.data.rows("train")
        batches = max(1, len(rows) // self.params["stage2_batch"])
        second = (steps >= self.net.bank.steps.item() - kept * batches).mean()
        first = np.ones(len(rows))
        if self.params["stage1_images"] == "findings":
            first = self.data.index.has_finding()[rows].astype(float)
        return second / len(rows) + (1 - second) * first / max(first.sum(), 1)

    def _write_bank(self) -> None:
        if self.net.bank is not None:
            table = self.bank_table().drop(columns="labels")
            write_whole(self.folder / "bank.csv", lambda temporary: table.to_csv(temporary, index=False))

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
        data, rows = self.data, self.data.rows(part) if rows is None else rows
        if not len(rows):  # a split without a validation part
            return np.empty((0, len(data.classes)), np.float32), np.empty((0, len(data.classes)), np.float32)
        images = ChestImages(data.images, data.labels, rows, data.classes)
        dl = ChestDL(images, bs=min(self.params["stage2_batch"], len(images)), device=self.device,
                     after_batch=[GreyToNetwork(self.net.mean, self.net.std)])
        self.net.eval()
        out, labels = [], []
        for x, y in dl:
            session.alive()
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

    def explain(self, image: str) -> Explanation:
        """What the memory bank answered an image with, given by its file name; of any part. See :func:`explain`.

        Raises
        ------
        ValueError
            The data have no such image.
        """
        return explain(self, image)

    def cases(self, count: int = 3) -> list[str]:
        """Test images to look at: the first with each of the ``count`` rarest findings that the test part holds, each image
        of another patient. Neither scores nor memory have a say in the choice."""
        return rare_cases(self, count)

    def score(self) -> dict:
        """Score the whole validation and test parts; writes ``predictions.npz`` and returns the metrics.

        Without a validation part its arrays are empty, ``valid`` of the metrics is None, and the test part has neither
        operating points nor a scaled calibration.

        The metrics also go into a part file from which ``metrics.json`` is made when the run is finished (see
        :func:`charmlib.evaluation.runs.finish`).

        Raises
        ------
        charmlib.session.OutOfTime
            A deadline is set, and scoring would not fit.
        """
        history = self.history or self._read_history()
        session.stop_unless(session.scoring_seconds(guess=max((row["seconds"] for row in history), default=0.0)), "scoring")
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
                    "accepted": self.net.bank.accepted.item() / max(self.net.bank.seen.item(), 1),
                    "enrichment": self._enrichment(history)}
        train = prevalence(self.data.labels[self.data.rows("train")], self.data.classes)
        valid = score_part(parts["valid"], self.data.classes)[0] if self.data.split.has_valid else None
        test, samples = score_part(parts["test"], self.data.classes, prevalence=train,
                                   **RunFolder(self.folder).choices)
        save_resamples(self.folder / "resamples.npz", samples)
        metrics = {
            "params": self.params, "data": self._source(),
            "split": {"name": self.data.split.name, "hash": self.data.split.hash, **self.data.split.counts},
            "classes": list(self.data.classes),
            "train_prevalence": train, "valid": valid, "test": test,
            "bank": bank, "stage1_lr": RunFolder(self.folder).card["stage1_lr"],
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
