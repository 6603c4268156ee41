"""The explorer as a web page on this machine only, by Voilà."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import charmlib
from charmlib.evaluation.runs import run_folders

WEB = Path(__file__).with_name("web")
"""Holds a Voilà template that loads nothing from the internet."""


def explore(runs: Sequence[str | Path], *, data_root: str = "", port: int = 8866, browser: bool = True) -> int:
    """Serve ``explore.ipynb`` for some runs at http://127.0.0.1:port until it is stopped; returns Voilà's exit status.

    Raises
    ------
    FileNotFoundError
        A folder without finished runs.
    ValueError
        Voilà is not installed (says how to), or the port is in use.
    """
    if importlib.util.find_spec("voila") is None:
        raise ValueError("the explorer's page needs Voilà: pip install 'charmlib[explore]', or open notebooks/explore.ipynb "
                         "in JupyterLab")
    import papermill

    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        raise ValueError(f"port {port} is in use, perhaps by another explorer: name another with --port") from error
    folders = [str(run.path.resolve()) for run in run_folders(runs)]
    package = Path(charmlib.__file__).parent
    book = next(p for p in (package.parent / "notebooks/explore.ipynb", package / "shipped/notebooks/explore.ipynb")
                if p.is_file())
    env = dict(os.environ)
    for name, value in (("JUPYTER_PATH", WEB), ("PYTHONPATH", package.parent)):
        env[name] = os.pathsep.join(filter(None, [str(value), env.get(name)]))
    with tempfile.TemporaryDirectory(prefix="charm-explore-") as scratch:
        page = Path(scratch) / "explore.ipynb"
        papermill.execute_notebook(str(book), str(page), prepare_only=True, progress_bar=False, parameters={
            "runs": folders, "data_root": str(Path(data_root).expanduser().resolve()) if data_root else ""})
        command = [sys.executable, "-m", "voila", str(page), "--Voila.ip=127.0.0.1", f"--port={port}", "--template=charm",
                   "--show_tracebacks=True", *([] if browser else ["--no-browser"])]
        print(f"{len(folders)} runs at http://127.0.0.1:{port}/ (Ctrl-C ends it)", flush=True)
        server = subprocess.Popen(command, env=env)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # without this, the server would outlive this process
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait(20)
