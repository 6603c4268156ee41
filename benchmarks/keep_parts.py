"""Compare the configurations of a cross-validated grid out of fold, and keep the results.

    python -m benchmarks.keep_parts runs/nih64_parts benchmarks/results/nih64_parts

writes ``<target>.csv``, ``<target>_per_class.csv``,
``<target>_views.csv`` (the same among images of one view position, which alone predicts many findings),
``<target>.png`` (CHARM minus the plain network, by class) and ``<target>.json`` (splits, device, versions, seconds).

``<target>.csv`` has one row per configuration: mean AUC over all images and within folds, with intervals; the paired
differences from the plain network, from CHARM as published and from CHARM; and the log loss and Brier score of its
uncalibrated probabilities, mean over classes. Three more configurations need no training, because votes have no effect on
it: CHARM's own networks with no memory, with a memory of one scale, and with one that is not class-balanced.

Intervals are by bootstrap over patients, with the networks of one seed. They do not include the variance between trainings.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from charmlib import Run
from charmlib.data.index import read_index
from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.combine import auc_within_folds, out_of_fold, pooled
from charmlib.evaluation.compare import aligned
from charmlib.evaluation.intervals import bootstrap, interval, mean_of_defined
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.files import write_json
from charmlib.nn import VotingBank
from charmlib.params import UNHASHED

PLAIN, OURS, PUBLISHED = "plain", "charm", "published"
NO_VOTES, ONE_SCALE, NOT_BALANCED = "charm_without_votes", "charm_one_scale", "charm_not_balanced"
RAREST = ("Hernia", "Pneumonia", "Edema", "Emphysema")


def configurations(folder: Path) -> dict[str, list[Path]]:
    """Name -> its runs, one a fold, of a grid whose cells are called NAME_split=fold-I-N.

    Raises
    ------
    SystemExit
        A fold of a configuration is not done.
    """
    found: dict[str, list[Path]] = {}
    for cell in sorted(p for p in folder.glob("*_split=fold-*") if p.is_dir()):
        if not (cell / "metrics.json").is_file():
            raise SystemExit(f"{cell} is not done; run the grid again first")
        found.setdefault(cell.name.partition("_split=")[0], []).append(cell)
    return {name: found[name] for name in sorted(found, key=lambda n: (n != PLAIN, n != OURS, n != PUBLISHED, n))}


def other_memories(cell: Path) -> dict[str, Predictions]:
    """The test predictions of a trained run of CHARM with another memory: none, one whose keys are the fused feature only
    (of the same images), and one of training images drawn at random.

    Votes have no effect in training mode. So runs with such memories would have trained the same networks, except for the
    epoch that validation selects.
    """
    run = Run.load(cell, workers=0)
    net, bank, labels = run.net.eval(), run.net.bank, torch.from_numpy(run.data.labels.copy())
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (net.mean, net.std))

    @torch.no_grad()
    def encode(rows):
        found = [net.encode(grey_to_network(torch.from_numpy(run.data.images.take(some, axis=0))[:, None], mean, std))
                 for some in np.array_split(np.asarray(rows), max(1, len(rows) // 256))]
        return [torch.cat(part) for part in zip(*found)]

    def memory(rows, keys, blocks):
        other = VotingBank(keys.shape[1], bank.slot_labels.shape[1], size=len(rows), k=bank.k, weight=bank.weight.item(),
                           temperature=bank.temperature, ridge=bank.ridge, blocks=blocks).eval()
        other.slots.copy_(keys)
        other.slot_labels.copy_(labels[rows])
        other.filled.fill_(len(rows))
        other.shares.copy_(bank.shares)
        other.solve()
        return other

    held = bank.slot_ids[:bank.filled].numpy()
    drawn = np.random.default_rng(run.params["seed"]).permutation(run.data.rows("train"))[:len(held)]
    z, keys = encode(run.data.rows("test"))
    with torch.no_grad():
        plain = net.head(z)
        scores = {NO_VOTES: plain, ONE_SCALE: memory(held, encode(held)[0], ())(z, plain),
                  NOT_BALANCED: memory(drawn, encode(drawn)[1], bank.blocks)(keys, plain)}
    return {name: replace(RunFolder(cell).test, logits=logits.numpy()) for name, logits in scores.items()}


def in_order(folds: list[Predictions]) -> list[Predictions]:
    """Each fold's predictions with images in the order of their ids, the same for all configurations."""
    return [p.take(np.argsort(p.ids)) for p in folds]


def losses(p: Predictions) -> dict[str, float]:
    """Log loss and Brier score of the uncalibrated probabilities, mean over the known labels of all classes."""
    logits, labels, known = p.logits.astype(np.float64), p.labels, ~np.isnan(p.labels)
    log_loss = np.logaddexp(0, logits) - np.nan_to_num(labels) * logits
    brier = (1 / (1 + np.exp(-logits)) - np.nan_to_num(labels)) ** 2
    return {"log_loss": log_loss[known].mean(), "brier": brier[known].mean()}


