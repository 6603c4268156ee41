import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY

ROOT = Path(__file__).parents[1]


pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


def charm(*args, cwd=ROOT):
    return subprocess.run([sys.executable, "-m", "charmlib", *map(str, args)], capture_output=True, text=True, cwd=cwd)


def test_phantom_and_cache(tmp_path):
    done = charm("phantom", tmp_path / "p", "--images", 40, "--size", 32)
    assert done.returncode == 0 and "40 drawn phantoms of 32 pixels" in done.stdout
    done = charm("cache", tmp_path / "p", "--size", 32, "--cache-dir", tmp_path / "c")
    assert done.returncode == 0 and "40 images at 32 pixels" in done.stdout and "nothing odd found" in done.stdout
    (folder,) = (p for p in (tmp_path / "c").iterdir() if p.is_dir())
    page = (folder / "data.html").read_text()
    assert "40 of 32 x 32" in done.stdout and page.count("data:image/png") == 4 and "drawn phantoms" in page
    images = sorted((tmp_path / "p").rglob("*.png"))
    images[5].write_bytes(images[6].read_bytes())
    images[7].write_bytes(b"no picture")
    checked = charm("cache", tmp_path / "p", "--size", 32, "--cache-dir", tmp_path / "c", "--verify")
    assert checked.returncode == 0, checked.stderr
    assert f"2 changed ({images[5].name}, {images[7].name})" in checked.stderr
    assert f"unreadable, left out: 1 ({images[7].name}: OSError" in checked.stdout


def test_a_cache_of_a_table_of_ones_own_is_shown_by_patient(tmp_path):
    charm("phantom", tmp_path / "p", "--images", 60, "--size", 32)
    rows = ["image,patient,Mass"] + [f"{path.name},{i // 2},{i % 3 == 0:d}"
                                     for i, path in enumerate(sorted((tmp_path / "p").rglob("*.png")))]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    done = charm("cache", tmp_path / "p", "--size", 32, "--cache-dir", tmp_path / "c", "--csv", tmp_path / "mine.csv")
    assert done.returncode == 0 and "split 'patient'" in done.stdout and "Mass" in done.stdout, done.stderr
    assert list((tmp_path / "c").glob("*/data.html"))


def test_a_cache_of_pictures_without_a_split_is_built_and_says_so(tmp_path):
    charm("phantom", tmp_path / "p", "--images", 40, "--size", 32)
    for path in (tmp_path / "p").glob("*list*"):
        path.unlink()
    done = charm("cache", tmp_path / "p", "--size", 32, "--cache-dir", tmp_path / "c", "--aspect", "pad")
    assert done.returncode == 0 and "40 images at 32 pixels" in done.stdout and "no parts to show the data by" in done.stdout


@pytest.mark.slow
def test_run_trains_and_tests_one_cell_and_again_does_nothing(phantoms, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**TINY, "stage1_epochs": 1, "stage1_frozen_epochs": 0}))
    args = ("run", tmp_path / "mine.yaml", "-p", f"data_root={phantoms}", "-p", "stage2_epochs=1", "--out", tmp_path / "out")
    done = charm(*args)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/metrics.json").is_file() and "stage 2 epoch 1/1" in done.stdout
    assert "done: mean test AUC 0." in done.stdout and f"report: {tmp_path}/out/report.html" in done.stdout
    assert (tmp_path / "out/report.html").is_file() and "next: python -m charmlib explore " in done.stdout
    again = charm(*args)
    assert again.returncode == 0 and "1 done, 0 to run" in again.stdout
    changed = charm(*args, "-p", "k=1")
    assert changed.returncode == 2 and "--rerun-changed" in changed.stderr


@pytest.mark.slow
def test_one_stage_without_validation_from_the_file_to_predictions(phantoms, tmp_path):
    import nbformat

    (tmp_path / "one.yaml").write_text(yaml.safe_dump({
        **TINY, "data_root": str(phantoms), "valid_fraction": 0, "patience": 0, "stage1_images": "all", "stage1_epochs": 1,
        "stage2_epochs": 0}))
    done = charm("run", tmp_path / "one.yaml", "--out", tmp_path / "out")
    assert done.returncode == 0 and "no validation part" in done.stdout and "stage 1 epoch 2/2" in done.stdout, done.stderr
    book = nbformat.read(tmp_path / "out/test.ipynb", as_version=4)
    said = "".join(o.get("text", "") for c in book.cells if c.cell_type == "code" for o in c.outputs)
    assert "no operating point: trained without a validation part" in said
    assert (tmp_path / "out/report.html").read_text().count("data:image/png") == 11
    image = next(phantoms.rglob("*.png"))
    done = charm("predict", tmp_path / "out", image, "--out", tmp_path / "p.csv")
    assert done.returncode == 0 and "1 images, probabilities only" in done.stdout, done.stderr
    assert charm("predict", tmp_path / "out", image, "--out", tmp_path / "p.csv", "--calibrated").returncode == 2


