"""Menus of views and merges on finished runs: mean AUC and AP of the validation and test parts, and the paired difference on
the test part of the menu and merge that validation picks.

    python benchmarks/views.py OUT.csv RUN... [--gate 0.25 --gate 0.5]

The network of each run runs once over all views (``views.npz``). ``votes`` is what views do to a voting bank: ``once`` takes
the votes of the image as it is, ``each`` those of every view. Several runs of one split are also merged, as seeds.
"""

import time
from pathlib import Path

import click
import numpy as np
import pandas as pd

from charmlib.data.views import MENUS
from charmlib.evaluation.combine import MERGES, mean_ensemble
from charmlib.evaluation.compare import MEAN, compare
from charmlib.evaluation.ensemble import gate_note
from charmlib.evaluation.metrics import ap_by_class, auc_by_class
from charmlib.evaluation.runs import RunFolder, run_names
from charmlib.files import write_csv
from charmlib.nn import VotingBank
from charmlib.training.run import Run
from charmlib.training.views import stored_views, with_views


def figures(valid, test) -> dict[str, float]:
    out = {}
    for name, part in (("valid", valid), ("test", test)):
        p = part.of([part.classes[c] for c in part.findings])
        for figure, of in (("AUC", auc_by_class), ("AP", ap_by_class)):
            out[f"{name} {figure}"] = float(np.nanmean(list(of(p.labels, p.logits, p.classes).values())))
    return out


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("runs", nargs=-1, required=True)
@click.option("--gate", "gates", multiple=True, type=float)
def main(out, runs, gates):
    folders, rows = [RunFolder(run) for run in runs], []
    for folder, name in zip(folders, run_names(folders)):
        run = Run.load(folder)
        for menu in ("none", "flip"):  # network time
            start = time.monotonic()
            run.views("test", MENUS[menu])
            click.echo(f"{name}: {menu} takes {time.monotonic() - start:.1f} s on the test part")
        stored_views(folder, MENUS)
        best, votes = {}, ("once", "each") if isinstance(getattr(run.net, "bank", None), VotingBank) else ("once",)
        for menu in MENUS:
            for how in MERGES if menu != "none" else ("mean",):
                for v in votes if menu != "none" else ("once",):
                    seen = with_views(folder, menu, how, votes=v)
                    scores = figures(seen.valid, seen.test)
                    rows.append({"run": name, "menu": menu, "merge": how, "votes": v, **scores})
                    if scores["valid AP"] > best.get("valid AP", -1):
                        best = {**rows[-1], "seen": seen}
        table = compare(folder.test, best.pop("seen").test)
        click.echo(f"picked on validation AP: {best}\n{table[table['class'] == MEAN].to_string(index=False)}")
        for alpha in gates:
            click.echo(gate_note(folder, alpha))
    for n in range(2, len(folders) + 1):
        mean = {part: mean_ensemble([getattr(f, part) for f in folders[:n]]) for part in ("valid", "test")}
        rows.append({"run": f"first {n}", "menu": "none", "merge": "mean", "votes": "once", **figures(**mean)})
    write_csv(out, pd.DataFrame(rows))
    click.echo(pd.DataFrame(rows).to_string(index=False))


if __name__ == "__main__":
    main()
