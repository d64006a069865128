"""``airl-fast serve`` as a process of its own: load, SIGTERM, and where it may listen."""

import http.client
import json
import signal
import socket
import threading

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed")

from airl_fast.cli import main
from airl_fast.serving.server import listen, read_token
from benchmarks.serving import expected, load, served
from tests.tiny_reward import save_reward


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_reward(tmp_path_factory.mktemp("process"))


def test_under_load_nothing_is_lost_and_sigterm_finishes_what_was_asked(folder):
    pairs = [(f"{a}+{b}=", f"{a}{b} is{c}") for a in range(3) for b in range(2) for c in "ab"]
    cases = expected(folder, pairs)
    big = {"prompts": ["1+1="] * 40, "completions": ["a1b2c3 and so on " * 4] * 40}
    answers = []

    def ask_much(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", "/score", json.dumps(big))
        asked.set()
        response = connection.getresponse()
        answers.append((response.status, json.loads(response.read())))
        connection.close()

    with served(folder, threads=1) as (process, port):
        result = load(port, cases, clients=16, seconds=2, end="<eos>")
        assert (result["lost"], result["mixed_up"]) == (0, 0), result["first_failures"]
        assert result["requests"] >= 16
        assert set(result["by_route"]) == {"/score", "/get_reward", "/pooling", "/classify"}

        asked = threading.Event()
        last = threading.Thread(target=ask_much, args=(port,))
        last.start()
        asked.wait(60)
        wait_until_counted(port, "/score")
        process.send_signal(signal.SIGTERM)
        last.join(300)
        assert answers[0][0] == 200
        assert len(answers[0][1]["results"]) == 40
        assert process.wait(120) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=60)


def wait_until_counted(port, path):
    """Until the server has taken in the request that a thread has sent: its body was read."""
    for _ in range(200):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        if "airl_fast_being_answered 2.0" in text:  # that one, and this
            return
    pytest.fail(f"{path} has not arrived")


def test_off_loopback_a_token_is_required(folder, monkeypatch, capsys):
    monkeypatch.delenv("AIRL_FAST_TOKEN", raising=False)
    assert main(["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 2
    error = capsys.readouterr().err
    assert "0.0.0.0 can be reached from other machines and there is no token" in error
    assert error.count("\n") == 1
    with listen("127.0.0.1", 0, None), listen("localhost", 0, None):
        pass


def test_a_port_that_is_taken_is_named(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_wrong_limits_and_folders_are_named(folder, tmp_path, capsys):
    for options, message in (
        (["--timeout", "0"], "expected seconds above 0"),
        (["--max-waiting", "-1"], "expected waiting above 0"),
    ):
        assert main(["serve", str(folder), "--port", "0", *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none"), "--port", "0"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("AIRL_FAST_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("AIRL_FAST_TOKEN", "of-the-environment")
    assert read_token(None) == "of-the-environment"
    file = tmp_path / "token"
    file.write_text("of-the-file\n")
    assert read_token(file) == "of-the-file"
    for wrong in ("", "two words", "ümlaut"):
        file.write_text(wrong)
        with pytest.raises(ValueError, match="expected a token of ASCII"):
            read_token(file)
    monkeypatch.setenv("AIRL_FAST_TOKEN", "")
    with pytest.raises(ValueError, match="AIRL_FAST_TOKEN: expected a token"):
        read_token(None)