@pytest.mark.slow
def test_a_grid_with_a_failed_cell_does_not_exit_0(phantoms, tmp_path):
    (tmp_path / "damaged.pt").write_bytes(b"damaged")
    base = {**TINY, "data_root": str(phantoms), "weights": str(tmp_path / "damaged.pt"), "answer": "features"}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "grid_x.yaml").write_text("base: base.yaml\naxes: {k: [1]}\n")
    done = charm("grid", "run", tmp_path / "grid_x.yaml", "--out", tmp_path / "out")
    assert done.returncode == 1 and "1 of 1 cells failed: k1" in done.stderr
    status = charm("grid", "status", tmp_path / "out")
    assert "1 failed" in status.stdout and charm("grid", "report", tmp_path / "out").returncode == 1


@pytest.mark.parametrize(("args", "says"), [
    (("grid", "run", "params/grid_demo.yaml", "-p", "treshold=0.1"), "Did you mean 'threshold'"),
    (("grid", "run", "params/grid_dmo.yaml"), "Did you mean 'grid_demo.yaml'"),
    (("grid", "run", "params/grid_demo.yaml", "--shard", "3/2"), "wanted I/N"),
    (("run", "params/charm.yaml", "-p", "k=many"), "not a number"),
    (("run", "params/charm.yaml", "-p", "data_root=/nowhere"), "no folder /nowhere"),
    (("controls", "params/charm.yaml", "-p", "limit=50"), "whole test part"),
    (("run", "params/grid_demo.yaml"), "`python -m charmlib grid run params/grid_demo.yaml` runs it"),
    (("controls", "params/grid_demo.yaml"), "is a grid file (it has cells"),
    (("grid", "run", "params/plain.yaml"), "`python -m charmlib run params/plain.yaml` runs a file of parameters"),
    (("run", "params"), "params is a folder; name a YAML file"),
    (("run", "params/charm.yaml", "-p", "k"), "wanted name=value"),
    (("predict", "params/plain.yaml", "x.png"), "plain.yaml is a file; name the folder of a run or grid"),
    (("evaluate", "chramlib"), "no folder chramlib. Did you mean 'charmlib'?"),
    (("params", "--write", "README.md"), "does not appear to be JSON"),
    (("cache", "/nowhere"), "no folder /nowhere")])
def test_refused_input_is_one_clear_line_and_exit_2(args, says, tmp_path):
    out = ("--out", tmp_path / "out") if args[0] not in ("cache", "params") else ()
    done = charm(*args, *out)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_yaml_file_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("arch: ViT  # größer".encode("latin-1"))
    for command in (("run",), ("grid", "run"), ("controls",)):
        done = charm(*command, tmp_path / "mine.yaml")
        assert done.returncode == 2 and f"error: {tmp_path}/mine.yaml is not UTF-8 text" in done.stderr, done.stderr


def test_a_missing_module_of_systems_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setenv("CHARM_SYSTEMS", "nowhere_to_be_found")
    done = charm("params")
    assert done.returncode == 2 and "put its folder on PYTHONPATH" in done.stderr and "Traceback" not in done.stderr


def test_cuda_without_a_gpu_is_one_clear_line(phantoms, tiny, tmp_path):
    import torch

    from charmlib import Run

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    run = Run.open(tiny, stage1_epochs=0, stage2_epochs=0)
    run.train()
    done = charm("predict", run.folder, next(phantoms.rglob("*.png")), "--device", "cuda", "--out", tmp_path / "p.csv")
    assert done.returncode == 2 and done.stderr.startswith("error: device 'cuda': torch") and "Traceback" not in done.stderr


def test_an_error_without_words_is_named_by_its_class(capsys):
    import click

    from charmlib.session import entry_point

    @click.command()
    def silent():
        raise MemoryError

    with pytest.raises(SystemExit, match="2"):
        entry_point(silent, ValueError, args=[])
    assert capsys.readouterr().err == "error: MemoryError\n"


