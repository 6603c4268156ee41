"""Three controls of a parameter file in one call: shuffled labels, the view position alone, the plain network."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.data.dataset import open_dataset
from charmlib.evaluation.compare import compare, verdict
from charmlib.evaluation.groups import column_scores
from charmlib.evaluation.intervals import bootstrap, interval, mean_of_defined
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.tables import run_table, split_label
from charmlib.files import write_csv
from charmlib.grid.board import PLAIN
from charmlib.grid.cells import GridError
from charmlib.grid.runner import run_grid
from charmlib.grid.spec import Cell, Grid, read_cell
from charmlib.param_sources import find_file
from charmlib.params import ParameterError, changes

# cell -> its changes to the parameter file
CONTROLS = {"network": {}, "plain": {name: PLAIN[name] for name in ("use_momentum", "use_attention", "use_bank")},
            "shuffled": {"labels": "shuffled"}}
_NAMES = {"shuffled": "shuffled labels (must be 0.5)", "plain": "plain network"}
LEVEL = 0.99  # of the interval of the shuffled control that must contain 0.5: one in a hundred honest ones does not


def run_controls(path: str | Path, assignments: Iterable[str] = (), *, out: str | Path | None = None,
                 workers: int | None = None, say: Callable[[str], None] = print) -> tuple[pd.DataFrame, bool, list[str]]:
    """Train what is missing and score it; returns the table (also in ``controls.csv``), whether the shuffled control held,
    and remarks: its interval, and the difference between the network and the plain one.

    ``path`` is a parameter file, or the folder of a finished run, which then is the network and is not trained again.

    - ``network``: the parameter file as it is; ``plain``: without CHARM's three parts;
    - ``shuffled``: the same network on label rows shuffled within each part: must score 0.5 within its interval;
    - ``view position alone``: each view (PA, AP) scores the share of positives it has in the training part.

    Raises ParameterError for wrong parameters, GridError for a finished control of other settings and for one that failed.
    """
    run = RunFolder(Path(path).resolve()) if Path(path).is_dir() else None
    path = run.params_file if run else find_file(path)
    finished = run.metrics["params"] if run else None
    params = read_cell(path, assignments).params
    if params["labels"] != "real":
        raise ParameterError("controls make the shuffled run themselves; leave labels at 'real'")
    if params["limit"]:
        raise ParameterError("controls are scored on the whole test part; leave limit at 0")
    if finished and (changed := changes(finished, params)):
        raise ParameterError(f"controls of the finished run {run.path} keep its settings; -p changes {', '.join(changed)}. "
                             "Name its parameter file instead.")
    is_plain = CONTROLS["plain"].items() <= params.items()
    there = {"network": run or is_plain, "plain": run and is_plain, "shuffled": False}
    cells = tuple(Cell(name, params | own, {}) for name, own in CONTROLS.items() if not there[name])
    folder = Path(out or Path("runs") / f"{run.name if run else path.stem}_controls")
    run_grid(Grid(folder.name, path, cells), out=folder, workers=workers, say=say)
    runs = {cell.id: RunFolder(folder / cell.id) for cell in cells}
    failed = [each for each in runs.values() if not each.done]
    if failed:
        raise GridError(f"no table yet: {', '.join(each.name for each in failed)} failed; see {failed[0].error_file}")
    trained = ([run] if run else []) + list(runs.values())
    table = run_table([each.metrics for each in trained]).rename(columns={"run": "control"})
    table["control"] = ([run.name] if run else []) + [_NAMES.get(name, name) for name in runs]
    view = _view_alone(params)
    if not view:
        say("the label table has no view position: that control is left out")
    table = pd.concat([table.drop(columns=["valid AUC", "test AP"]), pd.DataFrame(view)], ignore_index=True)
    table["seed"] = table["seed"].astype("Int64")
    write_csv(folder / "controls.csv", table)
    samples, findings = runs["shuffled"].resamples, runs["shuffled"].test.findings
    low, high, _ = interval(mean_of_defined(samples.auc[:, findings]) if samples else np.empty(0), LEVEL)
    held = bool(low <= 0.5 <= high)
    remarks = [f"shuffled labels: the {LEVEL:.0%} interval {low:.4f} to {high:.4f} "
               f"{'contains' if held else 'does NOT contain'} 0.5"]
    network = run or runs.get("network")
    if network and "plain" in runs:
        difference = verdict(compare(runs["plain"].test, network.test), "the plain network", "the network")
        remarks.append(f"network minus plain: {difference} One seed each: the spread between trainings is not in it.")
    return table, held, remarks


def _view_alone(params: dict) -> list[dict]:
    data = open_dataset(params)
    views = data.index.frame["view"].fillna("").astype(str).to_numpy()
    train, test = data.rows("train"), data.rows("test")
    if len(np.unique(views[train])) < 2:
        return []
    scores = column_scores(views[train], data.labels[train], views[test])
    labels, patients = data.labels[test], data.index.frame["patient"].to_numpy(str)[test]
    columns = [data.classes.index(name) for name in data.index.findings]
    labels, scores = labels[:, columns], scores[:, columns]
    low, high, _ = interval(mean_of_defined(bootstrap(labels, scores, patients).auc))
    part = data.split.counts["test"]
    return [{"control": "view position alone", "test AUC": mean_auc(labels, scores, data.index.findings), "test AUC low": low,
             "test AUC high": high, "split": split_label(data.split.record()), "images": part["images"],
             "patients": part["patients"], "positive share": part["positive_share"]}]
