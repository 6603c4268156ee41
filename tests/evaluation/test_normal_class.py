"""The class that means "no finding" counts in no mean."""

import numpy as np
import pytest

from charmlib.evaluation.compare import MEAN, compare
from charmlib.evaluation.intervals import interval, mean_of_defined
from charmlib.evaluation.metrics import mean_auc
from charmlib.evaluation.runs import Predictions, RunFolder
from charmlib.evaluation.score import evaluate_run, score_part
from charmlib.evaluation.tables import class_table
from charmlib.nih import NIH14, NO_FINDING


def drawn(n=300, seed=0):
    generator = np.random.default_rng(seed)
    labels = (generator.random((n, 3)) < 0.3).astype(np.float32)
    labels[:, 1] = labels[:, [0, 2]].max(1) == 0
    return labels, (labels * 1.5 + generator.normal(size=labels.shape)).astype(np.float32), np.arange(n) // 2


@pytest.mark.parametrize("name, said", [("No Finding", ""), ("normal", ""), ("clear", "clear")])
def test_it_counts_in_no_mean(name, said):
    labels, logits, patients = drawn()
    classes, findings = ("A", name, "B"), [0, 2]
    values = {"labels": labels, "logits": logits, "patients": patients}
    part, samples = score_part(values, classes, thresholds={}, prevalence={"A": 0.3, name: 0.5, "B": 0.3}, normal_class=said,
                               resamples=50)
    alone, _ = score_part({**values, "labels": labels[:, findings], "logits": logits[:, findings]}, ("A", "B"), thresholds={},
                          prevalence={"A": 0.3, "B": 0.3}, resamples=50)
    for key in ("mean_auc", "mean_ap", "micro_auc", "micro_ap", "groups"):
        assert part[key] == alone[key]
    for key in ("mean_auc", "mean_ap"):
        assert part["intervals"][key] == alone["intervals"][key]
    assert part["calibration"]["as_trained"]["mean_ece"] == alone["calibration"]["as_trained"]["mean_ece"]
    assert part["normal_class"] == name and name in part["auc"]  # named beside the findings
    assert mean_auc(labels, logits, classes, said) == part["mean_auc"]
    table = class_table(part)
    assert table["class"][0] == f"mean of 2 findings (without {name})" and name in set(table["class"])
    first = Predictions(np.arange(300).astype(str), patients, labels, logits, classes, said)
    second = Predictions(first.ids, patients, labels, logits + drawn(seed=1)[1], classes, said)
    row = compare(first, second, resamples=50).set_index(["class", "figure"]).loc[(MEAN, "AUC")]
    assert row["first"] == part["mean_auc"] and row["positives"] == labels[:, findings].sum()
    assert interval(mean_of_defined(samples.auc[:, first.findings])) == part["intervals"]["mean_auc"]


def test_an_undefined_normal_class_is_not_left_out_of_a_mean():
    labels, logits, patients = drawn()
    labels[:, 1] = 0
    part, _ = score_part({"labels": labels, "logits": logits, "patients": patients}, ("A", NO_FINDING, "B"), prevalence={},
                         resamples=20)
    assert class_table(part)["class"][0] == f"mean of 2 findings (without {NO_FINDING})"


def test_nih15_averages_the_14_findings(make_run):
    run = RunFolder(make_run("fifteen", classes="nih15"))
    metrics, test = evaluate_run(run)
    assert len(test.classes) == 15 and [test.classes[c] for c in test.findings] == list(NIH14)
    assert metrics["test"]["mean_auc"] == pytest.approx(np.nanmean([metrics["test"]["auc"][name] for name in NIH14]))
