"""What the memory answers an image with, and what it holds, on one small trained run."""

import numpy as np
import pandas as pd
import pytest
import torch

from charmlib import Run
from charmlib.evaluation.runs import RunFolder, finish
from charmlib.viz.retrieved import plot_explanation
from tests.conftest import TINY

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")
FEATURES = {"answer": "features", "strategy": "rarity"}
SHORT = {"stage1_epochs": 1, "stage2_epochs": 1, "k": 3, **FEATURES}


@pytest.fixture(scope="module")
def folder(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("explained") / "run"
    Run.open({**TINY, **SHORT, "data_root": str(phantoms), "run_dir": str(folder)}).train()
    Run.load(folder).score()
    finish(folder)
    return folder


@pytest.fixture
def run(folder):
    return Run.load(folder)


@pytest.mark.parametrize("norm", ["both", "query", "memory", "none"])
def test_slots_similarities_and_weights_by_hand(run, norm):
    """The k most similar slots, one dot product at a time."""
    run.net.bank.bank_norm = norm
    image = RunFolder(run.folder).test.ids[5]
    told = run.bank.explain(image)
    row = run.data.index.frame.index[run.data.index.frame["id"] == image][0]
    x, _ = run.dataloaders(run.phase("stage2")).test_dl([run.data.index.frame.loc[row, "path"]]).one_batch()
    with torch.no_grad():
        z = run.net.eval().encode(x.as_subclass(torch.Tensor)).z[0].double().numpy()
    slots = run.net.bank.slots[:run.net.bank.filled].double().numpy()
    a = z / np.linalg.norm(z) if norm in ("both", "query") else z
    similar = [a @ (s / np.linalg.norm(s) if norm in ("both", "memory") else s) for s in slots]
    best = sorted(range(len(slots)), key=lambda i: -similar[i])[:3]
    assert told.table["slot"].tolist() == best and told.part == "test"
    np.testing.assert_allclose(told.table["similarity"], [similar[i] for i in best], rtol=1e-3, atol=1e-5)
    weights = np.exp([similar[i] - max(similar) for i in best])
    np.testing.assert_allclose(told.table["weight"], weights / weights.sum(), rtol=1e-2)
    frame = run.data.index.frame.set_index("id")
    for (_, slot), pixels in zip(told.table.iterrows(), told.retrieved):
        assert slot["patient"] == frame.loc[slot["image"], "patient"]
        assert (pixels == run.data.images[frame.index.get_loc(slot["image"])]).all()
        positive = [c for c in run.data.classes if frame.loc[slot["image"], c] == 1]
        assert slot["labels"] == ("|".join(positive) or "No Finding")


def test_probabilities_are_those_of_the_scores(run):
    test = RunFolder(run.folder).test
    for i in (0, 7):
        told = run.bank.explain(str(test.ids[i]))
        np.testing.assert_allclose(list(told.probabilities.values()), 1 / (1 + np.exp(-test.logits[i])), rtol=1e-3)
        assert told.labels == (tuple(c for c, v in zip(test.classes, test.labels[i]) if v == 1) or ("No Finding",))
        assert told.patient == test.patients[i] and told.top[0][1] == max(told.probabilities.values())


def test_a_training_image_is_not_answered_with_itself_and_nothing_is_written(run):
    before = {k: v.clone() for k, v in run.net.state_dict().items()}
    for image in run.bank.table()["image"].unique()[:4]:
        told = run.bank.explain(image)
        assert told.part == "train" and image not in told.table["image"].tolist() and len(told.table) == 3
    for name, value in run.net.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match=r"no image 'x\.png'.*such as"):
        run.bank.explain("x.png")


def test_a_gated_bank_shows_its_weights_as_used_and_an_empty_or_absent_one_says_so(run, phantoms, tmp_path):
    import matplotlib.pyplot as plt

    image = run.bank.cases(1)[0]
    empty = Run.open({**TINY, **FEATURES, "data_root": str(phantoms), "run_dir": str(tmp_path / "a"), "retrieval": "gated"})
    told = empty.bank.explain(image)
    assert "is empty" in told.note and told.table.empty and told.retrieved.shape == (0, 32, 32)
    empty.net.bank.train()(torch.randn(64, empty.net.features) * torch.linspace(0.1, 3, 64)[:, None])
    with torch.no_grad():
        empty.net.bank.gate.fill_(0.25)
    gated = empty.bank.explain(image)
    assert gated.table["weight"].sum() == pytest.approx(0.25, rel=1e-4) and gated.table["image"].isna().all()
    none = Run.open({**TINY, "data_root": str(phantoms), "run_dir": str(tmp_path / "b"), "use_bank": False}).bank.explain(image)
    assert "no memory bank" in none.note and len(none.probabilities) == 14
    for cases, words in ((told, "is empty"), ([none, told], "no memory bank"), (gated, "labels unknown")):
        figure = plot_explanation(cases, note="drawn")
        assert words in " ".join(" ".join(t.get_text() for t in figure.findobj(plt.Text)).split())
        plt.close(figure)


