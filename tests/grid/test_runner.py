"""Grids through papermill and Dask, with real child processes, on phantoms."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from charmlib.evaluation.runs import RunFolder
from charmlib.grid import leaderboard, run_grid, runner
from charmlib.grid.cells import CellFolder, GridError, cell_hash, find_notebooks, notebook_code
from charmlib.grid.cluster import Means, local_cluster
from charmlib.grid.spec import load_grid
from charmlib.grid.worker import child_environment
from charmlib.params import ParameterError, resolve
from tests.grid.conftest import CELLS, ROOT, small_grid


@pytest.mark.slow
def test_a_grid_leaves_all_its_files(done):
    _, out, said = done
    board = leaderboard(out)
    assert board["status"].tolist() == ["done"] * 2 and board["rank"].tolist() == [1, 2]
    assert list(board.columns) == ["rank", "cell", "momentum", "k", "threshold", "valid_mean_auc", "test_mean_auc", "ci_low",
                                   "ci_high", "same_as_first", "diff_first", "diff_low", "diff_high", "configuration",
                                   "seeds_diff", "seeds_low", "seeds_high", "survives", "split", "n_images", "n_patients",
                                   "positive_share", "seconds", "overhead_seconds", "training_of", "status"]
    for name in ("leaderboard.csv", "roc.png", "roc_bands.png", "report.html", "grid.yaml", "split.csv", "enrichment.csv"):
        assert (out / name).stat().st_size > 0, name
    for cell in board["cell"]:
        assert {p.name for p in (out / cell).iterdir() } == {
            "params.yaml", "train.ipynb", "test.ipynb", "model.safetensors", "model.json", "history.csv", "predictions.npz",
            "heat.npz", "boxes.csv", "resamples.npz", "metrics.json", "report.html", "log.txt", "bank_history.csv", "bank.csv",
            "card.md"}
        metrics = RunFolder(out / cell).metrics
        assert metrics["cell"] == cell and len(metrics["hash"]) == 16 and metrics["seconds"]["overhead"] > 0
        params = yaml.safe_load((out / cell / "params.yaml").read_text())
        assert resolve(params) == params and params["run_dir"] == str(out / cell)
        for name in ("train", "test"):
            book = nbformat.read(out / cell / f"{name}.ipynb", as_version=4)
            assert not any(o.output_type == "error" for c in book.cells if c.cell_type == "code" for o in c.outputs)
    assert any("stage 2 epoch 2/2" in line for line in said)  # one line an epoch reaches the caller


@pytest.mark.slow
def test_each_cell_has_the_scores_of_its_own_k(done):
    """The cells score differently, so that results in the wrong folder would be noticed, here and in every other test."""
    from charmlib import Run

    _, out, _ = done
    kept = [RunFolder(out / cell).test.logits for cell in CELLS]
    assert np.abs(kept[0] - kept[1]).max() > 0.01
    assert len({RunFolder(out / cell).metrics["test"]["mean_auc"] for cell in CELLS}) == 2
    for cell, k, logits in zip(CELLS, (1, 2), kept):
        run = Run.load(out / cell)
        assert run.net.bank.k == RunFolder(out / cell).metrics["params"]["k"] == k
        np.testing.assert_allclose(run.logits("test")[0], logits, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_validation_ranks_and_the_test_score_is_beside(done):
    _, out, _ = done
    board = leaderboard(out)
    assert board["valid_mean_auc"].is_monotonic_decreasing
    for _, row in board.iterrows():
        metrics = RunFolder(out / row["cell"]).metrics
        assert (row["valid_mean_auc"], row["test_mean_auc"]) == (metrics["valid"]["mean_auc"], metrics["test"]["mean_auc"])
        assert row["ci_low"] <= row["test_mean_auc"] <= row["ci_high"] and "drawn" in row["split"]
        assert row["n_images"] == metrics["split"]["test"]["images"]


@pytest.mark.slow
def test_finished_cells_are_skipped_and_the_board_is_the_same(done):
    path, out, _ = done
    board = leaderboard(out)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    said = []
    again = run_grid(path, out=out, say=said.append)
    assert before == {p: p.stat().st_mtime_ns for p in out.glob("*/*")}
    pd.testing.assert_frame_equal(again, board)
    assert any("2 done, 0 to run" in line for line in said)


@pytest.mark.slow
def test_the_report_is_one_file_that_says_what_it_shows(done):
    _, out, _ = done
    board = leaderboard(out)
    page = (out / "report.html").read_text()
    assert "http://" not in page and "https://" not in page and page.count("data:image/png;base64,") == 6
    for text in ("drawn phantoms", "test images of", "Research use only", *board["cell"]):
        assert text in page


@pytest.mark.slow
def test_a_finished_cell_of_other_settings_is_refused_by_name_then_rerun_when_asked(done, phantoms, tmp_path):
    _, out, _ = done
    mine = tmp_path / "out"
    shutil.copytree(out, mine)
    path = small_grid(tmp_path, phantoms, momentum=[0.5], k=[1], threshold=[0.1])
    with pytest.raises(GridError, match=r"1 finished or started cells.*m0\.5_k1_t0\.1.*--rerun-changed"):
        run_grid(path, ["seed=7"], out=mine)
    board = run_grid(path, ["seed=7"], out=mine, rerun_changed=True)
    assert RunFolder(mine / CELLS[0]).metrics["params"]["seed"] == 7
    assert set(board["cell"]) == set(CELLS)  # the other cell stays on the board


@pytest.mark.slow
def test_a_failed_cell_keeps_its_traceback_the_others_go_on_and_the_next_call_tries_again(done, phantoms, tmp_path):
    """The weight file of one cell is damaged; then it is replaced."""
    import timm
    import torch

    weights = tmp_path / "weights.pt"
    weights.write_bytes(b"damaged")
    grid = {"base": "base.yaml", "cells": [{"name": "broken", "weights": str(weights)}, {"name": "sound"}]}
    small_grid(tmp_path, phantoms, k=[1])
    path = tmp_path / "grid_two.yaml"
    path.write_text(yaml.safe_dump(grid))
    said = []
    board = run_grid(path, out=tmp_path / "out", say=said.append).set_index("cell")
    assert board.loc["broken", "status"] == "failed" and board.loc["sound", "status"] == "done"
    assert "cannot be read safely" in (tmp_path / "out/broken/error.txt").read_text()
    book = nbformat.read(tmp_path / "out/broken/train.ipynb", as_version=4)
    assert any(o.output_type == "error" for c in book.cells if c.cell_type == "code" for o in c.outputs)
    assert any("broken FAILED" in line for line in said)
    torch.save(timm.create_model("test_resnet").state_dict(), weights)
    board = run_grid(path, out=tmp_path / "out", say=said.append).set_index("cell")
    assert board.loc["broken", "status"] == "done" and not (tmp_path / "out/broken/error.txt").exists()


@pytest.mark.slow
def test_a_half_done_cell_never_goes_on_under_other_settings(done, tmp_path):
    """A trained but unscored cell: refused by name with another k, replaced when asked."""
    path, out, _ = done
    mine = tmp_path / "out"
    shutil.copytree(out, mine)
    cell = mine / CELLS[0]
    (cell / "cell.json").write_text(json.dumps({"id": cell.name, "hash": RunFolder(cell).metrics["hash"], "spent": 0.0}))
    (cell / "metrics.json").unlink()
    with pytest.raises(GridError, match=r"1 finished or started cells.*m0\.5_k1_t0\.1"):
        run_grid(path, ["k=1", "seed=7"], out=mine)
    assert (cell / "model.safetensors").is_file()
    run_grid(path, ["k=1"], out=mine, say=lambda line: None)  # the same settings: only scored
    assert (cell / "history.csv").read_text() == (out / CELLS[0] / "history.csv").read_text()


def no_cells_run(monkeypatch, runner, instead):
    """Everything but the cluster and the cells themselves; their jobs are given to ``instead``."""
    monkeypatch.setattr(runner, "local_cluster", lambda *a: contextlib.nullcontext())
    monkeypatch.setattr(runner, "Schedule", lambda cells, jobs, *a, **k: SimpleNamespace(run=lambda: instead(jobs)))


def test_a_grid_can_be_looked_at_before_it_is_done(phantoms, tmp_path, monkeypatch):
    """Its record is there, and whole, from the first moment on, also when a call runs a shard of it."""
    from charmlib.grid import runner

    seen = []
    no_cells_run(monkeypatch, runner, lambda jobs: seen.append(leaderboard(tmp_path / "out")))
    path = small_grid(tmp_path, phantoms, k=[1, 2], threshold=[0.1, 0.2])
    run_grid(path, out=tmp_path / "out", shard=(1, 2), say=lambda line: None)
    assert len(seen[0]) == 4 and set(seen[0]["status"]) == {"pending"}


def test_one_data_set_has_one_cache_from_wherever_it_is_named(phantoms, tmp_path, monkeypatch):
    """Named relatively by the caller and absolutely by the cells, images were decoded and stored twice."""
    from charmlib.grid import runner

    jobs = []
    no_cells_run(monkeypatch, runner, jobs.extend)
    monkeypatch.setenv("CHARM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(phantoms.parent)
    run_grid(small_grid(tmp_path, phantoms.name, k=[1]), out=tmp_path / "out", say=lambda line: None)
    from charmlib.data.dataset import open_dataset

    monkeypatch.chdir(tmp_path)
    open_dataset(jobs[0]["params"])
    assert len(list((tmp_path / "cache").glob("*/pixels.npy"))) == 1


@pytest.mark.slow
def test_a_wrong_axis_is_refused_before_anything_is_written(phantoms, tmp_path):
    path = small_grid(tmp_path, phantoms, treshold=[0.1])
    with pytest.raises(ParameterError, match="Did you mean 'threshold'"):
        run_grid(path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_quick_check_is_marked_and_never_ranked(phantoms, tmp_path):
    path = small_grid(tmp_path, phantoms, k=[1])
    board = run_grid(path, ["limit=60"], out=tmp_path / "out", say=lambda line: None)
    assert board["status"].tolist() == ["quick check"] and board["rank"].isna().all()
    assert (tmp_path / "out/report.html").is_file()


def test_a_call_for_one_fold_leaves_the_splits_of_earlier_calls(phantoms, tmp_path):
    """A cross-validation that is run fold by fold needs every split: the board checks its cells for leaks."""
    path, hashes = small_grid(tmp_path, phantoms, split=["fold:1/2", "fold:2/2"]), []
    for fold in (1, 1, 2, 1, 2):
        of_cell, *_ = runner._prepare(load_grid(path, [f"split=fold:{fold}/2"]), tmp_path / "out", lambda line: None)
        hashes += of_cell.values()
    assert len({*hashes}) == 2
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"split.csv", f"split_{hashes[2]}.csv"}
    tested = [frozenset(frame["id"][frame["part"] == "test"]) for frame in map(pd.read_csv, (tmp_path / "out").iterdir())]
    assert len({*tested}) == 2
    (tmp_path / "out/split.csv").write_bytes(b"\xff\x00 no table")
    runner._prepare(load_grid(path, ["split=fold:1/2"]), tmp_path / "out", lambda line: None)
    assert len(pd.read_csv(tmp_path / "out/split.csv")) > 100


@pytest.mark.slow
def test_two_cells_at_once_share_the_cores(done, phantoms, tmp_path):
    path, *_ = done
    board = run_grid(path, out=tmp_path / "out", workers=2, say=lambda line: None)
    assert board["status"].tolist() == ["done"] * 2


def test_dry_run_lists_and_writes_nothing(phantoms, tmp_path):
    said = []
    run_grid(small_grid(tmp_path, phantoms, k=[1, 2]), out=tmp_path / "out", dry_run=True, say=said.append)
    assert said[0] == "timing 1 kinds of cells by a few steps each" and not (tmp_path / "out").exists()
    assert [re.sub(r"\d+ s", "N s", line) for line in said[1:3]] == [f"k{k}: pending, at most N s left" for k in (1, 2)]
    assert re.search(r"at most \d\.\d\d GPU hours are left.*by a few steps on this machine", said[-2])
    assert re.fullmatch(r"[\d,]+ TFLOP: \d+ s to \d+ s on a T4 at 8 to 2 TFLOP/s, \d+ s to \d+ s on a P100 at 4 to 1 TFLOP/s; "
                        r"these rates are assumed, not measured", said[-1])


def test_a_hash_changes_with_what_a_result_depends_on_and_nothing_else():
    params, code = resolve(), notebook_code(find_notebooks())
    one = cell_hash(params, code, "s", {"labels": "a"})
    assert one == cell_hash({**params, "run_dir": "x", "data_root": "y", "cache_dir": "z", "workers": 9, "device": "cpu"},
                            code, "s", {"labels": "a"})
    others = [cell_hash({**params, "k": 3}, code, "s", {"labels": "a"}), cell_hash(params, code + " ", "s", {"labels": "a"}),
              cell_hash(params, code, "t", {"labels": "a"}), cell_hash(params, code, "s", {"labels": "b"})]
    assert len({one, *others}) == 5


def test_status_from_files_alone(tmp_path):
    assert CellFolder(tmp_path).status == "pending"
    (tmp_path / "resume.pt").touch()
    assert CellFolder(tmp_path).status == "started"
    (tmp_path / "error.txt").touch()
    assert CellFolder(tmp_path).status == "failed"
    (tmp_path / "metrics.json").touch()
    assert CellFolder(tmp_path).status == "done"
    with pytest.raises(GridError, match="holds no grid"):
        leaderboard(tmp_path)


def test_the_nannys_thread_and_malloc_settings_do_not_reach_a_cell(monkeypatch):
    """They made training three times slower without a word. What the user set stays, also where it is the same."""
    import dask
    import distributed  # noqa: F401  (fills dask.config)

    def environment(threads=0):
        return child_environment({"threads": threads, "deadline": None, "scoring_seconds": None})

    nanny = dask.config.get("distributed.nanny.pre-spawn-environ")
    assert {"OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_"} <= set(nanny)
    for name, value in nanny.items():
        monkeypatch.setenv(name, str(value))
    assert not set(nanny) & set(environment())
    assert environment(2)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert environment()["OMP_NUM_THREADS"] == "7"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with local_cluster(Means(workers=1), 1) as cluster:
        inside = cluster.client.submit(environment, 2).result()
    assert inside["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("module", ["charmlib.grid", "charmlib.grid.runner", "charmlib.grid.report", "charmlib.params",
                                    "charmlib.data.dataset", "charmlib.data.phantom", "charmlib.evaluation.runs",
                                    "charmlib.viz.curves", "charmlib.cli"])
def test_grid_files_and_pictures_never_import_torch(module):
    code = f"import sys, {module}; bad = [m for m in ('torch', 'fastai') if m in sys.modules]; sys.exit(str(bad) if bad else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_gpus_come_from_the_environment(monkeypatch):
    from charmlib.grid.cluster import gpus

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    assert gpus() == ["0", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("PATH", os.devnull)
    assert gpus() == []


def test_a_board_whose_cells_set_the_split_and_switch_parts_off(tmp_path):
    """Both once broke it: a second column called split, and a k for a cell without a bank."""
    from charmlib.grid.spec import load_grid

    (tmp_path / "base.yaml").write_text("answer: features\n")
    (tmp_path / "grid_x.yaml").write_text("base: base.yaml\naxes: {k: [2]}\n"
                                          "cells: [{name: plain, use_bank: off, split: patient},"
                                          " {name: own, split: patient, answer: votes, vote_weight: 0.4},"
                                          " {name: other, split: patient, retrieval: gated}]\n")
    board = leaderboard(tmp_path, load_grid(tmp_path / "grid_x.yaml")).set_index("cell")
    assert board.columns.is_unique and set(board["status"]) == {"pending"}
    assert board.loc["k2", "k"] == 2 and board.loc["other", "k"] == 5
    assert pd.isna(board.loc["plain", "k"]) and board.loc["own", "k"] == 5 and board.loc["own", "vote_weight"] == 0.4
    assert pd.isna(board.loc["own", "retrieval"]) and board.loc["other", "retrieval"] == "gated"  # votes retrieve no features


def test_grid_yaml_is_readable_and_says_once_what_cells_share(tmp_path):
    from charmlib.grid.board import read_record, record_of, record_text
    from charmlib.grid.spec import load_grid

    record = record_of(load_grid(ROOT / "params/grid_demo.yaml"))
    assert len(record["cells"]) == 8 and record == json.loads(json.dumps(record))
    for cells in (record["cells"], record["cells"][:1]):
        (tmp_path / "grid.yaml").write_text(text := record_text({**record, "cells": cells}))
        assert read_record(tmp_path) == {**record, "cells": cells} and text.count(" image_size:") == 1
        assert ("threshold" in yaml.safe_load(text)["params"]) == (len(cells) == 1)
