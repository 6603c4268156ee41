"""``python -m charmlib``: phantoms, cache, runs, grids, scores, predictions. Exit 0 only when all that was asked is done."""

import os
import shlex
import sys
import time
from pathlib import Path

import click

from charmlib import __version__
from charmlib.arguments import Folder, one_run, reading
from charmlib.files import write_csv, write_whole
from charmlib.session import entry_point

_ASSIGN = click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE", help="Sets a parameter; pins a grid's axis.")
_DEVICE = click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
_FOLDER = click.Path(path_type=Path, file_okay=False)
_GATE = click.option("--gate", default=0.0, metavar="ALPHA", type=click.FloatRange(min=0),
                     help="Findings times (1 - p of the normal class)^ALPHA; lowers AP as a rule [default: off].")
_MERGE = click.option("--merge", "--tta-merge", default="mean", show_default=True,
                      type=click.Choice(["mean", "max", "gmean", "median", "logit_mean"]), help="How probabilities are merged.")
_PATH = click.Path(path_type=Path)
_POINT = click.option("--point", default="youden", show_default=True, metavar="POINT",
                      help="Operating point: youden, f1, or sensitivity_S such as sensitivity_0.95.")
_READING = click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE",
                        help="How the table is read: classes, normal_class, blank, uncertain, patients.")
_RERUN = click.option("--rerun-changed", is_flag=True, help="Replace finished runs that were made with other settings.")
_RUN = Folder(path_type=Path, exists=True, file_okay=False)
_WORKERS = click.option("--workers", type=click.IntRange(min=1), help="Trainings at once [default: one a GPU, or 1].")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli():
    """CHARM-Xray notebooks' helper. Research use only."""


@cli.command()
@click.argument("out", type=_FOLDER)
@click.option("--images", default=3000, show_default=True)
@click.option("--size", default=64, show_default=True, help="Pixels a side.")
@click.option("--seed", default=85, show_default=True)
def phantom(out, images, size, seed):
    """Write drawn radiographs in the NIH layout to OUT."""
    from charmlib.data.phantom import make_phantoms

    start = time.monotonic()
    make_phantoms(out, images=images, size=size, seed=seed)
    click.echo(f"{images} drawn phantoms of {size} pixels in {out} ({time.monotonic() - start:.1f} s)")


@cli.command()
@click.argument("data_root")
@click.option("--size", default=224, show_default=True, type=click.IntRange(16, 1024), help="Pixels a side.")
@click.option("--aspect", default="stretch", show_default=True, type=click.Choice(["stretch", "pad", "crop"]),
              help="What becomes of pictures that are not square.")
@click.option("--contrast", default="none", show_default=True, type=click.Choice(["none", "clahe"]))
@click.option("--csv", default="", help="A label table of your own.")
@click.option("--split", default="", help="Parts to show the data by: official, patient, a folder [default: official; "
              "patient with --csv].")
@click.option("--cache-dir", default="", help="Where the cache goes [default: a scratch folder of this machine].")
@click.option("--workers", default=os.cpu_count() or 2, show_default="all cores", type=click.IntRange(1),
              help="Processes that decode.")
@click.option("--verify", is_flag=True, help="Check every source file against the cache, and decode again what changed.")
@_READING
def cache(data_root, size, aspect, contrast, csv, split, cache_dir, workers, verify, assignments):
    """Decode all images of DATA_ROOT once, and show what the data holds; goes on where a killed build was.

    Writes data.html into the cache: findings by part, patients, views, co-occurrence, sample images.
    """
    from charmlib.data import cache, dataset, index, splits
    from charmlib.viz import dataset_page as page

    found = index.read_index(dataset.find_data(data_root), **{"classes": "own" if csv else "nih14", "csv": csv,
                                                              **reading(assignments)})
    start, split = time.monotonic(), split or ("patient" if csv else "official")

    def train():  # the images that a run of this split finds the scale of deep pictures on
        try:
            return splits.training_rows(found, split)
        except splits.SplitError:
            return range(len(found.frame))

    images = cache.open_images(found.frame["id"].tolist(), found.frame["path"].tolist(), size, aspect=aspect, contrast=contrast,
                               train=train, cache_dir=cache_dir, workers=workers, verify=verify)
    click.echo(f"{len(images):,} images at {size} pixels, {images.pixels.nbytes / 1e9:.2f} GB, in {images.folder} "
               f"({time.monotonic() - start:.1f} s)")
    sizes = cache.content_of(images.folder)["sizes"]
    if sizes:
        click.echo("source pictures: " + ", ".join(f"{n:,} of {w} x {h}" for (w, h), n in list(sizes.items())[:5])
                   + (f" and {len(sizes) - 5} other sizes" if len(sizes) > 5 else ""))
    try:
        data = dataset.assemble(found, images, split=split)
    except splits.SplitError as error:
        click.echo(f"report: {found.report}\nno parts to show the data by: {error}")
        return
    click.echo(f"{data}\n\n{page.part_table(data).to_string(index=False)}\n\n{page.finding_table(data).to_string(index=False)}")
    if os.access(images.folder, os.W_OK):
        click.echo(f"\n{page.write_dataset_page(images.folder / 'data.html', data)}")


