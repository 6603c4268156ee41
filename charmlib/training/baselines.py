"""Baselines of a finished run that need no training: regressions on fixed maps, the view position, a second seed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import nn

from charmlib.evaluation import tables
from charmlib.evaluation.compare import mean_auc_difference
from charmlib.evaluation.groups import column_scores
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.runs import Predictions, RunFolder, number, write_arrays
from charmlib.evaluation.score import score_part
from charmlib.files import json_or_empty, write_json
from charmlib.models.registry import create
from charmlib.nn import VotingBank
from charmlib.nn.scales import GRID, cells, find_scales, maps_of
from charmlib.params import changes
from charmlib.training.callbacks import seed_everything
from charmlib.training.device import place
from charmlib.training.run import Run

LAMBDAS, RIDGES = (0.01, 0.1, 1.0, 10.0, 100.0), (0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties of ridge and kernel ridge, in mean eigenvalues of the keys' covariance and of the kernel."""
FLOOR = 0.003
"""Added to a label's variance, which limits the scores of classes with few positive images."""
MOST = 10_000
"""Images of a kernel ridge, which takes about 2 GB; of more training images, so many are drawn with the run's seed."""


def run_baselines(run: str | Path, **where) -> dict:
    """Fit and score the baselines of a finished run; writes ``baselines.npz`` and ``baselines.json``, and returns the latter.

    ``docs/training.md`` describes each of them. Penalties are chosen by mean AUC on validation; without a validation part they
    are the middle ones. Unknown labels count as the class's prevalence. ``where`` is as in :meth:`Run.load`. Raises
    FileNotFoundError for an unfinished run, ValueError for predictions of other images, and as :meth:`Run.load`.
    """
    folder = RunFolder(Path(run).expanduser().resolve())
    metrics, run, parts = folder.metrics, Run.load(folder, **where), {part: getattr(folder, part) for part in ("valid", "test")}
    rows = {part: run.data.rows(part) for part in ("train", *parts)}
    if any(parts[part].ids.tolist() != run.data.index.frame["id"].iloc[rows[part]].tolist() for part in parts):
        raise ValueError(f"{folder.predictions_file} is of other images than {run.data.index.table}: score the run again")
    p, train, over = run.params, run.data.labels[rows["train"]], "valid" if len(rows["valid"]) else "train"
    own = {part: known.logits for part, known in parts.items()}
    found, left_out = [("run", "the run itself", "", None, own)], {}

    def fitted(name: str, what: str, fit: Callable, keys: Mapping, penalties: Sequence[float], images: int) -> float:
        penalty, how = choose(fit, penalties, keys["valid"], parts["valid"])
        predict = fit(penalty)
        found.append((name, what, how, images, {part: predict(keys[part]) for part in (over, "test", "valid")}))
        if name != "shuffled":
            found.append((f"{name}+head", "its mean with the head", how, images, averaged(found[-1][-1], head, over)))
        return penalty

    if hasattr(run.net, "trunk"):
        if isinstance(getattr(run.net, "bank", None), VotingBank):
            run.net.bank = None
        head = {part: run.logits(part)[0] for part in (over, "test", "valid")}
        if metrics["bank"] and run.net.bank is None:
            found.append(("head", "its logits without votes", "", None, head))
        seed_everything(p["seed"], "weights")  # as the run's own network was made
        keys, _ = _keys(run, place(create(p, run.data.classes), run.device), 2)
        what = f"ridge on {'random' if p['weights'] == 'none' else 'frozen'} maps"
        used = fitted("frozen_ridge", what, ridge(keys["train"], train), keys, LAMBDAS, len(train))
        some = np.random.default_rng(p["seed"]).permutation(len(train))
        fitted("shuffled", "the same, labels shuffled", ridge(keys["train"], train[some]), keys, [used], len(train))
        keys, blocks = _keys(run, run.net, 3)
        fitted("own_ridge", "ridge on trained maps", ridge(keys["train"], train), keys, LAMBDAS, len(train))
        fit = kernel_ridge(keys["train"][some := some[:MOST]], train[some], blocks)
        fitted("own_kernel_ridge", "kernel ridge on trained maps", fit, keys, RIDGES, len(some))
    else:
        left_out["ridges"] = f"the network of system '{p['system']}' has no trunk"
    views = run.data.index.frame["view"].fillna("").astype(str).to_numpy()
    if len(np.unique(views[rows["train"]])) > 1:
        found.append(("view", "prevalence by view position", "", len(train), {
            part: np.nan_to_num(column_scores(views[rows["train"]], train, views[rows[part]])) for part in parts}))
    else:
        left_out["view"] = "the label table has no view positions"
    if other := _other_seed(folder):
        found.append(("two_seeds", f"mean with {other.name}, seed {other.metrics['params']['seed']}", "", None, {
            part: (own[part] + getattr(other, part).logits) / 2 for part in parts}))
    else:
        left_out["two_seeds"] = f"no finished run in {folder.path.parent} differs in its seed alone"
    record = {"run": metrics["cell"], "hash": metrics["hash"], "split": metrics["split"]["hash"], "standardised_over": over,
              "rows": [_scored(folder, *row) for row in found], "left_out": left_out}
    write_arrays(run.folder.baselines_arrays, classes=np.array(run.data.classes), **{
        f"{part}_{key}": getattr(parts[part], key) for part in parts for key in ("ids", "patients", "labels")}, **{
        f"{part}_{name}": scores[part].astype(np.float32) for name, *_, scores in found for part in parts})
    write_json(run.folder.baselines_file, record)
    return record | {"file": str(run.folder.baselines_file)}


