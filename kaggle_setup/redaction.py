"""Keeps API tokens and signed addresses out of whatever is printed, raised or written."""

import contextlib
import os
import re
from pathlib import Path

HIDDEN = "[token hidden]"
_SHAPES = (r"KGAT_[\w-]+",  # Kaggle's API tokens
           r"(?i)(?<=bearer )[\w.~+/=-]{8,}", r"(?i)(?<=basic )[\w+/=]{8,}",
           r"""(?i)(?<=["']key["']: ["'])[^"']+""", r"""(?i)(?<=_token["']: ["'])[^"']+""",
           r"(?i)(?<=[?&]x-goog-signature=)[\w%-]+", r"(?i)(?<=[?&]signature=)[\w%+/=-]+", r"(?<=//)[^/\s:@]+:[^/\s@]+(?=@)")
_FIELD = re.compile(r'"\w*(?:key|token|secret)\w*"\s*:\s*"([^"]+)"', re.I)


def redact(text: str) -> str:
    """``text`` without this user's Kaggle secrets, and without anything that has the shape of one.

    The secrets are read anew at each call, from where the client finds them (``kaggle`` 2.2.5): the environment,
    ``kaggle.json``, ``access_token`` and the OAuth ``credentials.json``.
    """
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    for shape in _SHAPES:
        text = re.sub(shape, HIDDEN, text)
    return text


def say(line: str) -> None:
    """Print a line without secrets, at once."""
    print(redact(line), flush=True)


def _secrets() -> set[str]:
    variables = [os.environ.get(name, "") for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_API_V1_TOKEN")]
    config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kaggle"
    folders = {Path.home() / ".kaggle", config, Path(os.environ.get("KAGGLE_CONFIG_DIR") or config)}
    files = [folder / name for folder in folders
             for name in ("access_token", "access_token.txt", "kaggle.json", "credentials.json")]
    found = set(variables)
    for path in (*files, *map(Path, filter(None, variables))):  # a variable holds a token, or the path of a token's file
        with contextlib.suppress(OSError, ValueError):  # not there, not readable, or the token itself taken for a path
            text = path.read_text().strip()
            found |= set(_FIELD.findall(text) if text.startswith("{") else [text])
    return {secret for secret in found if len(secret) >= 8 and "/" not in secret}  # not the path of a token's file
