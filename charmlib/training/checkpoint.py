"""Checkpoints without pickles: ``model.safetensors`` beside ``model.json``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from charmlib.evaluation.runs import FORMAT, RunFolder
from charmlib.files import write_json, write_whole
from charmlib.models.registry import Network, create
from charmlib.training.device import place


def save_model(net: Network, folder: str | Path, *, classes, params: Mapping, normal_class: str = "",
               thresholds: Mapping | None = None, temperature: float | None = None, stage1_lr: float | None = None,
               data: Mapping | None = None) -> Path:
    """Write ``model.safetensors`` and ``model.json`` (classes, arch, parameters, norm, thresholds); returns the former.

    ``stage1_lr`` is the rate that stage 1 used (the finder's, where none was pinned).
    ``thresholds`` maps an operating point ('youden') to class -> probability; they and the ``temperature`` of the
    calibration are chosen on validation data, and stay empty where there was none. ``data`` says what it was trained on
    (name, drawn, scale).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu").contiguous() for k, v in net.state_dict().items()}
    write_whole(folder / "model.safetensors", lambda temporary: save_file(state, temporary))
    write_json(folder / "model.json", {
        "format": FORMAT, "classes": list(classes), "normal_class": normal_class, "arch": net.arch, "params": dict(params),
        "norm": {"mean": list(net.mean), "std": list(net.std)}, "thresholds": dict(thresholds or {}),
        "temperature": temperature, "stage1_lr": stage1_lr, "data": data})
    return folder / "model.safetensors"


def load_weights(net: Network, folder: str | Path) -> None:
    """Fill a network from ``model.safetensors`` of a trained run; raises FileNotFoundError without one, and as :func:`fill`."""
    path = RunFolder(folder).weights_file
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint: {path} is not there (was the run trained to its end?)")
    fill(net, load_file(path), str(path))


def load_model(folder: str | Path, device="cpu") -> tuple[Network, dict]:
    """The network of a run, in eval mode, and its card (``model.json``).

    Strict: a file that does not fill the network exactly is an error, never a silently fresh network. Raises as
    :func:`load_weights`.
    """
    card = RunFolder(folder).card
    net = create({**card["params"], "weights": "none", "norm": "half"}, card["classes"])
    net.mean, net.std = tuple(card["norm"]["mean"]), tuple(card["norm"]["std"])
    load_weights(net, folder)
    return place(net.eval(), device), card


def fill(net: torch.nn.Module, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Load a state dict that must fit exactly.

    Raises
    ------
    ValueError
        Names the source and what differs.
    """
    own = net.state_dict()
    wrong = [*(f"{name} is missing" for name in own if name not in state),
             *(f"{name} is not in the network" for name in state if name not in own),
             *(f"{name} is {tuple(state[name].shape)}, wanted {tuple(own[name].shape)}"
               for name in own if name in state and state[name].shape != own[name].shape)]
    if wrong:
        raise ValueError(f"{source} does not fit the network ({len(wrong)} differences): " + "; ".join(wrong[:5]))
    net.load_state_dict(state)


def differences(theirs: Mapping, ours: Mapping) -> str:
    """``'k 5 there, 3 here'`` for the first settings in which two runs differ; empty if they agree."""
    keys = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    return ", ".join(f"{k} {theirs.get(k)!r} there, {ours.get(k)!r} here" for k in keys[:4])


def save_resume(path: Path, state: Mapping) -> None:
    """Write a resume file (tensors, numbers, text, lists and dicts of them), whole or not at all.

    numpy's numbers become Python's: fastai's schedules leave them in the optimizer, and they would need unpickling.
    """
    plain = tree_map(lambda value: value.item() if isinstance(value, np.generic) else value, state)
    write_whole(path, lambda temporary: torch.save(plain, temporary))


def load_resume(path: Path) -> dict | None:
    """The resume state, or None where there is none; loads with ``weights_only``.

    Raises
    ------
    ValueError
        Damaged; says that removing it starts the run anew.
    """
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}). "
                         "Remove it to train from the start, or say resume=False.") from error
