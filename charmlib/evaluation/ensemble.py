"""Ensembles as folders that are read like a run's: ``ensemble.json`` names the members, their weights and the merge."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from charmlib.evaluation.card import card_text
from charmlib.evaluation.combine import gate
from charmlib.evaluation.intervals import bootstrap, enough_patients, save_resamples
from charmlib.evaluation.leaks import split_of
from charmlib.evaluation.metrics import ap_by_class
from charmlib.evaluation.runs import FORMAT, RunFolder, chosen_on_validation, save_predictions
from charmlib.evaluation.score import evaluate_merged, score_part
from charmlib.files import read_json, write_csv, write_json, write_text

FILE = "ensemble.json"


def write_ensemble(out: str | Path, runs: Sequence[str | Path | RunFolder], *, weights: Sequence[float] | None = None,
                   how: str = "mean") -> RunFolder:
    """Score several runs as one, and write the folder ``out`` of that ensemble.

    It holds what a finished run's folder holds, but weights and history: ``predict`` reads the members, whose paths
    are kept relative to ``out``. ``weights`` and ``how`` as in :func:`charmlib.evaluation.combine.merge`; weights must not be
    chosen on the test part. Thresholds and temperature come from the merged validation part.

    Raises
    ------
    ValueError
        ``out`` is the folder of something else; members that differ in images, classes or labels.
    charmlib.evaluation.leaks.LeakError
        A member was trained on test images of another.
    """
    out, members = Path(out), [RunFolder.of(run) for run in runs]
    if out.is_dir() and any(out.iterdir()) and not (out / FILE).is_file():
        raise ValueError(f"{out} holds something else than an ensemble: name another folder")
    metrics, test, valid = evaluate_merged(members, how=how, weights=weights)
    out.mkdir(parents=True, exist_ok=True)
    first, normal = members[0], test.normal_class
    parts = {part: vars(p) | dict(p.about) for part, p in (("valid", valid), ("test", test))}
    save_predictions(out / "predictions.npz", parts, test.classes, normal)
    frames = [split_of(member) for member in members]
    hashes = dict.fromkeys(member.metrics["split"]["hash"] for member in members)
    if known := [frame for frame in frames if frame is not None]:  # of several splits, what any member was trained on
        write_csv(out / "split.csv", pd.concat(known).drop_duplicates("id"))
    if len(hashes) > 1:
        metrics["split"] = {**metrics["split"], "hash": hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]}
    chosen = chosen_on_validation(valid.labels, valid.logits, valid.classes)
    if all(member.trained for member in members):
        write_json(out / "model.json", {**first.card, **chosen, "vote_weight": None, "sha256": hashlib.sha256("".join(
            member.card["sha256"] for member in members).encode()).hexdigest()})
    samples = bootstrap(test.labels, test.logits, test.patients) if enough_patients(test.patients) else None
    save_resamples(out / "resamples.npz", samples)
    write_json(out / FILE, {"members": [os.path.relpath(member.path.resolve(), out.resolve()) for member in members],
                            "weights": None if weights is None else list(weights), "merge": how})
    scored = score_part(vars(valid), valid.classes, normal_class=normal)[0] if len(valid.ids) else None
    seconds = {key: sum(member.metrics["seconds"][key] or 0 for member in members) for key in ("train", "score", "overhead")}
    write_json(out / "metrics.json", {**metrics, "format": FORMAT, "cell": out.name, "hash": None, "code": None, "merge": how,
                                      "params": first.metrics["params"], "valid": scored, "seconds": seconds})
    write_text(out / "card.md", card_text(RunFolder(out).metrics))
    return RunFolder(out)


def members_of(folder: str | Path) -> tuple[list[Path], dict] | None:
    """The members' folders and ``how`` and ``weights`` of an ensemble; None for a run."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    record = read_json(file, "record of an ensemble", "write the ensemble again")
    return [Path(folder) / name for name in record["members"]], {"how": record["merge"], "weights": record["weights"]}


def gated(run: RunFolder, alpha: float) -> RunFolder:
    """The run with gated predictions (:func:`charmlib.evaluation.combine.gate`), and thresholds and temperature of them."""
    out = RunFolder(run.path)
    for part in ("valid", "test"):
        p = getattr(run, part)
        setattr(out, part, replace(p, logits=gate(p.logits, alpha, p.classes, p.normal_class)))
    out.choices = chosen_on_validation(out.valid.labels, out.valid.logits, out.valid.classes)
    return out


def gate_note(run: RunFolder, alpha: float) -> str:
    """What gating does to the average precision of the test part, in one line."""
    p, after = run.test, gated(run, alpha).test
    before, then = (np.array(list(ap_by_class(q.labels, q.logits, q.classes).values()))[p.findings] for q in (p, after))
    known = np.isfinite(before)
    return (f"gate {alpha:g}: mean AP {np.mean(before[known]):.4f} without, {np.mean(then[known]):.4f} with it "
            f"({np.mean(then[known]) - np.mean(before[known]):+.4f}); lower in {(then < before)[known].sum()} of {known.sum()} "
            "findings. Published: -0.010, -0.024 and -0.046 at 0.25, 0.5 and 1.")
