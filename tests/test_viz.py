import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from charmlib.viz.grid import heat_maps
from charmlib.viz.roc import plot_roc


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def board(**changes):
    rows = [{"rank": r, "cell": f"c{r}", "momentum": 0.9, "k": k, "threshold": 0.1, "rule": rule, "valid_mean_auc": v,
             "test_mean_auc": t, "ci_low": t - 0.02, "ci_high": t + 0.02, "split": "official abc", "status": "done"}
            for r, (k, rule, v, t) in enumerate([(2, "rare", 0.7, 0.60), (3, "rare", 0.68, 0.61), (2, "angle", 0.6, 0.80)], 1)]
    return pd.DataFrame(rows).assign(**changes)


def texts(figure):
    return [t.get_text() for a in figure.axes for t in a.texts]


def test_a_further_axis_is_settled_by_validation_never_by_the_test_score():
    figure = heat_maps(board())
    assert sorted(texts(figure)) == ["0.600\n0.580 to 0.620", "0.610\n0.590 to 0.630"]
    assert "by validation" in figure.get_suptitle()


def test_other_splits_and_quick_checks_are_not_drawn():
    mixed = board(split=["official abc", "official abc", "patient xyz"], rule="rare")
    assert "0.800" not in "".join(texts(heat_maps(mixed)))
    quick = board(rank=[1, 2, pd.NA], rule="rare")
    assert "0.800" not in "".join(texts(heat_maps(quick)))
    assert heat_maps(board().drop(columns="k")) is None and heat_maps(board().head(1)) is None


def test_drawn_maps_say_so():
    assert "drawn" in heat_maps(board(split="official abc (drawn phantoms)")).get_suptitle()


def test_all_curves_with_their_auc_in_the_legend():
    from sklearn.metrics import roc_auc_score

    from charmlib.evaluation.results import Predictions

    g = np.random.default_rng(0)
    labels = (g.random((200, 14)) < 0.3).astype(float)
    labels[:, 13] = 0
    logits = labels + g.normal(size=labels.shape)
    names = tuple(f"class {i}" for i in range(14))
    figure = plot_roc(Predictions(np.arange(200), np.arange(200), labels, logits, names), title="t", note="n")
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert len(legend) == 14 and any("n/a" in t and "class 13" in t for t in legend)
    for i in range(13):
        assert any(t.startswith(f"{roc_auc_score(labels[:, i], logits[:, i]):.3f}") and f"class {i} " in t for t in legend)
    styles = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines if line.get_label()[0] != "_"}
    assert len(styles) == 14
