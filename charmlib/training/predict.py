"""Probabilities and calls of a trained run for new images."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import expit

from charmlib.data.radiograph import NotARadiograph, find_radiographs, read_radiograph
from charmlib.data.tables import column_of, last_part, read_table
from charmlib.data.views import MENUS
from charmlib.evaluation.combine import gate as gate_logits
from charmlib.evaluation.combine import merge
from charmlib.evaluation.ensemble import gated, members_of
from charmlib.evaluation.operating import called
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.score import thresholds_at
from charmlib.files import readable
from charmlib.training.checkpoint import kept_model
from charmlib.training.device import pick_device
from charmlib.training.views import head_share, merged, read_views, tensors


def predict(run: str | Path, paths: Iterable[str | Path], *, point: str = "youden", calibrated: bool = False, batch: int = 32,
            device: str = "auto", gate: float = 0.0, refused: Callable[[str], None] = print) -> pd.DataFrame:
    """A row a file: its path, run, operating point, ``p_<class>`` of six digits, ``call_<class>`` (0 or 1) and ``refused``.

    ``paths`` are files as in :mod:`charmlib.data.images`, or folders of them. A file that is not a radiograph-like grey image
    has the reason in ``refused`` and no probabilities, and the callable ``refused`` gets a line on it. The network reads each
    image by itself, with the memory bank as training left it, so neither the batch nor other images change a result by more
    than rounding. Views are those of the run's parameter ``tta``. ``run`` may be an ensemble's folder. ``gate`` lowers findings
    where the normal class is probable (:func:`charmlib.evaluation.combine.gate`), with thresholds chosen anew.

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
    folder = gated(RunFolder(run), gate) if gate else RunFolder(run)
    thresholds = (folder.choices["thresholds"].get(point) or thresholds_at(folder, point)) if validated else {}
    files = find_radiographs(paths)
    reasons, values = _read(run, files, batch, pick_device(device))
    for path, reason in reasons.items():
        if reason:
            refused(f"{readable(path)}: {reason}")
    values = gate_logits(values, gate, card["classes"], card["normal_class"])
    classes, kept = card["classes"], np.array([not reason for reason in reasons.values()])
    shown = expit(values / folder.choices["temperature"] if calibrated else values)
    calls = {f"call_{name}": pd.array(np.where(kept, called(values[:, c], threshold), pd.NA) if
                                      (threshold := thresholds.get(name)) is not None else [pd.NA] * len(files), dtype="Int8")
             for c, name in enumerate(classes if validated else ())}
    return pd.DataFrame({"image": [readable(path) for path in files], "run": Path(run).resolve().name,
                         "point": point if validated else pd.NA,
                         **{f"p_{name}": [float(f"{p:.6g}") for p in shown[:, c]] for c, name in enumerate(classes)}, **calls,
                         "refused": list(reasons.values())})


def _read(run: str | Path, files: list[Path], batch: int, device: torch.device) -> tuple[dict[Path, str], np.ndarray]:
    """Why each file is refused ('' if it is not), and logits (n, C) of all, NaN for the refused."""
    if ensemble := members_of(run):
        read = [_read(member, files, batch, device) for member in ensemble[0]]
        return read[0][0], merge([logits for _, logits in read], **ensemble[1])
    net, card = kept_model(run, device)
    params, scale, share = card["params"], tensors(net, device), head_share(net)
    out = np.full((len(files), net.classes), np.nan)
    how, reasons = {key: params[key] for key in ("aspect", "contrast")} | {"scale": card["data"]["scale"]}, {}
    for start in range(0, len(files), batch):
        images, at = [], []
        for n, path in enumerate(files[start:start + batch], start):
            reasons[path] = ""
            try:
                images.append(read_radiograph(path, params["image_size"], **how))
                at.append(n)
            except NotARadiograph as error:
                reasons[path] = readable(error).removeprefix(f"{readable(path)}: ")
        if images:
            grey = torch.from_numpy(np.stack(images)).to(device).unsqueeze(1)
            views = read_views(net, grey, MENUS[params["tta"]], *scale)
            out[at] = merged({name: values.cpu().numpy() for name, values in views.items()}, params["tta"], params["tta_merge"],
                             share)
    return reasons, out


def submission(run: str | Path, paths: Iterable[str | Path], csv: str | Path, **how) -> pd.DataFrame:
    """The ids of a table in its order, under their column's name, then a column of probabilities for each class of the run.

    Ids are names of files under ``paths``; folders and suffixes do not count. ``how`` goes to :func:`predict`.

    Raises
    ------
    ValueError
        A table without ids, or with one twice; an image that is missing, there twice, or unreadable. Names them.
    """
    raw = read_table(Path(csv))
    if (column := column_of(raw, "id")) is None:
        raise ValueError(f"{csv} has no column of image ids among {', '.join(map(str, raw.columns[:8]))}: name one ImageID")
    names, known = [last_part(name) for name in raw[column]], {}
    for path in find_radiographs(paths):
        known.setdefault(last_part(path.name), []).append(path)
    wrong = {"are missing under the given paths": [n for n in names if n not in known],
             "are there more than once": [n for n in names if len(known.get(n, ())) > 1],
             "stand more than once in the table": [n for n in dict.fromkeys(names) if names.count(n) > 1]
             if len({*names}) < len(names) else []}
    refused: list[str] = []
    if not any(wrong.values()):
        table = predict(run, [known[name][0] for name in names], refused=refused.append, **how)
    wrong["cannot be scored"] = refused
    for what, found in wrong.items():
        if found:
            raise ValueError(f"{csv}: {len(found)} of {len(names)} images {what}, such as {'; '.join(found[:3])}. No "
                             "submission was written: each image needs a score of its own")
    classes = RunFolder(run).card["classes"]
    return pd.DataFrame({column: raw[column], **{name: table[f"p_{name}"].to_numpy() for name in classes}})


def origin(run: str | Path) -> str:
    """What a run's network was trained on, in one line; shouts where its calls can mean nothing."""
    card = RunFolder(run).card
    params, data = card["params"], card["data"]
    shout = "TRAINED ON DRAWN PHANTOMS, its calls say nothing of radiographs: " if data["drawn"] else ""
    shout += "TRAINED ON SHUFFLED LABELS, its calls say nothing: " if params["labels"] == "shuffled" else ""
    return (f"{shout}{Path(run).resolve().name}: {card['arch']}, trained on {data['name']}, split '{params['split']}', at "
            f"{params['image_size']} pixels. Research use only.")
