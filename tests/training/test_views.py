"""Test-time augmentation of a run, ensembles that predict, and submissions."""

import numpy as np
import pandas as pd
import pytest
import torch

from charmlib import Run
from charmlib.data.loaders import grey_to_network
from charmlib.data.views import MENUS, VIEWS
from charmlib.evaluation.combine import merge
from charmlib.evaluation.ensemble import gate_note, gated, members_of, write_ensemble
from charmlib.evaluation.leaks import LeakError, split_of
from charmlib.evaluation.runs import RunFolder, finish
from charmlib.evaluation.score import evaluate_run
from charmlib.evaluation.tables import run_table, split_note
from charmlib.grid.board import leaderboard
from charmlib.training.predict import predict, submission
from charmlib.training.views import head_share, merged, stored_views, tensors, with_views

pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


@pytest.fixture(scope="module")
def runs(phantoms, tmp_path_factory):
    """Two tiny finished runs, the second with views."""
    from tests.conftest import TINY

    folder, out = tmp_path_factory.mktemp("runs"), []
    for name, seed, tta in (("one", 1, "none"), ("two", 2, "flip")):
        run = Run.open({**TINY, "vote_weight": 0.5, "use_momentum": False, "use_attention": False, "stage1_epochs": 0,
                        "stage2_epochs": 1, "seed": seed, "classes": "nih15", "data_root": str(phantoms), "tta": tta,
                        "run_dir": str(folder / name)})
        run.train()
        run.score()
        finish(run.folder)
        out.append(RunFolder(folder / name))
    return out


def test_views_of_a_run_equal_a_loop_over_images_and_no_view_is_the_bits_of_one_pass(runs):
    run = Run.load(runs[0])
    rows = run.data.rows("test")[:5]
    names = MENUS["medium"]
    views, _ = run.views("test", names, rows)
    mean, std = tensors(run.net, "cpu")
    with torch.no_grad():
        for name in names:
            for i, row in enumerate(rows):
                grey = torch.from_numpy(run.data.images.take([row], axis=0))[None].float()
                want = run.net(grey_to_network(VIEWS[name].of(grey), mean, std))
                np.testing.assert_allclose(views[name][i], want[0], atol=1e-4)
        grey = torch.from_numpy(run.data.images.take(rows, axis=0))[:, None]
        assert np.array_equal(run.logits("test", rows)[0], run.net(grey_to_network(grey, mean, std)).numpy())
        assert merged(views, "none", "max", head_share(run.net)) is views["id"]


def test_votes_are_of_the_image_as_it_is_and_views_change_the_heads_share(runs):
    run = Run.load(runs[0])
    views, _ = run.views("test", MENUS["flip"], run.data.rows("test")[:20])
    share = head_share(run.net)
    assert set(share.tolist()) <= {0.5, 1.0} and 0.5 in share
    votes = views["id"] - share * views["id_head"]  # of the image as it is
    want = votes + share * merge([views["id_head"], views["flip_head"]], "mean")
    np.testing.assert_allclose(merged(views, "flip", "mean", share), want, atol=1e-5)
    each = merged(views, "flip", "logit_mean", share, votes="each")
    np.testing.assert_allclose(each, (views["id"] + views["flip"]) / 2, atol=1e-6)
    assert abs(each - merged(views, "flip", "logit_mean", share)).max() > 1e-4
    same = {name: views[name.replace("flip", "id")] for name in views}  # as of a network that does not see a flip
    np.testing.assert_allclose(merged(same, "flip", "gmean", share), views["id"], atol=1e-5)


def test_a_finished_runs_views_come_from_one_pass_and_equal_a_run_with_the_parameter(runs, monkeypatch):
    two = with_views(runs[1], "flip")
    np.testing.assert_allclose(two.test.logits, runs[1].test.logits, atol=1e-5)
    assert two.choices["temperature"] == pytest.approx(runs[1].card["temperature"], rel=1e-4)
    stored_views(runs[0], MENUS)
    monkeypatch.setattr(Run, "load", lambda *_, **__: pytest.fail("the network ran again"))
    held = stored_views(runs[0], MENUS)
    assert {f"{part}_{name}" for part in ("valid", "test") for name in VIEWS} <= set(held)
    assert np.array_equal(with_views(runs[0], "none").test.logits, runs[0].test.logits)
    scored = evaluate_run(with_views(runs[0], "heavy", "median"))[0]
    assert scored["test"]["mean_auc"] != runs[0].metrics["test"]["mean_auc"]


