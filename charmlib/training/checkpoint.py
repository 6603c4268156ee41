"""Checkpoints without pickles: ``model.safetensors`` beside ``model.json``."""

import contextlib
import functools
import hashlib
import mmap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils._pytree import tree_map

from charmlib.evaluation.runs import FORMAT, RunFolder
from charmlib.files import reading, write_json, write_whole
from charmlib.models.registry import Network, create
from charmlib.nn import VotingBank
from charmlib.nn.backbone import read_state_dict
from charmlib.training.device import place

_DIGEST = 32  # bytes of a sha256


def save_model(net: Network, folder: str | Path, *, classes, params: Mapping, data: Mapping, normal_class: str = "",
               thresholds: Mapping | None = None, chosen_on: Mapping | None = None, temperature: float | None = None,
               stage1_lr: float | None = None) -> Path:
    """Write ``model.safetensors`` and ``model.json`` (its sha256, classes, arch, parameters, norm, thresholds, weight of the
    votes); returns the former.

    ``stage1_lr`` is the rate that stage 1 used (the finder's, where none was pinned). ``thresholds``, ``chosen_on`` and
    ``temperature`` are those of :func:`charmlib.evaluation.runs.chosen_on_validation`. ``data`` says what it was trained on
    (name, drawn, scale).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    bank = getattr(net, "bank", None)
    state = {k: v.detach().to("cpu").contiguous() for k, v in net.state_dict().items()}
    write_whole(folder / "model.safetensors", lambda temporary: save_file(state, temporary))
    write_json(folder / "model.json", {
        "format": FORMAT, "classes": list(classes), "normal_class": normal_class, "arch": net.arch, "params": dict(params),
        "norm": {"mean": list(net.mean), "std": list(net.std)}, "thresholds": dict(thresholds or {}),
        "chosen_on": dict(chosen_on or {}), "temperature": temperature, "stage1_lr": stage1_lr, "data": data,
        "vote_weight": round(bank.weight.item(), 7) if isinstance(bank, VotingBank) else None,  # digits of a float32
        "sha256": _sha256(folder / "model.safetensors")})
    return folder / "model.safetensors"


def load_weights(net: Network, folder: str | Path) -> None:
    """Fill a network from ``model.safetensors`` of a trained run.

    Raises FileNotFoundError without one, :class:`charmlib.files.Damaged` for another file than that of ``model.json``, and as
    :func:`fill`.
    """
    fill(net, _weights(RunFolder(folder)), str(RunFolder(folder).weights_file))


def _weights(run: RunFolder) -> Mapping[str, torch.Tensor]:
    path = run.weights_file
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint: {path} is not there (was the run trained to its end?)")
    with reading(path, "weights of a trained run", "copy it from where it is whole, or train again with resume=False"):
        if _sha256(path) != run.card["sha256"]:
            raise ValueError(f"its sha256 is not that in {run.card_file.name}")
        return read_state_dict(path)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(folder: str | Path, device="cpu") -> tuple[Network, dict]:
    """The network of a run, in eval mode, and its card (``model.json``).

    Strict: a file that does not fill the network exactly is an error, never a silently fresh network. Raises as
    :func:`load_weights`.
    """
    run = RunFolder(folder)
    card, weights, params = run.card, _weights(run), {**run.card["params"], "weights": "none", "norm": "half"}
    with reading(run.card_file, "card of a network", "copy it from where it is whole, or train again with resume=False"):
        # a network of other sizes than its weights is refused before it takes memory; a system of one's own may do without
        with contextlib.suppress(NotImplementedError, RuntimeError), torch.device("meta"):
            _refuse_misfit(create(params, card["classes"]).state_dict(), weights, str(run.weights_file))
        net = create(params, card["classes"])
    net.mean, net.std = tuple(card["norm"]["mean"]), tuple(card["norm"]["std"])
    fill(net, weights, str(run.weights_file))
    return place(net.eval(), device), card


def kept_model(folder: str | Path, device="cpu") -> tuple[Network, dict]:
    """As :func:`load_model`, for reading: the network that was asked for last is kept in memory, until its file changes."""
    run = RunFolder(folder)
    return _kept(str(run.path.resolve()), run.card["sha256"], str(device))


@functools.lru_cache(maxsize=1)
def _kept(folder: str, sha256: str, device: str) -> tuple[Network, dict]:
    return load_model(folder, device)


def fill(net: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises
    ------
    ValueError
        Names the source and what differs.
    """
    _refuse_misfit(net.state_dict(), state, source)
    net.load_state_dict(state)


def _refuse_misfit(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], source: str) -> None:
    wrong = [*(f"{name} is missing" for name in own if name not in state),
             *(f"{name} is not in the network" for name in state if name not in own),
             *(f"{name} is {tuple(state[name].shape)}, wanted {tuple(own[name].shape)}"
               for name in own if name in state and state[name].shape != own[name].shape)]
    if wrong:
        raise ValueError(f"{source} does not fit the network ({len(wrong)} differences): " + "; ".join(wrong[:5]))


def differences(theirs: Mapping, ours: Mapping) -> str:
    """``'k 5 there, 3 here'`` for the first settings in which two runs differ; empty if they agree."""
    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    return ", ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys[:4])


def save_resume(path: Path, state: Mapping) -> None:
    """Write a resume file (tensors, numbers, text, lists and dicts of them), whole or not at all; its last 32 bytes are the
    sha256 of the others.

    numpy's numbers become Python's: fastai's schedules leave them in the optimizer, and they would need unpickling.
    """
    plain = tree_map(lambda value: value.item() if isinstance(value, np.generic) else value, state)

    def write(temporary: Path) -> None:
        torch.save(plain, temporary)
        with open(temporary, "rb+") as file:
            file.write(hashlib.file_digest(file, "sha256").digest())  # behind the last byte that was read

    write_whole(path, write)


def load_resume(path: Path) -> dict | None:
    """The resume state, or None where there is none. The file is compared with its sha256, then loaded with ``weights_only``.

    Raises
    ------
    charmlib.files.Damaged
        Says that removing the file starts the run anew.
    """
    if not path.is_file():
        return None
    with reading(path, "state of a started training", "delete it, or say resume=False, to train from the start"):
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, \
                memoryview(content) as view, view[:-_DIGEST] as body:
            if hashlib.sha256(body).digest() != content[-_DIGEST:]:
                raise ValueError("it does not have the sha256 at its end")
        return torch.load(path, map_location="cpu", weights_only=True)
