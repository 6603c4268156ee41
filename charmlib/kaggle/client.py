"""The official ``kaggle`` command as a child process: what it prints becomes results and clear errors.

The texts are those of ``kaggle`` 2.2.5. Some refusals come with exit status 0, and an interrupted client exits with 0 and
without a result, so only the words of success count as success.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from charmlib.kaggle.errors import KaggleError, NotThere, Refused, SessionLimit, StartedWithout, Unclear
from charmlib.kaggle.redaction import redact

OLDEST = (2, 2, 5)
_ANSWER_SECONDS, _DOWNLOAD_SECONDS = 1200, 12 * 3600
RUNNING, COMPLETE, FAILED, CANCELLED = "running", "complete", "failed", "cancelled"
_STATES = {"queued": RUNNING, "running": RUNNING, "new_script": RUNNING, "cancel_requested": RUNNING, "complete": COMPLETE,
           "error": FAILED, "cancel_acknowledged": CANCELLED}
_PUSHED = re.compile(r"Kernel version (?:(\d+) )?successfully pushed\.\s+Please check progress at (\S+)")
_LEFT_OUT = re.compile(r"The following are not valid (\w+) sources and could\s+not be added to the kernel: (.*)")
_REMEDIES = (
    (r"[Mm]aximum batch \w+ session count", "it allows two GPU sessions at once: wait until one has ended (`python -m charmlib "
     "kaggle status`), or stop one on kaggle.com under Your Work, View Active Events", SessionLimit),
    (r"(?i)quota|number of hours allowed", "the week's GPU hours are used up: `kaggle quota` says when there are new ones; "
     "then give the same command", Refused),
    (r"(?i)phone", "GPU and internet need an account with a verified phone number: kaggle.com/settings", Refused),
    (r"Authentication required|401 Client Error|Invalid credentials", "it does not know you: `kaggle auth login`, or make a "
     "new token on kaggle.com/settings/api", Refused),
    (r"429 Client Error|rate limited", "too many requests: wait some minutes and give the same command", Refused),
    (r"already in use by a dataset", "choose another dataset with --dataset", Refused),
    (r"title does not resolve", "title and id differ: the notebook lies under another name there", Refused),
)
_NAMED_ERROR = re.compile(r"(?:push|creation) error: |usage: kaggle|must be|Invalid|not found: ")
# a server's own words may come in place of the number of the error; the client's hint follows them
_ABSENT = re.compile(r"Cannot access kernel|40[34] Client Error|resource was not found|don't have access to this resource")


@dataclass(frozen=True)
class Pushed:
    """A kernel that Kaggle has taken: its version there and its address."""

    version: int
    url: str


@dataclass(frozen=True)
class Session:
    """How a kernel's session is: one of the states of this module, and Kaggle's own words where it failed."""

    state: str
    message: str = ""


class Client:
    """Runs the ``kaggle`` command. Its tokens stay with it: they are in no argument, and hidden in all that it prints.

    Raises
    ------
    KaggleError
        No such command, or one older than what its texts are read from.
    """

    def __init__(self, command: str = "kaggle"):
        self._command = shutil.which(command)
        remedy = "install the official client where this python is: pip install -U kaggle"
        if self._command is None:
            raise KaggleError(f"there is no command `{command}`: {remedy}")
        _, text = self._run("--version")
        found = re.search(r"Kaggle CLI (\d+)\.(\d+)\.(\d+)", text)
        if not found:
            raise KaggleError(f"`{command} --version` fails: {text.strip()[-300:]}. Remedy: {remedy}")
        if tuple(map(int, found.groups())) < OLDEST:
            raise KaggleError(f"the kaggle client is {found[0]}, older than {'.'.join(map(str, OLDEST))}: {remedy}")

    def push(self, folder: Path, timeout: int) -> Pushed:
        """Push the kernel in ``folder``; its session ends after ``timeout`` seconds.

        Raises
        ------
        Refused
            Not taken, or (StartedWithout) taken without one of its inputs; the message says what to do.
        Unclear
            The client failed in a way that does not tell whether the kernel was taken.
        """
        _, text = self._run("kernels", "push", "-p", str(folder), "-t", str(timeout))
        pushed, missing = _PUSHED.search(text), _LEFT_OUT.findall(text)
        if pushed and missing:
            named = "; ".join(f"{kind} {names}" for kind, names in missing)
            raise StartedWithout(f"Kaggle does not have, or does not show you, {named}. Correct --data or "
                                 "--notebook-outputs, or open it on kaggle.com once and accept its terms. A session without it "
                                 f"was started and fails by itself: {pushed[2]} (stop it there to save GPU time)")
        if not pushed or "title does not resolve" in text:
            raise _refusal(f"the push of {folder}", text)
        return Pushed(int(pushed[1] or 1), pushed[2])

    def session(self, kernel: str) -> Session:
        """How the latest session of ``owner/slug`` is.

        Raises
        ------
        NotThere
            No such kernel.
        KaggleError
            The client failed, or said something unknown.
        """
        status, text = self._run("kernels", "status", kernel)
        found = re.search(r'has status "(?:\w+\.)?(\w+)"', text)
        if status or not found or found[1].lower() not in _STATES:
            raise _refusal(f"the status of {kernel}", text, absent=NotThere)
        message = re.search(r'Failure message: "(.*)"', text, re.S)
        return Session(_STATES[found[1].lower()], message[1] if message else "")

    def output(self, kernel: str, into: Path, pattern: str) -> None:
        """Download those output files of a kernel whose names match ``pattern``, and its log; goes on where it stopped.

        Raises
        ------
        KaggleError
            Not all came.
        """
        into.mkdir(parents=True, exist_ok=True)
        status, text = self._run("kernels", "output", kernel, "-p", str(into), "-q", "--file-pattern", pattern,
                                 timeout=_DOWNLOAD_SECONDS)
        if status or "Next page token" in text:
            raise _refusal(f"the output of {kernel}", text, absent=NotThere)

    def dataset(self, name: str) -> tuple[str, int]:
        """State (``ready`` when it can be attached) and version number of a dataset.

        Raises
        ------
        NotThere
            No such dataset.
        """
        status, text = self._run("datasets", "status", name, "--format", "json")
        found = re.search(r"^\{.*\}$", text, re.M)
        try:
            content = json.loads(found[0] if found and not status else "")
            return str(content["status"]).lower(), int(content["current_version_number"] or 0)
        except (ValueError, KeyError) as error:
            raise _refusal(f"the status of dataset {name}", text, absent=NotThere) from error

    def create_dataset(self, folder: Path) -> None:
        """Upload ``folder`` as a new private dataset.

        Raises
        ------
        Refused
            Not taken.
        """
        _, text = self._run("datasets", "create", "-p", str(folder), "-r", "zip")
        if "Dataset is being created" not in text:
            raise _refusal(f"the upload of {folder}", text)

    def new_version(self, folder: Path, message: str) -> None:
        """Upload ``folder`` as the next version of its dataset.

        Raises
        ------
        Refused
            Not taken.
        """
        _, text = self._run("datasets", "version", "-p", str(folder), "-r", "zip", "-m", message)
        if "Dataset version is being created" not in text:
            raise _refusal(f"the upload of {folder}", text)

    def _run(self, *args: str, timeout: float | None = None) -> tuple[int, str]:
        # its output is read and hidden before anyone sees it; stdin is closed, so that it cannot wait for an answer
        timeout = timeout or _ANSWER_SECONDS  # its own requests have none
        # VERBOSE makes it print its requests with their authorization
        env = {name: value for name, value in os.environ.items() if name not in ("VERBOSE", "VERBOSE_OUTPUT")}
        try:
            done = subprocess.run([self._command, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL, env=env,
                                  check=False, timeout=timeout)
        except subprocess.TimeoutExpired:
            # without its cause, which holds what the client had printed
            raise Unclear(f"`kaggle {' '.join(args[:3])}` gave no answer in {timeout / 60:.0f} minutes and was stopped: look "
                          "at the network, then give the same command") from None
        return done.returncode, redact(f"{done.stdout}\n{done.stderr}")


def _refusal(what: str, text: str, absent: type[KaggleError] = Unclear) -> KaggleError:
    words = _said(text)
    if absent is not Unclear and _ABSENT.search(text):
        return absent(f"{what}: Kaggle says: {words}")
    for pattern, remedy, kind in _REMEDIES:
        if re.search(pattern, text):
            return kind(f"{what}: Kaggle says: {words}. Remedy: {remedy}.")
    kind = Refused if _NAMED_ERROR.search(text) else Unclear
    return kind(f"{what}: the kaggle client says: {words}. If this is no passing trouble, look at it with `kaggle --debug`.")


def _said(text: str) -> str:
    """The client's words on one line; of a traceback (it lets one out when it cannot reach Kaggle to log in) the last."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if any(line.startswith("Traceback (most recent call last)") for line in lines):
        lines = lines[-1:]
    return " ".join(lines)[:600] or "nothing"
