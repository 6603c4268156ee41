import json
import warnings
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from charmlib.viz.curves import plot_roc
from charmlib.viz.heat import plot_heat
from charmlib.viz.heat_maps import heat_maps

STRANGE = r"Cost $5 $\frac$ {x}"  # matplotlib's mathematics, with an error in it


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
    whole = board(n_images=608, n_patients=266, positive_share=0.66)
    assert "608 test images of 266 patients, 66.0% with a" in " ".join(heat_maps(whole).get_suptitle().split())


def test_a_map_lies_on_the_window_that_the_network_reads():
    """Without a margin on the whole image, with an eighth a side on the middle 48 of 64 pixels."""
    pixels, heat = np.zeros((64, 64), np.uint8), np.eye(3)
    for margin, (low, high) in ((0.0, (-0.5, 63.5)), (0.125, (7.5, 55.5))):
        right = plot_heat(pixels, heat, "Mass", margin=margin).axes[1]
        assert right.images[1].get_extent() == [low, high, high, low]
        assert right.get_xlim() == (-0.5, 63.5) and right.get_ylim() == (63.5, -0.5)


def test_all_curves_with_their_auc_in_the_legend():
    from sklearn.metrics import roc_auc_score

    from charmlib.evaluation.runs import Predictions

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


@pytest.fixture
def scored(make_run):
    from charmlib.evaluation.score import evaluate_run

    return evaluate_run(make_run("g/a"))


def test_every_picture_names_its_data_and_every_class(scored):
    from charmlib.evaluation.tables import split_note
    from charmlib.viz.run_report import run_pictures

    metrics, test = scored
    metrics = json.loads(json.dumps({**metrics, "cell": "m$^$"}).replace('"Effusion"', json.dumps(STRANGE)))
    test = replace(test, classes=tuple(STRANGE if name == "Effusion" else name for name in test.classes))
    note = split_note(metrics)
    assert "drawn phantoms" in note and "patients" in note and "with a finding" in note and "official" in note
    for title, figure in run_pictures(metrics, test).items():
        heading = " ".join(figure.get_suptitle().split())
        assert "drawn phantoms" in heading and "test images of" in heading, title
        words = " ".join(t.get_text() for t in figure.findobj(plt.Text))
        for name in test.classes:
            assert name.replace("_", " ") in words, f"{name} is not in {title}"
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # matplotlib 3.10 took square roots of what is below an axis
            figure.canvas.draw()


def test_hundreds_of_classes_draw_the_rarest(scored):
    from charmlib.evaluation.runs import Predictions
    from charmlib.evaluation.score import score_part
    from charmlib.viz.run_report import PANELS, encoded_pictures, run_pictures

    metrics, generator = scored[0], np.random.default_rng(0)
    n, classes = 80, tuple(f"c{c:03d}" for c in range(200))
    labels = (generator.random((n, 200)) < np.linspace(0, 0.5, 200)).astype(np.float32)
    test = Predictions(np.arange(n).astype(str), np.arange(n).astype(str), labels, generator.normal(size=(n, 200)), classes)
    part = score_part(vars(test), classes, thresholds={"youden": dict.fromkeys(classes, 0.5)}, temperature=1.0, resamples=20,
                      prevalence=dict(zip(classes, labels.mean(0))))[0]
    figures = run_pictures({**metrics, "test": part}, test)
    panels = [a.get_title() for a in figures["ROC curves with interval bands"].axes if a.get_title()]
    rarest = sorted((k for k, v in test.positives.items() if v), key=test.positives.get)[:PANELS]
    assert {title.split(",")[0] for title in panels} == set(rarest)
    assert f"the {PANELS} rarest of 200 classes" in " ".join(figures["AUC by class"].get_suptitle().split())
    empty = Predictions(test.ids, test.patients, labels * 0, test.logits, classes)
    part = score_part(vars(empty), classes, thresholds={"youden": dict.fromkeys(classes)}, resamples=20,
                      prevalence=dict.fromkeys(classes, 0.0))[0]
    assert encoded_pictures({**metrics, "test": part}, empty)  # a test part without any positive
    plt.close("all")


