"""Files of a run that are damaged, of another kind or from elsewhere: named with their remedy, never a traceback."""

import json

import numpy as np
import pytest

from charmlib.evaluation.operating import at_thresholds, choose_thresholds
from charmlib.evaluation.runs import RunFolder, save_predictions
from charmlib.evaluation.score import evaluate_run
from charmlib.evaluation.tables import operating_table, point_note
from charmlib.files import Damaged

READERS = {"metrics.json": lambda run: run.metrics, "model.json": lambda run: run.card, "predictions.npz": lambda run: run.test,
           "history.csv": lambda run: run.history}


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 0x80]) + content[at + 1:]


DAMAGES = {"empty": lambda content: b"", "half": lambda content: content[:len(content) // 2], "bit": flipped,
           "list": lambda content: b"[]", "dict": lambda content: b'{"format": 4}', "deep": lambda content: b"[" * 100_000,
           "noise": lambda content: bytes(range(128, 256)), "pickle": lambda content: b"\x80\x04N.",
           "zip": lambda content: b"PK\3\4" * 20}


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named_with_its_remedy(make_run, name):
    run = make_run("a")
    whole, remedy = (run / name).read_bytes(), "again|delete it"
    for damage in DAMAGES.values():
        (run / name).write_bytes(damage(whole))
        with pytest.raises(Damaged, match=rf"{name}.*({remedy})"):
            READERS[name](RunFolder(run))
    (run / name).write_bytes(whole)
    READERS[name](RunFolder(run))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_bootstrap_is_made_again_with_a_line(make_run, kind, capsys):
    run = make_run("a")
    want = RunFolder(run).resamples.auc
    (run / "resamples.npz").write_bytes(DAMAGES[kind]((run / "resamples.npz").read_bytes()))
    np.testing.assert_array_equal(RunFolder(run).resamples.auc, want)
    assert "resamples.npz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(("keys", "value", "says"), [
    (["valid"], ..., "has no valid"), (["test", "operating"], ..., r"test\.operating"), (["seconds"], {}, r"seconds\.train"),
    (["valid", "mean_auc"], "0.9", r"valid\.mean_auc is '0\.9'"), (["data"], [], r"data\.name"),
    (["params"], 3, r"params\.labels"), (["format"], 2, "format 2, this charmlib reads"), (["quick_check"], 1, "a flag")])
def test_a_record_without_what_its_readers_need_is_refused_by_key(make_run, keys, value, says):
    path = make_run("a") / "metrics.json"
    content = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    path.write_text(json.dumps(content))
    with pytest.raises(Damaged, match=says):
        _ = RunFolder(path.parent).metrics


@pytest.mark.parametrize(("change", "says"), [
    ({"more": 1}, "unknown keys"), ({"classes": ["A", "A"]}, "each once"), ({"classes": [1]}, "classes"),
    ({"classes": []}, "classes"), ({"norm": {"mean": [0.5], "std": [1.0]}}, "norm"),
    ({"norm": {"mean": [0.5] * 3, "std": [0.0] * 3}}, "norm"),
    ({"thresholds": {"youden": {"A": 0.5}}}, "thresholds"), ({"temperature": "1"}, "temperature"),
    ({"temperature": -1.0}, "temperature"), ({"vote_weight": 1.5}, "vote_weight"), ({"vote_weight": -1}, "vote_weight"),
    ({"params": {}}, "split_hash"), ({"sha256": None}, "sha256")])
def test_a_card_of_other_kinds_or_ranges_is_refused(make_run, change, says):
    path = make_run("a") / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(Damaged, match=rf"model\.json.*{says}"):
        _ = RunFolder(path.parent).card


def test_repeated_images_and_other_labels_are_refused_by_name(make_run, tmp_path):
    p = RunFolder(make_run("a")).test
    part = {"ids": p.ids, "patients": p.patients, "labels": p.labels, "logits": p.logits}
    twice, odd, short = p.ids.copy(), p.labels.copy(), p.logits[:-1]
    twice[3], odd[5, 2] = twice[0], 2.0
    for change, says in (({"ids": twice}, p.ids[0]), ({"labels": odd}, f"2.0 of class '{p.classes[2]}' in row 5"),
                         ({"logits": short}, "arrays of shape")):
        save_predictions(tmp_path / "predictions.npz", {"test": part | change}, p.classes)
        with pytest.raises(Damaged, match=rf"predictions\.npz.*{says}"):
            _ = RunFolder(tmp_path).test
    with pytest.raises(ValueError, match=f"of class '{p.classes[2]}'"):
        choose_thresholds(odd, p.logits, p.classes)


def test_thresholds_are_chosen_where_probabilities_are_saturated():
    """Logits of 40 and more are all 1.0 as probabilities, and of -800 and less all 0.0."""
    labels = np.array([0, 0, 1, 1, 0, 1])[:, None]
    for logits in ([40, 50, 60, 70, 41, 65], [-900, -890, -830, -820, -880, -810], [30, 30.000002, 30.000004, 31, 29, 30.5]):
        logits = np.array(logits, np.float32)[:, None]
        chosen = json.loads(json.dumps(choose_thresholds(labels, logits, ["a"])))
        for point in chosen.values():
            row = at_thresholds(labels, logits, ["a"], point)["a"]
            assert (row["tp"], row["fp"], row["fn"], row["tn"]) == (3, 0, 0, 3)


def test_thresholds_chosen_on_few_positives_are_marked(make_run):
    run = make_run("a")
    positives, test = RunFolder(run).valid.positives, evaluate_run(run, points=["sensitivity_0.55"])[0]["test"]
    few = {name for name, count in positives.items() if 0 < count < 10}
    assert few and len(few) < len(positives)
    for point in ("youden", "sensitivity_0.55"):
        notes = operating_table(test, point).set_index("class")["note"]
        assert notes[notes != ""].to_dict() == {name: f"chosen on {positives[name]} positives" for name in few}
        assert all(name in point_note(test, point).partition("fewer than 10 positives")[2] for name in few)
