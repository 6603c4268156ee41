"""Keep the predictions of a cross-validated grid of several seeds, and compare its configurations (docs/protocol.md).

    python -m benchmarks.keep_parts runs/nih64_parts benchmarks/results/nih64_parts

keeps each finished cell's test predictions, and those of its baselines, as ``<target>/CELL.npz`` (float16) with its figures in
``CELL.json``. Of the cells of CHARM's grid, it keeps the one that validation picks in each fold and seed, and the validation
figures of all (``grid.csv``). So a long grid can be made in several sittings, on several machines. From all that is kept it
then writes

- ``<target>.csv``: a row a configuration, with mean AUC within folds and the figures beside it, intervals, each seed's value;
- ``<target>_comparisons.csv``: the comparisons that the protocol names, with Holm's correction;
- ``<target>_axes.csv``: what each axis of CHARM's grid moves on validation;
- ``<target>_per_class.csv``, ``<target>_views.csv`` (images of one view position) and ``<target>.png``;
- ``<target>.json``: splits, seeds, parameters, device, versions, seconds.

Resamples draw the patients of each fold, the same for all configurations and seeds, and then the seeds.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from charmlib.evaluation.combine import mean_ensemble
from charmlib.evaluation.compare import holm, p_of
from charmlib.evaluation.intervals import RESAMPLES, bootstrap, draws, interval, mean_of_defined, over_seeds
from charmlib.evaluation.metrics import ap_by_class, auc_by_class, mean_auc
from charmlib.evaluation.runs import Predictions, RunFolder, valid_auc, write_arrays
from charmlib.files import write_csv, write_json
from charmlib.params import UNHASHED

PLAIN, BEFORE, OURS, PUBLISHED, PAIR = "plain", "plain_0.5", "charm", "published", "plain, two seeds"
BASELINE, GRID, PICK = "plain, best baseline", "charm_grid_", "charm, picked by its grid"
NAMED = {2: ((PLAIN, BEFORE),),
         4: (("momentum_alone", PLAIN), ("ldam_drw", PLAIN, "rare_auc")),
         5: (("attention", PLAIN), ("attention", "plain_long"), ("attention", "other")),
         6: ((OURS, PLAIN), (OURS, BASELINE), (OURS, "no_momentum"), (OURS, "no_attention"), (OURS, "no_memory"),
             (OURS, PUBLISHED))}
"""By part of the protocol: configuration, less this one, figure (mean AUC if none is named). Holm's corrects within a part."""
AXES = ("momentum", "k", "threshold")
RARE = ("Hernia", "Pneumonia", "Edema", "Emphysema")
FIGURES = ("mean_auc", "auc_without_hernia", "rare_auc", "mean_ap", "log_loss")
Folds = Mapping[str, Predictions]  # by name of the fold
Configurations = Mapping[str, Mapping[int, Folds]]  # by configuration and seed


class Measured(NamedTuple):
    """Of one configuration, by figure: the values of its seeds (S,), and their resamples (S, resamples)."""

    values: dict[str, np.ndarray]
    drawn: dict[str, np.ndarray]
    auc: np.ndarray  # (S, C), within folds
    auc_drawn: np.ndarray  # (S, resamples, C)


def keep(cell: RunFolder, target: Path, name: str = "") -> None:
    """Write a finished cell's predictions by configuration, and what they were made with."""
    own, at, where = cell.path.name.partition("_split=")
    test, name, file_name = cell.test, name or own, ("picked" if name else own) + at + where
    logits, more, judged = {name: test.logits}, {}, {}
    if (file := cell.baselines_arrays).is_file():
        with np.load(file, allow_pickle=False) as found:
            at = {image: i for i, image in enumerate(found["test_ids"].tolist())}
            order = [at[image] for image in test.ids.tolist()]
            logits |= {f"{name}, {key.removeprefix('test_')}": found[key][order] for key in found.files
                       if key.startswith("test_") and key not in ("test_ids", "test_patients", "test_labels", "test_run")}
            if name == PLAIN:
                judged = dict(zip(("baseline", "baseline_valid_auc"), best_baseline(found, cell.valid)))
                logits[BASELINE] = found[f"test_{judged['baseline']}"][order]
    if name == PLAIN:  # whose mean with another seed may be the best baseline
        more = {"valid_ids": cell.valid.ids, "valid_labels": cell.valid.labels.astype(np.float16),
                "valid_logits": cell.valid.logits.astype(np.float16)}
    target.mkdir(parents=True, exist_ok=True)
    write_arrays(target / f"{file_name}.npz", ids=test.ids, patients=test.patients, labels=test.labels.astype(np.float16),
                 view=test.about.get("view", np.full(len(test.ids), "")), classes=np.array(test.classes),
                 names=np.array(list(logits)), logits=np.stack(list(logits.values())).astype(np.float16), **more)
    kept = ("split", "seconds", "device", "precision", "versions", "code", "hash")
    metrics = cell.metrics
    params = {key: value for key, value in metrics["params"].items() if key not in UNHASHED}
    params["weights"] = Path(params["weights"]).name
    write_json(target / f"{file_name}.json",
               {"configuration": name, "params": params, **judged, **{key: metrics.get(key) for key in kept}})


