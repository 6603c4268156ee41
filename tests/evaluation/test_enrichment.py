"""Enrichment of a bank over its training part, against a slow twin."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import poisson

from charmlib.evaluation.enrichment import FEW, compare_enrichment, enrichment, enrichment_table, rows_of, training_shares
from charmlib.evaluation.intervals import interval

CLASSES = ("Common", "Middle", "Rare", "No Finding")


def part(n=400, people=80, seed=0):
    """Labels with holes, the last column 'No Finding'; and patients."""
    g = np.random.default_rng(seed)
    labels = (g.random((n, 3)) < [0.3, 0.04, 0.015]).astype(float)
    labels = np.concatenate([labels, ~labels.any(1, keepdims=True)], axis=1)
    labels[g.random(n) < 0.1, 1] = np.nan
    labels[:3, :3] = np.nan
    return labels, g.integers(people, size=n).astype(str)


def bank(labels, patients, n=60, seed=1):
    rows = np.random.default_rng(seed).integers(len(labels), size=n)
    slots = np.nan_to_num(labels[rows], nan=-1).astype(np.int8)
    return slots, patients[rows]


def units(row):
    """What one image or slot counts as: 1, 0 or None for each finding, none of them, and each group."""
    row = [None if v < 0 or v != v else int(v) for v in row]

    def some(members):
        return None if all(v is None for v in members) else int(1 in members)

    none = some(row[:3])
    return [*row[:3], None if none is None else 1 - none, some(row[:1]), some(row[1:2]), some(row[2:3])]


def slow(slots, who, labels, patients, times):
    """Enrichment with each patient counted so many times."""
    out = []
    for u in range(7):
        share = []
        for rows, people in ((slots, who), (labels, patients)):
            values = [(units(row)[u], times[p]) for row, p in zip(rows, people) if units(row)[u] is not None]
            total = sum(t for _, t in values)
            share.append(sum(v * t for v, t in values) / total if total else float("nan"))
        out.append(share[0] / share[1] if share[1] else float("nan"))
    return out


def poisson_limits(count):
    """Garwood's limits by bisection of the Poisson distribution itself."""
    def search(tail):
        low, high = 0.0, 50.0
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle) > 0 else (low, middle)
        return low

    under = search(lambda mean: 0.025 - poisson.sf(count - 1, mean)) if count else 0.0
    return under, search(lambda mean: poisson.cdf(count, mean) - 0.025)


def test_equals_the_slow_twin_in_every_resample():
    labels, patients = part()
    slots, who = bank(labels, patients)
    found = enrichment(slots, who, labels, patients, CLASSES, resamples=20, seed=3)
    names = np.unique(patients)
    figures = list(rows_of(found).values())
    order = [found["classes"][c] for c in CLASSES[:3]] + [found["no_finding"]]
    order += [found["groups"][g] for g in ("head", "medium", "tail")]
    assert [g["classes"] for g in order[4:]] == [["Common"], ["Middle"], ["Rare"]] and len(figures) == 7
    want = slow(slots, who, labels, patients, dict.fromkeys(names, 1))
    np.testing.assert_allclose([f["enrichment"] for f in order], want, rtol=1e-12)
    draws = np.random.default_rng(3).multinomial(len(names), np.full(len(names), 1 / len(names)), size=20)
    samples = np.array([slow(slots, who, labels, patients, dict(zip(names, times))) for times in draws])
    for u, figure in enumerate(order):
        resampled, patients_with = interval(samples[:, u]), len({w for row, w in zip(slots, who) if units(row)[u] == 1})
        if patients_with >= FEW:
            np.testing.assert_allclose(figure["interval"], resampled, rtol=1e-12)
        else:
            exact = poisson_limits(patients_with)
            known = [w for row, w in zip(slots, who) if units(row)[u] in (0, 1)]
            each = figure["slots"] / patients_with if patients_with else len(known) / len(set(known))
            scale = each / len(known) / figure["prevalence"]
            np.testing.assert_allclose(figure["interval"][:2], (min(resampled[0], scale * exact[0]),
                                                                max(resampled[1], scale * exact[1])), rtol=1e-9)
        assert figure["slots"] == sum(units(row)[u] == 1 for row in slots)