@cli.command()
@click.argument("params_yaml", type=_PATH)
@_ASSIGN
@click.option("--out", type=_FOLDER, help="The run's folder [default: runs/<stem>].")
@_RERUN
def run(params_yaml, assignments, **how):
    """Train and test one cell from PARAMS_YAML."""
    from charmlib.evaluation import runs, tables
    from charmlib.grid.runner import run_single

    folder = run_single(params_yaml, assignments, say=click.echo, **how)
    metrics, name = runs.RunFolder(folder).metrics, shlex.quote(os.path.relpath(folder))
    click.echo(f"done: mean test AUC {runs.number(metrics['test']['mean_auc']):.4f}, {tables.split_note(metrics)}\nreport: "
               f"{folder}/report.html\nnext: python -m charmlib explore {name}, predict {name} IMAGE..., compare OTHER {name}")


@cli.command()
@click.argument("params_yaml", type=_PATH)
@_ASSIGN
@click.option("--out", type=_FOLDER, help="The run's folder [default: runs/<stem>].")
def train(params_yaml, assignments, out):
    """Train PARAMS_YAML as train.ipynb does; under torchrun in several processes, one a GPU. Then `run` tests it."""
    from charmlib.param_sources import load_params, parse_assignments
    from charmlib.training import cards, run

    folder = out or Path("runs", params_yaml.stem)
    with cards.as_one():
        run.Run.open({**load_params(params_yaml), **parse_assignments(assignments)}, run_dir=str(folder)).train()
        click.echo(f"trained in {folder}; next: python -m charmlib run, with the same parameters and --out, tests it")


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN, metavar="RUN...")
@_POINT
@click.option("--ensemble", is_flag=True, help="Score the mean of all runs' probabilities as well.")
@click.option("--out", type=_FOLDER,
              help="Where report.html and per_class.csv go [default: each run's folder; none with --ensemble, --tta, --gate].")
@click.option("--tta", default="", help="With views: flip, light, medium, heavy, flip_scale. The network runs once a view.")
@_MERGE
@_GATE
@click.option("--data-root", default="", help="With --tta, where the images are [default: as each run's parameters say].")
@_DEVICE
def evaluate(runs, point, ensemble, out, tta, merge, gate, **where):
    """Score finished runs anew from their prediction files, with intervals; a grid's folder stands for its cells."""
    from charmlib.data.views import MENUS
    from charmlib.evaluation import ensemble as ensembles
    from charmlib.evaluation import leaks, score, tables
    from charmlib.evaluation.runs import run_folders, run_names
    from charmlib.viz.run_report import evaluation_text, write_evaluation

    folders = run_folders(runs)
    leaks.refuse_leaks(folders)
    if ensemble and len(folders) < 2:
        raise click.UsageError(f"an ensemble needs at least two runs, found {folders[0]} only")
    if tta not in ("", *MENUS):
        raise click.UsageError(f"--tta must be one of {', '.join(MENUS)}, got {tta!r}")
    if not (out or tta or gate) and (locked := [f for f in folders if not os.access(f, os.W_OK)]):
        raise click.UsageError(f"{locked[0]} is read-only: name a folder for the reports with --out")
    scored = []

    def show(metrics, test, target, run=None):
        scored.append(metrics)
        click.echo(evaluation_text(metrics, test, point))
        if target:
            click.echo(f"{write_evaluation(target, metrics, test, point, run)}\n")

    names = run_names(folders)
    if tta:
        from charmlib.training.views import with_views

        folders = [with_views(folder, tta, merge, **where) for folder in folders]
        names = [f"{name}, views {tta}, {merge}" for name in names]
    if gate:
        for name, folder in zip(names, folders):
            click.echo(f"{name}: {ensembles.gate_note(folder, gate)}")
        folders, names = [ensembles.gated(folder, gate) for folder in folders], [f"{name}, gate {gate:g}" for name in names]
    for folder, name in zip(folders, names):
        metrics, test = score.evaluate_run(folder, points=[point])
        show({**metrics, "cell": name}, test, out if out and len(folders) == 1 else out / name if out else
             None if tta or gate else folder.path, folder)
    if ensemble:
        show(*score.evaluate_ensemble(folders, points=[point]), out and out / f"mean_of_{len(folders)}_runs")
    if len(scored) > 1:
        click.echo(tables.with_intervals(tables.run_table(scored), 4).to_string(index=False))