def best_baseline(found: Mapping[str, np.ndarray], valid: Predictions) -> tuple[str, float]:
    """The baseline of one run with the highest mean AUC on validation, and that AUC; :func:`read` adds means of two seeds."""
    at = {image: i for i, image in enumerate(found["valid_ids"].tolist())}
    order = [at[image] for image in valid.ids.tolist()]
    names = [key.removeprefix("valid_") for key in found.files if key.startswith("valid_")]
    names = {*names} - {"ids", "patients", "labels", "run", "head", "shuffled", "shuffled+head", "two_seeds"}
    scores = {name: mean_auc(valid.labels, found[f"valid_{name}"][order], valid.classes) for name in sorted(names)}
    return max(scores.items(), key=lambda item: item[1])


def keep_grid(folder: Path, target: Path) -> None:
    """Of CHARM's grid: add the validation figures of all cells to ``grid.csv``, and keep each fold's and seed's pick."""
    file, rows = target / "grid.csv", []
    for path in sorted(folder.glob(f"{GRID}*_split=*/metrics.json")):
        cell = RunFolder(path.parent)
        metrics = cell.metrics
        rows.append({"cell": cell.path.name, "split": metrics["split"]["name"], "seed": metrics["params"]["seed"],
                     **{axis: metrics["params"][axis] for axis in AXES}, "valid_auc": valid_auc(metrics),
                     "valid_log_loss": log_loss(cell.valid, 1, 0)[0]})
    if not rows:
        return
    before = pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=list(rows[0]))
    made = pd.DataFrame(rows)
    table = pd.concat([before[~before["cell"].isin(made["cell"])], made])
    target.mkdir(parents=True, exist_ok=True)
    write_csv(file, table.sort_values(["split", "seed", *AXES]))
    whole = table.groupby(["split", "seed"])["cell"].transform("size") == table.groupby(list(AXES)).ngroups
    for _, some in table[whole].groupby(["split", "seed"]):
        best = some.loc[some["valid_auc"].idxmax(), "cell"]
        if (folder / best / "metrics.json").is_file():
            keep(RunFolder(folder / best), target, PICK)


