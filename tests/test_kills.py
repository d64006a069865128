"""SIGKILL: at every point of writing, at moments of a run, and what the study compares."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.kills import Kill, aims, differences, table, write
from tests.kill_points import POINTS

ROOT = Path(__file__).resolve().parent.parent


def test_killed_at_every_point_of_writing_a_run_ends_with_the_same_bytes(tmp_path):
    command = [sys.executable, "-m", "tests.kill_points", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
    assert len(POINTS) == 12


def test_what_differs_between_two_runs_is_named(tmp_path):
    for name in "ab":
        (tmp_path / name / "policy").mkdir(parents=True)
        (tmp_path / name / "policy" / "weights").write_bytes(b"1")
        (tmp_path / name / "metrics.jsonl").write_text(f'{{"step": 1, "seconds": {ord(name)}}}\n')
    one, two = tmp_path / "a", tmp_path / "b"
    assert differences(one, two) == []
    (two / "policy" / "weights").write_bytes(b"2")
    (two / "policy.tmp-1").mkdir()
    (two / "metrics.jsonl").write_text('{"step": 2, "seconds": 98}\n')
    assert differences(one, two) == [
        "metrics.jsonl: other bytes",
        "policy/weights: other bytes",
        "policy.tmp-1: only in one",
    ]


def test_the_study_writes_what_it_found(tmp_path):
    assert {name: aims(25).count(name) for name in aims(25)} == {
        "write": 8,
        "export": 3,
        "start": 2,
        "step": 12,
    }
    kills = [
        Kill("write", 4, "step-000002", ["checkpoints/step-000004.tmp-7"], 1.5, 0, []),
        Kill("step", 5, "none", [], 1.5, 0, ["policy/weights: other bytes"]),
    ]
    machine = {"hardware": "X", "cores": 2, "date": "2026-01-01T", "versions": {}}
    machine["versions"] = {"airl_fast": "1", "torch": "2"}
    found = {"environment": machine, "seed": 3, "late": 1, "asked": 2, "kills": []}
    write(found, kills, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "1 of 2 runs that were killed once" in text
    assert "1 kills left something half-written" in text
    assert table(kills).splitlines()[2] in text
    assert "| write | 4 | step-000002 | checkpoints/step-000004.tmp | 0 | nothing |" in text
    assert json.loads((tmp_path / "results.json").read_text())["seed"] == 3