def test_a_bank_that_is_the_training_part_is_not_enriched_and_one_of_the_rare_is():
    labels, patients = part(4000, 900)
    found = enrichment(labels, patients, labels, patients, CLASSES)
    for figure in rows_of(found).values():
        assert figure["enrichment"] == pytest.approx(1) and figure["interval"][:2] == pytest.approx((1, 1))
        assert figure["expected"] == pytest.approx(1)
    rare = labels[:, 2] == 1
    found = enrichment(labels[rare], patients[rare], labels, patients, CLASSES)
    shares = training_shares(labels, CLASSES)
    assert found["classes"]["Rare"]["enrichment"] == pytest.approx(1 / shares["Rare"])
    assert found["classes"]["Rare"]["interval"][0] > 10 and found["no_finding"]["enrichment"] == 0
    assert list(shares) == ["Common", "Middle", "Rare", "no_finding"]


def test_what_a_stage_offers_is_no_choice_of_the_bank():
    """Slots drawn at random from the images with findings are as enriched as expected of them."""
    labels, patients = part(4000, 900)
    finding = (labels[:, :3] == 1).any(1)
    rows = np.flatnonzero(finding)
    found = enrichment(labels[rows], patients[rows], labels, patients, CLASSES, offered=finding)
    for name, figure in found["classes"].items():
        assert figure["enrichment"] == pytest.approx(figure["expected"]) and figure["expected"] > 1.5, name
    assert found["no_finding"]["expected"] == 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Banks drawn at random from the training part: 1 lies in about 95 of 100 intervals."""
    covered = []
    for seed in range(60):
        labels, patients = part(1500, 300, seed)
        low, high, _ = enrichment(*bank(labels, patients, 200, seed + 1000), labels, patients, CLASSES, resamples=200,
                                  )["classes"]["Common"]["interval"]
        covered.append(low <= 1 <= high)
    assert 0.85 <= np.mean(covered) <= 1


@pytest.mark.parametrize("prevalence", [0.002, 0.005, 0.02])
def test_intervals_cover_the_truth_for_rare_findings_too(prevalence):
    """Of a finding that one slot in 512 would hold many random banks hold none: their interval must not be 0 to 0."""
    covered, empty = [], 0
    for seed in range(60):
        generator = np.random.default_rng(seed)
        labels = (generator.random((8000, 1)) < prevalence).astype(float)
        patients = np.repeat(np.arange(2000), 4).astype(str)
        rows = generator.choice(8000, 512)
        figure = enrichment(labels[rows], patients[rows], labels, patients, ["Rare"], resamples=200)["classes"]["Rare"]
        covered.append(figure["interval"][0] <= 1 <= figure["interval"][1])
        empty += figure["slots"] == 0
    assert np.mean(covered) >= 0.93
    assert empty > 5 or prevalence > 0.002


def test_tables_are_sorted_by_prevalence_and_say_what_cannot_be_said():
    labels, patients = part()
    found = enrichment(*bank(labels, patients), labels, patients, CLASSES, resamples=50)
    table = enrichment_table(found)
    assert table["finding"].tolist() == ["Rare", "Middle", "Common", "no finding", "any tail finding", "any medium finding",
                                         "any head finding"]
    assert table["prevalence"].head(3).is_monotonic_increasing
    both = compare_enrichment({"a": found, "b": found})
    assert both["cell"].tolist() == ["a", "b"] and both.columns[2:5].tolist() == ["Rare", "Rare low", "Rare high"]
    assert (both["Rare expected"] == 1).all()
    one = enrichment(labels[:5], ["1"] * 5, labels[:5], ["1"] * 5, CLASSES)
    assert np.isnan(one["no_finding"]["interval"][0])
    assert pd.isna(enrichment_table(one)["enrichment"]).any()
    with pytest.raises(ValueError, match="the bank is empty"):
        enrichment(labels[:0], patients[:0], labels, patients, CLASSES)
    with pytest.raises(ValueError, match="2 of 4 slots are of patients who are not in the training part"):
        enrichment(labels[:4], [*patients[:2], "x", "000"], labels, patients, CLASSES)
