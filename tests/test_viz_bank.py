"""Pictures of memory banks, and what a grid says of them."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import yaml

from charmlib.evaluation.enrichment import compare_enrichment, enrichment, training_shares
from charmlib.viz.bank_content import PANELS, plot_bank_history, plot_enrichment, plot_enrichment_map

CLASSES = tuple(f"Class_{i}" for i in range(14))


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def labels():
    g = np.random.default_rng(0)
    return (g.random((3000, 14)) < np.geomspace(0.004, 0.2, 14)).astype(float)


def found_in(labels, seed=0, **more):
    rows = np.random.default_rng(seed).choice(len(labels), 128)
    people = np.arange(len(labels)) // 4
    return enrichment(labels[rows], people[rows], labels, people, CLASSES, resamples=50, **more)


def history(filled=(4, 8, 8), stage=(1, 1, 2), counts=None):
    frame = pd.DataFrame({"stage": stage, "epoch": [0, 1, 0][:len(stage)], "filled": filled})
    for i, name in enumerate((*CLASSES, "no_finding")):
        frame[name] = counts[i] if counts else 1
    return frame


def words(figure):
    return " ".join(t.get_text() for t in figure.findobj(plt.Text))


def test_enrichment_is_drawn_from_the_rarest_down_with_its_interval_and_a_line_at_one(labels):
    found = found_in(labels, offered=labels.any(1))
    figure = plot_enrichment(found, title="t", note="drawn phantoms")
    axis = figure.axes[0]
    names = [t.get_text().split("  ")[0] for t in axis.get_yticklabels()]
    assert names[:14] == [n.replace("_", " ") for n in sorted(CLASSES, key=lambda c: found["classes"][c]["prevalence"])]
    assert names[14:] == ["no finding", "any tail finding", "any medium finding", "any head finding"]
    assert axis.get_xscale() == "log" and any(set(line.get_xdata()) == {1} for line in axis.lines)
    dots = next(line for line in axis.lines if line.get_label() == "this bank")
    drawn = dict(zip(dots.get_ydata(), dots.get_xdata()))
    heights = axis.get_yticks()
    zeros = [t for t in axis.texts if t.get_text() == "0"]
    for name, y in zip(sorted(CLASSES, key=lambda c: found["classes"][c]["prevalence"]), heights):
        value = found["classes"][name]["enrichment"]
        assert drawn[y] == pytest.approx(value) if value else any(t.xy[1] == y for t in zeros)
    assert "drawn phantoms" in words(figure) and "drawn at random" in words(figure)
    assert "drawn at random" not in words(plot_enrichment(found_in(labels)))


def test_enrichment_survives_json_and_a_single_patient(labels, tmp_path):
    from charmlib.files import write_json

    one = enrichment(labels[:4], ["1"] * 4, labels[:40], ["1"] * 40, CLASSES)
    write_json(tmp_path / "x.json", one)
    plot_enrichment(json.loads((tmp_path / "x.json").read_text())).canvas.draw()
    plot_enrichment(one).canvas.draw()


def test_a_history_shows_shares_over_prevalence_a_panel_a_setting(labels):
    shares = training_shares(labels, CLASSES)
    figure = plot_bank_history({"one": history(), "two seeds": [history(), history(filled=(8, 8, 8))]}, shares, note="drawn")
    first, second = figure.axes[:2]
    assert first.get_title() == "one" and second.get_title() == "two seeds (2 runs)"
    rarest = min(shares, key=shares.get)
    line = next(ln for ln in first.lines if len(ln.get_xdata()) == 3 and ln.get_color() == "#0072b2" and ln.get_ls() == "-")
    np.testing.assert_allclose(line.get_ydata(), np.array([1 / 4, 1 / 8, 1 / 8]) / shares[rarest])
    pooled = next(ln for ln in second.lines if len(ln.get_xdata()) == 3 and ln.get_color() == "#0072b2" and ln.get_ls() == "-")
    np.testing.assert_allclose(pooled.get_ydata(), np.array([2 / 12, 2 / 16, 2 / 16]) / shares[rarest])
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(legend) == 15 and legend[0].startswith(rarest.replace("_", " ")) and "no finding" in " ".join(legend)
    styles = {(h.get_color(), h.get_ls()) for h in figure.legends[0].get_lines()}
    assert len(styles) == 15


def test_more_settings_than_panels_and_odd_histories_are_drawn(labels):
    shares = training_shares(labels, CLASSES)
    many = plot_bank_history({f"s{i}": history() for i in range(PANELS + 3)}, shares)
    assert "3 more settings are not drawn" in words(many)
    none = history(counts=[0] * 15)
    for frames in ({"none": none}, {"a": none.head(1)}, {"empty": none.head(0)}, {"unfilled": history(filled=(0, 0, 4))},
                   {"without": pd.DataFrame(columns=["stage", "epoch", "filled"])}):
        plot_bank_history(frames, shares).canvas.draw()


def test_the_map_shows_the_numbers_of_the_table(labels):
    table = compare_enrichment({f"cell{i}": found_in(labels, i) for i in range(3)})
    shown = [t.get_text() for t in plot_enrichment_map(table).axes[0].texts]
    values = table[[c for c in table.columns if f"{c} low" in table]].to_numpy()
    assert len(shown) == np.isfinite(values).sum() == 3 * 18
    np.testing.assert_allclose([float(t) for t in shown], values.ravel(), atol=0.051)


@pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")
def test_a_grid_compares_the_banks_of_its_cells(make_run, labels):
    from charmlib.grid import leaderboard
    from charmlib.grid.report import bank_table, write_report

    for strategy, seed in (("rarity", 0), ("fifo", 1), ("fifo", 0)):
        run = make_run(f"g/{strategy}_{seed}", answer="features", strategy=strategy, seed=seed)
        metrics = json.loads((run / "metrics.json").read_text())
        names = list(metrics["train_prevalence"])
        found = json.loads(json.dumps(found_in(labels, seed)))
        found["classes"] = dict(zip(names, found["classes"].values()))
        metrics["bank"] = {"filled": 128, "accepted": 0.5, "enrichment": found}
        (run / "metrics.json").write_text(json.dumps(metrics))
        history().rename(columns=dict(zip(CLASSES, names))).to_csv(run / "bank_history.csv", index=False)
    off = make_run("g/off", use_bank=False)
    folder = off.parent
    (folder / "grid.yaml").write_text(yaml.safe_dump({"name": "g", "axes": ["strategy", "seed"], "cells": [
        {"id": p.parent.name, "params": {}} for p in folder.glob("*/metrics.json")]}))
    board = leaderboard(folder)
    page = write_report(folder, board).read_text()
    table = pd.read_csv(folder / "enrichment.csv")
    assert table["cell"].tolist() == ["fifo_0", "fifo_1", "rarity_0"]
    assert table["strategy"].tolist() == ["fifo", "fifo", "rarity"] and table["seed"].tolist() == [0, 1, 0]
    assert {names[0], f"{names[0]} low", "no finding", "any tail finding high"} <= set(table.columns)
    assert "Do the banks hold rare findings?" in page and "What filled the memory banks" in page
    for run in folder.glob("*/metrics.json"):
        run.write_text(json.dumps({**json.loads(run.read_text()), "bank": None}))
    assert bank_table(folder, board) is None