@cli.command()
@click.argument("run", type=_RUN)
@click.option("--data-root", required=True, help="The folder of the other data set.")
@click.option("--csv", default="", help="Its label table [default: the NIH's].")
@click.option("--split", default="", help="A split of it: official, patient, fold:I/N, a folder [default: all its images].")
@click.option("--part", default="test", show_default=True, type=click.Choice(["train", "valid", "test"]), help="With --split.")
@_READING
@_POINT
@click.option("--name", default="", help="Of the files [default: data folder and table].")
@click.option("--out", type=_FOLDER, help="The folder of the files [default: scores in the run's].")
@click.option("--cache-dir", default="", help="Folder of decoded images [default: a scratch folder of this machine].")
@_DEVICE
def score(run, assignments, **how):
    """Score RUN on another data set (external validation), by the classes that both have."""
    from charmlib.evaluation.tables import split_note
    from charmlib.training.external import external_note, score_elsewhere
    from charmlib.viz.curves import plot_roc
    from charmlib.viz.run_report import evaluation_text

    run = one_run(run)
    if not (how["out"] or os.access(run, os.W_OK)):
        raise click.UsageError(f"{run} is read-only: name a folder for the scores with --out")
    metrics, test = score_elsewhere(run, reading=reading(assignments), **how)
    figure, picture = plot_roc(test, title=metrics["cell"], note=split_note(metrics)), f"{metrics['file'][:-5]}_roc.png"
    write_whole(picture, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    click.echo(f"{external_note(metrics)}\n\n{evaluation_text(metrics, test, how['point'])}\n\n{metrics['file']}\n{picture}")


@cli.command()
@click.argument("first", type=_RUN)
@click.argument("second", type=_RUN)
@_POINT
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Also write the table to this CSV.")
def compare(first, second, point, out):
    """The paired difference SECOND minus FIRST of two runs on the same images, with its interval."""
    from charmlib.evaluation import compare, leaks, score, tables
    from charmlib.evaluation.runs import RunFolder

    first, second = map(one_run, (first, second))
    if first.resolve() == second.resolve():
        raise click.UsageError(f"{first} is named twice; compare two runs")
    runs = [RunFolder(first), RunFolder(second)]
    leaks.refuse_leaks(runs)
    thresholds = [score.thresholds_at(run, point) for run in runs]
    table = compare.compare(runs[0].test, runs[1].test, thresholds=thresholds if all(thresholds) else None)
    click.echo(f"{tables.split_note(runs[0].metrics)}\nfirst: {first}, second: {second}; " + (
        f"each at its own operating point '{point}', chosen on validation\n" if all(thresholds) else
        "no operating points: trained without a validation part was "
        f"{' and '.join(str(run) for run, t in zip(runs, thresholds) if not t)}\n"))
    shown = table.rename(columns={"low": "difference low", "high": "difference high"})
    click.echo(f"{tables.with_intervals(shown, 4).to_string(index=False)}\n\n{compare.verdict(table, str(first), str(second))}"
               f"{tables.means_note(runs[0].metrics)}")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_csv(out, tables.with_origin(table, runs[0].metrics).assign(first_run=str(first), second_run=str(second)))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=_RUN, metavar="RUN...")
@click.option("--data-root", default="", help="Where the images are [default: as each run's parameters say].")
@_DEVICE
def baselines(runs, **where):
    """What each RUN is worth beside baselines without training: regressions on maps, view position, a second seed."""
    from charmlib.evaluation.runs import RunFolder
    from charmlib.training.baselines import baselines_text, run_baselines

    runs = [RunFolder(one_run(run)) for run in runs]
    for run in [run for run in runs if run.metrics]:  # an unfinished one is refused before the first is read
        click.echo(baselines_text(run, run_baselines(run, **where)))