def test_cases_are_the_rarest_findings_of_different_patients(run):
    names = run.bank.cases(3)
    frame, train = run.data.index.frame.set_index("id"), run.data.labels[run.data.rows("train")]
    assert len(set(names)) == 3 and frame.loc[names, "patient"].nunique() == 3
    test = frame.iloc[run.data.rows("test")]
    assert set(names) <= set(test.index)
    rarest = min((c for c in run.data.classes if test[c].any()), key=lambda c: train[:, run.data.classes.index(c)].mean())
    assert names[0] == test.index[test[rarest] == 1][0]


def test_the_picture_names_images_labels_similarity_and_weight(run):
    import matplotlib.pyplot as plt

    cases = [run.bank.explain(image) for image in run.bank.cases(2)]
    figure = plot_explanation(cases, note="drawn phantoms")
    words = " ".join(" ".join(t.get_text() for t in figure.findobj(plt.Text)).split())
    for case in cases:
        assert case.image in words and f"{case.top[0][1]:.2f}" in words
        for _, slot in case.table.iterrows():
            wanted = slot["image"], f"similarity {slot['similarity']:.3f}", f"weight {slot['weight']:.3f}"
            assert all(text in words for text in wanted)
    assert sum(len(a.images) for a in figure.axes) == 2 * (1 + 3) and "drawn phantoms" in words
    plt.close(figure)


def test_metrics_keep_the_enrichment_of_the_last_bank(run):
    """Shares counted by hand from bank.csv and the split."""
    bank = RunFolder(run.folder).metrics["bank"]
    assert {"filled", "accepted", "enrichment"} == set(bank)
    held, kept = bank["enrichment"], pd.read_csv(run.folder / "bank.csv")
    assert held["slots"] == len(kept) == bank["filled"] and held["patients"] == kept["patient"].nunique()
    frame = run.data.index.frame.iloc[run.data.rows("train")]
    for name, figure in held["classes"].items():
        assert figure["share"] == pytest.approx(kept[name].mean()) and figure["slots"] == kept[name].sum()
        assert figure["prevalence"] == pytest.approx(frame[name].mean())
    finding = frame[list(run.data.classes)].any(axis=1)
    assert held["no_finding"]["prevalence"] == pytest.approx(1 - finding.mean())
    assert run.bank.shares()["no_finding"] == pytest.approx(1 - finding.mean())


def test_slots_that_were_offered_findings_only_are_expected_to_be_enriched(tiny):
    """Stage 1 alone: a finding is as much more frequent among its images as images without one are left out."""
    run = Run.open(tiny, **FEATURES, stage1_epochs=0, stage2_epochs=0)
    run.train()
    held, none = run.score()["bank"]["enrichment"], run.bank.shares()["no_finding"]
    assert 0.2 < none < 0.8 and held["no_finding"]["expected"] == 0
    assert all(figure["expected"] == pytest.approx(1 / (1 - none)) for figure in held["classes"].values()
               if figure["prevalence"])


@pytest.mark.parametrize("steps", ["first", "second", "both"])
def test_what_was_on_offer_follows_the_stage_that_wrote_the_slots(run, steps):
    rows, finding = run.data.rows("train"), run.data.index.has_finding()[run.data.rows("train")]
    history = run._read_history()
    border = run.net.bank.steps.item() - len(rows) // run.params["stage2_batch"]  # stage 2 had one epoch
    assert border == 2 * (finding.sum() // run.params["stage1_batch"])
    at = {"first": [0, border - 1], "second": [border, border + 1], "both": [border - 1, border]}[steps]
    weight = run.bank._offered(np.array(at), history)
    stage1, stage2 = finding / finding.sum(), np.full(len(rows), 1 / len(rows))
    want = {"first": stage1, "second": stage2, "both": (stage1 + stage2) / 2}[steps]
    np.testing.assert_allclose(weight, want, rtol=1e-12)
    run.params["stage1_images"] = "all"
    np.testing.assert_allclose(run.bank._offered(np.array(at), history), stage2, rtol=1e-12)
