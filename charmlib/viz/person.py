"""Whether a person looks at this notebook, or a program runs it."""

from __future__ import annotations

import os


def person_watches() -> bool:
    """True in JupyterLab, VS Code, Kaggle's editor and under Voilà; False in scripts, under papermill and in Kaggle's batch.

    A frontend that a person sits at lets the kernel ask for input; papermill and nbconvert do not. Voilà does not either but
    serves a person.
    """
    if os.environ.get("CHARM_BATCH") or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        return False
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    if type(shell).__name__ != "ZMQInteractiveShell":
        return False
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila") or bool(getattr(shell.kernel, "_allow_stdin", True))
