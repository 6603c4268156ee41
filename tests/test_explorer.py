"""The explorer: its widgets moved by program, its static pictures, and the page in a real browser."""

import base64
import contextlib
import datetime
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from charmlib import Run
from charmlib.data.boxes import CORNERS
from charmlib.data.dataset import ImageReader
from charmlib.data.index import read_index
from charmlib.evaluation.ensemble import write_ensemble
from charmlib.evaluation.runs import RunFolder, finish
from charmlib.training import ask
from charmlib.training.heat import explain_picture
from charmlib.training.predict import predict
from charmlib.viz.cards import digits
from charmlib.viz.explorer import SHOWN, Explorer, _Board
from charmlib.viz.serve import UPLOAD, WEB
from charmlib.viz.style import readable
from tests.conftest import TINY
from tests.test_notebooks import papermill, pictures

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*undefined for:UserWarning")


@pytest.fixture
def runs(make_run):
    return [make_run("g/one"), make_run("g/two", seed=3, skill=2.0), make_run("other/three", seed=4, valid_fraction=0.3)]


@pytest.fixture
def board(runs):
    return _Board(Explorer(runs, ImageReader()))


def test_moving_along_the_curve_changes_numbers_and_pictures(board):
    numbers, curve = board.numbers.value, board.curve.value
    board.slider.value += 12
    assert board.numbers.value != numbers and board.curve.value != curve and "change sides" in board.moved.value
    here = board.walk.point(board.at)
    for value in (here["tp"], here["fp"], here["fn"], here["tn"]):
        assert f"<td>{value:,}</td>" in board.numbers.value
    assert f"{here['sensitivity']:.3f}" in board.numbers.value
    strip = board.changed.value
    board.slider.value -= 5
    assert "no longer called" in board.moved.value and board.changed.value != strip
    board.slider.value = board.slider.max
    assert ">1.000</td>" in board.numbers.value  # everything is called: sensitivity 1
    board.slider.value = 0
    assert "above all" in board.numbers.value


def test_a_run_without_validation_comes_last_and_is_walked_by_hand(runs, make_run):
    apart = make_run("apart", skill=9.0, valid_fraction=0, patience=0)
    explorer = Explorer([apart, *runs], ImageReader())
    assert list(explorer.folders)[-1] == "apart"
    board = _Board(explorer)
    board.run.value = "apart"
    assert board.point.options == ("(by hand)",) and "without a validation part" in board.note.value
    numbers = board.numbers.value
    board.slider.value += 12
    assert board.numbers.value != numbers and "change sides" in board.moved.value
    board.finding.value = next(value for _, value in board.finding.options if value != board.finding.value)
    board.run.value = "one"
    board.point.value = "youden"
    board.run.value = "apart"
    assert board.point.value == "(by hand)" and board.at is not None
    alone = Explorer([apart], ImageReader())
    assert len(_Board(alone).curve.value) > 1000 and len(alone.static()) == 3  # without the counts


def test_operating_points_are_those_of_validation(board):
    for name in board.point.options[:-1]:
        board.point.value = name
        board.slider.value += 3
        assert board.point.value == "(by hand)"
        board.point.value = name  # and back
        row = board.metrics["test"]["operating"][name][board.finding.value]
        assert all(board.walk.point(board.at)[k] == row[k] for k in ("tp", "fp", "fn", "tn"))
        low, high, _ = row["specificity_interval"]
        assert f"({low:.3f} to {high:.3f})" in board.numbers.value  # the report's own


