"""The official client itself against a local server, where it is installed: its true interface, checks and words."""

import importlib.util
import json
import time

import pytest

from tests.kaggle_setup.conftest import TOKEN
from tests.kaggle_setup.server import Server

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_wheel"),
              pytest.mark.skipif(importlib.util.find_spec("kaggle") is None,
                                 reason="the official client is not installed (pip install kaggle)")]


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A server where the client looks for one on this machine."""
    (tmp_path / "home").mkdir()
    for name, value in (("KAGGLE_API_ENVIRONMENT", "LOCALHOST"), ("KAGGLE_API_TOKEN", TOKEN), ("HOME", str(tmp_path / "home")),
                        ("VERBOSE", "1")):
        monkeypatch.setenv(name, value)
    try:
        server = Server()
    except OSError as error:
        pytest.skip(f"port 80 of this machine cannot be had: {error}")
    with server:
        yield server


@pytest.fixture
def push(charm, small, tmp_path, merged):
    """``kaggle_setup push`` of the small grid."""
    return lambda *args: charm("push", small, "--user", "anna", "--out", tmp_path / "out", *args)


def names(server):
    return [name for name, _ in server.asked if name != "IntrospectToken"]


def test_push_status_fetch(push, charm, kaggle, tmp_path, merged):
    status, text = push()
    assert status == 0 and "is retired" not in text and "does not resolve" not in text, text
    assert names(kaggle)[-1] == "SaveKernel" and "CreateDataset" in names(kaggle)
    ((name, kernel),) = kaggle.kernels.items()
    assert kernel["newTitle"].replace(" ", "-") == name.split("/")[1]
    assert kernel["machineShape"] == "NvidiaTeslaT4" and kernel["isPrivate"] is True and kernel["enableInternet"] is False
    assert kernel["datasetDataSources"] == ["anna/charmlib-wheel", "nih-chest-xrays/data"]
    assert kernel["sessionTimeoutSeconds"] == 41400
    assert all(isinstance(cell["source"], str) for cell in json.loads(kernel["text"])["cells"])
    kaggle.files.update({f"runs/small/k{i}/metrics.json": "{}" for i in (1, 2, 3, 4)} | {"data/phantoms/x.csv": "no"})
    status, text = charm("fetch", tmp_path / "out")
    assert status == 0 and "4 of 4 cells done" in text and len(merged) == 1, text
    assert not (tmp_path / "out/kaggle/s1-r1/output/data").exists()
    assert not any(TOKEN.encode() in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    status, text = charm("push", *push_args(tmp_path))
    assert status == 0 and "CreateDatasetVersion" in names(kaggle), text


def push_args(tmp_path):
    """The same grid to another folder: its wheel is there already."""
    return tmp_path / "mine/grid_small.yaml", "--user", "anna", "--out", tmp_path / "again"


@pytest.mark.parametrize(("request_name", "answer", "words"), [
    ("SaveKernel", {"error": "Maximum batch GPU session count of 2 reached."}, ("waiting", "two GPU sessions")),
    ("SaveKernel", {"error": "Notebook title is already in use"}, ("already in use",)),
    ("SaveKernel", {"versionNumber": 1, "url": "https://k/x", "invalidDatasetSources": ["nih-chest-xrays/data"]},
     ("nih-chest-xrays/data", "Correct --data")),
    ("SaveKernel", {"code": 401, "message": "Unauthorized"}, ("Unauthorized",)),
    ("CreateDataset", {"status": "error", "error": "too large"}, ("too large",))])
def test_refusals(push, kaggle, tmp_path, request_name, answer, words):
    kaggle.answers[request_name] = answer
    status, text = push()
    assert status != 0 and all(word in text for word in words), text
    states = [kernel["state"] for kernel in json.loads((tmp_path / "out/kaggle/state.json").read_text())["kernels"]]
    assert "running" not in states and TOKEN not in text


@pytest.mark.parametrize(("status", "words", "state"), [
    (429, "wait some minutes", "waiting"), (403, "403 Client Error", "waiting"), (502, "502 Server Error", "pushing")])
def test_what_a_failed_push_means_is_read_from_its_number(push, kaggle, tmp_path, status, words, state):
    kaggle.answers["SaveKernel"] = (status, "no")
    code, text = push()
    assert code == 2 and words in text, text
    (kernel,) = json.loads((tmp_path / "out/kaggle/state.json").read_text())["kernels"]
    assert kernel["state"] == state


def test_a_signed_address_that_has_expired_stays_hidden(push, charm, kaggle, tmp_path):
    push()
    kaggle.files["runs/small/k1/metrics.json"] = "{}"
    kaggle.signature = "another"
    status, text = charm("fetch", tmp_path / "out")
    assert status == 2 and "403 Client Error" in text and "0a1b2c3d" not in text, text


def test_a_server_that_gives_no_answer_is_not_waited_for(push, kaggle, tmp_path, monkeypatch):
    monkeypatch.setattr("kaggle_setup.client._ANSWER_SECONDS", 4)
    monkeypatch.setattr(kaggle, "_SaveKernel", lambda content: time.sleep(8))
    status, text = push()
    assert status == 2 and "kernels_push gave no answer" in text and TOKEN not in text, text


def test_a_session_that_failed_says_why(push, charm, kaggle, tmp_path):
    push()
    kaggle.answers["GetKernelSessionStatus"] = {"status": "ERROR", "failureMessage": "out of memory"}
    status, text = charm("status", tmp_path / "out")
    assert status == 0 and "ended, failed" in text and "out of memory" in text, text
    kaggle.answers["GetKernelSessionStatus"] = (403, {"code": 403, "message": "Permission 'kernels.get' was denied"})
    status, text = charm("fetch", tmp_path / "out")
    assert status == 2 and "is not there any more" in text, text


def test_a_wrong_token(push, kaggle):
    kaggle.answers["IntrospectToken"] = {"active": False}
    status, text = push()
    assert status == 2 and "kaggle auth login" in text
