"""A finished run scored on another data set (external validation), by the classes whose names match."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from charmlib.data.cache import open_images
from charmlib.data.dataset import ChestData, assemble, find_data, readable_only
from charmlib.data.index import Index, read_index
from charmlib.data.splits import Split
from charmlib.evaluation.leaks import leaked_start, split_of
from charmlib.evaluation.runs import Predictions, RunFolder, about, save_predictions
from charmlib.evaluation.score import score_part, thresholds_at
from charmlib.files import json_or_empty, write_json
from charmlib.nih import is_normal
from charmlib.training.checkpoint import load_model
from charmlib.training.device import pick_device, pick_precision
from charmlib.training.machine import device_name
from charmlib.training.run import Run

_SAME = ("effusion pleuraleffusion effusions pleuraleffusions", "pleuralthickening pleurathickening",
         "edema oedema pulmonaryedema pulmonaryoedema lungedema", "mass lungmass pulmonarymass masses",
         "fibrosis pulmonaryfibrosis lungfibrosis", "emphysema pulmonaryemphysema",
         "nodule nodules lungnodule pulmonarynodule", "infiltration infiltrate infiltrates infiltrations",
         "atelectasis atelectases", "consolidation consolidations", "hernia hiatalhernia hiatushernia")
# Names that mean one finding. Wider and narrower ones are kept apart: 'Lung Opacity', 'Lung Lesion', 'Nodule/Mass'.
_MEANING = {name: names.split()[0] for names in _SAME for name in names.split()}


def score_elsewhere(run: str | Path | RunFolder, data_root: str | Path, *, csv: str = "", split: str = "", part: str = "test",
                    point: str = "youden", out: str | Path = "", name: str = "", device: str = "auto", cache_dir: str = "",
                    workers: int = 2, reading: Mapping | None = None) -> tuple[dict, Predictions]:
    """Score a finished run on a data set that it was not trained on; returns metrics and predictions of the matched classes.

    Thresholds and temperature are those of the run's own validation part. ``csv`` and ``reading`` say how the table is read,
    as in :func:`charmlib.data.index.read_index`. Scored is a ``part`` of a ``split`` of the data, by default all its images.
    Writes NAME.json and NAME.npz into ``out``, by default ``scores`` in the run's folder; ``name`` defaults to data folder and
    table.

    The metrics are as in ``metrics.json``, with ``matched`` (our class -> theirs), ``unmatched`` {run, data} and ``seen`` (the
    number of images whose names are among the run's training and validation images). Raises ValueError if no class of the run
    is among those of the data, or if the name is taken by the scores of other images.
    """
    run = RunFolder.of(run)
    card, trained = run.card, run.metrics
    params = {**card["params"], "run_dir": str(run.path), "device": device}
    index = read_index(find_data(data_root), csv=csv, **{"classes": "own" if csv else "nih15", **(reading or {})})
    leak = leaked_start(params, index.table.name)
    matched = match_classes(card["classes"], index.classes)
    if not matched:
        raise ValueError(f"no class of {run} is in {index.table}: the run has {', '.join(card['classes'])}; the table has "
                         f"{', '.join(index.classes)}. Rename columns of the table that mean the same.")
    images = open_images(index.frame["id"].tolist(), index.frame["path"].tolist(), params["image_size"],
                         aspect=params["aspect"], contrast=params["contrast"], cache_dir=cache_dir, workers=workers)
    data = assemble(index, images, split=split) if split else whole(*readable_only(index, images))
    rows, where = data.rows(part if split else "test"), pick_device(device)
    net, _ = load_model(run.path, where)
    logits, _ = Run(params, data, net, where, pick_precision(params["precision"], where)).logits(part, rows)
    named, ours = about(data.index.frame.iloc[rows]), list(matched)
    test = Predictions(named.pop("ids"), named.pop("patients"), data.index.frame[list(matched.values())].
                       to_numpy(np.float32)[rows], logits[:, [card["classes"].index(c) for c in ours]], tuple(ours),
                       card["normal_class"] if card["normal_class"] in matched else "", named)
    thresholds = card["thresholds"] | ({point: thresholds_at(run, point)} if card["thresholds"] else {})
    scores, _ = score_part(vars(test), ours, thresholds=thresholds, temperature=card["temperature"],
                           chosen_on=card["chosen_on"],
                           prevalence={c: trained["train_prevalence"][c] for c in ours}, normal_class=test.normal_class)
    known = split_of(run)
    seen = None if known is None else int(data.index.frame["id"].iloc[rows].isin(known["id"][known["part"] != "test"]).sum())
    record, left = data.split.record(), [c for c in index.findings if c not in matched.values()]
    record |= {"test": record[part if split else "test"]} | ({"leak": True} if leak else {})
    name = name or "_".join(dict.fromkeys([data.index.root.resolve().name, index.table.stem, *([part] if split else [])]))
    metrics = {**trained, "cell": f"{run.name} on {name}", "classes": ours, "normal_class": test.normal_class,
               "data": {"name": data.source, "drawn": data.index.drawn, "scale": images.scale,
                        "table": str(index.table), "trained_on": card["data"]},
               "unmatched": {"run": [c for c in card["classes"] if c not in matched], "data": left}, "seen": seen, "bank": None,
               "matched": matched, "run": str(run.path), "weights": card["sha256"],
               "reading": {"csv": csv, **(reading or {})}, "split": record,
               "test": scores, "report": str(data.index.report),
               "device": device_name(where)}
    file = Path(out or run / "scores") / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    if (old := json_or_empty(file)) and _identity(old) != _identity(metrics):
        raise ValueError(f"{file} holds the scores of another run or of other images: say another --name")
    save_predictions(file.with_name(f"{name}.npz"), {"test": vars(test) | test.about}, ours, test.normal_class)
    write_json(file, metrics)
    return metrics | {"file": str(file)}, test


def _identity(metrics: Mapping) -> list:
    """What scores are of: the run, wherever its folder lies, and the images."""
    return [metrics.get("weights"), metrics.get("reading"), metrics["split"]["hash"]]


def whole(index: Index, images) -> ChestData:
    """A data set whose every image is in the test part."""
    ids, patients = index.frame["id"], index.frame["patient"]
    count = {"images": len(ids), "patients": int(patients.nunique()), "positive_share": float(index.has_finding().mean())}
    return ChestData(index, Split("whole table", np.full(len(ids), "test", dtype=object), hashlib.sha256(
        "\n".join(sorted(ids)).encode("utf-8", "surrogateescape")).hexdigest()[:16], {"test": count}, index.patients_from),
        images, index.labels())


def match_classes(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Our class -> theirs: the same name, else the same letters and digits, else a synonym. Each is used once.

    'Pleural_Thickening' is 'pleural thickening', 'Effusion' is 'Pleural Effusion', 'No Finding' is 'Normal'.
    """
    found: dict[str, str] = {}
    for spell in (str, _letters, _meaning):
        free = {spell(name): name for name in reversed(theirs) if name not in found.values()}
        found |= {name: free.pop(spell(name)) for name in ours if name not in found and spell(name) in free}
    return {name: found[name] for name in ours if name in found}


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _meaning(name: str) -> str:
    return "no finding" if is_normal(name) else _MEANING.get(_letters(name), _letters(name))


def external_note(metrics: Mapping) -> str:
    """What was scored on what, which classes were matched and which were not, in words."""
    renamed = [f"{ours} = {theirs}" for ours, theirs in metrics["matched"].items() if ours != theirs]
    lines = [f"trained on {metrics['data']['trained_on']['name']}, scored on {metrics['data']['name']} "
             f"({metrics['data']['table']}), at thresholds and temperature of the run's own validation part",
             f"{len(metrics['matched'])} classes matched by name"
             + (f", of which by another spelling or a synonym: {', '.join(renamed)}" if renamed else "")]
    lines += [f"classes of the {whose} without a counterpart, not scored: {', '.join(names)}"
              for whose, names in metrics["unmatched"].items() if names]
    if metrics["seen"]:
        lines.append(f"WARNING: {metrics['seen']:,} of {metrics['split']['test']['images']:,} images have the names of images "
                     "that the run was trained or validated on. If they are the same images, this is no external validation.")
    if metrics["seen"] is None:
        lines.append("the run has no split.csv: whether it was trained on some of these images cannot be checked")
    return "\n".join(lines)
