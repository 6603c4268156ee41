"""The explorer as a web page on this machine only, for its user only, by Voilà."""

import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Sequence
from pathlib import Path

import charmlib
from charmlib.evaluation.runs import run_folders
from charmlib.files import for_papermill, write_json, write_text

IDLE = 300
"""Seconds after which the kernel of a page that is no longer open is ended."""

UPLOAD = 64
"""Largest picture of a user's own, in MB."""

WEB = Path(__file__).with_name("web")
"""Holds a Voilà template that loads nothing from the internet."""


def explore(runs: Sequence[str | Path], *, data_root: str = "", port: int = 8866, browser: bool = True) -> int:
    """Serve ``explore.ipynb`` for some runs at http://127.0.0.1:port until it is stopped; returns Voilà's exit status.

    The printed address holds a token. Without it, and for a Host or a websocket's Origin other than this machine, Jupyter's
    server refuses.

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
    from jupyter_server import DEFAULT_STATIC_FILES_PATH

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
        page, token = Path(scratch) / "explore.ipynb", secrets.token_urlsafe(24)
        papermill.execute_notebook(for_papermill(book), for_papermill(page), prepare_only=True, progress_bar=False, parameters={
            "runs": folders, "data_root": str(Path(data_root).expanduser().resolve()) if data_root else ""})
        # a file, because every user of this machine can read a command line
        write_json(page.with_name("voila.json"), {
            "Voila": {"ip": "127.0.0.1", "port": port, "port_retries": 0, "open_browser": False, "token": token,
                      "tornado_settings": {"allow_remote_access": False, "static_path": DEFAULT_STATIC_FILES_PATH,
                                            "websocket_max_message_size": (UPLOAD + 1) * 2**20}},
            "VoilaConfiguration": {"template": "charm", "show_tracebacks": True, "file_allowlist": [],
                                   "resources": {"upload_mb": UPLOAD}},
            "PasswordIdentityProvider": {"cookie_options": {"samesite": "Strict"}},
            "KernelManager": {"transport": "ipc"},  # every user of this machine can read a kernel's pictures from its ports
            "MappingKernelManager": {"cull_idle_timeout": IDLE, "cull_interval": max(1, IDLE // 10)}})
        address = f"http://127.0.0.1:{port}/?token={token}"
        print(f"{len(folders)} runs at {address} (Ctrl-C ends it)", flush=True)
        server = subprocess.Popen([sys.executable, "-m", "voila", str(page)], env=env, cwd=scratch)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # without this, the server would outlive this process
        try:
            while browser and server.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    write_text(page.with_suffix(".html"), f"<meta http-equiv='refresh' content='0; url={address}'>")
                    webbrowser.open(page.with_suffix(".html").as_uri())
                    browser = False
                time.sleep(0.2)
            return server.wait()
        except KeyboardInterrupt:
            return 0
        finally:
            server.terminate()
            server.wait(20)