@cli.command()
@click.argument("params_or_run", type=_PATH)
@_ASSIGN
@click.option("--out", type=_FOLDER, help="The controls' folder [default: runs/<name>_controls].")
@_WORKERS
def controls(params_or_run, assignments, **how):
    """Controls of a parameter file or a finished run: shuffled labels (must score 0.5), view position alone, plain network."""
    from charmlib.evaluation.tables import with_intervals
    from charmlib.grid.controls import run_controls

    table, held, remarks = run_controls(params_or_run, assignments, say=click.echo, **how)
    click.echo("\n".join([with_intervals(table, 4).to_string(index=False), *remarks]))
    if not held:
        raise SystemExit("the 99 % interval of the shuffled control does not contain 0.5: labels reach the network by another "
                         "way than the images, or this is the one honest run in a hundred (try another seed)")


@cli.command()
@click.argument("out", type=_FOLDER)
@click.argument("runs", nargs=-1, required=True, type=_RUN, metavar="RUN...")
@click.option("--weights", help="One number a run, separated by commas [default: equal]; never chosen on the test part.")
@_MERGE
def ensemble(out, runs, weights, merge):
    """Merge finished RUNs into the folder OUT, which other commands take like a run."""
    from charmlib.evaluation import ensemble, tables
    from charmlib.evaluation.runs import run_folders

    try:
        numbers = [float(w) for w in weights.split(",")] if weights else None
    except ValueError as error:
        raise click.UsageError(f"--weights {weights}: give numbers separated by commas, such as 1,2") from error
    made = ensemble.write_ensemble(out, run_folders(runs), weights=numbers, how=merge)
    click.echo(tables.with_intervals(tables.run_table([made.metrics]), 4).to_string(index=False))


@cli.command()
@click.argument("run", type=_RUN)
@click.argument("paths", nargs=-1, required=True, type=_PATH, metavar="PATH...")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("predictions.csv"), show_default=True)
@_POINT
@click.option("--calibrated", is_flag=True, help="Probabilities at the validation part's temperature; calls stay the same.")
@_GATE
@click.option("--csv", type=_PATH, help="A test table: with --submission, its images in its order.")
@click.option("--submission", type=click.Path(path_type=Path, dir_okay=False), help="Write ids and probabilities there.")
@_DEVICE
def predict(run, paths, out, csv, submission, **how):
    """Probabilities and calls of RUN for new images or folders (PNG, JPEG, TIFF, WebP, BMP, DICOM). Research use only."""
    from charmlib.training import predict

    run, refused = one_run(run), []
    if bool(csv) != bool(submission):
        raise click.UsageError("--csv and --submission go together: the table whose ids are scored, and the file to write")
    click.echo(predict.origin(run))
    if how["gate"]:
        from charmlib.evaluation.ensemble import gate_note
        from charmlib.evaluation.runs import RunFolder

        click.echo(gate_note(RunFolder(run), how["gate"]))
    if csv:
        table = predict.submission(run, paths, csv, **how)
        submission.parent.mkdir(parents=True, exist_ok=True)
        write_csv(submission, table)
        click.echo(f"{submission}: {len(table)} images, {table.shape[1] - 1} classes")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    table = predict.predict(run, paths, refused=refused.append, **how)
    write_csv(out, table)
    calls = any(column.startswith("call_") for column in table)
    click.echo(f"{out}: {len(table) - len(refused)} images, " + (f"operating point '{how['point']}'" if calls else
               "probabilities only: the run was trained without a validation part, so it has no operating point"))
    if refused:
        click.echo("\n".join([*(f"refused: {line}" for line in refused),
                              f"{len(refused)} of {len(table)} files have no probabilities"]), err=True)
        sys.exit(2)


@cli.command()
@click.argument("run", type=_RUN)
@click.argument("paths", nargs=-1, required=True, type=_PATH, metavar="PATH...")
@click.option("--finding", default="", help="The class whose evidence is shown [default: the most probable finding].")
@click.option("--map", "kind", default="evidence", show_default=True, type=click.Choice(["evidence", "attention", "crop"]),
              help="Grad-CAM of the finding, weights of CHARM's attention, or the heat that a second path's crop is cut by.")