def test_the_run_of_a_grid_is_its_first_cell_and_said_to_be(make_run, tmp_path):
    from charmlib.evaluation.runs import RunFolder

    for name, skill in (("poor", 0.2), ("rich", 3.0)):
        make_run(f"g/{name}", skill=skill)
    cells = [{"id": name, "axes": {}, "params": RunFolder(tmp_path / "g" / name).metrics["params"]}
             for name in ("poor", "rich")]
    (tmp_path / "g/grid.yaml").write_text(yaml.safe_dump({"name": "g", "axes": [], "cells": cells}))
    done = charm("compare", tmp_path / "g", tmp_path / "g/poor")
    assert done.returncode == 0, done.stderr
    first, other = tmp_path / "g/rich", tmp_path / "g/poor"
    assert f"taking its first cell by validation AUC, {first}; others are named like {other}" in done.stdout
    assert f"first: {first}" in done.stdout
    RunFolder(tmp_path / "g/rich").metrics_file.unlink()
    RunFolder(tmp_path / "g/poor").metrics_file.unlink()
    done = charm("predict", tmp_path / "g", tmp_path)
    assert done.returncode == 2 and f"grid without a ranked cell: name the folder of one, such as {tmp_path}/g/" in done.stderr


def test_the_list_of_parameters():
    done = charm("params")
    assert done.returncode == 0 and "threshold: float = 0.2" in done.stdout


def test_a_notebooks_parameters_are_brought_up_to_date(tmp_path):
    import shutil

    import nbformat

    for name in ("train", "test"):
        path = tmp_path / f"{name}.ipynb"
        shutil.copy(ROOT / "notebooks" / path.name, path)
        book = nbformat.read(path, as_version=4)
        cell = next(c for c in book.cells if "parameters" in c.metadata.get("tags", []))
        right, cell.source = cell.source, cell.source.replace("workers: int = 0", "workers: int = 3")
        nbformat.write(book, path)
        assert charm("params", "--write", path).returncode == 0
        again = nbformat.read(path, as_version=4)
        assert [c.source for c in again.cells if "parameters" in c.metadata.get("tags", [])] == [right]


