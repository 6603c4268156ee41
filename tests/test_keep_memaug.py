"""The table that holds each memory strategy against no memory, seed by seed."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.keep_memaug import against_none, rarest, setting
from charmlib.evaluation.compare import compare
from charmlib.evaluation.runs import RunFolder
from charmlib.evaluation.tables import MEAN


def test_differences_are_those_of_each_seed_in_the_mean(make_run, tmp_path):
    cells = [make_run(f"{name}_seed={seed}", skill=skill, seed=seed).name
             for name, skill in (("no_memory", 0.6), ("strategy=fifo", 1.0)) for seed in (1, 2)]
    table = against_none(tmp_path, pd.DataFrame({"cell": cells})).set_index("setting")
    assert list(table.index.sort_values()) == ["fifo", "no_memory"] and set(table["seeds"]) == {2}

    pairs = [compare(*(RunFolder(tmp_path / f"{name}_seed={seed}").test for name in ("no_memory", "strategy=fifo")))
             for seed in (1, 2)]
    means = [t[(t["class"] == MEAN) & (t["figure"] == "AUC")].iloc[0] for t in pairs]
    row = table.loc["fifo"]
    assert row["difference"] == pytest.approx(np.mean([m["difference"] for m in means]))
    assert row["difference_by_seed"] == " ".join(f"{m['difference']:+.4f}" for m in means)
    assert min(m["low"] for m in means) < row["difference_low"] < row["difference"] < row["difference_high"]
    metrics = RunFolder(tmp_path / cells[0]).metrics
    rare = rarest(metrics)
    assert len(rare) == 4 and max(metrics["train_prevalence"][c] for c in rare) <= min(
        p for c, p in metrics["train_prevalence"].items() if c not in rare)
    by_class = [t[(t["figure"] == "AUC") & t["class"].isin(rare)]["difference"].mean() for t in pairs]
    assert row["rare_difference"] == pytest.approx(np.mean(by_class))
    assert pd.isna(table.loc["no_memory", "difference"])


def test_a_cell_is_its_setting_and_its_seed():
    assert [setting(c) for c in ("strategy=hard_seed=85", "no_memory_seed=86")] == ["hard", "no_memory"]
