"""What the demo says at its end."""

import pandas as pd

from benchmarks.demo_check import sentence
from charmlib.evaluation.runs import RunFolder


def test_the_demo_compares_charms_first_cell_with_the_plain_network_paired(make_run):
    runs = {"charm_b": make_run("charm_b", skill=1.0), "plain": make_run("plain", skill=0.3, seed=1),
            "charm_a": make_run("charm_a", skill=0.5, seed=2)}
    auc = {name: RunFolder(run).metrics["test"]["mean_auc"] for name, run in runs.items()}
    board = pd.DataFrame([{"rank": i, "cell": name, "test_mean_auc": auc[name]} for i, name in enumerate(runs, 1)])
    text = sentence(runs["plain"].parent, board, 0.6)
    assert f"(charm_b) has a mean test AUC of {auc['charm_b']:.3f}" in text and "charm_a" not in text
    assert f"difference of {auc['charm_b'] - auc['plain']:+.3f} (95 % " in text and "thumbnails 0.600" in text
    assert "say nothing of patients" in text
