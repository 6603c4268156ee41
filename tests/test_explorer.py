"""The explorer: its widgets moved by program, its static pictures, and the page in a real browser."""

import contextlib
import http.client
import json
import os
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

from charmlib.data.dataset import ImageReader
from charmlib.evaluation.runs import RunFolder
from charmlib.training import ask
from charmlib.viz.explorer import SHOWN, Explorer, _Board
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
    assert pictures(book) == 4 and "widget" not in (tmp_path / "out.ipynb").read_text()


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


@pytest.fixture
def page(runs):
    with served(*runs) as (address, _):
        yield address


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


@pytest.mark.slow
def test_in_a_real_browser(page, browser, tmp_path):
    from playwright.sync_api import expect

    errors, outside = [], []
    tab = browser.new_page(viewport={"width": 1240, "height": 1200})
    tab.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    tab.on("pageerror", lambda e: errors.append(str(e)))
    own = (page.split("?")[0], "data:", "blob:", "ws://127.0.0.1")
    tab.on("request", lambda r: None if r.url.startswith(own) else outside.append(r.url))
    tab.goto(page)
    slider = tab.locator(".noUi-handle").first
    slider.wait_for(timeout=120_000)
    numbers, curve = tab.locator("table.walk"), tab.locator("img").first
    before, source = numbers.inner_text(), curve.get_attribute("src")
    slider.focus()
    for _ in range(8):
        tab.keyboard.press("ArrowRight")
    expect(numbers).not_to_have_text(before, timeout=30_000)
    expect(curve).not_to_have_attribute("src", source, timeout=30_000)
    expect(tab.get_by_text("images change sides").first).to_be_visible()
    after = numbers.inner_text()
    tab.get_by_label("finding").select_option(index=1)
    expect(numbers).not_to_have_text(after, timeout=30_000)
    tab.get_by_label("compare with").select_option(index=1)
    expect(tab.get_by_text("resamples agree in sign")).to_be_visible(timeout=30_000)
    sizes = tab.evaluate("[...document.images].filter(i => i.offsetParent).map(i => [i.naturalWidth, i.offsetWidth])")
    assert len(sizes) >= 2 and all(natural > 100 and shown > 100 for natural, shown in sizes)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 1240  # nothing runs off the side
    tab.screenshot(path=os.environ.get("CHARM_SCREENSHOT", str(tmp_path / "explorer.png")), full_page=True)
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