def choose(fit: Callable, penalties: Sequence[float], keys: np.ndarray, valid: Predictions) -> tuple[float, str]:
    """The penalty of the best mean AUC on validation keys (n, K), or the middle one, and words that say which.

    ``fit(penalty)`` gives a function from keys (n, K) to scores (n, C).
    """
    best, why = penalties[len(penalties) // 2], "the middle: no validation part" if len(penalties) > 1 else "as above"
    if len(valid.ids) and len(penalties) > 1:
        found = [mean_auc(valid.labels, fit(each)(keys), valid.classes, valid.normal_class) for each in penalties]
        best, why = penalties[int(np.argmax(np.nan_to_num(found)))], "by validation"
    return best, f"{best:g}, {why}"


def ridge(keys: np.ndarray, labels: np.ndarray) -> Callable:
    """Ridge regression of labels (n, C) on standardised keys (n, K), as ``fit`` of :func:`choose`."""
    labels = pd.DataFrame(labels, dtype=float)

    def fit(penalty: float) -> Callable:
        model = make_pipeline(StandardScaler(), Ridge(alpha=penalty * len(keys)))
        model.fit(keys.astype(float), labels.fillna(labels.mean()).fillna(0).to_numpy())
        return lambda keys: model.predict(keys.astype(float)) if len(keys) else np.empty((0, labels.shape[1]))
    return fit


def kernel_ridge(keys: np.ndarray, labels: np.ndarray, blocks: Sequence[int]) -> Callable:
    """Kernel ridge regression on keys (n, K), as ``fit`` of :func:`choose`.

    The kernel is ``exp((s - 1) / 0.8)`` of s, the mean over the ``blocks`` of the cosines of centred keys. Labels count
    relative to their share, in units of their variance and :data:`FLOOR`.
    """
    def directions(some: np.ndarray) -> np.ndarray:
        parts = np.split(some - keys.mean(0), np.cumsum(blocks)[:-1], axis=1)
        return np.concatenate([normalize(part) for part in parts], 1) / len(blocks) ** 0.5

    own, base = directions(keys), np.nan_to_num(np.nanmean(labels, 0))
    rest = np.nan_to_num(labels - base) / (base * (1 - base) + FLOOR)

    def kernel(some: np.ndarray) -> np.ndarray:
        return np.exp((directions(some) @ own.T - 1) / 0.8)

    def fit(penalty: float) -> Callable:
        model = KernelRidge(alpha=penalty, kernel="precomputed").fit(kernel(keys), rest)
        return lambda some: model.predict(kernel(some)) if len(some) else np.empty((0, labels.shape[1]))
    return fit


def averaged(first: Mapping, second: Mapping, over: str) -> dict[str, np.ndarray]:
    """By part, the mean of two scores (n, C), each standardised per class by mean and deviation over one part."""
    scale = [(scores, StandardScaler().fit(scores[over])) for scores in (first, second)]
    return {part: sum((scores[part] - by.mean_) / by.scale_ for scores, by in scale) / 2 for part in first}


class _Maps(nn.Module):
    def __init__(self, net: nn.Module, scales: int):
        super().__init__()
        self.ends, widths = (found[-scales:] for found in find_scales(net.trunk))
        self.trunk, self.mean, self.std, self.blocks = net.trunk, net.mean, net.std, [GRID * GRID * width for width in widths]

    def forward(self, x):
        return cells(maps_of(self.trunk, self.ends, x, nn.Module.__call__)[1])


def _keys(run: Run, net: nn.Module, scales: int) -> tuple[dict[str, np.ndarray], list[int]]:
    maps = _Maps(net, scales)
    reader = Run(run.params, run.data, maps, run.device, run.precision)
    return {part: reader.logits(part)[0].reshape(-1, sum(maps.blocks)) for part in ("train", "valid", "test")}, maps.blocks


def _other_seed(run: RunFolder) -> RunFolder | None:
    there = ((path.parent, json_or_empty(path)) for path in sorted(run.path.parent.glob("[!.]*/metrics.json")))
    return next((RunFolder(path) for path, found in there if changes(found.get("params", {}), run.metrics["params"]) == ["seed"]
                 and all(found.get(key) == run.metrics[key] for key in ("classes", "data", "split"))), None)


def _scored(run: RunFolder, name: str, what: str, penalty: str, fitted_to: int | None, logits: Mapping) -> dict:
    valid, test = replace(run.valid, logits=logits["valid"]), replace(run.test, logits=logits["test"])
    scores, samples = score_part(vars(test), test.classes, normal_class=test.normal_class)
    second = SimpleNamespace(test=test, resamples=samples)
    low, high, _ = mean_auc_difference(run, second) if samples and name != "run" else (None, None, None)
    return {"baseline": name, "what": what, "lambda": penalty, "train_images": fitted_to, "seed": run.metrics["params"]["seed"],
            "valid_auc": mean_auc(valid.labels, valid.logits, valid.classes, valid.normal_class) if len(valid.ids) else None,
            **{f"test_{key[5:]}": scores[key] for key in ("mean_auc", "mean_auc_low", "mean_auc_high", "mean_ap")},
            "difference": scores["mean_auc"] - number(run.metrics["test"]["mean_auc"]), "difference_low": low,
            "difference_high": high, "auc": scores["auc"], "images": len(test.ids), "patients": len({*test.patients})}


def baselines_text(run: RunFolder, record: Mapping) -> str:
    """The table of :func:`run_baselines` for a terminal, with paired differences from the run, and what was left out."""
    table = pd.DataFrame(record["rows"]).drop(columns=["seed", "test_ap", "auc", "images", "patients"])
    table = table.astype({"train_images": "Int64"}).rename(columns=lambda name: name.replace("_", " "))
    shown = tables.with_intervals(table, 4).to_string(index=False)
    notes = [*(f"left out: {name}, {why}" for name, why in record["left_out"].items()), record["file"]]
    return "\n".join([f"{run}: {tables.split_note(run.metrics)}", shown, *notes]) + tables.means_note(run.metrics)