def test_choosing_run_finding_and_order(board, runs):
    assert board.run.value == "two"  # best by validation
    findings = [value for _, value in board.finding.options]
    board.finding.value = findings[1]
    assert board.c == board.test.classes.index(findings[1])
    assert board.point.value == "youden"
    board.slider.value += 2
    board.finding.value = findings[2]
    assert board.point.value == "youden"  # a new finding starts at a point of validation
    board.finding.value = findings[1]
    board.run.value = "one"
    assert board.finding.value == findings[1] and np.array_equal(board.test.logits, RunFolder(runs[0]).test.logits)
    board.order.value = "false negatives"
    assert len(board.positions) == board.walk.point(board.at)["fn"] and board.walk.y[board.positions].all()
    board.slider.value = 0  # nothing is called: all are missed
    assert len(board.positions) == board.test.positives[findings[1]]
    board.slider.value = board.slider.max
    assert len(board.positions) == 0 and "0 images" in board.pages.value
    board.order.value = "largest error"
    first = board.errors.value
    board.page.value = 2
    assert board.errors.value != first and board.page.max == -(-len(board.positions) // SHOWN)


def test_runs_of_one_name_and_controls_with_other_labels(make_run):
    """Two runs of one name once became one, and a shuffled control was offered for comparison and broke the page."""
    one, two = make_run("a/g/x"), make_run("b/g/x", seed=1)
    shuffled = make_run("a/g/shuffled", labels="shuffled")
    board = _Board(Explorer([one, two, shuffled]))
    assert sorted(board.run.options) == ["a/g/shuffled", "a/g/x", "b/g/x"]
    board.run.value = "a/g/x"
    assert list(board.other.options) == ["(none)", "b/g/x"]


def test_two_runs_are_compared_only_on_the_same_split(board, runs):
    assert list(board.other.options) == ["(none)", "one"]  # three has another split
    assert RunFolder(runs[2]).metrics["split"]["hash"] != RunFolder(runs[0]).metrics["split"]["hash"]
    curve = board.curve.value
    board.other.value = "one"
    assert "resamples agree in sign" in board.said.value and board.curve.value != curve
    board.order.value = "the two runs differ most"
    mine, theirs = (RunFolder(r).test.logits[:, board.c] for r in (runs[1], runs[0]))
    ranks = [np.argsort(np.argsort(v[board.walk.rows])) for v in (mine, theirs)]
    assert abs(ranks[0] - ranks[1])[board.positions[0]] == abs(ranks[0] - ranks[1]).max()
    board.other.value = "(none)"
    assert board.said.value == "" and board.order.value == "largest error"


def test_missing_images_do_not_stop_it(runs):
    for reader in (None, ImageReader("/nowhere")):
        board = _Board(Explorer(runs[:1], reader, ask))
        assert board.errors.value.count("no image</span>") == SHOWN and "<img" not in board.errors.value
        assert "The images are not there" in board.key.value
        board.heat.value = True  # asks nothing
        board.pool.shutdown()
        assert "The images are not there" in board.key.value and not board.explorer.heats


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    """A finished run with a network and a memory that votes."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run = Run.open({**TINY, "data_root": str(phantoms), "run_dir": str(folder), "image_size": 64, "use_momentum": False,
                    "stage1_frozen_epochs": 0, "stage1_epochs": 0, "stage2_epochs": 1})
    run.train()
    run.score()
    finish(folder)
    return folder


def own_file(path):
    """What a browser sends of a file."""
    return ({"name": path.name, "type": "", "size": path.stat().st_size, "content": memoryview(path.read_bytes()),
             "last_modified": datetime.datetime.now()},)


def test_heat_maps_are_asked_for_shown_images_only(trained):
    board = _Board(Explorer([trained], ImageReader(), ask))
    board.order.value = "largest error"
    assert not board.explorer.heats and "heat" not in board.errors.value
    board.stride.value = 8
    board.heat.value = True
    board.pool.submit(int).result()  # after what was asked before
    ids = [str(board.test.ids[board.walk.rows[p]]) for p in board.positions[:SHOWN]]
    assert [key[3] for key in board.explorer.heats] == ids and board.errors.value.count("class='heat'") > 0
    path = ImageReader().path(board.metrics, ids[0])
    told = explain_picture(trained, path, finding=board.finding.value, stride=8)
    np.testing.assert_array_equal(board.explorer.heats[trained.name, board.finding.value, 8, ids[0]]["heat"], told["heat"])
    assert "votes is in no map" in board.key.value
    wanted = board._wanted
    board.finding.value = board.finding.options[2][1]
    board._ask_heat(wanted, ids)  # an answer that comes too late
    board.pool.submit(int).result()
    assert wanted[1] not in board.errors.value and readable(board.finding.value) in board.errors.value
    board.stride.value = 4  # the network has no such map
    board.pool.submit(int).result()
    assert "No heat map" not in board.key.value or "strides" in board.key.value


def test_filters_and_boxes(trained):
    board = _Board(Explorer([trained], ImageReader(), ask))
    frame = read_index(board.metrics["params"]["data_root"]).frame.set_index("id")
    everything = len(board.positions)
    board.filters["sex"].value, board.filters["view"].value = "female", board.filters["view"].options[1]
    ids = board.test.ids[board.walk.rows[board.positions]]
    assert 0 < len(ids) < everything and set(frame.loc[ids, "sex"]) == {"F"}
    assert set(frame.loc[ids, "view"]) == {board.filters["view"].value} and "sex female" in board.pages.value
    board.order.value = "false negatives"
    assert f"p ≥ {digits(board.threshold)}, the operating point youden" in board.pages.value
    table = ImageReader().boxes(board.metrics, board.test.ids.tolist(), board.test.labels)
    boxes = board.explorer.boxes(trained.name)
    assert sum(map(len, boxes.values())) == len(table) > 20
    position = list(board.walk.rows).index(table["row"][0])
    card = board.explorer.cards(trained.name, board.walk, [position], table["finding"][0])[0]
    assert card.boxes[0] == (readable(table["finding"][0]), *table.iloc[0][CORNERS])


@pytest.mark.parametrize("of", ["run", "ensemble"])
def test_an_image_of_ones_own(trained, tmp_path, of):
    folder = trained
    if of == "ensemble":
        shutil.copytree(trained, tmp_path / "second")
        folder = write_ensemble(tmp_path / "ensemble", [trained, tmp_path / "second"]).path
    board = _Board(Explorer([folder], ImageReader(), ask))
    path = Path(ImageReader().path(board.metrics, str(board.test.ids[0])))
    board.own.upload.value = own_file(path)
    board.pool.submit(int).result()
    told, row = board.own.told.value, predict(folder, [path]).iloc[0]
    for name in board.test.classes:
        assert f"<td>{readable(name)}</td><td>{digits(row[f'p_{name}'])}</td>" in told
    assert told.count("<td>called</td>") == row.filter(like="call_").fillna(0).sum()
    if of == "ensemble":
        assert "ask its members run, second" in told and "class='heat'" not in told
    else:
        case = Run.load(folder).bank.explain(path.name, board.finding.value)
        assert all(f"<b>{Path(name).stem}</b>" in told for name in case.table["image"]) and case.note[:30] in told
    before = told
    board.finding.value = board.finding.options[3][1]  # the same picture is asked about another finding
    board.pool.submit(int).result()
    assert board.own.told.value != before
    (tmp_path / "x.png").write_text("no picture")
    board.own.upload.value = own_file(tmp_path / "x.png")
    board.pool.submit(int).result()
    assert "<b>Refused</b> x.png: " in board.own.told.value and "Choose a chest radiograph" in board.own.told.value
    assert str(tmp_path) not in board.own.told.value
    board.own.upload.value = ({**own_file(path)[0], "size": UPLOAD * 2**20 + 1},)
    assert f"more than {UPLOAD}" in board.own.told.value


def test_names_cannot_smuggle_html(make_run):
    run = make_run("g/<b>x")
    board = _Board(Explorer([run, make_run("g/y")]))
    board.run.value = "<b>x"
    board.other.value = "y"
    assert "<b>x" not in board.said.value + board.note.value


@pytest.mark.slow
def test_papermill_gets_static_pictures_and_no_widget(runs, tmp_path):
    nb = nbformat.read(ROOT / "notebooks/explore.ipynb", as_version=4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace('["runs"]', repr([str(runs[0])]))
    nbformat.write(nb, tmp_path / "explore.ipynb")
    book = papermill(tmp_path / "explore.ipynb", tmp_path / "out.ipynb", {}, tmp_path)
    text = (tmp_path / "out.ipynb").read_text()
    assert pictures(book) == 2 and text.count("class='cards'") == 2 and "widget-view" not in text


@contextlib.contextmanager
def served(*runs, idle=300):
    """The explorer's page, served as `make explore` serves it; its address with the token, and its process."""
    for name in ("voila", "playwright"):  # Kaggle's image has neither
        pytest.importorskip(name, reason=f"no {name}, which the browser test needs: pip install 'charmlib[test]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"from charmlib.viz import serve; serve.IDLE = {idle}; from charmlib.cli import main; main()"
    command = [sys.executable, "-c", code, "explore", *map(str, runs), "--port", str(port), "--no-browser"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
                              text=True)
    try:
        address = server.stdout.readline().split(" at ")[1].split()[0]
        assert address.startswith(f"http://127.0.0.1:{port}/")
        for _ in range(120):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/login", timeout=1)
                break
            time.sleep(0.5)
        yield address, psutil.Process(server.pid)
    finally:
        server.terminate()
        try:
            server.wait(20)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


def status(address, **headers):
    """The status that a request without a browser's cookies ends with, the login page counting as 401."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return 401 if "/login" in answer.url else answer.status
    except urllib.error.HTTPError as error:
        return error.code


def upgraded(address, **headers):
    """The status of a request for a websocket."""
    host, path = address.removeprefix("ws://").split("/", 1)
    with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        connection.request("GET", f"/{path}", headers={**headers, "Upgrade": "websocket", "Connection": "Upgrade",
                                                       "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "A" * 22 + "=="})
        return connection.getresponse().status


@pytest.mark.slow
def test_only_its_user_on_this_machine_gets_the_page(runs, browser):
    """Any local user, and any web page by DNS rebinding, once got the page, its kernel and the patients' pictures."""
    with served(runs[0], idle=10) as (address, process):
        base, token = address.split("?token=")

        def living(ask):
            """What ``ask`` says of the server and each process that it started; a process that ends meanwhile says nothing."""
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):  # also of a zombie
                    yield ask(one)

        def kernels():
            return [words for words in living(psutil.Process.cmdline) if "ipykernel_launcher" in " ".join(words)]

        assert {c.laddr.ip for found in living(psutil.Process.net_connections) for c in found} == {"127.0.0.1"}
        assert not any(token in " ".join(words) for words in living(psutil.Process.cmdline))
        assert [status(f"{base}{path}") for path in ("", "?token=x", "api/kernels")] == [401, 401, 401]
        assert status(f"{base}voila/files/explore.ipynb") == status(f"{base}voila/files/voila.json") == 403
        for host in ("evil.example", "127.0.0.1.evil.example", "10.0.0.1"):
            assert status(address, Host=host) == status(f"{base}login", Host=host) == 403
        assert not kernels()
        tab = browser.new_page()
        assert tab.goto(address.replace("127.0.0.1", "evil.example")).status == 403
        channels = []
        tab.on("websocket", lambda socket: channels.append(socket.url))
        tab.goto(address)
        tab.locator("table.walk").wait_for(timeout=120_000)
        time.sleep(12)
        assert len(kernels()) == 1  # an open page keeps its kernel
        connection = json.loads(Path(kernels()[0][-1]).read_text())
        assert connection["transport"] == "ipc"  # everybody on this machine could read pictures from its ports
        cookie = "; ".join(f"{c['name']}={c['value']}" for c in tab.context.cookies())
        assert upgraded(channels[0], Cookie=cookie, Origin="http://evil.example") == 403
        assert upgraded(channels[0], Origin=base.rstrip("/")) in (302, 403)  # without the cookie
        tab.context.set_offline(True)  # as if the machine of the browser was switched off
        tab.goto("about:blank", wait_until="commit")
        for _ in range(120):
            if not kernels():
                break
            time.sleep(0.5)
        assert not kernels()
        tab.close()


SEEN = """() => {  // at a change of the finding and each frame after it: finding of the curve, those of the cards, milliseconds
  const label = [...document.querySelectorAll('label')].find(l => l.textContent == 'finding');
  label.parentElement.querySelector('select').addEventListener('change', () => {
    const start = performance.now();
    [window.frames_seen, window.looking] = [[], true];
    const look = () => {
      const curve = document.querySelector('.roc').getAttribute('aria-label').match(/ROC curve, (.*?):/)[1];
      const cards = [...document.querySelectorAll('.cards figcaption')].map(c => c.innerText.split('\\n')[1].split(':')[0]);
      window.frames_seen.push([curve, [...new Set(cards)], performance.now() - start]);
      if (window.looking) requestAnimationFrame(look);
    };
    look();  // now, since the first frame may have the new ones
  });
}"""
FAINT = """() => {  // texts whose contrast to the colour behind them is below 4.5 : 1 (WCAG 2.1)
  const rgba = text => { const v = text.match(/[\\d.]+/g).map(Number); return [v[0], v[1], v[2], v[3] ?? 1]; };
  const over = (top, low) => [0, 1, 2].map(i => top[i] * top[3] + low[i] * (1 - top[3])).concat(1);
  const behind = e => {
    if (!e) return matchMedia('(prefers-color-scheme: dark)').matches ? [18, 18, 18, 1] : [255, 255, 255, 1];
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] == 1 ? own : over(own, behind(e.parentElement));
  };
  const light = c => {
    const [r, g, b] = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const out = [];
  for (const e of document.querySelectorAll('body *')) {
    const words = [...e.childNodes].filter(n => n.nodeType == 3).map(n => n.textContent.trim()).join(' ').trim();
    if (!words || !e.checkVisibility() || ['SCRIPT', 'STYLE', 'OPTION'].includes(e.tagName)) continue;
    const style = getComputedStyle(e), low = behind(e), top = over(rgba(e.closest('svg') ? style.fill : style.color), low);
    const [a, b] = [light(top), light(low)].sort();
    if ((b + 0.05) / (a + 0.05) < 4.5) out.push([words, top, low, (b + 0.05) / (a + 0.05)]);
  }
  return out;
}"""
NAMELESS = """() => [
  ...document.querySelectorAll('select, input, button, [role=slider], [contenteditable=true], img, svg')].filter(e =>
  e.checkVisibility() && e.tagName != 'IMG' && !e.closest('[aria-hidden]') && !(e.getAttribute('aria-label') || e.title ||
  e.textContent.trim() && e.tagName == 'BUTTON' || [...(e.labels ?? [])].some(l => l.textContent.trim())) ||
  e.tagName == 'IMG' && !e.hasAttribute('alt')).map(e => e.outerHTML.slice(0, 200))"""
OUTSIDE = """() => [...document.querySelectorAll('select, button, input, p, table, figure, svg, .noUi-target')].filter(
  e => e.checkVisibility() && !e.closest('.scroll') && e.getBoundingClientRect().right > innerWidth
  ).map(e => e.outerHTML.slice(0, 200))"""


@contextlib.contextmanager
def empty_page(folder):
    """The address of a Voilà page that shows one word, with the explorer's template."""
    cells = [nbformat.v4.new_code_cell("import ipywidgets\nipywidgets.HTML('<p>empty</p>')")]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "empty.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "voila", "empty.ipynb", "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1",
               "--template=charm", "--VoilaConfiguration.resources={'upload_mb': 64}"]
    server = subprocess.Popen(command, cwd=folder, env={**os.environ, "JUPYTER_PATH": str(WEB)}, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    for _ in range(120):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.5)
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.slow
def test_in_a_real_browser(trained, runs, browser, tmp_path, dicom):
    from playwright.sync_api import expect

    errors, outside, alerts = [], [], []

    def picture(name):
        tab.screenshot(path=Path(os.environ.get("CHARM_SCREENSHOTS", tmp_path)) / f"explorer_{name}.png")

    def upload(*path):
        with tab.expect_file_chooser() as chooser:
            tab.get_by_role("button", name="choose or drop").click()
        chooser.value.set_files(*path)

    with served(trained, runs[0], runs[1]) as (page, _), empty_page(tmp_path) as empty:
        tab = browser.new_page(viewport={"width": 1280, "height": 2400}, color_scheme="light")
        tab.on("console", lambda m: errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        tab.on("pageerror", lambda e: errors.append(str(e)))
        tab.on("dialog", lambda d: (alerts.append(d.message), d.accept()))
        own = (page.split("?")[0], "data:", "blob:", "ws://127.0.0.1")
        tab.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
        seconds = {page: [], empty: []}
        for _ in range(5):  # the quickest counts, for a machine with other work
            for address, there in ((empty, "p:text-is('empty')"), (page, ".cards img")):
                once, start = browser.new_page(), time.monotonic()
                once.goto(address)
                once.locator(there).first.wait_for(timeout=120_000)
                seconds[address].append(time.monotonic() - start)
                once.close()
            if min(seconds[page]) <= 2 * min(seconds[empty]):
                break
        print("seconds to the first picture, and to an empty page:", *seconds.values())
        assert min(seconds[page]) <= 2 * min(seconds[empty]), seconds
        tab.goto(page)
        tab.locator(".cards img").first.wait_for(timeout=120_000)

        run, finding = tab.get_by_label("run", exact=True), tab.get_by_label("finding", exact=True)
        run.select_option(label="run")  # the trained one
        numbers, curve, status = tab.locator("table.walk"), tab.locator(".roc"), tab.locator("p[role=status]").first
        expect(curve).to_have_attribute("aria-label", re.compile(" run[.]"), timeout=30_000)
        before = numbers.inner_text()
        tab.get_by_role("slider", name="along the ROC curve").focus()
        for _ in range(8):
            tab.keyboard.press("ArrowRight")
        expect(numbers).not_to_have_text(before, timeout=30_000)
        expect(tab.get_by_text("images change sides").first).to_be_visible()

        # a new finding never stands over the old one's images
        tab.evaluate(SEEN)
        late = []
        for index in (1, 2, 3):  # the quickest counts, for a machine with other work
            finding.select_option(index=index)
            tab.wait_for_timeout(3000)
            tab.evaluate("window.looking = false")
            frames = tab.evaluate("window.frames_seen")
            new = frames[-1][0]
            assert frames[-1][1] == [new] != [frames[0][0]], frames
            assert all(cards in ([], [shown]) for shown, cards, _ in frames), frames
            late.append(next(when for shown, cards, when in frames if cards == [new]))
        print("milliseconds to the images of another finding:", *late)
        assert min(late) <= 500, late

        # filters, and the operating point that a filter by outcome names
        tab.get_by_label("operating point").select_option(label="youden")
        tab.get_by_label("test images by").select_option(label="false positives")
        expect(status).to_contain_text("the operating point youden")
        all_of_them = status.inner_text()
        tab.get_by_label("sex").select_option(label="female")
        expect(status).to_contain_text("sex female")
        assert int(status.inner_text().split(": ")[1].split()[0]) < int(all_of_them.split(": ")[1].split()[0])

        # heat maps, their opacity, and a picture enlarged
        tab.get_by_label("heat map of the finding").check()
        tab.get_by_label("pixels a cell of it").select_option(label="8")
        heat = tab.locator("figure > button img.heat").first
        heat.wait_for(timeout=120_000)
        assert tab.evaluate("e => getComputedStyle(e).opacity", heat.element_handle()) == "0.65"
        tab.get_by_role("slider", name="opacity of heat maps").focus()
        tab.keyboard.press("ArrowLeft")
        tab.wait_for_function("getComputedStyle(document.querySelector('img.heat')).opacity == '0.6'")
        assert tab.locator("i.own, i.other").count()  # phantoms have boxes
        large, button = tab.locator("[popover]").first, tab.locator("figure > button").first
        button.click()
        expect(large).to_be_visible()
        assert large.bounding_box()["width"] > 3 * button.bounding_box()["width"]
        picture("large")
        tab.keyboard.press("Escape")
        expect(large).not_to_be_visible()

        # pictures of one's own: a good one, one that is refused, one that the websocket would choke on, one that is dropped
        good = next(Path(RunFolder(trained).metrics["params"]["data_root"]).rglob("*.png"))
        upload(good)
        expect(tab.locator(".own figcaption")).to_contain_text(good.name, timeout=60_000)
        expect(tab.locator(".own table")).to_contain_text("called")
        expect(tab.get_by_text("The memory's answer.")).to_be_visible()
        upload(dicom("film.dcm"))
        expect(tab.locator(".own figcaption")).to_contain_text("film.dcm", timeout=30_000)
        (tmp_path / "notes.png").write_text("no picture")
        upload(tmp_path / "notes.png")
        expect(tab.get_by_role("alert")).to_contain_text(re.compile("notes.png.*Choose a chest radiograph"), timeout=30_000)
        with open(tmp_path / "large.dcm", "wb") as file:
            file.truncate(65 * 2**20)
        upload(tmp_path / "large.dcm")
        tab.wait_for_timeout(500)
        assert alerts == ["large.dcm has 65 MB, more than 64 MB: make it smaller."]
        tab.evaluate("""([name, data]) => { const files = new DataTransfer();
            files.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
            document.body.dispatchEvent(new DragEvent('drop', {bubbles: true, dataTransfer: files})); }""",
                     ["dropped.png", base64.b64encode(good.read_bytes()).decode()])
        expect(tab.locator(".own figcaption")).to_contain_text("dropped.png", timeout=30_000)

        run.select_option(label="one")
        tab.get_by_label("compare with").select_option(label="two")
        expect(tab.get_by_text("resamples agree in sign")).to_be_visible(timeout=30_000)
        for scheme in ("light", "dark"):
            tab.emulate_media(color_scheme=scheme)
            assert not tab.evaluate(FAINT)
            for width, height in ((1280, 2400), (400, 5000)):
                tab.set_viewport_size({"width": width, "height": height})
                tab.wait_for_timeout(300)
                assert not tab.evaluate(OUTSIDE)
                picture(f"{scheme}_{width}")
        assert not tab.evaluate(NAMELESS)
        tab.close()
    assert not errors and not outside


def test_who_counts_as_a_person(monkeypatch):
    """papermill by hand once got a person's progress bars, because a kernel is a kernel to `get_ipython`."""
    import IPython

    from charmlib.session import person_watches

    class ZMQInteractiveShell:
        class kernel:
            _allow_stdin = True

    for name in ("CHARM_BATCH", "KAGGLE_KERNEL_RUN_TYPE", "SERVER_SOFTWARE"):
        monkeypatch.delenv(name, raising=False)
    assert not person_watches()  # a script
    monkeypatch.setattr(IPython, "get_ipython", ZMQInteractiveShell)
    assert person_watches()  # a frontend that can be asked for input
    ZMQInteractiveShell.kernel._allow_stdin = False
    assert not person_watches()  # papermill and nbconvert
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    assert person_watches()
    monkeypatch.setenv("CHARM_BATCH", "1")
    assert not person_watches()
