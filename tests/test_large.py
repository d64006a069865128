"""Small versions of `benchmarks.large`, which checks its results; and files that are read twice."""

import os
import threading

import pytest

from airl_fast.packing import Trace
from airl_fast.planning import plan_traces
from airl_fast.tasks import jsonl
from airl_fast.tasks.rows import RowFile
from benchmarks import large


@pytest.mark.parametrize(("part", "size"), [("batch", 0.01), ("head", 0.002), ("data", 0.001)])
def test_the_parts_are_right_when_small(part, size, monkeypatch):
    monkeypatch.setattr(jsonl, "STREAMED_BYTES", jsonl.STREAMED_BYTES)  # which `data` lowers
    rows = large.PARTS[part](size)
    assert all(row["seconds"] >= 0 for row in rows if "seconds" in row)
    environment = {"hardware": "a", "threads": 1, "versions": {"torch": "2"}}
    page = large.markdown({"environment": environment, "load": 0.0, "parts": {part: rows}})
    assert all(f"| {row['what']} |" in page for row in rows)


def test_what_is_wrong_is_seen():
    with pytest.raises(AssertionError):
        large.close(large.torch.ones(2), [1.0, 1.001])


@pytest.mark.parametrize("prompts", [1, 7])
def test_many_traces_of_few_prompts_for_many_ranks(prompts):
    traces = [
        Trace(
            prompt=(i % prompts,) * 40, completion=(1,) * (10 + i % 70), span_lengths=(10 + i % 70,)
        )
        for i in range(3000)
    ]
    plan = plan_traces(traces, 4096, ranks=64)
    assert len(plan) % 64 == 0
    assert sorted(i for members in plan for i in members) == list(range(3000))
    for members in plan:
        shown = {traces[i].prompt[0] for i in members}
        assert 40 * len(shown) + sum(len(traces[i].completion) for i in members) <= 4096


def test_rows_are_read_anew_each_time(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    rows = RowFile(path)
    for _ in range(2):
        assert [(row.values["a"], row.where) for row in rows] == [
            (1, f"{path}, line 1"),
            (2, f"{path}, line 3"),
        ]
    path.write_text('{"a": 1}\n')
    with pytest.raises(ValueError, match="it changed while it was read"):
        list(rows)


def test_a_file_that_changes_while_it_is_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    reading = iter(RowFile(path))
    next(reading)
    with path.open("a") as file:
        file.write('{"a": 3}\n')
    with pytest.raises(ValueError, match="it changed while it was read"):
        list(reading)


def test_a_pipe_is_kept(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=('{"a": 1}\n{"a": 2}\n',))
    writer.start()
    rows = RowFile(path)
    writer.join()
    assert [[row.values["a"] for row in rows] for _ in range(2)] == [[1, 2]] * 2
