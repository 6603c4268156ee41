"""``kernel-metadata.json`` and ``dataset-metadata.json``, as the client and the server want them.

Every field that has a default is written all the same: the documented default of ``enable_internet`` is false and the
client's is true (``kaggle`` 2.2.5, ``kernels_push``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from charmlib.kaggle.errors import KaggleError

CODE_FILE = "notebook.ipynb"
T4 = "NvidiaTeslaT4"
"""Two T4; there is no single one, and a request for a P100 gets these as well."""
NO_GPU = "none"
_TITLE = (6, 50)


def slug_of(title: str) -> str:
    """The name in the address that Kaggle makes of a title."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def check_user(user: str) -> str:
    """A Kaggle user name as it stands in addresses.

    Raises
    ------
    KaggleError
        Not one.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", user):
        raise KaggleError(f"--user {user!r} is no Kaggle user name: take it from the address of your profile "
                          "(kaggle.com/NAME), lower-case letters, digits and hyphens")
    return user


def check_source(reference: str, option: str) -> str:
    """``owner/slug`` of a dataset or notebook.

    Raises
    ------
    KaggleError
        Anything else; names the option.
    """
    if not re.fullmatch(r"[\w-]+/[\w-]+(/\d+)?", reference):
        raise KaggleError(f"{option} {reference!r}: wanted OWNER/NAME as in the address, such as nih-chest-xrays/data")
    return reference


def kernel_metadata(user: str, title: str, *, datasets: Iterable[str] = (), kernels: Iterable[str] = (),
                    accelerator: str = T4, internet: bool = False) -> dict[str, Any]:
    """The content of ``kernel-metadata.json`` for a private notebook.

    ``title`` becomes its id, so that the two agree: where they do not, Kaggle takes the title's and the kernel lies
    under another name than the one asked for.

    Raises
    ------
    KaggleError
        A name that Kaggle would not take.
    """
    _check_title(title)
    return {"id": f"{check_user(user)}/{slug_of(title)}", "title": title, "code_file": CODE_FILE, "language": "python",
            "kernel_type": "notebook", "is_private": True, "enable_gpu": accelerator != NO_GPU, "enable_tpu": False,
            "enable_internet": internet, "machine_shape": "" if accelerator == NO_GPU else accelerator, "keywords": [],
            "dataset_sources": [check_source(name, "--data") for name in datasets], "competition_sources": [],
            "kernel_sources": [check_source(name, "--notebook-outputs") for name in kernels], "model_sources": [],
            "docker_image_pinning_type": "latest"}


def dataset_metadata(user: str, title: str, description: str) -> dict[str, Any]:
    """The content of ``dataset-metadata.json``. Kaggle's list of licences has no MIT, so the description names it.

    Raises
    ------
    KaggleError
        A name that Kaggle would not take.
    """
    _check_title(title)
    return {"id": f"{check_user(user)}/{slug_of(title)}", "title": title, "licenses": [{"name": "other"}],
            "description": description}


def _check_title(title: str) -> None:
    low, high = _TITLE
    if not low <= len(title) <= high or not low <= len(slug_of(title)) <= high:
        raise KaggleError(f"the title {title!r} has {len(title)} characters, Kaggle takes {low} to {high}: give the grid a "
                          "shorter name (its name: key)")
