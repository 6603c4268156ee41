"""Real predictions on the whole official test part: each class with its interval, paired differences, a mean ensemble, and
the time of the bootstrap compared with a plain scikit-learn loop.

    python benchmarks/official_logits.py ../shared benchmarks/results

Reads ``casp_logits/*.npz`` (DenseNet-121 and ResNet-18 on 28-pixel input, two seeds each; INQUIRELAB/casp-chestmnist,
MIT) and ``nih_meta``; writes ``official_*.csv``, ``official_*.png`` and ``official_bootstrap.json``. Operating points and
calibration are left out: the files hold no validation predictions to choose them on.
"""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
import sklearn
from sklearn.metrics import average_precision_score, roc_auc_score

from charmlib.evaluation.combine import mean_ensemble
from charmlib.evaluation.compare import compare, verdict
from charmlib.evaluation.groups import column_scores
from charmlib.evaluation.intervals import bootstrap, interval, mean_of_defined
from charmlib.evaluation.metrics import mean_auc, prevalence
from charmlib.evaluation.runs import Predictions
from charmlib.evaluation.score import score_part
from charmlib.evaluation.tables import class_table, with_intervals
from charmlib.files import write_json
from charmlib.nih import NIH14
from charmlib.viz.curves import plot_precision_recall, plot_roc_bands
from charmlib.viz.per_class import plot_per_class

NAMES = ("densenet121_seed0", "densenet121_seed1", "resnet18_seed0", "resnet18_seed1")


def read(path: Path) -> Predictions:
    """A file of logits; images are named by their position, because the file has no names."""
    with np.load(path, allow_pickle=False) as file:
        labels, logits, patients = file["test_labels"], file["test_logits"], file["test_patient"]
    return Predictions(np.array([f"{i:05}" for i in range(len(labels))]), patients, labels, logits, tuple(NIH14))


