"""Enrichment of a memory bank: the share of each finding in its slots over its prevalence, with intervals over patients."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import chi2

from charmlib.evaluation.few import FEW
from charmlib.evaluation.intervals import LEVEL, RESAMPLES, SEED, Interval, draws, enough_patients, interval
from charmlib.evaluation.metrics import frequency_groups, prevalence
from charmlib.evaluation.runs import number
from charmlib.evaluation.tables import limits_of
from charmlib.nih import finding_columns

NONE = "no_finding"
"""The key and column of images without any finding, whether or not 'No Finding' is a class too."""


def enrichment(slots, slot_patients, labels, patients, classes: Sequence[str], *, offered=None, normal_class: str = "",
               resamples: int = RESAMPLES, seed: int = SEED) -> dict:
    """Share of the bank's slots with a finding over the finding's prevalence in the training part.

    At 1, the bank holds a finding as often as the training part does. Intervals are by bootstrap over the training part's
    patients: a patient's slots and images enter a resample together. With fewer than :data:`FEW` patients of the finding in
    the bank, the bootstrap is too narrow, and without any it has no spread. The limits are then widened to those of the exact
    Poisson interval for that number of patients (Garwood 1936), each with as many slots as such patients have on average.
    Intervals are for the bank of this one training; the spread between seeds needs further runs.

    ``slots`` (n_slots, n_classes) holds the labels of the filled slots: 1, 0, or -1 or NaN if unknown (left out, class by
    class). ``labels`` (n_images, n_classes) are those of the training part: 1, 0 or NaN. ``normal_class``, or a class named
    like 'No Finding', is no finding; it is reported as ``no_finding``. ``offered`` (n_images,) are weights: the probability of
    each image under slots drawn at random from the images on offer when they were written; equal by default. ``expected`` is
    the enrichment of such slots. It is above 1 if a stage shows only images with findings, which is not to a strategy's credit.

    Returns ``level``, ``resamples``, ``seed``, ``clustered_by``, ``slots``, ``patients`` (distinct ones in the bank), and the
    statistics of each of ``classes`` (by name), of ``no_finding``, and of ``groups`` (head, medium, tail: at least one of the
    group's findings; also its ``classes``). Statistics: ``prevalence``, ``slots`` (number that have it), ``share``,
    ``enrichment``, ``interval`` (low, high, share of resamples that do not define it) and ``expected``. Raises ValueError
    without slots, and for a slot of a patient who is not in the training part.
    """
    slots, labels = (np.where(np.asarray(v, np.float64) < 0, np.nan, np.asarray(v, np.float64)) for v in (slots, labels))
    if not len(slots):
        raise ValueError("the bank is empty: there is no share of its slots to compare")
    names, patient = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    at = np.searchsorted(names, np.asarray(slot_patients, dtype=str)).clip(max=len(names) - 1)
    strangers = int((names[at] != np.asarray(slot_patients, dtype=str)).sum())
    if strangers:
        raise ValueError(f"{strangers} of {len(slots)} slots are of patients who are not in the training part: the bank is of "
                         "another run or split")
    findings = finding_columns(classes, normal_class)
    share = prevalence(labels[:, findings], [classes[c] for c in findings])
    groups = {group: members for group, members in frequency_groups(share).items() if members}
    columns = [findings, *([list(classes).index(name) for name in members] for members in groups.values())]
    held, seen = _units(slots, columns), _units(labels, columns)

    counts = np.stack([_by_patient(v, who, len(names)) for units, who in ((held, at), (seen, patient))
                       for v in (units == 1, ~np.isnan(units))])  # (4, patients, units)
    point = _ratio(*counts.sum(1))
    if enough_patients(patients):
        drawn = np.concatenate([_ratio(*(weights.T @ count for count in counts))
                                for weights in draws(len(names), resamples, seed, int(np.clip(2**24 // len(names), 8, 256)))])
        limits = _widened([interval(column) for column in drawn.T], counts)
    else:
        limits = [Interval(float("nan"), float("nan"), 1.0)] * len(point)
    weight = np.ones(len(labels)) if offered is None else np.asarray(offered, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        rate, base = counts[0].sum(0) / counts[1].sum(0), counts[2].sum(0) / counts[3].sum(0)
        expected = (weight @ (seen == 1)) / (weight @ ~np.isnan(seen)) / base
    found = [{"prevalence": base[u], "slots": int(counts[0, :, u].sum()), "share": rate[u], "enrichment": point[u],
              "interval": limits[u], "expected": expected[u]} for u in range(len(point))]
    many = len(findings)
    return {"level": LEVEL, "resamples": resamples, "seed": seed, "clustered_by": "patient", "slots": len(slots),
            "patients": len(np.unique(at)), "classes": dict(zip((str(classes[c]) for c in findings), found)), NONE: found[many],
            "groups": {group: {"classes": members, **found[many + 1 + g]} for g, (group, members) in enumerate(groups.items())}}


def _widened(limits: Sequence[Interval], counts: np.ndarray) -> list[Interval]:
    held, of, seen, images = counts.sum(1)
    patients, in_bank = (counts[:2] > 0).sum(1)
    tail = (1 - LEVEL) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        slots_each = np.where(patients > 0, held / patients, of / in_bank)
        scale = slots_each / of / (seen / images)
        low = scale * np.where(patients > 0, chi2.ppf(tail, 2 * patients) / 2, 0.0)
        high = scale * chi2.ppf(1 - tail, 2 * patients + 2) / 2
    few = (patients < FEW) & np.isfinite(high)
    return [Interval(float(np.fmin(own.low, low[u])), float(np.fmax(own.high, high[u])), own.undefined) if few[u] else own
            for u, own in enumerate(limits)]


def _units(labels: np.ndarray, columns: Sequence[Sequence[int]]) -> np.ndarray:
    """(n, findings + 1 + groups) of 1, 0 and NaN from labels: each finding, none of them, any of each group.

    'None' and 'any' are unknown if all findings of an image are. Single unknown findings count as absent, as they do for the
    images of stage 1.
    """
    out = [labels[:, columns[0]]]
    for members in columns:
        any_ = np.where(np.isnan(labels[:, members]).all(1), np.nan, (labels[:, members] == 1).any(1).astype(float))
        out.append((1 - any_ if members is columns[0] else any_)[:, None])
    return np.concatenate(out, axis=1)


def _by_patient(values: np.ndarray, patient: np.ndarray, patients: int) -> np.ndarray:
    """(patients, units): sums of (n, units)."""
    return np.stack([np.bincount(patient, weights=column, minlength=patients) for column in values.T], axis=1)


def _ratio(held, of, seen, images) -> np.ndarray:
    """Share of slots over prevalence; NaN without known labels of slots or images, or without images of the finding."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((of > 0) & (seen > 0), held / of / (seen / images), np.nan)


def training_shares(labels, classes: Sequence[str], normal_class: str = "") -> dict[str, float]:
    """Prevalence in the training part of each finding, and of ``no_finding``: the reference of a bank's history."""
    labels = np.asarray(labels, np.float64)
    findings = finding_columns(classes, normal_class)
    return {**prevalence(labels[:, findings], [classes[c] for c in findings]),
            NONE: float(np.nanmean(_units(labels, [findings])[:, -1]))}


def rows_of(found: Mapping) -> dict[str, dict]:
    """Name -> statistics in reading order: findings by rising prevalence, 'no finding', 'any tail finding' and so on."""
    classes = sorted(found["classes"].items(), key=lambda item: number(item[1]["prevalence"], -1))
    return {**dict(classes), "no finding": found[NONE],
            **{f"any {name} finding": found["groups"][name] for name in ("tail", "medium", "head") if name in found["groups"]}}


def enrichment_table(found: Mapping) -> pd.DataFrame:
    """Columns: finding, prevalence, slots, share, enrichment, enrichment low, enrichment high, expected, undefined."""
    table = pd.DataFrame([
        {"finding": name, **{key: f[key] for key in ("prevalence", "slots", "share", "enrichment")},
         **limits_of("enrichment", f["interval"]), "expected": f["expected"], "undefined": f["interval"][2]}
        for name, f in rows_of(found).items()])
    return table.astype({c: float for c in table.columns if c not in ("finding", "slots")})


def enrichment_note(found: Mapping) -> str:
    """How enrichment is computed, in words."""
    return (f"{found['slots']:,} slots with images of {found['patients']:,} patients. Enrichment is the share of slots with a "
            f"finding over its prevalence in the training part, with {found['level']:.0%} intervals by bootstrap over its "
            f"patients, not narrower than an exact Poisson interval where fewer than {FEW} of them have it. 'Expected' is what "
            "slots drawn at random from the images of their stage would have: if stage 1 shows findings only, its slots are "
            "enriched without any choice.")


def compare_enrichment(cells: Mapping[str, Mapping]) -> pd.DataFrame:
    """One row per bank: cell, slots, then the enrichment of each finding (the rarest first), 'no finding' and the groups.

    Limits are in 'NAME low' and 'NAME high'. 'NAME expected' is the enrichment of slots drawn at random from the images on
    offer (see :func:`enrichment`).
    """
    rows = []
    for cell, found in cells.items():
        rows.append({"cell": cell, "slots": found["slots"]})
        for name, f in rows_of(found).items():
            rows[-1] |= {name: f["enrichment"], **limits_of(name, f["interval"]), f"{name} expected": f["expected"]}
    table = pd.DataFrame(rows)
    return table.astype({c: float for c in table.columns[2:]})
