"""Keeps API tokens out of whatever is printed, raised or written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

HIDDEN = "[token hidden]"
_SHAPES = (r"KGAT_[\w-]+",  # Kaggle's API tokens
           r"(?i)(?<=bearer )[\w.~+/=-]{8,}", r"(?i)(?<=basic )[\w+/=]{8,}",
           r"""(?i)(?<=["']key["']: ["'])[^"']+""", r"""(?i)(?<=_token["']: ["'])[^"']+""",
           r"(?i)(?<=[?&]x-goog-signature=)[\w%-]+", r"(?i)(?<=[?&]signature=)[\w%+/=-]+", r"(?<=//)[^/\s:@]+:[^/\s@]+(?=@)")


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


def _secrets() -> set[str]:
    found = {os.environ.get("KAGGLE_KEY", "")}
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_API_V1_TOKEN"):  # a token, or the file that holds it
        value = os.environ.get(name, "")
        found |= {value, _text_of(Path(value))} if value else set()
    for folder in _config_folders():
        found |= {_text_of(folder / name) for name in ("access_token", "access_token.txt")}
        for name in ("kaggle.json", "credentials.json"):
            found |= _values(_text_of(folder / name))
    return {secret for secret in found if len(secret) >= 8 and "/" not in secret}  # not the path of a token's file


def _config_folders() -> list[Path]:
    home = Path.home()
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "kaggle"
    own = os.environ.get("KAGGLE_CONFIG_DIR")
    return [home / ".kaggle", config, *([Path(own)] if own else [])]


def _text_of(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):  # not there, not readable, or the token itself taken for a path
        return ""


def _values(text: str) -> set[str]:
    try:
        content = json.loads(text)
    except ValueError:
        return set()
    fields = content.items() if isinstance(content, dict) else ()
    return {str(value) for name, value in fields if any(word in name.lower() for word in ("key", "token", "secret"))}
