"""Names that are HTML, mathematics or a format are shown as they are: in every page and notebook, in a real browser."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import TINY
from tests.test_explorer import served
from tests.test_notebooks import papermill

CLASSES = ("<b onclick=x>", "</td><script>window.pwned='script'</script>", r"$\frac$ {x}", "Normal")


def evil(what: str) -> str:
    return f"<img src=x onerror=\"window.pwned='{what}'\">"


@pytest.fixture
def hostile(phantoms, tmp_path) -> Path:
    """A data set whose folder, classes, files, patients, views and sexes have such names; one file name is no UTF-8."""
    root = tmp_path / (evil("folder") + r" {a} $\frac$")
    (root / "images").mkdir(parents=True)
    with open(root / "labels.csv", "w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["image", "patient", "age", "sex", "view", *CLASSES])
        for i, path in enumerate(sorted(phantoms.rglob("*.png"))[:120]):
            name = os.fsdecode(b"\xff\xe9.png") if i == 7 else f"{evil('file')}$^$ {{0}} {i}.png"
            shutil.copyfile(path, root / "images" / name)
            table.writerow([name, f"{evil('patient')}{i // 2}", 40 + i % 9, evil("sex") if i % 3 else "M",
                            evil("view") if i % 5 else "PA", i % 2, i % 3 == 0, i % 5 == 0, i % 7 == 0])
    return root


@pytest.mark.slow
def test_names_are_shown_and_never_read_as_something_else(hostile, browser, tmp_path):
    """The notebooks' tables once ran scripts in names, ``$`` in a name ended the report, and ``{`` in a path the training."""
    given = {"data_root": str(hostile), "csv": "labels.csv", "classes": "own", "split": "patient", "valid_fraction": 0.2}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({**TINY, **given, "stage1_frozen_epochs": 0, "stage1_epochs": 1,
                                                     "stage2_epochs": 1}))
    (tmp_path / "grid_x.yaml").write_text(yaml.safe_dump({"base": "p.yaml", "axes": {"seed": [1]}}))
    out = tmp_path / (evil("grid") + r" {seed} $\frac$")
    cell, books = out / "seed=1", tmp_path / "books"
    books.mkdir()
    papermill("prepare", books / "prepare.ipynb", {**given, "image_size": 32}, books)
    papermill("grid", books / "grid.ipynb", {"grid": tmp_path / "grid_x.yaml", "out": out}, books)
    for name in ("train", "test"):
        shutil.copyfile(cell / f"{name}.ipynb", books / f"{name}.ipynb")
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", *map(str, books.glob("*.ipynb"))], check=True,
                   capture_output=True)
    pages = [*books.glob("*.html"), out / "report.html", cell / "report.html"]
    assert len(pages) == 7
    tab = browser.new_page()
    for page in pages:
        tab.goto(page.as_uri(), wait_until="load")
        assert tab.evaluate("window.pwned") is None, page
        assert evil("folder") in tab.inner_text("body"), page
        if page.stem not in ("train", "grid"):  # these show classes in pictures only
            assert all(name.replace("_", " ") in tab.inner_text("body") for name in CLASSES[1:]), page
    shutil.copytree(cell, out / "other")
    with served(out) as (address, _):
        tab.goto(address)
        tab.locator("table.walk").wait_for(timeout=120_000)
        tab.get_by_label("compare with").select_option(index=1)
        tab.get_by_text("resamples agree in sign").wait_for(timeout=30_000)
        assert tab.evaluate("window.pwned") is None
    tab.close()
