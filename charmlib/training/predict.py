"""Probabilities and calls of a trained run for new images."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from charmlib.data.loaders import grey_to_network
from charmlib.data.radiograph import NotARadiograph, find_radiographs, read_radiograph
from charmlib.evaluation.operating import called
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.score import thresholds_at
from charmlib.files import readable
from charmlib.training.checkpoint import load_model
from charmlib.training.device import pick_device


def predict(run: str | Path, paths: Iterable[str | Path], *, point: str = "youden", calibrated: bool = False, batch: int = 32,
            device: str = "auto", refused: Callable[[str], None] = print) -> pd.DataFrame:
    """A row a file: its path, run, operating point, ``p_<class>`` of six digits, ``call_<class>`` (0 or 1) and ``refused``.

    ``paths`` are files as in :mod:`charmlib.data.images`, or folders of them. A file that is not a radiograph-like grey image
    has the reason in ``refused`` and no probabilities, and the callable ``refused`` gets a line on it. The network reads each
    image by itself, with the memory bank as training left it, so neither the batch nor other images change a result by more
    than rounding.

    Training chose the operating points 'youden', 'f1' and 'sensitivity_0.90' on validation data; any other sensitivity is
    chosen now, on the run's validation predictions. ``calibrated`` gives probabilities at the temperature of the validation
    part; the calls are the same either way. A run without a validation part has no operating point: its rows have
    probabilities and no calls, and ``point`` is missing.

    Raises FileNotFoundError or ValueError: not a trained run, no images, an unknown operating point, or ``calibrated`` for a
    run without a validation part.
    """
    card = RunFolder(run).card
    validated = bool(card["thresholds"])
    if calibrated and not validated:
        raise ValueError(f"{run} was trained without a validation part, so it has no temperature: leave --calibrated out")
    thresholds = (card["thresholds"].get(point) or thresholds_at(run, point)) if validated else {}
    files = find_radiographs(paths)
    chosen = pick_device(device)
    net, _ = load_model(run, chosen)
    mean, std = (torch.tensor(v, device=chosen).view(1, -1, 1, 1) for v in (net.mean, net.std))
    how = {key: card["params"][key] for key in ("aspect", "contrast")} | {"scale": card["data"]["scale"]}
    reasons, logits = dict.fromkeys(files, ""), []
    for start in range(0, len(files), batch):
        images = []
        for path in files[start:start + batch]:
            try:
                images.append(read_radiograph(path, card["params"]["image_size"], **how))
            except NotARadiograph as error:
                reasons[path] = readable(error).removeprefix(f"{readable(path)}: ")
                refused(readable(error))
        if images:
            grey = torch.from_numpy(np.stack(images)).to(chosen).unsqueeze(1)
            with torch.inference_mode():
                logits.append(net(grey_to_network(grey, mean, std)).float().cpu().numpy())
    classes, kept = card["classes"], np.array([not reason for reason in reasons.values()])
    values = np.full((len(files), len(classes)), np.nan)
    values[kept] = np.concatenate(logits) if logits else 0.0
    shown = expit(values / card["temperature"] if calibrated else values)
    calls = {f"call_{name}": pd.array(np.where(kept, called(values[:, c], threshold), pd.NA) if
                                      (threshold := thresholds.get(name)) is not None else [pd.NA] * len(files), dtype="Int8")
             for c, name in enumerate(classes if validated else ())}
    return pd.DataFrame({"image": [readable(path) for path in files], "run": Path(run).resolve().name,
                         "point": point if validated else pd.NA,
                         **{f"p_{name}": [float(f"{p:.6g}") for p in shown[:, c]] for c, name in enumerate(classes)}, **calls,
                         "refused": list(reasons.values())})


def origin(run: str | Path) -> str:
    """What a run's network was trained on, in one line; shouts where its calls can mean nothing."""
    card = RunFolder(run).card
    params, data = card["params"], card["data"]
    shout = "TRAINED ON DRAWN PHANTOMS, its calls say nothing of radiographs: " if data["drawn"] else ""
    shout += "TRAINED ON SHUFFLED LABELS, its calls say nothing: " if params["labels"] == "shuffled" else ""
    return (f"{shout}{Path(run).resolve().name}: {card['arch']}, trained on {data['name']}, split '{params['split']}', at "
            f"{params['image_size']} pixels. Research use only.")
