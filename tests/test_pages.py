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


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d');
  const rgb = text => { canvas.fillStyle = '#000'; canvas.fillStyle = text; const hex = canvas.fillStyle;
    return hex[0] == '#' ? [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)) : null };
  const light = c => { const l = c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * l[0] + 0.7152 * l[1] + 0.0722 * l[2] };
  const ground = node => { for (; node; node = node.parentElement) {
    const colour = rgb(getComputedStyle(node).backgroundColor); if (colour) return colour } return [255, 255, 255] };
  const worst = [99, ''];
  for (const node of document.querySelectorAll('body *')) {
    if (![...node.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(ground(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < worst[0]) worst.splice(0, 2, ratio, node.outerHTML.slice(0, 80));
  }
  return worst;
}"""


@pytest.fixture
def reports(make_run) -> list[Path]:
    """The report of a grid of two systems and two seeds, and of one of its cells."""
    from charmlib.evaluation.runs import RunFolder
    from charmlib.evaluation.score import evaluate_run
    from charmlib.grid import leaderboard
    from charmlib.grid.report import write_report
    from charmlib.viz.run_report import write_evaluation

    plain = {"use_momentum": False, "use_attention": False, "use_bank": False, "skill": 0.5}
    for name, settings in (("plain", plain), ("charm", {"skill": 2.0})):
        for seed in (0, 1):
            run = make_run(f"g/{name}_seed={seed}", seed=seed, **settings)
    (run.parent / "grid.yaml").write_text(yaml.safe_dump({"name": "g", "axes": ["seed"], "cells": [
        {"id": p.parent.name, "params": {}} for p in run.parent.glob("*/metrics.json")]}))
    page = write_evaluation(run, *evaluate_run(RunFolder(run)), "youden")
    return [write_report(run.parent, leaderboard(run.parent)), page]


@pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")
def test_reports_can_be_read_on_a_telephone_in_the_dark_and_link_one_another(reports, browser):
    for width, mode in ((400, "light"), (400, "dark"), (1280, "light")):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=mode)
        tab, said, asked = context.new_page(), [], []
        tab.on("console", lambda message, said=said: said.append(message.text))
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        for page in reports:
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
            ratio, where = tab.evaluate(CONTRAST)
            assert ratio >= 4.5, (mode, where)
            dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
            assert dark == (mode == "dark")
        assert not said and {url.split(":")[0] for url in asked} <= {"file", "data"}
        context.close()
    # the leaderboard leads to its cells, and they lead back
    tab = browser.new_page()
    tab.goto(reports[0].as_uri())
    assert tab.locator("img").count() == tab.locator("h2 + p.note + div.scroll > img").count() > 2  # each with a sentence
    tab.get_by_role("link", name="charm_seed=1").click()
    assert tab.inner_text("h1") == "Run charm_seed=1" and tab.get_by_text("Settings of charm_seed=1: ").is_visible()
    rows = tab.locator("table").filter(has_text="undefined").first.locator("tbody tr td:first-child").all_inner_texts()
    calls = tab.locator("table").filter(has_text="sensitivity").first.locator("tbody tr td:first-child").all_inner_texts()
    assert calls == [name for name in rows if name in calls]  # one order of classes
    assert "draws its heat map" in tab.inner_text("body") and tab.get_by_role("img", name="Worst errors").count() == 1
    tab.get_by_role("link", name="All cells of the grid").click()
    assert tab.inner_text("h1") == "Grid g" and "Less the plain network" in tab.inner_text("p.lead")
    tab.close()
