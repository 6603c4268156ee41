"""Heat maps of a run: for its own images, beside the boxes of a data set, and for pictures from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from charmlib import session
from charmlib.data.boxes import CORNERS, FILE, read_boxes
from charmlib.data.loaders import ChestDL, ChestImages, GreyToNetwork, grey_to_network
from charmlib.data.radiograph import read_radiograph
from charmlib.evaluation.boxes import check_boxes, margin_of
from charmlib.evaluation.ensemble import members_of
from charmlib.evaluation.runs import RunFolder, write_arrays
from charmlib.files import write_csv
from charmlib.models.registry import create
from charmlib.nn.heat import grad_cam, own_map, strides_of
from charmlib.training.bank_evidence import answer, stored_slots
from charmlib.training.callbacks import seed_everything
from charmlib.training.checkpoint import kept_model, load_model
from charmlib.training.device import pick_device, place
from charmlib.training.looks import as_grey
from charmlib.training.views import tensors

if TYPE_CHECKING:
    from charmlib.training.run import Run


def heat_of(run: Run, rows: Sequence[int], classes: Sequence[int], *, stride: int = 32, net: torch.nn.Module | None = None
            ) -> np.ndarray:
    """Grad-CAM (n_classes, n, h, w) float32 of the images of some rows; see :func:`charmlib.nn.heat.grad_cam`.

    ``net`` is read in place of the run's own network.
    """
    images = ChestImages(run.data.images, run.data.labels, np.asarray(rows), run.data.classes)
    loader, maps = ChestDL(images, bs=min(run.params["stage2_batch"], 64, len(images)), device=run.device,
                           after_batch=[GreyToNetwork(run.net.mean, run.net.std)]), []
    for x, _ in loader:
        session.alive()
        maps.append(grad_cam(net or run.net, x.as_subclass(torch.Tensor), classes, stride).cpu())
    return torch.cat(maps, 1).numpy()


def random_head(run: Run) -> torch.nn.Module:
    """The run's network with a head (the first path's, of two) as it was before training."""
    net, _ = load_model(run.folder, run.device)
    seed_everything(run.params["seed"], "weights")
    fresh = create({**run.params, "weights": "none", "norm": "half"}, run.data.classes)
    head, drawn = (getattr(each, "global_path", each).head for each in (net, fresh))
    head.load_state_dict(drawn.state_dict())
    return place(net, run.device)


def boxed(run: Run, parts: Sequence[str] = ("test",)) -> tuple[pd.DataFrame, np.ndarray, list[str]]:
    """The boxes on a run's images of some parts, their patients, and a line for each row that the list's reader left out.

    Boxes are in shares of what the network sees. Where that is a window of the picture, they are cut at its borders, and those
    outside are left out.

    Raises FileNotFoundError for a data set without ``BBox_List_2017.csv``.
    """
    index = run.data.index
    path = next((p for p in (index.root / FILE, index.table.parent / FILE) if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{index.root} has no {FILE}: only the NIH set has boxes")
    table, left = read_boxes(path, index.frame["id"].tolist(), run.data.labels, run.data.classes)
    margin = margin_of(run.params)
    table[CORNERS] = ((table[CORNERS].astype(float) - margin) / (1 - 2 * margin)).clip(0, 1)
    inside = (table["x0"] < table["x1"]) & (table["y0"] < table["y1"])
    of_parts = table["row"].isin(np.concatenate([run.data.rows(part) for part in parts]))
    table = table[inside & of_parts].reset_index(drop=True)
    return table, index.frame["patient"].to_numpy(str)[table["row"]], left


def maps_of_boxes(run: Run, table: pd.DataFrame, *, stride: int = 32) -> dict[str, np.ndarray]:
    """For each box the map (n, h, w) of its finding, and two controls: the mean map of the other boxed findings, and the map of
    a network with a random head."""
    names = sorted(set(table["finding"]), key=run.data.classes.index)
    classes, which = [run.data.classes.index(name) for name in names], table["finding"].map(names.index).to_numpy()
    rows, where = np.unique(table["row"], return_inverse=True)
    heat = heat_of(run, rows, classes, stride=stride)
    own, others = heat[which, where], [[c for c in range(len(names)) if c != w] for w in which]
    return {"map": own, "another finding's map": np.stack([heat[other, i].mean(0) for other, i in zip(others, where)]),
            "random head": heat_of(run, rows, classes, stride=stride, net=random_head(run))[which, where]}


def box_check(run: Run, *, stride: int = 32, tau: float = 0.7) -> pd.DataFrame:
    """The run's maps on its boxed test images beside four controls: :func:`charmlib.evaluation.boxes.check_boxes`.

    Raises FileNotFoundError for a data set without boxes, and ValueError if fewer than two findings have boxes there.
    """
    table, patients, _ = boxed(run)
    if (count := table["finding"].nunique()) < 2:
        raise ValueError(f"the test part of {run.folder} has boxes of {count} findings, wanted at least two")
    return check_boxes(maps_of_boxes(run, table, stride=stride), table[CORNERS].to_numpy(float), table["finding"], patients,
                       tau=tau)


def keep_heat(run: Run) -> None:
    """Store a run's maps of its test images, those with boxes or all, and hold them against the boxes.

    Writes ``heat.npz``: ids (n,), classes (C,) and maps (n, C, h, w) float16, and where two findings have boxes there
    ``boxes.csv``, the table of :func:`box_check`. Maps have the largest stride that gives seven cells a side, as 32 does at 224
    pixels. Parameter ``heat_maps`` says of which images; without any, what an earlier scoring has left is removed. A network of
    your own without ``trunk`` and ``final`` has no maps.
    """
    folder, rows = run.folder, run.data.rows("test") if run.params["heat_maps"] == "all" else []
    for file in (folder.heat_file, folder.boxes_file):
        file.unlink(missing_ok=True)
    if run.params["heat_maps"] == "none" or not strides_of(run.net):
        return
    with suppress(FileNotFoundError):
        table = boxed(run)[0]
        rows = rows if len(rows) else np.unique(table["row"])
        if table["finding"].nunique() > 1:
            write_csv(folder.boxes_file, box_check(run, stride=usual_stride(run)))
    if len(rows):
        maps = heat_of(run, rows, range(len(run.data.classes)), stride=usual_stride(run))
        write_arrays(folder.heat_file, ids=run.data.index.frame["id"].to_numpy(str)[rows], classes=np.array(run.data.classes),
                     maps=maps.swapaxes(0, 1).astype(np.float16))


def usual_stride(run: Run) -> int:
    """The largest stride at which a network's map has seven cells a side, else its smallest."""
    there, size = strides_of(run.net), run.params["input_size"] or run.params["crop"] or run.params["image_size"]
    return max((stride for stride in there if size >= 7 * stride), default=there[0])


