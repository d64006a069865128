"""SIGTERM and Ctrl-C: the step is finished and saved, and the run goes on to the same bits."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest

from airl_fast.cli import main
from airl_fast.stopping import StopSignals
from airl_fast.trainer import Trainer
from benchmarks.kills import RUN, differences
from tests.watched import make_config


def send(number):
    os.kill(os.getpid(), number)


def test_the_first_signal_asks_and_the_handlers_are_put_back(capfd):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        with StopSignals() as stop:
            assert not stop()
            send(number)
            assert stop()
            send(signal.SIGTERM)  # again: nothing new
            assert (stop.received, stop.status) == (number, status)
        assert capfd.readouterr().err.count("finishing the step") == 1
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_ctrl_c_after_another_signal_stops_at_once(first):
    def run():
        with StopSignals():
            send(first)
            send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            send(signal.SIGINT)
            assert not stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_is_refused():
    said = []

    def enter():
        try:
            StopSignals().__enter__()
        except ValueError as error:
            said.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "enter it in the main thread" in said[0]


def test_a_run_that_is_asked_saves_the_step_and_writes_no_final_weights(tmp_path):
    asked = iter([False, True])
    trainer = Trainer(make_config(tmp_path), should_stop=lambda: next(asked))
    assert [line["step"] for line in trainer.train()] == [1, 2]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert not (tmp_path / "policy").exists()
    Trainer(make_config(tmp_path), should_stop=lambda: True).train()  # one more step
    ended = Trainer(make_config(tmp_path), should_stop=lambda: True)
    assert len(ended.train()) == ended.total_steps  # asked at the last step: it ends as any other
    assert (tmp_path / "policy").exists()


def train(cwd):
    """The run of ``benchmarks.kills``, in this process."""
    cwd.mkdir(exist_ok=True)
    with contextlib.chdir(cwd):
        return main(["train", "arithmetic", "run.output_dir=run", *RUN])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same, which nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder) == 0
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_process_saves_ends_and_goes_on(number, status, whole, tmp_path):
    (tmp_path / "cut").mkdir()
    command = [sys.executable, "-m", "airl_fast", "train", "arithmetic", "run.output_dir=run"]
    root = os.path.dirname(os.path.dirname(__file__))
    environment = {**os.environ, "PYTHONPATH": root, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, *RUN], cwd=tmp_path / "cut", env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step 1/"):
                process.send_signal(number)
                break
        process.stdout.read()
        err = process.stderr.read()
    assert process.returncode == status
    run = tmp_path / "cut" / "run"
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    assert 2 <= steps < 8  # the signal came after the first step
    assert f"airl-fast: {number.name}: finishing the step" in err
    assert f"stopped after step {steps} of 8 and saved it; the same command goes on" in err
    assert "Traceback" not in err
    assert (run / "checkpoints" / f"step-{steps:06d}").is_dir()

    assert train(tmp_path / "cut") == 0
    found = differences(whole / "run", run)
    # The step saved on the way may be among the last two; the final one has to be the same.
    ours = [n for n in found if not n.startswith("checkpoints/") or "step-000008" in n]
    assert ours == []
