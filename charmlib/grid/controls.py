"""Three controls of a parameter file in one call: shuffled labels, the view position alone, the plain network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.dataset import open_dataset
from charmlib.evaluation.compare import compare, verdict
from charmlib.evaluation.controls import column_scores
from charmlib.evaluation.intervals import Interval, bootstrap, interval, mean_of_defined
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.runs import RunFolder
from charmlib.files import write_whole
from charmlib.grid.cells import GridError, cell_status
from charmlib.grid.runner import Means, run_loaded
from charmlib.grid.spec import Cell, Grid
from charmlib.param_sources import find_file, load_params, parse_assignments
from charmlib.params import ParameterError, changes, resolve, stored, with_absolute_paths

PARTS_OFF = {"use_momentum": False, "use_attention": False, "use_bank": False}
LEVEL = 0.99
"""Of the interval in which the shuffled control must hold 0.5: one in a hundred honest ones does not."""


def run_controls(path: str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
                 workers: int | None = None, say: Callable[[str], None] = print) -> tuple[pd.DataFrame, bool, list[str]]:
    """Train what is missing and score it; returns the table (also in ``controls.csv``), whether the shuffled control held,
    and remarks: its interval, and what the network adds to the plain one.

    ``path`` is a parameter file, or the folder of a finished run, which then is the network and is not trained again.

    - ``network``: the parameter file as it is; ``plain``: without CHARM's three parts;
    - ``shuffled``: the same network on label rows shuffled within each part: must score 0.5 within its interval;
    - ``view position alone``: each view (PA, AP) scores the share of positives it has in the training part.

    Raises
    ------
    charmlib.params.ParameterError, charmlib.grid.cells.GridError
        Wrong parameters; a finished control of other settings; a control that failed.
    """
    run = Path(path).resolve() if Path(path).is_dir() else None
    path = run / "params.yaml" if run else find_file(path)
    finished = RunFolder(run).metrics if run else None
    given = load_params(path)
    params = resolve(stored(given) if run else given, parse_assignments(assignments), sources=(str(path), "-p"))
    with_absolute_paths(params)  # refuses what is not there
    del params["run_dir"]
    if params["labels"] != "real":
        raise ParameterError("controls make the shuffled run themselves; leave labels at 'real'")
    if params["limit"]:
        raise ParameterError("controls are scored on the whole test part; leave limit at 0")
    if finished and (changed := changes(finished["params"], params)):
        raise ParameterError(f"controls of the finished run {run} keep its settings; -p changes {', '.join(changed)}. Name its "
                             "parameter file instead.")
    settings = {"network": params, "plain": {**params, **PARTS_OFF}, "shuffled": {**params, "labels": "shuffled"}}
    is_plain = settings["plain"] == params
    if run or is_plain:
        del settings["network"]
    if run and is_plain:
        del settings["plain"]
    name = run.name if run else path.stem
    folder = Path(out or Path("runs") / f"{name}_controls")
    grid = Grid(folder.name, path, tuple(Cell(cell, p, {}) for cell, p in settings.items()), ())
    run_loaded(grid, Means(workers=workers), out=folder, say=say)
    failed = [name for name in settings if cell_status(folder / name) != "done"]
    if failed:
        raise GridError(f"no table yet: {', '.join(failed)} failed; see {folder / failed[0] / 'error.txt'}")
    rows = [_trained(run, run.name)] if run else []
    rows += [_trained(folder / name, name) for name in settings]
    view = _view_alone(params)
    if view is None:
        say("the label table has no view position: that control is left out")
    table = pd.DataFrame([*rows, *([view] if view else [])]).astype({"seed": "Int64"})
    write_whole(folder / "controls.csv", lambda temporary: table.to_csv(temporary, index=False))
    low, high, _ = _limits(folder / "shuffled", LEVEL)
    held = bool(low <= 0.5 <= high)
    remarks = [f"shuffled labels: the {LEVEL:.0%} interval {low:.4f} to {high:.4f} {'holds' if held else 'does NOT hold'} 0.5"]
    network = run or (folder / "network" if "network" in settings else None)
    if network and "plain" in settings:
        plain, ours = RunFolder(folder / "plain").test, RunFolder(network).test
        remarks.append(f"network less plain: {verdict(compare(plain, ours), 'the plain network', 'the network')}")
    return table, held, remarks


def _limits(folder: Path, level: float = 0.95) -> Interval:
    samples = RunFolder(folder).resamples
    return interval(mean_of_defined(samples.auc), level) if samples else Interval(float("nan"), float("nan"), 1.0)


def _trained(folder: Path, name: str) -> dict:
    metrics = RunFolder(folder).metrics
    split = metrics["split"]
    return {**_row({"shuffled": "shuffled labels (must be 0.5)", "plain": "plain network"}.get(name, name),
                   metrics["test"]["mean_auc"], _limits(folder), split["name"], split["hash"], split["test"]),
            "seed": metrics["params"]["seed"]}


def _row(control: str, auc: float, limits: Interval, split: str, split_hash: str, part: Mapping) -> dict:
    return {"control": control, "test AUC": auc, "test AUC low": limits.low, "test AUC high": limits.high,
            "split": f"{split} {split_hash[:8]}", "images": part["images"], "patients": part["patients"],
            "positive share": part["positive_share"]}


def _view_alone(params: dict) -> dict | None:
    data = open_dataset(params)
    views = data.index.frame["view"].fillna("").astype(str).to_numpy()
    train, test = data.rows("train"), data.rows("test")
    if len(np.unique(views[train])) < 2:
        return None
    scores = column_scores(views[train], data.labels[train], views[test])
    labels, patients = data.labels[test], data.index.frame["patient"].to_numpy(str)[test]
    return _row("view position alone", mean_auc(labels, scores, data.classes),
                interval(mean_of_defined(bootstrap(labels, scores, patients).auc)), data.split.name, data.split.hash,
                data.split.counts["test"])