def test_panels_show_the_stored_numbers(scored):
    from charmlib.viz.curves import plot_roc_bands
    from charmlib.viz.per_class import plot_counts

    metrics, test = scored
    part = metrics["test"]
    titles = " ".join(a.get_title() for a in plot_roc_bands(test, part).axes)
    name = max((n for n in test.classes if part["auc"][n] == part["auc"][n]), key=part["auc"].get)
    low, high, _ = part["intervals"]["auc"][name]
    assert f"{part['auc'][name]:.3f} ({low:.2f} to {high:.2f})" in titles
    point = part["operating"]["youden"]
    shown = texts(plot_counts(point))
    assert all(f"{row[k]:,}" in shown for row in point.values() for k in ("tp", "fp", "fn", "tn"))


def test_cooccurrence_counts_pairs():
    from charmlib.viz.cooccurrence import plot_cooccurrence

    labels = np.array([[1, 1], [1, 0], [1, np.nan], [0, 1]])
    assert texts(plot_cooccurrence(labels, "ab"))[:4] == ["3", "50%", "50%", "2"]


def test_a_report_needs_nothing_else(scored, tmp_path):
    from charmlib.viz.run_report import evaluation_text, write_evaluation

    metrics, test = scored
    text = evaluation_text(metrics, test, "f1")
    write_evaluation(tmp_path / "out", metrics, test, "f1")
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and "://" not in page.replace("https://arxiv", "")
    assert "drawn phantoms" in page and "sensitivity_0.90" in page and "Research use only" in page
    assert "operating point 'f1'" in text and "mean of " in text
    table = pd.read_csv(tmp_path / "out/per_class.csv").set_index("class")
    assert set(test.classes) <= set(table.index) and {"AUC", "AUC low", "TP", "F1 high"} <= set(table.columns)
    assert {"run", "split", "images", "patients", "positive_share", "point"} <= set(table.columns)


def test_colours_can_be_told_apart_by_the_colour_blind():
    """The pairs of colours that stand beside one another keep apart when red-green vision is missing (Machado 2009)."""
    from matplotlib.colors import to_rgb

    from charmlib.viz.style import FIRST, OKABE_ITO, SECOND

    deuteranopia = np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                             [-0.011820, 0.042940, 0.968881]])
    for one, other in ((FIRST, SECOND), (OKABE_ITO[2], SECOND)):
        seen = [deuteranopia @ np.array(to_rgb(c)) ** 2.2 for c in (one, other)]
        assert np.abs(seen[0] - seen[1]).max() > 0.15


def test_dollars_in_a_data_set_are_no_mathematics(phantoms):
    from charmlib.data.dataset import open_dataset
    from charmlib.viz.dataset_page import dataset_pictures
    from tests.conftest import TINY

    data = open_dataset({**TINY, "data_root": str(phantoms)})
    frame = data.index.frame.rename(columns={"Effusion": STRANGE}).assign(sex="$\\sex$", view="_$\\view$\udcff")
    data.index = replace(data.index, frame=frame, classes=tuple(STRANGE if c == "Effusion" else c for c in data.classes))
    for title, figure in dataset_pictures(data).items():
        figure.canvas.draw()
        shown = [text.get_text() for text in figure.findobj(plt.Text) if "$" in text.get_text()]
        assert shown and not any("mathdefault" in text for text in shown), title  # the numbers on logarithmic axes