def explain_picture(folder: str | Path, path: str | Path, *, finding: str = "", kind: str = "evidence", stride: int = 32,
                    device: str = "auto") -> dict:
    """One picture's probabilities, the heat map of a finding (the given, or the most probable), and what the memory answers.

    Returns a mapping: file, finding, probabilities (class -> uncalibrated probability), logit; ``parts``, ``memory`` (a row a
    slot) and ``note`` (parts, table and note of :class:`charmlib.training.bank_evidence.Explanation`); ``map`` (its kind, one
    of :data:`charmlib.nn.heat.KINDS`), stride, ``heat`` (h, w), ``margin`` (share of each side of the picture outside the map,
    where the network reads a window), and ``pixels`` (S, S) uint8 as cached; of two paths also ``box``, top, left, bottom and
    right of the crop in shares of what the map covers, and ``crop`` (s, s) uint8, as the second path saw it.

    Raises as :func:`charmlib.data.radiograph.read_radiograph` and :func:`charmlib.training.checkpoint.load_model`, and
    ValueError for an ensemble, an unknown finding, or a network without such a map or stride.
    """
    if ensemble := members_of(folder):
        raise ValueError(f"{Path(folder).name} is an ensemble, without a heat map and a memory of its own: ask its members "
                         + ", ".join(path.name for path in ensemble[0]))
    device = pick_device(device)
    net, card = kept_model(folder, device)
    classes, params = card["classes"], card["params"]
    if finding not in ("", *classes):
        raise ValueError(f"no class {finding!r} in {folder}: one of {', '.join(classes)}")
    pixels = read_radiograph(path, params["image_size"], params["aspect"], scale=card["data"]["scale"],
                             contrast=params["contrast"])
    mean, std = tensors(net, device)
    x = grey_to_network(torch.from_numpy(pixels.copy())[None, None].to(device), mean, std)
    with torch.no_grad():
        logits, seen = net.read(x)
        probabilities = dict(zip(classes, torch.sigmoid(logits.float())[0].tolist()))
        finding = finding or max((c for c in classes if c != card["normal_class"]), key=probabilities.get)
        table, note, parts, _ = answer(getattr(net, "bank", None), seen, classes, finding,
                                       lambda: stored_slots(RunFolder(folder), classes))
    c, window = classes.index(finding), getattr(net, "crop", 0)
    heat = (grad_cam(net, x, [c], stride)[0] if kind == "evidence" else own_map(net, x, kind, stride))[0].cpu().numpy()
    two = {"box": seen["box"][0].tolist(), "crop": as_grey(seen["crop"], mean, std)[0]} if "crop" in seen else {}
    return {"file": str(path), "finding": finding, "probabilities": probabilities, "logit": logits[0, c].item(), "parts": parts,
            "memory": table.astype(object).where(table.notna(), None).to_dict("records"), "note": note, "map": kind,
            "stride": round((window or len(pixels)) / len(heat)), "heat": heat,
            "margin": margin_of(params), "pixels": pixels, **two}
