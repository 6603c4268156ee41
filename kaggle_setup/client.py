"""The official client's Python interface (``kaggle`` 2.2.5): its answers as plain values, its refusals as clear errors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from charmlib.grid.cells import GridError
from kaggle_setup.redaction import redact

CANCELLED, ABSENT = "cancelled", "not there yet"
_ENDED = {"COMPLETE": "complete", "ERROR": "failed", "CANCEL_ACKNOWLEDGED": CANCELLED}
_ANSWER_SECONDS, _DOWNLOAD_SECONDS = 1200, 12 * 3600


class KaggleError(GridError):
    """A push, status or fetch that cannot go on; the message names the file, value or kernel and the remedy, no secret."""

    def __init__(self, message: str):
        super().__init__(redact(message))


class Refused(KaggleError):
    """Kaggle did not do what was asked; nothing counts as pushed."""


class SessionLimit(Refused):
    """Kaggle runs as many GPU sessions of this account as it allows; the same push works when one has ended."""


class StartedWithout(Refused):
    """Kaggle started a kernel without one of the inputs that it names; that session is of no use."""


class NotThere(KaggleError):
    """Kaggle knows no kernel or dataset of this name, or does not show it to this account."""


class Unclear(KaggleError):
    """The client failed in a way that does not tell what Kaggle did; asking for the status does."""


_REMEDIES = (
    (r"[Mm]aximum batch \w+ session count", "it allows two GPU sessions at once: wait until one has ended (`python -m "
     "kaggle_setup status`), or stop one on kaggle.com under Your Work, View Active Events", SessionLimit),
    (r"(?i)quota|number of hours allowed", "the week's GPU hours are used up: `kaggle quota` says when there are new ones; "
     "then give the same command", Refused),
    (r"(?i)phone", "GPU and internet need an account with a verified phone number: kaggle.com/settings", Refused),
    (r"^HTTP 401", "it does not know you: `kaggle auth login`, or make a new token on kaggle.com/settings/api", Refused),
    (r"^HTTP 429", "too many requests: wait some minutes and give the same command", Refused),
    (r"already in use by a dataset", "choose another dataset with --dataset", Refused),
    (r"ImportError|ModuleNotFoundError", "install the official client where this python is: pip install -U kaggle", Refused),
    (r"^HTTP 4", "look at it with `kaggle --debug`", Refused),
    (r"", "if this is no passing trouble, look at it with `kaggle --debug`", Unclear),
)


def push(folder: Path, seconds: int) -> str:
    """Push the kernel in ``folder`` for so many seconds; returns its address. Raises Refused, StartedWithout or Unclear."""
    what = f"the push of {folder}"
    done = _call("kernels_push", what, folder=str(folder), timeout=seconds)
    if done["error"] or not done["url"]:
        raise _refusal(what, done["error"], 400 if done["error"] else 0)
    missing = [f"{kind.lower()} {', '.join(names)}" for kind in ("Dataset", "Kernel", "Competition", "Model")
               if (names := done[f"invalid{kind}Sources"])]
    if missing:
        raise StartedWithout(f"Kaggle does not have, or does not show you, {'; '.join(missing)}. Correct --data or "
                             "--notebook-outputs, or open it on kaggle.com once and accept its terms. A session without it "
                             f"was started and fails by itself: {done['url']} (stop it there to save GPU time)")
    return done["url"]


def session(kernel: str) -> tuple[str, str]:
    """How the latest session of ``owner/slug`` ended, and why; empty while it waits or runs. Raises NotThere."""
    found = _call("kernels_status", f"the status of {kernel}", reads=True, kernel=kernel)
    return _ENDED.get(found["status"], ""), redact(found["failureMessage"] or "")


def output(kernel: str, into: Path, pattern: str) -> None:
    """Download the output files of a kernel whose names match ``pattern``, and its log; goes on where it stopped."""
    _call("kernels_output", f"the output of {kernel}", reads=True, seconds=_DOWNLOAD_SECONDS, kernel=kernel, path=str(into),
          file_pattern=pattern)


def dataset(name: str) -> tuple[str, int]:
    """State and version number of a dataset; ``ready`` when it can be attached, ABSENT where there is none."""
    try:
        found = json.loads(_call("dataset_status", f"the status of dataset {name}", reads=True, dataset=name, format="json"))
    except NotThere:
        return ABSENT, 0
    return found["status"], found["current_version_number"] or 0


def upload(folder: Path, notes: str = "") -> None:
    """Upload ``folder`` as a new private dataset; with ``notes``, as the next version of its dataset. Raises Refused."""
    what, given = f"the upload of {folder}", {"version_notes": notes} if notes else {}
    done = _call("dataset_create_version" if notes else "dataset_create_new", what, folder=str(folder), quiet=True, **given)
    if str(done["status"]).lower() != "ok":
        raise _refusal(what, done["error"], 400)


def _call(method: str, what: str, reads: bool = False, seconds: float = 0, **arguments: Any) -> Any:
    """The answer of a method of ``KaggleApi``; only one that reads may say that something is not there."""
    command = [sys.executable, "-P", str(Path(__file__).with_name("call.py")), method, json.dumps(arguments)]
    # VERBOSE makes the client print its requests with their authorization
    env = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "VERBOSE_OUTPUT")}
    try:  # stdin is closed, so that it cannot wait for an answer
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env, check=False,
                              timeout=seconds or _ANSWER_SECONDS)
    except subprocess.TimeoutExpired as stopped:
        # without its cause, which holds what the client had printed
        raise Unclear(f"{what}: kaggle's {method} gave no answer in {stopped.timeout / 60:.0f} minutes and was stopped: look "
                      "at the network, then give the same command") from None
    if done.returncode or not done.stdout:  # it was killed, or did not start
        raise _refusal(what, done.stderr.strip().rpartition("\n")[2], 0)
    found = json.loads(done.stdout.strip().rpartition("\n")[2])
    if "error" in found:
        raise _refusal(what, found["error"], found["status"], reads)
    return found["answer"]


def _refusal(what: str, words: str | None, status: int, reads: bool = False) -> KaggleError:
    words = redact(" ".join((words or "no words of its own").split()))
    text = f"HTTP {status}: {words}"
    if reads and re.search(r"^HTTP 40[34]|Cannot access kernel", text):
        return NotThere(f"{what}: Kaggle says: {words[:600]}")
    remedy, kind = next((remedy, kind) for pattern, remedy, kind in _REMEDIES if re.search(pattern, text))
    return kind(f"{what}: {'the kaggle client' if kind is Unclear else 'Kaggle'} says: {words[:600]}. Remedy: {remedy}.")