@click.option("--stride", default=32, show_default=True, type=click.Choice([4, 8, 16, 32]), help="Pixels a cell of the map.")
@click.option("--out", type=_FOLDER, default=Path("explained"), show_default=True)
@_DEVICE
def explain(run, paths, out, **how):
    """Where RUN sees a finding in radiographs: a heat map, the crop of a second path, what the memory answers with, and the
    terms of the logit, as PNG and JSON a picture."""
    from charmlib.data.dataset import ImageReader
    from charmlib.data.radiograph import NotARadiograph, find_radiographs
    from charmlib.evaluation.runs import RunFolder
    from charmlib.files import readable, write_json
    from charmlib.training import heat, predict
    from charmlib.viz.cards import slot_lines
    from charmlib.viz.heat import plot_heat

    run, refused, reader = one_run(run), [], ImageReader(size=128)
    card = RunFolder(run).card
    click.echo(origin := predict.origin(run))
    out.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(find_radiographs(paths)):
        try:
            found = heat.explain_picture(run, path, **how)
        except NotARadiograph as error:
            refused.append(readable(error))
            continue
        name, p = f"{number:03}_{readable(path.stem)}", found["probabilities"][found["finding"]]
        terms = ", ".join(f"{term} {value:+.2f}" for term, value in found["parts"].items())
        words = f"{readable(path.name)}: {found['finding']} {p:.1%}, logit {found['logit']:+.2f}" + (
            f" = {terms}{'; the map is of the head alone' * (found['map'] == 'evidence')}" if terms else "")
        slots = [(reader.find(card, s["image"]), "\n".join(slot_lines(s)).replace(", ", ",\n")) for s in found["memory"]]
        figure = plot_heat(found.pop("pixels"), found["heat"], found["finding"], kind=found["map"], margin=found["margin"],
                           box=found.get("box", ()), crop=found.pop("crop", None), slots=slots,
                           note=f"{words}. {origin}")
        write_whole(out / f"{name}.png", lambda temporary, figure=figure: figure.savefig(temporary, format="png", dpi=130))
        write_json(out / f"{name}.json", found)
        click.echo(f"{out / name}.png: {words}")
    if refused:
        click.echo("\n".join(f"refused: {line}" for line in refused), err=True)
        sys.exit(2)


@cli.command()
@click.argument("run", type=_RUN)
@click.option("--out", type=_FOLDER, help="The folder of the files [default: the run's].")
@click.option("--data-root", default="", help="Where the images are [default: as the run's parameters say].")
def export(run, out, **where):
    """Write RUN as ONNX with its preprocessing, checked on 32 of its test images. Research use only."""
    from charmlib.training.export import export_onnx

    path, far = export_onnx(one_run(run), out or "", **where)
    click.echo(f"{path} and {path.name}.json: logits within {far:.1g} of torch's on test images")


@cli.command()
@click.argument("runs", nargs=-1, type=_RUN, metavar="[RUN]...")
@click.option("--data-root", default="", help="Where the images are [default: as each run's parameters say].")
@click.option("--port", default=8866, show_default=True, type=click.IntRange(1, 65535))
@click.option("--browser/--no-browser", default=True, help="Open the page in a browser.")
def explore(runs, **how):
    """Look at finished runs on a web page of this machine: walk along ROC curves, see images, compare runs."""
    from charmlib.viz import serve

    sys.exit(serve.explore(runs or ["runs"], **how))


@cli.group()
def grid():
    """Run, merge and inspect grids."""


@grid.command("run")
@click.argument("grid_yaml", type=_PATH)
@_ASSIGN
@click.option("--out", type=_FOLDER, help="The grid's folder [default: runs/<name>].")
@_WORKERS
@click.option("--scheduler", metavar="ADDRESS", help="Use this Dask cluster.")
@click.option("--scheduler-file", metavar="FILE", help="Use the Dask cluster of this scheduler file.")
@click.option("--any-worker", is_flag=True, help="Also use workers without a GPU resource, a cell each.")
@click.option("--wait-workers", default="60s", show_default=True, metavar="TIME",
              help="Time after which a cluster without workers is refused.")
@click.option("--shard", metavar="I/N", help="Only every N-th training from the I-th on, with its cells.")
@click.option("--budget", metavar="TIME", help="Time for this call, such as 11h; the same command goes on with the cells left.")
@click.option("--hung-after", default="30m", show_default=True, metavar="TIME",
              help="Time without any sign of life after which a cell is ended and tried once more.")
@click.option("--continue-from", metavar="DIR", type=_RUN,
              help="Copy an earlier session's cells from there first [default: attached outputs on Kaggle].")