def history(epochs=((1, 4), (2, 3)), best=(2, 1)):
    rows = [{"stage": stage, "epoch": epoch, "train_loss": 1.0, "valid_loss": 0.5 + abs(epoch - kept), "valid_auc": epoch / 9,
             "valid_ap": 1 / epoch,              "lr": 0.1, "seconds": 1.0, "bank_filled": 4, "bank_accepted": 0.5}
            for (stage, count), kept in zip(epochs, best) for epoch in range(1, count + 1)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("monitor, changes, kept", [("valid_loss", {}, [2, 5]), ("valid_auc", {}, [4, 7]),
                                                    ("valid_ap", {}, [1, 5]), ("last", {}, [4, 7]),
                                                    ("valid_loss", {"valid_loss": np.nan, "valid_auc": np.nan}, [4, 7])])
def test_curves_mark_the_kept_epochs_and_count_as_the_history_does(monitor, changes, kept):
    from charmlib.viz.history import plot_history

    figure = plot_history(history().assign(**changes), monitor=monitor)
    figure.canvas.draw()
    for axis in figure.axes:
        bands = [patch for patch in axis.patches if patch.get_width() == pytest.approx(0.6)]
        assert [round(patch.get_x() + 0.3) for patch in bands] == kept
        assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2", "3", "4", "1", "2", "3"]
    assert "kept epoch" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_a_heat_map_stands_beside_crop_and_memory_in_their_places():
    from charmlib.viz.heat import plot_heat

    pixels, heat = np.full((64, 64), 90, np.uint8), np.array([[0.0, 2.0], [1.0, 0.0]])
    figure = plot_heat(pixels, heat, "Mass", margin=0.125, box=(0.0, 0.5, 0.5, 1.0), crop=pixels[:20, :20],
                       slots=[(pixels, "first"), (None, "second $x$")] * 4, note="drawn")
    figure.canvas.draw()
    image, shaded, crop = [axis for axis in figure.axes if axis.images][:3]
    assert [axis.get_title() for axis in (image, shaded, crop)] == [
        "image, with the crop's border", "evidence for Mass", "crop, as the second path saw it"]
    assert shaded.images[1].get_extent() == [7.5, 55.5, 55.5, 7.5]
    assert image.patches[0].get_bbox().bounds == pytest.approx((31.5, 7.5, 24, 24))
    slots = [axis for axis in figure.axes if axis.get_title() in ("first", "second $x$")]
    assert [bool(axis.images) for axis in slots] == [True, False, True, False, True]
    assert "2 x 2 cells" in figure.get_suptitle() and "memory answers" in figure.get_suptitle()
    plain = plot_heat(pixels, heat * 0, "Mass")
    assert [axis.get_title() for axis in plain.axes] == ["image", "no positive evidence for Mass"]


def test_the_worst_errors_are_those_that_most_others_contradict():
    """Beside a loop over all images of all classes."""
    from charmlib.evaluation.runs import Predictions
    from charmlib.viz.errors import SHOWN, plot_errors, worst_errors

    g = np.random.default_rng(0)
    labels, logits = (g.random((60, 7)) < 0.3).astype(float), g.normal(size=(60, 7)).round(1)
    ids = np.array([f"{i}.png" for i in range(60)])
    found = worst_errors(Predictions(ids, ids, labels, logits, tuple("abcdefg")))
    for kind, positive in (("missed", 1), ("false", 0)):
        worst = []
        for c in range(7):
            own, others = logits[labels[:, c] == positive, c], logits[labels[:, c] != positive, c]
            worst.append(max(np.mean(others > s) if positive else np.mean(others < s) for s in own))
        assert [case["error"] for case in found[kind]] == pytest.approx(sorted(worst, reverse=True)[:SHOWN])
        for case in found[kind]:
            i, c = ids.tolist().index(case["image"]), "abcdefg".index(case["class"])
            assert labels[i, c] == positive and case["probability"] == pytest.approx(1 / (1 + np.exp(-logits[i, c])))
    assert plot_errors(found, lambda metrics, image: np.zeros((8, 8), np.uint8), {}).axes[0].get_title().startswith(
        f"{found['missed'][0]['class']}, p ")

    def missing(metrics, image):
        raise FileNotFoundError(image)

    assert plot_errors(found, missing, {}) is None


def test_ink_has_contrast_on_every_colour():
    from charmlib.viz.style import ink_on

    def light(colour):
        return np.dot([v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in colour], (0.2126, 0.7152, 0.0722))

    for colour in np.random.default_rng(0).random((300, 3)):
        ink = {"black": 0.0, "white": 1.0}[ink_on(colour)]
        a, b = sorted((light(colour), ink))
        assert (b + 0.05) / (a + 0.05) >= 4.5