def test_evaluate_and_compare_finished_runs(make_run, tmp_path):
    first, second = make_run("g/one"), make_run("g/two", seed=3, skill=2.0)
    done = charm("evaluate", first, second, "--ensemble", "--point", "sensitivity_0.80", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "mean of the probabilities of one, two" in done.stdout and "Warning" not in done.stderr
    assert "operating point 'sensitivity_0.80'" in done.stdout
    assert done.stdout.count("test images of") == 3  # on every table
    for name in ("one", "two", "mean_of_2_runs"):
        assert (tmp_path / f"out/{name}/report.html").is_file() and (tmp_path / f"out/{name}/per_class.csv").is_file()
    done = charm("compare", first, second, "--out", tmp_path / "d.csv")
    assert done.returncode == 0 and "cannot be told apart" in done.stdout  # few patients have a class
    assert "100.0% of the resamples agree in sign" in done.stdout
    assert (tmp_path / "d.csv").read_text().startswith("class,figure,positives,first,second,difference,low,high,agree")
    assert charm("compare", first, first).returncode == 2 and charm("evaluate", first, "--ensemble").returncode == 2


def test_evaluate_and_compare_a_run_without_validation(make_run, tmp_path):
    usual, apart = make_run("g/usual"), make_run("g/apart", seed=3, valid_fraction=0, patience=0)
    done = charm("evaluate", usual, apart, "--ensemble", "--out", tmp_path / "out")
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert done.stdout.count("no operating point: trained without a validation part") == 2  # apart, and the mean with it
    page = (tmp_path / "out/apart/report.html").read_text()
    assert page.count("data:image/png") == 8 and "nothing to choose" in page and "Operating point '" not in page
    rows = (tmp_path / "out/apart/per_class.csv").read_text().splitlines()
    assert len(rows) > 15 and all(row.endswith(",apart,") for row in rows[1:])
    done = charm("compare", usual, apart)
    assert done.returncode == 0 and "agree in sign" in done.stdout and "sensitivity" not in done.stdout, done.stderr
    assert f"no operating points: trained without a validation part was {apart}" in done.stdout


def test_leaks_and_unknown_points_are_refused(make_run, tmp_path):
    official, patient = make_run("g/official"), make_run("h/patient", split="patient")
    for command in ("evaluate", "compare"):
        done = charm(command, official, patient)
        assert done.returncode == 2 and "training or validation part of" in done.stderr and "Traceback" not in done.stderr
    done = charm("evaluate", official, "--point", "yuden")
    assert done.returncode == 2 and "unknown operating point 'yuden'" in done.stderr
    (tmp_path / "empty").mkdir()
    assert charm("explore", tmp_path / "empty").returncode == 2


@pytest.mark.slow
def test_predict_equals_the_test_notebook_and_names_what_it_refuses(phantoms, tiny, tmp_path):
    import numpy as np
    import pandas as pd
    from PIL import Image
    from scipy.special import expit

    from charmlib import Run
    from charmlib.evaluation.runs import RunFolder, finish

    run = Run.open(tiny)
    run.train()
    run.score()
    finish(run.folder)
    test = RunFolder(run.folder).test
    files = {p.name: p for p in phantoms.rglob("*.png")}
    (tmp_path / "in").mkdir()
    for name in test.ids[:40]:
        (tmp_path / "in" / name).write_bytes(files[name].read_bytes())
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "in/photo.png")
    done = charm("predict", run.folder, tmp_path / "in", "--out", tmp_path / "p.csv")
    assert done.returncode == 2 and "photo.png: a colour picture" in done.stderr and "1 of 41 files" in done.stderr
    assert "TRAINED ON DRAWN PHANTOMS" in done.stdout
    table = pd.read_csv(tmp_path / "p.csv")
    table.index = table["image"].map(lambda p: Path(p).name)
    assert len(table) == 41 and table["refused"].dropna().index == ["photo.png"]
    assert "a colour picture" in table["refused"]["photo.png"] and table.loc["photo.png"].isna().sum() == 28
    assert all(len(cell.strip("0.")) < 13 for cell in (tmp_path / "p.csv").read_text().splitlines()[1].split(",")[3:17])
    thresholds = RunFolder(run.folder).card["thresholds"]["youden"]
    for c, name in enumerate(test.classes):
        want = expit(test.logits[:40, c].astype(float))
        np.testing.assert_allclose(table.loc[test.ids[:40], f"p_{name}"], want, atol=1e-5)
        if thresholds[name] is None:
            assert table[f"call_{name}"].isna().all()
        else:
            clear = abs(want - thresholds[name]) > 1e-5
            assert (table.loc[test.ids[:40], f"call_{name}"][clear] == (want >= thresholds[name])[clear]).all()
    done = charm("predict", run.folder, tmp_path / "in" / test.ids[0], "--out", tmp_path / "q.csv", "--calibrated")
    assert done.returncode == 0
    scaled, plain = pd.read_csv(tmp_path / "q.csv").iloc[0], table.loc[test.ids[0]]
    temperature = RunFolder(run.folder).card["temperature"]
    logit = np.log(plain["p_Effusion"] / (1 - plain["p_Effusion"]))
    assert scaled["p_Effusion"] == pytest.approx(expit(logit / temperature), abs=1e-5)
    done = charm("predict", run.folder, tmp_path / "in", "--out", tmp_path / "new/r.csv", "--point", "sensitivity_0.55")
    assert set(pd.read_csv(tmp_path / "new/r.csv")["point"]) == {"sensitivity_0.55"}
    ids = test.ids[:40][::-1].tolist()
    pd.DataFrame({"ImageID": ids}).to_csv(tmp_path / "test.csv", index=False)
    asked = ("predict", run.folder, phantoms, "--csv", tmp_path / "test.csv", "--submission")
    done = charm(*asked, tmp_path / "to/send.csv")
    assert done.returncode == 0 and "40 images, 14 classes" in done.stdout, done.stderr
    sent = pd.read_csv(tmp_path / "to/send.csv")
    assert list(sent) == ["ImageID", *test.classes] and sent["ImageID"].tolist() == ids
    np.testing.assert_allclose(sent["Effusion"], table.loc[ids, "p_Effusion"], atol=1e-6)
    (tmp_path / "test.csv").write_text("ImageID\nnowhere.png\n")
    done = charm(*asked, tmp_path / "none.csv")
    assert done.returncode == 2 and "nowhere" in done.stderr and not (tmp_path / "none.csv").exists()
    assert charm(*asked[:-3], "--submission", tmp_path / "none.csv").returncode == 2
    assert charm("predict", run.folder, tmp_path / "nowhere").returncode == 2
    assert charm("predict", run.folder, tmp_path / "in", "--point", "yuden").returncode == 2
