"""A finished run scored on another data set."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from charmlib.cli import cli, main
from charmlib.data.phantom import make_phantoms
from charmlib.evaluation.metrics import auc_by_class
from charmlib.evaluation.runs import RunFolder, finish
from charmlib.training.external import match_classes
from charmlib.training.predict import predict
from charmlib.training.run import Run


def test_classes_are_matched_by_name_letters_and_synonym():
    ours = ["Effusion", "Pleural_Thickening", "Mass", "No Finding", "Edema", "Infiltration"]
    theirs = ["Normal", "pleural thickening", "Pleural Effusion", "effusion", "Lung Opacity", "Nodule/Mass", "Pulmonary oedema"]
    assert match_classes(ours, theirs) == {"Effusion": "effusion", "Pleural_Thickening": "pleural thickening",
                                           "No Finding": "Normal", "Edema": "Pulmonary oedema"}
    assert match_classes(["a", "A"], ["A", "a"]) == {"a": "a", "A": "A"} and match_classes(["A"], ["B"]) == {}


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Phantoms of another seed, and a table of them with other names."""
    root = make_phantoms(tmp_path_factory.mktemp("other") / "elsewhere", images=80, size=32, seed=9)
    table = pd.read_csv(root / "Data_Entry_2017.csv")
    names = table["Finding Labels"].str.split("|")
    ours = {"Pleural Effusion": "Effusion", "cardiomegaly": "Cardiomegaly", "Lung Opacity": "Infiltration",
            "Normal": "No Finding"}
    pd.DataFrame({"image_id": table["Image Index"], "subject_id": table["Patient ID"], "View": table["View Position"],
                  **{new: names.map(lambda found, old=old: int(old in found)) for new, old in ours.items()}}
                 ).to_csv(root / "other.csv", index=False)
    return root


def test_a_run_is_scored_on_another_table(tiny, other, tmp_path):
    run = Run.open(tiny, stage1_epochs=1, stage2_epochs=1, classes="nih15")
    run.train()
    run.score()
    folder = RunFolder(run.folder)
    finish(folder)
    before = folder.predictions_file.read_bytes(), folder.metrics_file.read_bytes()
    (folder / "scores").mkdir()
    (folder / "scores/elsewhere_other_roc.png").write_text("old")
    os.link(folder / "scores/elsewhere_other_roc.png", tmp_path / "old.png")
    done = CliRunner().invoke(cli, ["score", str(folder), "--data-root", str(other), "--csv", "other.csv"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "old.png").read_text() == "old"  # replaced as a whole: no reader meets half a picture
    for words in ("Effusion = Pleural Effusion", "the run without a counterpart, not scored: Atelectasis", "Lung Opacity",
                  "80 test images", "without No Finding", "view AP", "WARNING"):
        assert words in done.output
    assert done.output.count("WARNING") == 2  # also in the note that stands under its picture
    assert before == (folder.predictions_file.read_bytes(), folder.metrics_file.read_bytes())
    found = json.loads((folder / "scores/elsewhere_other.json").read_text())
    assert found["classes"] == ["Cardiomegaly", "Effusion", "No Finding"] == list(found["matched"])
    assert found["unmatched"]["data"] == ["Lung Opacity"] and found["seen"] > 0 and found["split"]["name"] == "whole table"
    assert (folder / "scores/elsewhere_other_roc.png").read_bytes().startswith(b"\x89PNG")
    with np.load(folder / "scores/elsewhere_other.npz") as file:
        labels, logits = file["test_labels"], file["test_logits"]
        files = [next(other.rglob(str(name))) for name in file["test_ids"][:4]]
    assert found["test"]["auc"] == pytest.approx(auc_by_class(labels, logits, found["classes"]))
    assert found["test"]["mean_auc"] == pytest.approx(np.mean([found["test"]["auc"][c] for c in found["classes"][:2]]))
    for point, chosen in folder.card["thresholds"].items():
        assert all(row["threshold"] == chosen[name] for name, row in found["test"]["operating"][point].items())
    probability = predict(folder, files, device="cpu")["p_Effusion"].to_numpy()  # pixels and normalisation as for new images
    assert 1 / (1 + np.exp(-logits[:4, 1])) == pytest.approx(probability, abs=1e-4)

    part = CliRunner().invoke(cli, ["score", str(folder), "--data-root", str(other), "--csv", "other.csv", "--split", "patient",
                                    "--part", "valid", "--out", str(tmp_path / "out")])
    assert part.exit_code == 0 and (tmp_path / "out/elsewhere_other_valid.npz").is_file(), part.output
    pd.read_csv(other / "other.csv").iloc[:40].to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(ValueError, match="holds the scores of another run or of other images: say another --name"):
        CliRunner().invoke(cli, ["score", str(folder), "--data-root", str(other), "--csv", str(tmp_path / "other.csv")],
                           catch_exceptions=False)
    pd.read_csv(other / "other.csv")[["image_id", "subject_id", "Lung Opacity"]].to_csv(tmp_path / "none.csv", index=False)
    with pytest.raises(ValueError, match="no class of .* the table has Lung Opacity"):
        CliRunner().invoke(cli, ["score", str(folder), "--data-root", str(other), "--csv", str(tmp_path / "none.csv")],
                           catch_exceptions=False)


def test_names_that_are_not_utf8_and_junk_beside_them(tiny, tmp_path, monkeypatch, capsys):
    run = Run.open(tiny, stage1_epochs=1, stage2_epochs=1)
    run.train()
    run.score()
    finish(run.folder)
    new = tmp_path / "new"
    new.mkdir()
    picture = next((Path(tiny["data_root"]) / "images_001").rglob("*.png")).read_bytes()
    for name in (b"/a.png", b"/radiograf\xeda.png"):
        Path(os.fsdecode(os.fsencode(new) + name)).write_bytes(picture)
    Path(os.fsdecode(os.fsencode(new) + b"/bad\xed.png")).write_bytes(b"no picture")
    (new / "._a.png").write_bytes(b"\0\5\x16\7")

    def call(*more):
        monkeypatch.setattr(sys, "argv", ["charmlib", "predict", str(run.folder), str(new), "--out", str(tmp_path / "p.csv"),
                                          "--device", "cpu", *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    code, words = call()
    assert code == 2 and r"bad\xed.png: cannot be read" in words and "1 of 3 files" in words
    table = pd.read_csv(tmp_path / "p.csv")
    assert [Path(name).name for name in table["image"]] == ["a.png", r"bad\xed.png", r"radiograf\xeda.png"]
    assert table["p_Mass"][0] == table["p_Mass"][2] and table["refused"].notna().tolist() == [False, True, False]
    monkeypatch.setattr("charmlib.training.predict.kept_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    code, words = call()
    assert code == 130 and words.strip() == "stopped; the same command starts anew: nothing is kept"
