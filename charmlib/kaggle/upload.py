"""Uploading the wheel's dataset, and waiting until notebooks can attach it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from charmlib.kaggle.client import Client
from charmlib.kaggle.errors import KaggleError, NotThere

_POLL, _SECONDS = 5.0, 900


def upload(folder: Path, message: str, client: Client, say: Callable[[str], None] = print) -> None:
    """Make ``folder`` a new private dataset, or the next version of the one that its metadata names.

    A notebook that is pushed before the version is ready would get the one before, or none.

    Raises
    ------
    Refused
        Kaggle did not take it.
    KaggleError
        It took it and cannot make a version of it.
    """
    name = json.loads((folder / "dataset-metadata.json").read_text())["id"]
    try:
        _, before = client.dataset(name)
    except NotThere:
        before = 0
        client.create_dataset(folder)
    else:
        client.new_version(folder, message)
    end = time.monotonic() + _SECONDS
    while True:
        state, version = _now(client, name)
        if state == "ready" and version > before:
            say(f"{name}: the wheel is there, version {version}")
            return
        if state in ("failed", "deleted") or time.monotonic() > end:
            raise KaggleError(f"dataset {name}: {state}, version {version}, after its upload: look at "
                              f"kaggle.com/datasets/{name}, then give the same command")
        time.sleep(_POLL)


def _now(client: Client, name: str) -> tuple[str, int]:
    try:
        return client.dataset(name)
    except NotThere:  # just made
        return "not there yet", 0
