"""Heat maps of a run: in batches, beside the phantoms' boxes, and of a picture from elsewhere."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from charmlib import Run
from charmlib.cli import cli
from charmlib.data.dataset import ImageReader
from charmlib.data.loaders import grey_to_network
from charmlib.evaluation.boxes import MEAN, box_table
from charmlib.evaluation.runs import RunFolder
from charmlib.files import Damaged
from charmlib.nn.heat import grad_cam
from charmlib.training.heat import box_check, boxed, explain_picture, heat_of, maps_of_boxes, random_head, usual_stride
from charmlib.viz.heat import plot_boxed
from charmlib.viz.run_report import LOOKS, MEMORY, explained_cases, rarest_first, write_run_report


@pytest.fixture
def run(tiny):
    run = Run.open(tiny, use_momentum=False, image_size=64, stage1_frozen_epochs=0, stage1_epochs=0, stage2_epochs=1)
    run.train()
    return Run.load(tiny["run_dir"])


def test_maps_boxes_and_a_picture(run, tmp_path, monkeypatch):
    rows = run.data.rows("test")[:5]
    found = heat_of(run, rows, [1, 4], stride=8)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (run.net.mean, run.net.std))
    for i, row in enumerate(rows):  # one image after the other
        x = grey_to_network(torch.from_numpy(run.data.images[row].copy())[None, None], mean, std)
        np.testing.assert_allclose(found[:, i], grad_cam(run.net, x, [1, 4], 8)[:, 0].numpy(), rtol=1e-3, atol=1e-6)
    assert found.shape == (2, 5, 8, 8) and found.min() >= 0

    table, patients, left = boxed(run)
    assert not left and set(table["row"]) <= set(run.data.rows("test").tolist()) and len(patients) == len(table) > 20
    maps = maps_of_boxes(run, table, stride=8)
    i = len(table) // 2
    c = run.data.classes.index(table["finding"][i])
    np.testing.assert_allclose(maps["map"][i], heat_of(run, [table["row"][i]], [c], stride=8)[0, 0], rtol=1e-3, atol=1e-6)
    assert not np.allclose(maps["map"], maps["random head"])
    drawn, own = random_head(run).state_dict(), run.net.state_dict()
    assert {name.split(".")[0] for name in own if not torch.equal(own[name], drawn[name])} == {"head"}
    check = box_check(run, stride=8)
    means = check[check["finding"] == MEAN].set_index("method")
    assert list(means.index) == ["map", "another finding's map", "random head", "constant box", "centre"]
    assert means["hit"].between(0, 1).all() and (means["hit_low"] <= means["hit_high"]).all()

    # what scoring stores of them
    metrics = run.score()
    kept, order = RunFolder(run.folder).heat, sorted(set(table["row"]))
    assert usual_stride(run) == 8 and list(kept) == run.data.index.frame["id"].iloc[order].tolist()
    for at, name in ((i, "Mass"), (0, run.data.classes[0])):
        own = heat_of(run, [table["row"][at]], [run.data.classes.index(name)], stride=8)[0, 0]
        np.testing.assert_allclose(kept[table["id"][at]][name], own, rtol=2e-3, atol=1e-5)
    pd.testing.assert_frame_equal(pd.read_csv(run.folder.boxes_file), check, check_dtype=False)
    shown = box_table(run.folder.boxes_file)
    assert shown["hit rate low"].isna().tolist() == (shown["patients"] < 10).tolist()
    assert shown["method"].tolist()[:5] == list(means.index) and {*shown["method"][5:]} == {"map"}
    assert {*shown["finding"][5:]} == {*table["finding"]} and shown["boxes"][0] == len(table)
    pictures = explained_cases(run, metrics, run.folder.test)
    assert [*pictures] == [LOOKS, MEMORY] and all(picture.startswith(b"\x89PNG") for picture in pictures.values())
    text = write_run_report(run.folder / "report.html", metrics, run.folder.test, pictures).read_text()
    assert all(f"<h2>{title}</h2>" in text for title in (LOOKS, MEMORY, "Heat maps against radiologists&#x27; boxes"))
    drawn = [[axis.get_title() for axis in plot_boxed(run.folder, of, part, ImageReader()).axes]
             for of, part in ((metrics, run.folder.test), rarest_first(metrics, run.folder.test))]
    assert drawn[0] == drawn[1] and sum(map(bool, drawn[0])) == 5  # whatever the order of classes
    away = {**metrics, "params": {**metrics["params"], "data_root": str(tmp_path / "nowhere")}}
    assert plot_boxed(run.folder, away, run.folder.test, ImageReader()) is None
    assert LOOKS not in write_run_report(tmp_path / "away.html", away, run.folder.test, {}, run.folder).read_text()
    # of a window in the middle, boxes are in shares of that
    run.params |= {"system": "two_path", "crop": 16}
    window, _, _ = boxed(run)
    both = table.merge(window, on=["row", "finding"], suffixes=("", "_in"))
    np.testing.assert_allclose(both["x0_in"], ((both["x0"] - 0.375) / 0.25).clip(0, 1), atol=1e-9)
    outside = ~table.set_index(["row", "finding"]).index.isin(window.set_index(["row", "finding"]).index)
    lost = table[outside]
    assert len(both) < len(table) and ((lost["x1"] <= 0.375) | (lost["x0"] >= 0.625) | (lost["y1"] <= 0.375)
                                       | (lost["y0"] >= 0.625)).all()
    run.params |= {"system": "charm", "crop": 0, "heat_maps": "none"}
    run.score()
    assert not run.folder.heat_file.exists() and not run.folder.boxes_file.exists()
    run.params |= {"heat_maps": "all"}
    run.score()
    assert [*RunFolder(run.folder).heat] == run.folder.test.ids.tolist()
    run.folder.heat_file.write_bytes(b"no")
    with pytest.raises(Damaged, match="heat.npz.*score again"):
        _ = RunFolder(run.folder).heat

    # a picture from elsewhere: the same image from its file
    path = next(p for p in run.data.index.root.rglob("*.png") if p.name == run.data.index.frame["id"].iloc[rows[0]])
    told = explain_picture(run.folder, path, finding="Mass", stride=8)
    case = run.bank.explain(path.name, finding="Mass")
    assert told["probabilities"] == pytest.approx(case.probabilities, abs=1e-5)
    assert told["parts"] == pytest.approx(case.parts, abs=1e-4)
    assert told["logit"] == pytest.approx(sum(told["parts"].values()), abs=1e-4)
    want = heat_of(run, rows[:1], [run.data.classes.index("Mass")], stride=8)[0, 0]
    np.testing.assert_allclose(told["heat"], want, rtol=1e-3, atol=1e-6)

    (tmp_path / "no.png").write_text("no picture")
    command = ["explain", str(run.folder), str(path), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(cli, [*command, str(tmp_path / "no.png"), "--finding", "Mass", "--stride", "8"])
    assert done.exit_code == 2 and "the map is of the head alone" in done.output
    assert f"refused: {tmp_path}/no.png" in done.output
    kept = json.loads((tmp_path / f"out/000_{path.stem}.json").read_text())
    np.testing.assert_allclose(kept["heat"], told["heat"], rtol=1e-5)
    assert (tmp_path / f"out/000_{path.stem}.png").stat().st_size > 10_000
    done = CliRunner().invoke(cli, [*command, "--map", "crop"])
    assert done.exit_code and "no crop of this network follows a map" in str(done.exception) + done.output
    done = CliRunner().invoke(cli, [*command, "--map", "attention"])
    assert not done.exit_code, done.output
    kept = json.loads((tmp_path / f"out/000_{path.stem}.json").read_text())
    assert kept["map"] == "attention" and np.shape(kept["heat"]) == (2, 2)
    assert 0 < np.min(kept["heat"]) < np.max(kept["heat"]) < 1
    done = CliRunner().invoke(cli, [*command, "--finding", "Gout"])
    assert done.exit_code and "no class 'Gout'" in str(done.exception) + done.output
