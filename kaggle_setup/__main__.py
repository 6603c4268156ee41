"""``python -m kaggle_setup prepare|push|wheel|status|fetch``: exit 0 only when all that was asked is done."""

from pathlib import Path

import click

from charmlib.grid.budget import KAGGLE_WEEK, seconds_of
from charmlib.grid.cells import GridError
from charmlib.grid.spec import load_grid
from charmlib.session import entry_point
from kaggle_setup import client, rounds
from kaggle_setup.kernel import NO_GPU, T4
from kaggle_setup.prepare import SESSION_HOURS, prepare, write_data_kernel
from kaggle_setup.redaction import redact, say
from kaggle_setup.state import READY, load_state, locked
from kaggle_setup.wheel import WHEEL_TITLE, upload, write_dataset

_FOLDER = click.Path(path_type=Path, file_okay=False)
_PUSHED = click.Path(path_type=Path, file_okay=False, exists=True)
_DATASET = click.option("--dataset", default=WHEEL_TITLE, show_default=True, help="Title of your dataset that gets the wheel.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli():
    """Run a grid on Kaggle with the official client (pip install kaggle; kaggle auth login)."""


@cli.command("push")
@click.argument("grid_yaml", type=click.Path(path_type=Path))
@click.option("--user", default="", help="Your name on Kaggle, kaggle.com/NAME (the first time).")
@click.option("--shards", default=1, show_default=True, type=click.IntRange(min=1),
              help="Notebooks to share the cells; two run at once.")
@click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE", help="Sets a parameter; pins an axis.")
@click.option("--out", type=_FOLDER, help="The grid's folder [default: runs/<name>].")
@click.option("--budget", default="11h", show_default=True, help="Time of a session, 11h or 90m; Kaggle ends it after 12 h.")
@click.option("--data", multiple=True, metavar="OWNER/NAME", help="Datasets to attach [default: nih-chest-xrays/data].")
@click.option("--notebook-outputs", multiple=True, metavar="OWNER/NAME",
              help="Notebooks whose output to attach, such as that of prepare.ipynb with the cache.")
@_DATASET
@click.option("--accelerator", default=T4, show_default=True, help="Kaggle's name (this one is two T4), or none.")
@click.option("--internet/--no-internet", default=None, help="[default: only where ImageNet weights must be downloaded]")
@click.option("--wait", "waits", is_flag=True, help="Stay until all is done: push what waits, fetch, merge, go on in rounds.")
@click.option("--poll", default=60.0, show_default=True, type=click.FloatRange(min=0),
              help="Seconds between looks with --wait.")
@click.option("--dry-run", is_flag=True, help="Write notebooks, metadata and wheel; send nothing.")
def push_command(grid_yaml, out, waits, poll, dry_run, **settings):
    """Push the shards of GRID_YAML as notebooks, or go on: fetch what has ended, push what waits and what has cells left."""
    out = (out or Path("runs") / load_grid(grid_yaml).name).expanduser().resolve()
    with locked(out):
        state = prepare(grid_yaml, out=out, **settings)
        if settings["accelerator"] != NO_GPU:
            hours = settings["shards"] * seconds_of(settings["budget"]) / 3600
            say(f"{settings['shards']} sessions of at most {settings['budget']}: up to {hours:g} of the week's {KAGGLE_WEEK} "
                "GPU hours a round")
        if dry_run:
            write_dataset(state.folder / "wheel", state.settings["user"], settings["dataset"])
            say(f"{state.folder}: notebooks, metadata and wheel written; nothing was sent")
            return
        rounds.push(state)
        if waits:
            rounds.wait(state, poll)
        rounds.report(state)
    if waits and (left := state.left()):
        raise SystemExit(f"{len(left)} cells are not done: {', '.join(left)}. Look at their error.txt and log; the same "
                         "command tries them again.")
    if not waits and (ready := sum(kernel.state == READY for kernel in state.kernels)):
        raise SystemExit(f"{ready} shards wait for a free session: give the same command when one has ended, or --wait")


@cli.command("prepare")
@click.option("--user", required=True, help="Your name on Kaggle, kaggle.com/NAME.")
@click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE", help="Sets a parameter of prepare.ipynb.")
@click.option("--data", multiple=True, metavar="OWNER/NAME", help="Datasets to attach [default: nih-chest-xrays/data].")
@_DATASET
@click.option("--out", type=_FOLDER, default="dist/kaggle_prepare", show_default=True)
@click.option("--dry-run", is_flag=True, help="Write notebook, metadata and wheel; send nothing.")
def prepare_command(user, dataset, out, dry_run, **settings):
    """Push prepare.ipynb as a CPU session, which decodes every image once; push attaches its output."""
    name = write_data_kernel(out / "kernel", user, dataset=dataset, **settings)
    digest = write_dataset(out / "wheel", user, dataset)
    if dry_run:
        say(f"{out}: notebook, metadata and wheel written; nothing was sent")
        return
    upload(out / "wheel", digest)
    say(f"{client.push(out / 'kernel', SESSION_HOURS * 3600)}: when it has ended, push with --notebook-outputs {name}")


@cli.command("wheel")
@click.option("--user", required=True, help="Your name on Kaggle, kaggle.com/NAME.")
@_DATASET
@click.option("--out", type=_FOLDER, default="dist/kaggle_wheel", show_default=True)
@click.option("--dry-run", is_flag=True, help="Write the dataset's folder; send nothing.")
def wheel_command(user, dataset, out, dry_run):
    """Build the dataset that carries charmlib to Kaggle, and upload it (push does this by itself)."""
    digest = write_dataset(out, user, dataset)
    say(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if not dry_run:
        upload(out, digest)


@cli.command("status")
@click.argument("folder", type=_PUSHED)
def status_command(folder):
    """Say how the notebooks of a grid's FOLDER are on Kaggle; a push that waits in another process goes on undisturbed."""
    state = load_state(folder.resolve())
    rounds.refresh(state)
    rounds.report(state)


@cli.command("fetch")
@click.argument("folder", type=_PUSHED)
def fetch_command(folder):
    """Download what has ended into a grid's FOLDER and merge it."""
    with locked(folder):
        state = load_state(folder.resolve())
        rounds.refresh(state)
        rounds.fetch(state)
        rounds.report(state)
    if left := state.left():
        say(f"{len(left)} cells are not done; `kaggle_setup push` with the same settings goes on with them")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: a refusal is one clear line without secrets, and exit status 2."""
    entry_point(cli, GridError, args=arguments, prog_name="python -m kaggle_setup", clean=redact)


if __name__ == "__main__":
    main()
