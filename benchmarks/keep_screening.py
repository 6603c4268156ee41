"""Keep what the cells of a grid score on the validation part, beside the grid's plain cell (docs/protocol.md, parts 4 and 5).

    python -m benchmarks.keep_screening runs/longtail64 benchmarks/results/nih64_longtail.csv

A row a cell: mean AUC, mean AP, AUC and AP of the four rarest findings, each less plain with its 95 % interval over patients;
log loss as trained, and at the temperature that the same part has chosen; seconds of training. Test parts are not read.
"""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd

from benchmarks.keep_parts import PLAIN, RARE, log_loss
from charmlib.evaluation.calibration import fit_temperature
from charmlib.evaluation.intervals import bootstrap, interval, mean_of_defined
from charmlib.evaluation.metrics import ap_by_class, auc_by_class
from charmlib.evaluation.runs import Predictions, run_folders
from charmlib.files import write_csv


def figures(part: Predictions) -> dict[str, np.ndarray]:
    """Of each figure the value and then its resamples over patients, (1 + resamples,)."""
    drawn, found = bootstrap(part.labels, part.logits, part.patients), {}
    for figure, of, samples in (("AUC", auc_by_class, drawn.auc), ("AP", ap_by_class, drawn.ap)):
        table = np.vstack([list(of(part.labels, part.logits, part.classes).values()), samples])
        for name, columns in ((figure, part.findings), (f"rare {figure}", [part.classes.index(c) for c in RARE])):
            found[name] = mean_of_defined(table[:, columns])
    return found


def main() -> None:
    folder, path = sys.argv[1:]
    runs = {run.name: run for run in run_folders([folder])}
    values, rows = {name: figures(run.valid) for name, run in runs.items()}, []
    for name, run in runs.items():
        valid = run.valid
        cooled = replace(valid, logits=valid.logits / fit_temperature(valid.labels, valid.logits))
        row = {"cell": name}
        for figure, found in values[name].items():
            less = found - values[PLAIN][figure]
            row |= {figure: found[0], f"{figure} less plain": less[0],
                    **dict(zip((f"{figure} less plain low", f"{figure} less plain high"), interval(less[1:])[:2]))}
        rows.append(row | {"log loss": log_loss(valid, 1, 0)[0], "log loss at its temperature": log_loss(cooled, 1, 0)[0],
                           "training seconds": run.metrics["seconds"]["train"], "shares training with":
                           run.metrics.get("shares_training_with") or ""})
    part = next(iter(runs.values())).metrics
    about = part["split"]["valid"]
    table = pd.DataFrame(rows).sort_values("AUC", ascending=False).assign(
        split=part["split"]["name"], images=about["images"], patients=about["patients"], seed=part["params"]["seed"],
        charmlib=part["versions"]["charmlib"])
    write_csv(path, table.round(5))
    print(table.filter(regex="cell|AUC|AP|loss").round(4).to_string(index=False))


if __name__ == "__main__":
    main()
