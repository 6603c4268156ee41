"""A notebook session as Kaggle gives it: its ``/kaggle`` tree, read-only input, no network, no charmlib installed.

The tree is mounted in namespaces of the session's own, over a root made of the machine's folders, so nothing is left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

_ENTER = r"""
set -e
ip link set lo up 2>/dev/null || true
mount --make-rprivate /
mount -t tmpfs tmpfs "$ROOT"
for entry in /*; do
  name="${entry#/}"
  if [ -L "$entry" ]; then ln -s "$(readlink "$entry")" "$ROOT/$name"
  elif [ -d "$entry" ]; then mkdir "$ROOT/$name"; mount --rbind "$entry" "$ROOT/$name"; fi
done
mkdir -p "$ROOT/kaggle"
mount --bind "$TREE" "$ROOT/kaggle"
for fixed in "$ROOT/kaggle/input" "$ROOT$SITE"; do mount --bind "$fixed" "$fixed"; mount -o remount,ro,bind "$fixed"; done
exec chroot "$ROOT" sh -c 'cd /kaggle/working && exec "$@"' session "$@"
"""


def can_mount() -> bool:
    """Whether this user may make mount and network namespaces."""
    unshare = shutil.which("unshare")
    if not unshare:
        return False
    return subprocess.run([unshare, "-mn", "mount", "--make-rprivate", "/"], capture_output=True).returncode == 0


def image_python(folder: Path) -> Path:
    """An interpreter with all packages of this one but charmlib, and a site of its own that pip installs into."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python*/site-packages"))
    # a path in a .pth file: the packages are found, but not the .pth file that leads to a checkout of charmlib
    (site / "image.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def run_session(notebook: Path, tree: Path, attached: dict[str, Path], python: Path, *,
                old_form: bool = False) -> subprocess.CompletedProcess:
    """Run a notebook with papermill; it and what it wrote are in ``tree/working`` afterwards.

    ``attached`` are folders by mount, such as ``datasets/nih-chest-xrays/data``; in the old form by their last name alone.
    """
    for name in ("input", "working", "temp", "root"):
        (tree / name).mkdir(parents=True, exist_ok=True)
    for mount, folder in attached.items():
        shutil.copytree(folder, tree / "input" / (mount.rpartition("/")[2] if old_form else mount), dirs_exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    env = {**kept, "ROOT": str(tree / "root"), "TREE": str(tree), "SITE": sysconfig.get_paths()["purelib"],
           "HOME": "/kaggle/temp", "KAGGLE_KERNEL_RUN_TYPE": "Batch", "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), "-m", "papermill", "--no-progress-bar", "/kaggle/temp/pushed.ipynb",
               "/kaggle/working/__notebook__.ipynb"]
    shutil.copy(notebook, tree / "temp" / "pushed.ipynb")
    return subprocess.run(["unshare", "-mn", "sh", "-c", _ENTER, "session", *command], env=env, capture_output=True, text=True)