@click.option("--dry-run", is_flag=True, help="List the cells and the hours they take, and run nothing.")
@_RERUN
@click.option("--notebooks", type=_PATH, help="Folder of train.ipynb and test.ipynb.")
def grid_run(grid_yaml, assignments, **how):
    """Run or continue the cells of GRID_YAML."""
    from charmlib.grid.report import board_text
    from charmlib.grid.runner import Terminated, run_grid

    try:
        board = run_grid(grid_yaml, assignments, say=click.echo, **how)
    except KeyboardInterrupt as stop:
        click.echo("stopped: only unfinished epochs are lost; the same command goes on", err=True)
        sys.exit(143 if isinstance(stop, Terminated) else 130)
    if how["dry_run"]:
        return
    click.echo(board_text(board))
    for status, words in (("failed", "failed"), ("damaged", "are damaged")):
        if len(cells := board["cell"][board["status"] == status]):
            raise SystemExit(f"{len(cells)} of {len(board)} cells {words}: {', '.join(cells)}")
    left = board[board["status"].isin(["started", "pending"])]
    if len(left) and not how["shard"] and not how["budget"]:
        raise SystemExit(f"{len(left)} of {len(board)} cells are not done: {', '.join(left['cell'])}")


@grid.command("merge")
@click.argument("out", type=_FOLDER)
@click.argument("folders", nargs=-1, required=True, type=_RUN, metavar="DIR...")
def grid_merge(out, folders):
    """Merge the cells of shards, or of several sessions, into OUT, with leaderboard and report."""
    from charmlib.grid.bring import merge_grids
    from charmlib.grid.report import board_text

    click.echo(board_text(merge_grids(out, folders, say=click.echo)))


@grid.command("status")
@click.argument("folder", type=_RUN)
def grid_status(folder):
    """List the cells as done, failed, started or pending, with the processes that work on them."""
    from charmlib.grid.board import leaderboard
    from charmlib.grid.lease import holder
    from charmlib.grid.report import board_text

    board = leaderboard(folder, write=False)
    click.echo(board_text(board))
    for cell in board["cell"]:
        if words := holder(folder / cell):
            click.echo(f"{cell} is being worked on by {words}")
    click.echo(", ".join(f"{n} {s}" for s, n in board["status"].value_counts().items()))


@grid.command("report")
@click.argument("folder", type=_RUN)
@click.option("--out", type=_FOLDER, help="Write there instead (a read-only grid).")
def grid_report(folder, out):
    """Write leaderboard.csv, the pictures and report.html from the cells' files, unless nothing has changed since."""
    from charmlib.grid.board import leaderboard
    from charmlib.grid.report import write_report

    if out is None and not os.access(folder, os.W_OK):
        raise click.UsageError(f"{folder} is read-only: name a folder for the report with --out")
    board = leaderboard(folder, write=out is None)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_csv(out / "leaderboard.csv", board)
    if not (page := write_report(folder, board, out=out)):
        raise SystemExit("no cell is done yet; nothing to report")
    click.echo(page)


@cli.command()
@click.option("--write", "notebooks", multiple=True, metavar="NOTEBOOK",
              type=click.Path(path_type=Path, exists=True, dir_okay=False),
              help="Bring the parameters cell of this notebook up to date instead.")
def params(notebooks):
    """List all parameters with their defaults and reasons."""
    import nbformat

    from charmlib.param_sources import cell_source
    from charmlib.params import PARAMS, need_text

    for p in () if notebooks else PARAMS.values():
        needs = [*([f"system: {' or '.join(p.of)}"] if p.of else []), *(need_text(*need) for need in p.needs.items())]
        allowed = f" [{', '.join(map(str, p.choices))}{f', {p.also}' if p.also else ''}]" if p.choices else ""
        click.echo(f"{p.name}: {p.type.__name__} = {p.default!r}  # {p.reason}{allowed}"
                   + (f"; needs {', '.join(needs)}" if needs else ""))
    for path in notebooks:
        book = nbformat.read(path, as_version=4)
        if not (cell := next((c for c in book.cells if "parameters" in c.metadata.get("tags", [])), None)):
            raise click.UsageError(f"{path} has no cell tagged parameters")
        names = [line.split(":")[0] for line in cell.source.splitlines() if line.split(":")[0] in PARAMS]
        cell.source = cell_source(None if path.stem == "train" else names)
        nbformat.write(book, path)
        click.echo(f"{path}: {len(cell.source.splitlines())} lines")


def main():
    """Entry point of ``charmlib``."""
    try:
        from charmlib.grid.cells import GridError
    except ValueError as error:  # of the modules that CHARM_SYSTEMS names
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    entry_point(cli, GridError)
