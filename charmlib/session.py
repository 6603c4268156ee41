"""How this process is run: by a person or a program, until when, watched by whom, and started by which process.

A grid's runner tells the processes of a cell through the environment variables below.
"""

import ctypes
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

import charmlib
from charmlib.files import readable

CELL = "CHARM_CELL"  # id of the grid cell that this process works on
BATCH = "CHARM_BATCH"  # set where a program runs the notebook
PARENT = "CHARM_PARENT"  # number of the process that started this one
ALIVE = "CHARM_ALIVE"  # file to touch as work goes on
DEADLINE = "CHARM_DEADLINE"  # Unix time at which the cell must have ended
TAPE = "CHARM_TAPE"  # arguments of charmlib.training.tape.Tape as JSON, for cells that share a training
SCORING = "CHARM_SCORING_SECONDS"  # expected seconds of scoring, where they are known

_last = 0.0


class OutOfTime(RuntimeError):
    """The time budget is spent; what was finished is saved, and the same command goes on from there."""


def entry_point(command: Callable, refusal: type[Exception], *, clean: Callable[[str], str] = str, **how) -> None:
    """Run a click command with options ``how``: a refused input is one clear line, made ``clean``, and exit status 2."""
    import click  # a cell's kernel, which imports this module, does without

    if os.path.expanduser("~") == "~":  # a user id that the machine does not know (containers); Jupyter needs a home
        os.environ["HOME"] = str(own_temporary_folder())
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*undefined for")  # the tables name these classes
    try:
        command(standalone_mode=False, **how)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        anew = {"predict", "evaluate", "compare", "score", "baselines"} & {*sys.argv[1:2]}
        kept = "starts anew: nothing is kept" if anew else "goes on where it was"
        click.echo(f"stopped; the same command {kept}", err=True)
        sys.exit(130)
    except (refusal, ValueError, OSError, ImportError, MemoryError) as error:
        click.echo(clean(f"error: {readable(error) or type(error).__name__}"), err=True)
        sys.exit(2)


def in_grid() -> bool:
    """Whether this process works on a cell of a grid."""
    return CELL in os.environ


def alive() -> None:
    """Report progress, to be called for each batch: touches the file that the runner watches, once a second at most."""
    global _last
    path, now = os.environ.get(ALIVE), time.monotonic()
    if path and now - _last >= 1.0:
        _last = now
        Path(path).touch()


def time_left() -> float:
    """Seconds until the deadline; infinite without one."""
    deadline = os.environ.get(DEADLINE)
    return float(deadline) - time.time() if deadline else float("inf")


def stop_unless(seconds: float, what: str) -> None:
    """Raise OutOfTime, naming the step, if fewer than ``seconds`` are left for ``what`` comes next."""
    left = time_left()
    if left < seconds:
        raise OutOfTime(f"stopped before {what}, which takes about {seconds:.0f} s: the time budget has {max(left, 0):.0f} s "
                        "left. The same command goes on from here.")


def scoring_seconds(guess: float) -> float:
    """Seconds that scoring takes: measured on the grid's finished cells, else the guess."""
    return float(os.environ.get(SCORING) or guess)


def person_watches() -> bool:
    """True in JupyterLab, VS Code, Kaggle's editor and under Voilà; False in scripts, under papermill and in Kaggle's batch.

    An interactive frontend lets the kernel ask for input; papermill and nbconvert do not. Voilà does not either, but serves a
    person.
    """
    if os.environ.get(BATCH) or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        return False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if type(shell).__name__ != "ZMQInteractiveShell":
        return False
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila") or bool(getattr(shell.kernel, "_allow_stdin", True))


def own_temporary_folder() -> Path:
    """A folder of this user among the machine's temporary ones; raises PermissionError if somebody else has made it."""
    folder = Path(tempfile.gettempdir()) / f"charmlib-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user: set HOME or CHARM_CACHE to a folder of your own")
    return folder


def with_this_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process: ``python -m charmlib...`` is this package, this process is its parent, and the
    kernel 'python3' is this interpreter's rather than another one that the user has installed."""
    home = Path(charmlib.__file__).parents[1]
    environment = {**environment, PARENT: str(os.getpid()), "JUPYTER_PREFER_ENV_PATH": "1"}
    if not (home / "pyproject.toml").is_file():
        return environment
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, [str(home), environment.get("PYTHONPATH")]))}


def die_with_parent(parent: int) -> None:
    """Let the operating system end this process with its parent, so that it never runs on unnoticed.

    Ends at once if ``parent`` is gone already. Linux only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def end_children(pid: int | None = None, *, itself: bool = False) -> None:
    """Kill all descendants of a process (this one by default) and wait until they are gone.

    ``itself`` kills the process first, so that it starts no more.
    """
    try:
        parent = psutil.Process(pid)
        family = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [parent, *family] if itself else family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=10)