def axes(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each value of each axis: its mean effect on validation AUC, by seed, and the range of the axis beside the
    spread of its effects over seeds."""
    rows, middle = [], table.groupby(["split", "seed"])["valid_auc"].transform("mean")
    for axis in AXES:
        effect = (table["valid_auc"] - middle).groupby([table[axis], table["seed"]]).mean().unstack()
        mean = effect.mean(axis=1)
        for value in effect.index:
            rows.append({"axis": axis, "value": value, "effect": mean[value],
                         "by_seed": " ".join(f"{v:+.4f}" for v in effect.loc[value]), "range": mean.max() - mean.min(),
                         "range_without_this": mean.drop(value).max() - mean.drop(value).min(),
                         "spread_over_seeds": effect.std(axis=1).max() if effect.shape[1] > 1 else float("nan")})
    return pd.DataFrame(rows)


def read(target: Path) -> tuple[Configurations, dict[str, dict]]:
    """What is kept, and the JSON of each cell. A seed without all the folds of others is left out, with a line."""
    found, cells, splits, valid, single = {}, {}, {}, {}, {}
    for file in sorted(target.glob("*.npz")):
        card = cells[file.stem] = json.loads(file.with_suffix(".json").read_text())
        if splits.setdefault(card["split"]["name"], card["split"]["hash"]) != card["split"]["hash"]:
            raise ValueError(f"{file} is of another split {card['split']['name']} than the cells before it, and cannot be "
                             "paired with them: were both made with -p never_test=benchmarks/explore64.txt?")
        at = card["params"]["seed"], card["split"]["name"]
        with np.load(file, allow_pickle=False) as arrays:
            if card["configuration"] == PLAIN and "valid_ids" in arrays:
                single[at], ids = card.get("baseline_valid_auc"), arrays["valid_ids"]
                valid[at] = Predictions(ids, ids, *(arrays[f"valid_{key}"].astype(np.float32) for key in ("labels", "logits")),
                                        tuple(arrays["classes"].tolist()))
            labels = arrays["labels"].astype(np.float32)
            for name, logits in zip(arrays["names"].tolist(), arrays["logits"]):
                part = Predictions(arrays["ids"], arrays["patients"], labels, logits.astype(np.float32),
                                   tuple(arrays["classes"].tolist()), about={"view": arrays["view"]})
                part = part.take(np.argsort(part.ids))
                found.setdefault(name, {}).setdefault(at[0], {})[at[1]] = part
    if PLAIN in found:
        seeds = sorted(found[PLAIN])
        other = {one: two for one, two in zip(seeds, seeds[1:] + seeds[:1]) if two != one}
        found[PAIR] = {one: {fold: mean_ensemble([part, found[PLAIN][two][fold]]) for fold, part in found[PLAIN][one].items()
                             if fold in found[PLAIN][two]} for one, two in other.items()}
        for one, two in other.items():
            for fold in found.get(BASELINE, {}).get(one, {}):
                if {(one, fold), (two, fold)} <= valid.keys():
                    pair = mean_ensemble([valid[one, fold], valid[two, fold]])
                    if mean_auc(pair.labels, pair.logits, pair.classes) > single[one, fold]:
                        found[BASELINE][one][fold] = found[PAIR][one][fold]
    wanted = {fold for seeds in found.values() for folds in seeds.values() for fold in folds}
    for name in list(found):
        whole = {seed: folds for seed, folds in sorted(found[name].items()) if set(folds) == wanted}
        for seed in sorted(set(found[name]) - set(whole)):
            print(f"{name}, seed {seed}: {len(found[name][seed])} of {len(wanted)} folds, left out")
        found[name] = whole
    first = [BEFORE, PLAIN, OURS, "no_momentum", "no_attention", "no_memory", "momentum_alone", PICK, PUBLISHED, BASELINE]
    order = sorted(found, key=lambda name: (first.index(name) if name in first else len(first), name))
    return {name: found[name] for name in order if found[name]}, cells


def measure(seeds: Mapping[int, Folds], resamples: int = RESAMPLES) -> Measured:
    """The figures of a configuration, means over folds."""
    values, drawn, auc, auc_drawn = {f: [] for f in FIGURES}, {f: [] for f in FIGURES}, [], []
    for folds in seeds.values():
        classes = next(iter(folds.values())).classes
        columns = {"mean_auc": list(range(len(classes))), "rare_auc": [classes.index(name) for name in RARE if name in classes],
                   "auc_without_hernia": [c for c, name in enumerate(classes) if name != "Hernia"]}
        found = [(bootstrap(p.labels, p.logits, p.patients, resamples=resamples, seed=i), p) for i, (_, p) in
                 enumerate(sorted(folds.items()))]
        auc.append(mean_over_folds([list(auc_by_class(p.labels, p.logits, classes).values()) for _, p in found]))
        ap = mean_over_folds([list(ap_by_class(p.labels, p.logits, classes).values()) for _, p in found])
        auc_drawn.append(mean_over_folds([samples.auc for samples, _ in found]))
        ap_drawn = mean_over_folds([samples.ap for samples, _ in found])
        losses = [log_loss(p, resamples, i) for i, (_, p) in enumerate(found)]
        for figure, which in columns.items():
            values[figure].append(np.nanmean(auc[-1][which]))
            drawn[figure].append(mean_of_defined(auc_drawn[-1][:, which]))
        values["mean_ap"].append(np.nanmean(ap))
        drawn["mean_ap"].append(mean_of_defined(ap_drawn))
        values["log_loss"].append(np.mean([value for value, _ in losses]))
        drawn["log_loss"].append(np.mean([samples for _, samples in losses], axis=0))
    return Measured(*({figure: np.array(v) for figure, v in some.items()} for some in (values, drawn)), np.array(auc),
                    np.array(auc_drawn))


def mean_over_folds(values) -> np.ndarray:
    """The mean over the first axis of what is defined; NaN where no fold defines it."""
    values = np.array(values, float)
    return np.nansum(values, 0) / np.where((count := (~np.isnan(values)).sum(0)) > 0, count, np.nan)


def log_loss(p: Predictions, resamples: int, seed: int) -> tuple[float, np.ndarray]:
    """Log loss of the uncalibrated probabilities, mean over known labels, and its resamples by patient."""
    logits, known = p.logits.astype(np.float64), ~np.isnan(p.labels)
    lost = np.where(known, np.logaddexp(0, logits) - np.nan_to_num(p.labels) * logits, 0)
    names, patient = np.unique(p.patients, return_inverse=True)
    sums, counts = (np.bincount(patient, v.sum(1), minlength=len(names)) for v in (lost, known))
    drawn = [(sums @ w) / (counts @ w) for w in draws(len(names), resamples, seed, 256)]
    return lost.sum() / known.sum(), np.concatenate(drawn)


def differences(one: Measured, other: Measured, named: str = FIGURES[0]) -> dict:
    """First less second, by figure: value and limits; of the named one each seed's value, and whether all agree in sign."""
    out = {}
    for figure in FIGURES:
        by_seed = one.values[figure] - other.values[figure]
        low, high, _ = interval(over_seeds(one.drawn[figure] - other.drawn[figure]))
        out |= {figure: by_seed.mean(), f"{figure}_low": low, f"{figure}_high": high}
        if figure == named:
            out |= {"seeds": " ".join(f"{v:+.4f}" for v in by_seed), "one_sign": bool(len(set(np.sign(by_seed))) == 1)}
    return out


def tables(configurations: Configurations) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """The rows of ``<target>.csv``, ``_comparisons.csv`` and ``_per_class.csv``. Pairs take the seeds that both have."""
    measured = {name: measure(seeds) for name, seeds in configurations.items()}
    rows, by_class, pairs = [], [], []

    def pair(name: str, other: str) -> tuple[Measured, Measured]:
        both = sorted(set(configurations[name]) & set(configurations[other]))
        at = [[list(configurations[n]).index(seed) for seed in both] for n in (name, other)]
        return tuple(Measured(*({figure: v[i] for figure, v in some.items()} for some in m[:2]), m.auc[i], m.auc_drawn[i])
                     for m, i in zip((measured[name], measured[other]), at))

    for name, m in measured.items():
        row = {"configuration": name, "seeds": len(m.auc), "folds": len(next(iter(configurations[name].values())))}
        for figure in FIGURES:
            low, high, _ = interval(over_seeds(m.drawn[figure]))
            row |= {figure: m.values[figure].mean(), f"{figure}_low": low, f"{figure}_high": high}
        row["mean_auc_by_seed"] = " ".join(f"{v:.4f}" for v in m.values["mean_auc"])
        if name != PLAIN and PLAIN in measured:
            row |= {f"less_plain_{key}": value for key, value in differences(*pair(name, PLAIN)).items()}
        rows.append(row)
        folds = next(iter(configurations[name].values())).values()
        positive = {c: np.concatenate([p.patients[p.labels[:, c] == 1] for p in folds]) for c in range(m.auc.shape[1])}
        one, plain = pair(name, PLAIN) if PLAIN in measured else (m, m)
        for c, label in enumerate(next(iter(folds)).classes):
            low, high, _ = interval(over_seeds(one.auc_drawn[..., c] - plain.auc_drawn[..., c]))
            by_class.append({"configuration": name, "class": label, "images": len(positive[c]),
                             "patients": len(set(positive[c])), "auc": m.auc[:, c].mean(),
                             "less_plain": (one.auc - plain.auc)[:, c].mean(), "low": low, "high": high})
    for part, named in NAMED.items():
        named = [(name, other, *(figure or FIGURES[:1])) for name, other, *figure in named if {name, other} <= measured.keys()]
        found = [differences(*pair(name, other), figure) for name, other, figure in named]
        p = np.array([p_of(row[f], (row[f"{f}_low"], row[f"{f}_high"])) for row, (*_, f) in zip(found, named)])
        pairs += [{"part": part, "configuration": name, "less": other, "figure": figure, "p": own, "p_holm": corrected, **row}
                  for (name, other, figure), own, corrected, row in zip(named, p, holm(p), found)]
    return pd.DataFrame(rows), pd.DataFrame(pairs), pd.DataFrame(by_class)


def by_view(configurations: Configurations) -> pd.DataFrame:
    """Mean AUC within folds among the images of each view position, and its difference from the plain network."""
    rows, folds = [], next(iter(configurations[PLAIN].values())).values()
    for view in sorted({*np.concatenate([p.about["view"] for p in folds])} - {""}):
        some = {name: {seed: {fold: p.take(p.about["view"] == view) for fold, p in folds.items()}
                       for seed, folds in seeds.items()} for name, seeds in configurations.items()}
        found, _, _ = tables(some)
        folds = next(iter(some[PLAIN].values())).values()
        kept = ["configuration", "seeds", "mean_auc", "mean_auc_low", "mean_auc_high", "less_plain_mean_auc",
                "less_plain_mean_auc_low", "less_plain_mean_auc_high"]
        rows.append(found[[name for name in kept if name in found]].assign(
            view=view, images=sum(len(p.ids) for p in folds), patients=sum(len(set(p.patients)) for p in folds)))
    return pd.concat(rows) if rows else pd.DataFrame()


def picture(by_class: pd.DataFrame, note: str):
    """CHARM minus the plain network by class, rarest first, with intervals."""
    ours = by_class[by_class["configuration"] == OURS].sort_values("images", ascending=False)
    figure, axis = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    at = np.arange(len(ours))
    axis.errorbar(ours["less_plain"], at, xerr=[ours["less_plain"] - ours["low"], ours["high"] - ours["less_plain"]], fmt="o",
                  color="#1b6ca8", ecolor="#8fb8d9", elinewidth=3, capsize=0)
    axis.axvline(0, color="0.4", linewidth=1)
    axis.set_yticks(at, [f"{name.replace('_', ' ')} ({images})" for name, images in zip(ours["class"], ours["images"])])
    axis.set_xlabel("AUC of CHARM minus that of the plain network, within folds (95 % over patients and seeds)")
    axis.set_title(note, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(folder: Path, target: Path) -> None:
    """Keep what is finished in a grid's folder, which may be missing, and write the tables of all that is kept."""
    for file in sorted(folder.glob("*_split=*/metrics.json")):
        if not file.parent.name.startswith(GRID):
            keep(RunFolder(file.parent), target)
    keep_grid(folder, target)
    configurations, cells = read(target)
    if not configurations:
        raise SystemExit(f"no whole cross-validation in {target}; run the grid first")
    rows, comparisons, by_class = tables(configurations)
    write_csv(f"{target}.csv", rows.round(4))
    write_csv(f"{target}_comparisons.csv", comparisons.round(5))
    write_csv(f"{target}_per_class.csv", by_class.round(4))
    if (target / "grid.csv").is_file():
        write_csv(f"{target}_axes.csv", axes(pd.read_csv(target / "grid.csv")).round(5))
    if PLAIN in configurations:
        write_csv(f"{target}_views.csv", by_view(configurations).round(4))
    some = next(iter(configurations.values()))
    folds = next(iter(some.values()))
    note = (f"{sum(len(p.ids) for p in folds.values()):,} radiographs of {sum(len(set(p.patients)) for p in folds.values()):,} "
            f"patients, {len(folds)} folds, seeds {', '.join(map(str, some))}")
    if OURS in configurations:
        picture(by_class, note).savefig(f"{target}.png", dpi=100)
    write_json(f"{target}.json", {
        "note": note, "splits": {card["split"]["name"]: card["split"] for card in cells.values()},
        "params": {card["configuration"]: {**card["params"], "split": "fold:I/N", "seed": "S"} for card in cells.values()},
        "seconds": {name: card["seconds"] for name, card in cells.items()},
        "machines": sorted({f"{card['device']}, {card['precision']}, torch {card['versions']['torch']}, charmlib "
                            f"{card['versions']['charmlib']}" for card in cells.values()})})
    with pd.option_context("display.width", 200, "display.max_columns", 30):
        print(note)
        print(rows[["configuration", "seeds", *FIGURES]].round(4).to_string(index=False))
        print(comparisons.round(4).T.to_string())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
