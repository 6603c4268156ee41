"""Heat maps of cross-validated runs beside radiologists' boxes, each box once, by the run that has not seen its patient.

    python -m benchmarks.boxes benchmarks/results/nih64_boxes.csv runs/nih64_parts/*_seed=85

Runs are pooled by the part of their names before ``_split=``; one row a network, stride, method and finding. The methods are
those of charmlib/training/heat.py and charmlib/evaluation/boxes.py: the map, four controls, and the ceiling of its grid.
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.boxes import CORNERS
from charmlib.evaluation.boxes import MEAN, check_boxes
from charmlib.training.heat import boxed, maps_of_boxes
from charmlib.training.run import Run

STRIDES = (8, 16, 32)


def table_of(folders: list[str]) -> pd.DataFrame:
    """The rows of one network's folds."""
    tables, patients, maps = [], [], {stride: defaultdict(list) for stride in STRIDES}
    for folder in folders:
        run = Run.load(folder)
        table, who, _ = boxed(run)
        if table["finding"].nunique() < 2:
            continue
        tables.append(table)
        patients += who.tolist()
        for stride in STRIDES:
            for name, heat in maps_of_boxes(run, table, stride=stride).items():
                maps[stride][name].append(heat)
    table = pd.concat(tables)
    if table[["id", "finding", *CORNERS]].duplicated().any():
        raise ValueError(f"a box is in the test part of two runs: {', '.join(folders)} are no folds of one cross-validation")
    found = [check_boxes({name: np.concatenate(parts) for name, parts in of.items()}, table[CORNERS].to_numpy(float),
                         table["finding"], patients).assign(stride=stride) for stride, of in maps.items()]
    return pd.concat(found)


def main() -> None:
    path, *folders = sys.argv[1:]
    networks = defaultdict(list)
    for folder in folders:
        networks[Path(folder).name.partition("_split=")[0]].append(folder)
    table = pd.concat([table_of(runs).assign(network=name, folds=len(runs)) for name, runs in networks.items()])
    first = ["network", "stride", "folds"]
    table = table[[*first, *(c for c in table if c not in first)]]
    table.round(4).to_csv(path, index=False, lineterminator="\n")
    shown = table[table["finding"] == MEAN].drop(columns="finding")
    print(shown[[*first, "method", "boxes", "hit", "hit_low", "hit_high", "iou", "iou>0.1", "iou>0.5", "ceiling", "hit_less",
                 "hit_less_low", "hit_less_high"]].round(3).to_string(index=False))


if __name__ == "__main__":
    main()