def naive(p: Predictions, resamples: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The straightforward loop: scikit-learn on the drawn images, one call per resample and class."""
    names, index = np.unique(p.patients, return_inverse=True)
    draws = np.random.default_rng(85).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    auc, ap = np.full((2, resamples, len(p.classes)), np.nan)
    start = time.perf_counter()
    for r in range(resamples):
        rows = np.repeat(np.arange(len(index)), draws[r][index])
        for c in range(len(p.classes)):
            auc[r, c] = roc_auc_score(p.labels[rows, c], p.logits[rows, c])
            ap[r, c] = average_precision_score(p.labels[rows, c], p.logits[rows, c])
    return auc, ap, time.perf_counter() - start


def speed(p: Predictions, out: Path, resamples: int = 1000, few: int = 5) -> None:
    """Time both in one run, and compare their results."""
    bootstrap(p.labels, p.logits, p.patients, resamples=few)
    start = time.perf_counter()
    found = bootstrap(p.labels, p.logits, p.patients, resamples=resamples)
    ours = time.perf_counter() - start
    auc, ap, seconds = naive(p, few)
    difference = max(np.abs(auc - found.auc[:few]).max(), np.abs(ap - found.ap[:few]).max())
    result = {"images": len(p.labels), "classes": len(p.classes), "patients": len(np.unique(p.patients)),
              "resamples": resamples,
              "seconds": round(ours, 3), "naive_seconds_for_as_many": round(seconds / few * resamples, 1),
              "naive_resamples_timed": few, "times_faster": round(seconds / few * resamples / ours, 1),
              "largest_difference": float(difference), "device": f"cpu, {platform.machine()}, 2 cores",
              "versions": {"python": platform.python_version(), "numpy": np.__version__, "scikit-learn": sklearn.__version__}}
    write_json(out / "official_bootstrap.json", result)
    print(f"{resamples} resamples of AUC and AP on {len(p.labels):,} x {len(p.classes)}: {ours:.2f} s; a scikit-learn loop "
          f"{result['naive_seconds_for_as_many']:.0f} s (from {few}), {result['times_faster']:.0f} times as long; they "
          f"differ by {difference:.1e} at most")


def view_alone(shared: Path) -> dict:
    """The official test part scored by the view position alone, with prevalences by view from the training list."""
    frame = pd.read_csv(shared / "nih_meta/Data_Entry_2017_v2020.csv.gz").rename(columns={"Image Index": "id"})
    for name in NIH14:
        frame[name] = frame["Finding Labels"].str.split("|").map(lambda found, n=name: float(n in found))
    lists = {part: set((shared / f"nih_meta/{name}.txt").read_text().split())
             for part, name in (("train", "train_val_list"), ("test", "test_list"))}
    train, test = (frame[frame["id"].isin(lists[part])] for part in ("train", "test"))
    scores = column_scores(train["View Position"], train[list(NIH14)], test["View Position"])
    labels = test[list(NIH14)].to_numpy(float)
    low, high, _ = interval(mean_of_defined(bootstrap(labels, scores, test["Patient ID"]).auc))
    print(f"view position alone: {mean_auc(labels, scores):.4f} ({low:.4f} to {high:.4f})")
    return {"run": "view position alone (control)", "AUC": mean_auc(labels, scores), "AUC low": low, "AUC high": high,
            "prevalence": prevalence(train[list(NIH14)], NIH14)}


def main(shared: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    runs = {name: read(shared / f"casp_logits/{name}.npz") for name in NAMES}
    runs["mean of the four"] = mean_ensemble(list(runs.values()))
    first = runs[NAMES[0]]
    split = {"images": len(first.labels), "patients": len(np.unique(first.patients)),
             "positive_share": float((first.labels == 1).any(1).mean())}
    note = (f"NIH ChestX-ray14, split 'official': {split['images']:,} test images of {split['patients']:,} patients, "
            f"{split['positive_share']:.1%} with a finding")
    view = view_alone(shared)
    train_prevalence = view.pop("prevalence")
    rows, tables = [], []
    for name, p in runs.items():
        part, _ = score_part(vars(p), p.classes, prevalence=train_prevalence)
        table = class_table(part, p.positives)
        tables.append(table.assign(run=name)[["run", *table.columns]])
        rows.append({"run": name, "AUC": part["mean_auc"], "AUC low": part["mean_auc_low"], "AUC high": part["mean_auc_high"],
                     "AP": part["mean_ap"], **dict(zip(("AP low", "AP high"), part["intervals"]["mean_ap"]))})
    summary = pd.DataFrame([*rows, view]).assign(**split)
    summary.round(5).to_csv(out / "official_runs.csv", index=False)
    pd.concat(tables).round(5).to_csv(out / "official_per_class.csv", index=False)
    print(note)
    print(with_intervals(summary, 4).to_string(index=False))
    print(with_intervals(tables[-1].drop(columns="run")).to_string(index=False))
    pairs = []
    for a, b in (("resnet18_seed0", "densenet121_seed0"), ("resnet18_seed1", "densenet121_seed1"),
                 ("densenet121_seed0", "densenet121_seed1"), ("densenet121_seed1", "mean of the four")):
        table = compare(runs[a], runs[b])
        pairs.append(table.assign(first_run=a, second_run=b))
        print(f"{b} minus {a}: {verdict(table, a, b)}")
    pd.concat(pairs).round(5).to_csv(out / "official_paired.csv", index=False)
    metrics = {"test": part, "split": {"name": "official", "test": split}, "params": {"labels": "real"}, "quick_check": False,
               "classes": first.classes, "data": {"drawn": False, "name": "NIH"}, "cell": "mean of the four"}
    mean = runs["mean of the four"]
    title = "mean of DenseNet-121 and ResNet-18 (28 pixels, two seeds each)"
    for name, figure in (("roc", plot_roc_bands(mean, part, title=title, note=note)),
                         ("precision_recall", plot_precision_recall(mean, part, title=title, note=note)),
                         ("per_class", plot_per_class(metrics, title=title, note=note))):
        figure.savefig(out / f"official_{name}.png", dpi=110)
    speed(first, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
