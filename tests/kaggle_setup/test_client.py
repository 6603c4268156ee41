"""How the answers and failures of the client's process become results and errors."""

import json

import pytest

from tests.kaggle_setup.conftest import TOKEN

pytestmark = pytest.mark.usefixtures("quick_wheel")


@pytest.fixture
def push(charm, small, tmp_path, merged):
    """``kaggle_setup push`` of the small grid."""
    return lambda *args: charm("push", small, "--user", "anna", "--out", tmp_path / "out", *args)


def state_of(tmp_path):
    return json.loads((tmp_path / "out/kaggle/state.json").read_text())["kernels"][0]["state"]


@pytest.mark.parametrize(("step", "words"), [
    ("401", "kaggle auth login"), ("in body", "kaggle auth login"), ("429", "wait some minutes"), ("403", "403 Client Error")])
def test_a_refused_request_is_known_by_its_number_and_counts_as_not_pushed(push, server, tmp_path, step, words):
    server.plan(steps={"kernels_push": [step]})
    status, text = push()
    assert status == 2 and words in text and state_of(tmp_path) == "waiting", text


@pytest.mark.parametrize(("step", "words"), [("502", "502 Server Error"), ("killed", "the kaggle client"), ("ask", "EOF"),
                                             ("crash", "Connection aborted")])
def test_a_failure_that_does_not_tell_what_kaggle_did_is_asked_about(push, server, tmp_path, monkeypatch, step, words):
    """Also a question of the client's, which nobody can answer; and what it prints to the last is no authorization."""
    monkeypatch.setenv("VERBOSE", "1")
    server.plan(steps={"kernels_push": [step]})
    status, text = push()
    assert status == 2 and words in text and state_of(tmp_path) == "pushing", text
    assert TOKEN not in text and "Authorization" not in text
    status, text = push()
    assert status == 0 and server.kernels()["1of1-r1"]["version"] == 1, text


def test_a_push_whose_answer_got_lost_is_found_and_not_made_again(push, server, tmp_path):
    server.plan(steps={"kernels_push": ["lost"]})
    assert push()[0] == 2 and state_of(tmp_path) == "pushing"
    status, text = push()
    assert status == 0 and state_of(tmp_path) == "running", text
    assert server.kernels()["1of1-r1"]["version"] == 1 and len(server.calls("kernels_push")) == 1


def test_a_wait_asks_about_a_push_whose_answer_got_lost(push, server):
    server.plan(done={"1of2-r1": ["k1", "k3"], "2of2-r1": ["k2", "k4"]}, steps={"kernels_push": ["", "maximum", "lost"]})
    status, text = push("--shards", 2, "--wait", "--poll", 0)
    assert status == 0 and "trying again" in text and len(server.calls("kernels_push")) == 3, text


def test_a_wait_outlives_an_input_that_is_not_there(push, server):
    """The shard that was started without it is left, as no other push of it would fare better."""
    server.plan(done={"1of2-r1": ["k1", "k3"]}, steps={"kernels_push": ["", "maximum", "without"]})
    status, text = push("--shards", 2, "--wait", "--poll", 0)
    assert status == 1 and "2 cells are not done: k2, k4" in text and "void" in text, text


def test_too_many_requests_are_no_absent_kernel(push, charm, server, tmp_path):
    push()
    server.plan(steps={"kernels_status": ["429"]})
    status, text = charm("status", tmp_path / "out")
    assert status == 2 and "wait some minutes" in text and "another --out" not in text
