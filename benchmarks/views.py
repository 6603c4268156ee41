"""Views of test-time augmentation, merges, means of seeds and gates, on finished folds of one configuration.

    python -m benchmarks.views OUT.csv RUN... [--gate 0.25 --gate 0.5]

A row a setting: mean AUC and AP of the validation parts, and of the test parts within folds, less those of the image as it is,
with 95 % intervals over patients and seeds (of means of seeds: over patients). ``picked`` marks the menu and merge of the
highest mean validation AP. ``votes`` is what views do to a voting bank: ``once`` takes the votes of the image as it is, and
``each`` those of every view. A mean of n seeds merges the first n runs of each fold by each merge, and is less the mean score
of these runs. A gate needs a class that means "no finding".

The network of each run runs once over all views (``views.npz``). ``OUT.json`` has the network's time of `flip` beside one view.
"""

import time
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import pandas as pd

from benchmarks.keep_parts import Measured, measure
from benchmarks.measure import interleaved, median_ratio
from charmlib.data.views import MENUS
from charmlib.evaluation.combine import MERGES, mean_ensemble
from charmlib.evaluation.ensemble import gated
from charmlib.evaluation.intervals import interval, over_seeds
from charmlib.evaluation.metrics import ap_by_class, auc_by_class
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.files import write_csv, write_json
from charmlib.nn import VotingBank
from charmlib.training.run import Run
from charmlib.training.views import stored_views, with_views

Runs = dict[int, dict[str, RunFolder]]  # by seed and fold
SHOWN = {"mean_auc": "AUC", "mean_ap": "AP"}


def findings(part: Predictions) -> Predictions:
    return part.of([part.classes[c] for c in part.findings])


def row(runs: Runs, plain: Measured, **setting) -> dict:
    """Figures of a setting's runs, and their test figures less ``plain``'s: of as many seeds, or of one that is their mean."""
    out, parts = dict(setting), [findings(run.valid) for folds in runs.values() for run in folds.values()]
    for name, of in (("AUC", auc_by_class), ("AP", ap_by_class)):
        out[f"valid {name}"] = np.mean([np.nanmean(list(of(p.labels, p.logits, p.classes).values())) for p in parts])
    test = measure({seed: {fold: findings(run.test) for fold, run in folds.items()} for seed, folds in runs.items()})
    for figure, name in SHOWN.items():
        less = over_seeds(test.drawn[figure] - plain.drawn[figure])
        out |= {f"test {name}": test.values[figure].mean(),
                f"{name} less one view": (test.values[figure] - plain.values[figure]).mean(),
                **dict(zip((f"{name} low", f"{name} high"), interval(less)[:2]))}
    return out


def mean_of(measured: Measured, seeds: int) -> Measured:
    """The mean score of the first seeds, as one."""
    return Measured(*({figure: v[:seeds].mean(0, keepdims=True) for figure, v in some.items()} for some in measured[:2]),
                    *(v[:seeds].mean(0, keepdims=True) for v in measured[2:]))


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True)
@click.option("--gate", "gates", multiple=True, type=float)
def main(out, runs, gates):
    found, rows = defaultdict(dict), []
    for folder in map(RunFolder, runs):
        seed, fold = folder.metrics["params"]["seed"], folder.metrics["split"]["name"]
        if found[seed].setdefault(fold, folder) is not folder:
            raise click.UsageError(f"{folder} and {found[seed][fold]} have one seed and split: name runs of one configuration")
    if len({frozenset(folds) for folds in found.values()}) > 1:
        raise click.UsageError("the seeds have different folds: name as many of each")
    one_seed = next(iter(found.values()))
    first = Run.load(next(iter(one_seed.values())))
    seconds = interleaved({menu: lambda menu=menu: first.views("test", MENUS[menu]) for menu in ("none", "flip")}, 3)
    votes, start = ("once", "each") if isinstance(getattr(first.net, "bank", None), VotingBank) else ("once",), time.monotonic()
    for folds in found.values():
        for folder in folds.values():
            stored_views(folder, MENUS)
    took = time.monotonic() - start

    def changed(change) -> Runs:
        return {seed: {fold: change(folder) for fold, folder in folds.items()} for seed, folds in found.items()}

    plain = measure({seed: {fold: findings(f.test) for fold, f in folds.items()} for seed, folds in found.items()})
    rows.append(row(found, plain, menu="none", merge="", votes=""))
    for menu in [menu for menu in MENUS if menu != "none"]:
        rows += [row(changed(lambda f, m=menu, h=how, v=v: with_views(f, m, h, votes=v)), plain, menu=menu, merge=how,
                     votes=v if len(votes) > 1 else "") for how in MERGES for v in votes]
    rows[int(np.argmax([r["valid AP"] for r in rows]))]["picked"] = True
    for n in range(2, len(found) + 1):
        for how in MERGES:
            mean = {}
            for fold, folder in one_seed.items():
                mean[fold] = RunFolder(folder.path)
                for part in ("valid", "test"):
                    members = [getattr(folds[fold], part) for folds in list(found.values())[:n]]
                    setattr(mean[fold], part, mean_ensemble(members, how))
            rows.append(row({0: mean}, mean_of(plain, n), menu=f"mean of {n} seeds", merge=how, votes=""))
    rows += [row(changed(lambda f, a=alpha: gated(f, a)), plain, menu=f"gate {alpha:g}", merge="", votes="") for alpha in gates]
    write_csv(out, (table := pd.DataFrame(rows)).round(5))
    metrics = first.folder.metrics
    write_json(out.with_suffix(".json"), {
        "runs": [folder.name for folds in found.values() for folder in folds.values()], "seeds": list(found),
        "folds": sorted({fold for folds in found.values() for fold in folds}), "versions": metrics["versions"],
        "device": metrics["device"],
        "test": {key: sum(f.metrics["split"]["test"][key] for f in one_seed.values()) for key in ("images", "patients")},
        "flip_times_one_view": round(median_ratio(seconds["flip"], seconds["none"]), 3), "asked": 2.1,
        "seconds_of_all_views": round(took)})
    click.echo(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
