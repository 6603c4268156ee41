"""``python -m charmlib kaggle push|status|fetch``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from charmlib.kaggle.errors import KaggleError


class _Group(click.Group):
    """A group whose errors are one clear line and exit status 2."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KaggleError as error:
            refused = click.ClickException(str(error))
            refused.exit_code = 2
            raise refused from error


@click.group(cls=_Group)
def kaggle():
    """Run a grid on Kaggle with the official client (pip install kaggle; kaggle auth login)."""


@kaggle.command("push")
@click.argument("grid_yaml", type=click.Path(path_type=Path))
@click.option("--user", default="", help="Your name on Kaggle, kaggle.com/NAME (the first time).")
@click.option("--shards", default=1, show_default=True, type=click.IntRange(min=1),
              help="Notebooks to share the cells; two run at once.")
@click.option("-p", "assignments", multiple=True, metavar="NAME=VALUE", help="Sets a parameter; pins an axis.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The grid's folder [default: runs/<name>].")
@click.option("--budget", default="11h", show_default=True, help="Time of a session, 11h or 90m; Kaggle ends it after 12 h.")
@click.option("--data", multiple=True, metavar="OWNER/NAME", help="Datasets to attach [default: nih-chest-xrays/data].")
@click.option("--notebook-outputs", multiple=True, metavar="OWNER/NAME",
              help="Notebooks whose output to attach, such as that of prepare.ipynb with the cache.")
@click.option("--dataset", default="charmlib wheel", show_default=True, help="Title of your dataset that gets the wheel.")
@click.option("--accelerator", default="NvidiaTeslaT4", show_default=True, help="Kaggle's name (this one is two T4), or none.")
@click.option("--internet/--no-internet", default=None, help="[default: only where ImageNet weights must be downloaded]")
@click.option("--wait", "waits", is_flag=True, help="Stay until all is done: push what waits, fetch, merge, go on in rounds.")
@click.option("--poll", default=60.0, show_default=True, type=click.FloatRange(min=0),
              help="Seconds between looks with --wait.")
@click.option("--dry-run", is_flag=True, help="Write notebooks, metadata and wheel; send nothing.")
def push_command(grid_yaml, waits, poll, dry_run, **settings):
    """Push the shards of GRID_YAML as notebooks, or go on: fetch what has ended, push what waits and what has cells left."""
    from charmlib.kaggle.client import Client
    from charmlib.kaggle.prepare import gpu_hours, grid_folder, prepare
    from charmlib.kaggle.push import push, report, wait
    from charmlib.kaggle.state import locked
    from charmlib.kaggle.wheel import write_dataset

    client = None if dry_run else Client()
    with locked(grid_folder(grid_yaml, settings["out"])):
        state = prepare(grid_yaml, **settings)
        if state.settings.accelerator != "none":
            click.echo(gpu_hours(state.settings))
        if dry_run:
            write_dataset(state.folder / "wheel", state.settings.user, state.settings.dataset)
            click.echo(f"{state.folder}: notebooks, metadata and wheel written; nothing was sent")
            return
        push(state, client, _say)
        if waits:
            wait(state, client, _say, poll)
        click.echo(report(state))
    _exit_unless_done(state, waits)


def _exit_unless_done(state, waited: bool) -> None:
    from charmlib.kaggle.push import cells_left
    from charmlib.kaggle.state import READY

    left, ready = cells_left(state), sum(kernel.state == READY for kernel in state.kernels)
    if waited and left:
        raise SystemExit(f"{len(left)} cells are not done: {', '.join(left)}. Look at their error.txt and log; the same "
                         "command tries them again.")
    if ready and not waited:
        raise SystemExit(f"{ready} shards wait for a free session: give the same command when one has ended, or --wait")


@kaggle.command("wheel")
@click.option("--user", required=True, help="Your name on Kaggle, kaggle.com/NAME.")
@click.option("--dataset", default="charmlib wheel", show_default=True, help="Title of your dataset that gets the wheel.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("dist/kaggle_wheel"), show_default=True)
@click.option("--dry-run", is_flag=True, help="Write the dataset's folder; send nothing.")
def wheel_command(user, dataset, out, dry_run):
    """Build the dataset that carries charmlib to Kaggle, and upload it (push does this by itself)."""
    from charmlib.kaggle.client import Client
    from charmlib.kaggle.upload import upload
    from charmlib.kaggle.wheel import write_dataset

    client = None if dry_run else Client()
    digest = write_dataset(out, user, dataset)
    click.echo(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    if not dry_run:
        upload(out, f"charmlib wheel {digest}", client, _say)


@kaggle.command("status")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def status_command(folder):
    """Say how the notebooks of a grid's FOLDER are on Kaggle."""
    from charmlib.kaggle.client import Client
    from charmlib.kaggle.push import refresh, report

    state = _state_of(folder)
    state.only_looked_at = True  # a push that waits in another process goes on undisturbed
    refresh(state, Client(), _say)
    click.echo(report(state))


@kaggle.command("fetch")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def fetch_command(folder):
    """Download what has ended into a grid's FOLDER and merge it."""
    from charmlib.kaggle.client import Client
    from charmlib.kaggle.push import cells_left, fetch, refresh, report
    from charmlib.kaggle.state import locked

    client = Client()
    with locked(folder.resolve()):
        state = _state_of(folder)
        refresh(state, client, _say)
        fetch(state, client, _say)
        click.echo(report(state))
    left = cells_left(state)
    if left:
        click.echo(f"{len(left)} cells are not done; `kaggle push` with the same settings goes on with them")


def _state_of(folder: Path):
    from charmlib.kaggle.state import load_state

    state = load_state(folder.resolve())
    if state is None:
        raise KaggleError(f"nothing was pushed from {folder}: there is no {folder / 'kaggle' / 'state.json'}")
    return state


def _say(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()