def test_an_ensembles_folder_is_taken_like_a_runs(runs, phantoms, tmp_path):
    out = write_ensemble(tmp_path / "g/both", runs, weights=[3, 1], how="gmean")
    assert out.status == "done" and members_of(out)[1] == {"how": "gmean", "weights": [3, 1]}
    np.testing.assert_allclose(out.test.logits, merge([run.test.logits for run in runs], "gmean", [3, 1]), atol=1e-6)
    files = {path.name: path for path in phantoms.rglob("*.png")}
    table = predict(out, [files[name] for name in out.test.ids[:12]])
    want = 1 / (1 + np.exp(-out.test.logits[:12]))
    np.testing.assert_allclose(table[[f"p_{name}" for name in out.test.classes]], want, atol=1e-5)
    scored, _ = evaluate_run(out)
    assert scored["test"]["mean_auc"] == pytest.approx(out.metrics["test"]["mean_auc"])
    assert set(split_of(out)["id"]) == set(split_of(runs[0])["id"])
    again = write_ensemble(tmp_path / "again", [out, runs[0]])
    assert len(predict(again, [files[again.test.ids[0]]])) == 1
    with pytest.raises(ValueError, match="something else"):
        write_ensemble(runs[0].path, runs)


def test_a_board_takes_an_ensemble_and_a_member_that_saw_anothers_test_images_is_refused(make_run, tmp_path):
    a, b = make_run("g/a"), make_run("g/b", seed=2)
    (tmp_path / "g/grid.yaml").write_text("{name: g, axes: {}, cells: []}")
    write_ensemble(tmp_path / "g/both", [a, b])
    with pytest.raises(LeakError, match="training or validation part"):
        write_ensemble(tmp_path / "wrong", [a, make_run("h/c", split="patient")])
    assert not (tmp_path / "wrong").exists()
    assert set(leaderboard(tmp_path / "g", write=False)["cell"]) == {"a", "b", "both"}


def test_a_gate_lowers_predictions_and_chooses_thresholds_anew(runs, phantoms):
    run, files = runs[0], {path.name: path for path in phantoms.rglob("*.png")}
    assert "findings" in gate_note(run, 0.5) and run.test.logits is not gated(run, 0.5).test.logits
    images = [files[name] for name in run.test.ids[:6]]
    plain, low = predict(run, images), predict(run, images, gate=0.5)
    keep = (1 - plain["p_No Finding"]) ** 0.5
    np.testing.assert_allclose(low["p_Effusion"], plain["p_Effusion"] * keep, atol=1e-5)
    want = gated(run, 0.5).choices["thresholds"]["youden"]["Effusion"]
    assert want != run.card["thresholds"]["youden"]["Effusion"]
    assert (low["call_Effusion"] == (low["p_Effusion"] >= want)).all()


@pytest.mark.parametrize("header", ["ImageID,StudyDate_DICOM,PatientID,,,", "id,Effusion,Mass,a,b,c"])
def test_a_submission_has_the_tables_ids_in_its_order(runs, phantoms, tmp_path, header):
    """CXR-LT's test table has unnamed empty columns; Kaggle's sample has ids without suffix and columns to fill."""
    files = sorted(phantoms.rglob("*.png"))[:6][::-1]
    names = [path.name if header.startswith("ImageID") else path.stem for path in files]
    table = tmp_path / "test.csv"
    table.write_text("\n".join([header, *(f"{name},0,0,,," for name in names)]))
    out = submission(runs[0], [phantoms], table)
    assert list(out) == [header.split(",")[0], *runs[0].test.classes] and out.iloc[:, 0].tolist() == names
    want = predict(runs[0], files)
    assert np.array_equal(out["Mass"], want["p_Mass"])
    for extra, says in (("nowhere.png", "1 of 7 images are missing.*nowhere"), (names[0], "more than once in the table")):
        table.write_text("\n".join([header, *(f"{name},0,0,,," for name in [*names, extra])]))
        with pytest.raises(ValueError, match=says):
            submission(runs[0], [phantoms], table)
    (tmp_path / "black").mkdir()
    (tmp_path / "black/broken.png").write_bytes(b"no picture")
    pd.DataFrame({"image": ["broken.png"]}).to_csv(table, index=False)
    with pytest.raises(ValueError, match="cannot be scored, such as .*broken.png"):
        submission(runs[0], [tmp_path / "black"], table)


def test_every_run_and_ensemble_has_a_card(runs, tmp_path):
    text = (runs[1] / "card.md").read_text()
    mean = runs[1].metrics["test"]["mean_auc"]
    for words in ("Research use only", f"{mean:.3f} (", runs[1].metrics["split"]["hash"], "tta: flip", "drawn phantoms"):
        assert words in text
    assert "Members: one, two" in (write_ensemble(tmp_path / "both", runs) / "card.md").read_text()


def test_a_leak_that_was_allowed_stands_on_every_table(tiny, tmp_path):
    from tests.nn.test_xrv import saved

    saved(tmp_path / "nih-state.pt", "resnet50", "model.")
    params = {**tiny, "arch": "resnet50", "use_momentum": False, "use_attention": False, "stage1_frozen_epochs": 1,
              "weights": str(tmp_path / "nih-state.pt"), "norm": "xrv", "stage1_epochs": 0, "stage2_epochs": 0}
    with pytest.raises(LeakError, match="have seen NIH images"):
        Run.open(params)
    run = Run.open({**params, "allow_leak": True})
    run.train()
    metrics = run.score()
    assert "LEAK" in split_note(metrics) and "LEAK" in run_table([{**metrics, "cell": "x"}])["split"][0]
    finish(run.folder)
    assert "LEAK" in (run.folder / "card.md").read_text()