def table(parts: dict[str, list[Predictions]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of ``<target>.csv`` and ``<target>_per_class.csv`` from the predictions of each configuration's folds. Resamples
    draw patients, the same for all configurations."""
    first, *others = map(pooled, parts.values())
    whole = dict(zip(parts, aligned(first, *others)))
    classes = first.classes
    columns = {"mean": list(range(len(classes))), "rare": [classes.index(name) for name in RAREST]}
    values = {n: np.array(list(auc_by_class(p.labels, p.logits, classes).values())) for n, p in whole.items()}
    samples = {n: bootstrap(p.labels, p.logits, p.patients).auc for n, p in whole.items()}
    inside = {n: np.array(list(auc_within_folds(folds).values())) for n, folds in parts.items()}
    # Folds share no patient, so each is drawn by itself; the draws of one fold are the same for all configurations.
    drawn_inside = {n: np.nanmean([bootstrap(p.labels, p.logits, p.patients, seed=i).auc
                                   for i, p in enumerate(in_order(folds))], axis=0) for n, folds in parts.items()}
    rows, by_class = [], []
    for name, folds in parts.items():
        p = whole[name]
        row = {"configuration": name, "folds": len(folds), **losses(p)}
        for what, which in columns.items():
            for where, value, sample in (("", values, samples), ("_within_folds", inside, drawn_inside)):
                low, high, _ = interval(mean_of_defined(sample[name][:, which]))
                row |= {f"{what}_auc{where}": value[name][which].mean(), f"{what}{where}_low": low, f"{what}{where}_high": high}
                for other in (PLAIN, PUBLISHED, OURS):
                    if other != name and other in parts:
                        drawn = mean_of_defined(sample[name][:, which]) - mean_of_defined(sample[other][:, which])
                        low, high, _ = interval(drawn)
                        row |= {f"{what}{where}_less_{other}": value[name][which].mean() - value[other][which].mean(),
                                f"{what}{where}_less_{other}_low": low, f"{what}{where}_less_{other}_high": high}
        rows.append(row)
        for c, label in enumerate(classes):
            low, high, _ = interval(samples[name][:, c] - samples[PLAIN][:, c])
            positive = first.labels[:, c] == 1
            by_class.append({"configuration": name, "class": label, "images": int(positive.sum()),
                             "patients": len(set(first.patients[positive])), "auc": values[name][c],
                             "within_folds": inside[name][c], "less_plain": values[name][c] - values[PLAIN][c], "low": low,
                             "high": high})
    return pd.DataFrame(rows), pd.DataFrame(by_class)


def by_view(folds: dict[str, list[Predictions]], views: pd.Series) -> pd.DataFrame:
    """Mean AUC of each configuration and its paired difference from the plain network among the images of each view; ``views``
    maps image ids to PA or AP."""
    first, *others = map(pooled, folds.values())
    parts, rows = dict(zip(folds, aligned(first, *others))), []
    for view in sorted(views.dropna().unique()):
        these = views.reindex(first.ids).to_numpy() == view
        some = {n: p.take(these) for n, p in parts.items()}
        samples = {n: mean_of_defined(bootstrap(p.labels, p.logits, p.patients).auc) for n, p in some.items()}
        means = {n: np.nanmean(list(auc_by_class(p.labels, p.logits, p.classes).values())) for n, p in some.items()}
        for name in parts:
            low, high, _ = interval(samples[name] - samples[PLAIN])
            rows.append({"view": view, "images": int(these.sum()), "patients": len(set(first.patients[these])),
                         "configuration": name, "mean_auc": means[name], "less_plain": means[name] - means[PLAIN], "low": low,
                         "high": high})
    return pd.DataFrame(rows)


def picture(by_class: pd.DataFrame, note: str):
    """CHARM minus the plain network by class, rarest first, with intervals."""
    ours = by_class[by_class["configuration"] == OURS].sort_values("images", ascending=False)
    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    at = np.arange(len(ours))
    axis.errorbar(ours["less_plain"], at, xerr=[ours["less_plain"] - ours["low"], ours["high"] - ours["less_plain"]], fmt="o",
                  color="#1b6ca8", ecolor="#8fb8d9", elinewidth=3, capsize=0)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(at, [f"{name.replace('_', ' ')} ({images})" for name, images in zip(ours["class"], ours["images"])])
    axis.set_xlabel("AUC of CHARM minus that of the plain network, out of fold (95 % over patients)")
    axis.set_title(note, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def what_it_is(params: dict) -> dict:
    """A configuration's parameters without the folders and files of this machine."""
    kept = {name: value for name, value in params.items() if name not in UNHASHED}
    return kept | {"split": "fold:I/N", "weights": Path(kept["weights"]).name}


def main(folder: Path, target: Path) -> None:
    runs = {name: [RunFolder(cell) for cell in cells] for name, cells in configurations(folder).items()}
    for cells in runs.values():
        out_of_fold(cells)  # refuses cells of different cross-validations
    parts = {name: [cell.test for cell in cells] for name, cells in runs.items()}
    others = [other_memories(cell.path) for cell in runs[OURS]]
    parts |= {name: [other[name] for other in others] for name in others[0]}
    rows, by_class = table(parts)
    rows.round(4).to_csv(f"{target}.csv", index=False)
    by_class.round(4).to_csv(f"{target}_per_class.csv", index=False)
    frame = read_index(runs[PLAIN][0].metrics["params"]["data_root"]).frame
    by_view(parts, frame.set_index("id")["view"]).round(4).to_csv(f"{target}_views.csv", index=False)
    metrics = {cell.name: cell.metrics for cells in runs.values() for cell in cells}
    one = next(iter(metrics.values()))
    patients, images = (sum(cell.metrics["split"]["test"][key] for cell in runs[PLAIN]) for key in ("patients", "images"))
    note = f"{images:,} radiographs of {patients:,} patients, {len(runs[PLAIN])} folds, {one['params']['image_size']} pixels"
    figure = picture(by_class, note)
    figure.savefig(f"{target}.png", dpi=100)
    write_json(f"{target}.json", {
        "splits": {m["split"]["name"]: m["split"] for m in metrics.values()}, "seed": one["params"]["seed"],
        "device": one["device"], "precision": one["precision"], "versions": one["versions"],
        "seconds": {name: m["seconds"] for name, m in metrics.items()},
        "params": {name: what_it_is(cells[0].metrics["params"]) for name, cells in runs.items()}})
    with pd.option_context("display.width", 200):
        print(note)
        print(rows.round(4).T.to_string())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
