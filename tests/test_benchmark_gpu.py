"""The program for a machine with a GPU, tried out on a CPU; and what it makes of results."""

import json
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict

import pytest
import torch

from airl_fast import cli
from airl_fast.ops import _gpu_head
from benchmarks import gpu, gpu_layers, gpu_products, gpu_rows, gpu_timing, heads, roofline
from benchmarks.cross_entropy import cross_entropy_case
from benchmarks.harness import Case, Prepared, Row, Sampled, Timing, Variant
from benchmarks.runner import run_case

TIMING = Timing(rounds=5, least_s=0.0)


def test_cross_entropy_has_the_gradients_of_the_policy_loss():
    peers = ["plain torch", "torch linear_cross_entropy"]
    rows = run_case(cross_entropy_case(32, 256, 16, torch.float32, 0, "cpu"), TIMING, peers=peers)
    status = {(row.peer, row.backend): row.status for row in rows}
    assert status["airl_fast", "cpu"] == status["airl_fast", "reference"] == "ok"
    assert status["plain torch", "-"] == "ok"


@pytest.mark.parametrize("operator", gpu_rows.OPERATORS)
def test_plain_torch_gets_the_row_kernels_results(operator):
    case = gpu_rows.row_case(operator, 9, 200, torch.float32, 0, "cpu")
    rows = run_case(case, TIMING, peers=["plain torch"])
    assert next(row for row in rows if row.peer == "plain torch").status == "ok"


@pytest.mark.parametrize("operator", gpu_products.OPERATORS)
def test_products_of_chunks_are_those_of_the_whole(operator):
    case = gpu_products.product_case(operator, 40, 30, 8, torch.bfloat16, 0, "cpu")
    rows = run_case(case, TIMING)
    assert [row.status for row in rows] == ["ok"] * len(gpu_products.CUTS[operator])


@pytest.mark.parametrize("operator", gpu_layers.OPERATORS)
def test_what_lies_between_products_is_right_before_it_is_timed(operator):
    case = gpu_layers.layer_case(operator, 9, 128, torch.float32, 0, "cpu")
    rows = run_case(case, TIMING, peers=["plain torch"])
    assert [(row.peer, row.status) for row in rows] == [("airl_fast", "ok"), ("plain torch", "ok")]


def test_other_chunks_are_tried_and_put_back(monkeypatch):
    monkeypatch.setattr(heads.airl_fast, "backend", lambda name: nullcontext())
    before = _gpu_head.LOGITS, _gpu_head.CHUNK_BYTES
    with heads.CHUNKS["bfloat16 logits"](), heads.CHUNKS["chunks of 2 GiB"]():
        assert (torch.bfloat16, 2**31) == (_gpu_head.LOGITS, _gpu_head.CHUNK_BYTES)
    assert before == (_gpu_head.LOGITS, _gpu_head.CHUNK_BYTES)
    case = heads.head_case(heads.POLICY, 4, 9, 2, torch.bfloat16, 0, device="cuda")
    assert "airl_fast (bfloat16 logits)" in [variant.peer for variant in case.variants]


def test_every_operator_is_among_the_cases():
    named = " ".join(build().operator for _, build in gpu_timing.plans("cpu", quick=True))
    for operator in ("policy_loss", "logprob", "airl_score", "segment_sum", "returns", "step"):
        assert operator in named


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


def head_row(ms, **changes):
    sizes = {"N": 10, "V": 100, "D": 4}
    return Row("linear_logprob", sizes, "float32", "airl_fast", "cpu", "main", "product",
               ms=ms, yardstick_ms=1.0, least=1, **changes)  # fmt: skip


def test_the_roof_is_what_the_run_measured():
    copy = Row("segment_sum", {"B": 2, "N": 1000}, "float32", "airl_fast", "cpu", "main", "copy",
               ms=0.5, yardstick_ms=0.1, gb_s=0.008)  # fmt: skip
    rows = [head_row(2.0), copy, head_row(None, status="wrong")]
    peak, bandwidth = roofline.roof(rows)
    assert peak == 2 * 10 * 100 * 4 / 1e-3
    assert bandwidth == 2 * 1000 * 4 / 1e-4
    head, summed = roofline.points(rows)
    assert head.rate == peak / 2
    assert summed.intensity == 0.5


def test_a_report_is_drawn_again_and_other_files_are_refused(tmp_path, capsys):
    folder = tmp_path / "run"
    assert cli.main(["bench", "--quick", "--only", "segment_last", "--backend", "cpu", "--peers",
                     "none", "--no-memory", "--output-dir", str(folder)]) == 0  # fmt: skip
    (folder / "results.md").unlink()
    assert cli.main(["bench", "--report", str(folder / "results.json")]) == 0
    assert "segment_last" in (folder / "results.md").read_text()
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": []}))
    capsys.readouterr()
    assert cli.main(["bench", "--report", str(other)]) != 0
    assert "results.json of a benchmark run" in capsys.readouterr().err


FAULTY = """
import json, os, sys, time
from pathlib import Path
folder, first = Path(sys.argv[1]), int(sys.argv[3])
def note(**values):
    with (folder / "cases.jsonl").open("a") as file:
        file.write(json.dumps(values) + chr(10))
for index, case in enumerate(["good", "raises", "dies", "hangs", "last"]):
    if index < first:
        continue
    note(index=index, case=case, began=True)
    if case == "raises":
        note(index=index, case=case, failed="ValueError: of its own")
        sys.exit(1)
    if case == "dies":
        os.abort()
    if case == "hangs":
        time.sleep(60)
    note(index=index, case=case, rows=[])
"""


def test_a_case_that_fails_dies_or_hangs_costs_no_other(tmp_path, monkeypatch):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY)
    monkeypatch.setattr(gpu, "_command", lambda *a: [sys.executable, script, *map(str, a)])
    assert gpu._time(tmp_path, [], "cpu", deadline=time.monotonic() + 60, limit=2.0)
    lines = [json.loads(line) for line in (tmp_path / gpu_timing.LINES).read_text().splitlines()]
    ended = {line["case"]: line.get("failed", "rows") for line in lines if "began" not in line}
    assert ended == {
        "good": "rows",
        "raises": "ValueError: of its own",
        "dies": f"its process ended with status {-signal.SIGABRT}",
        "hangs": "no end within 2 s",
        "last": "rows",
    }


def test_where_no_case_can_begin_the_run_has_failed(tmp_path, monkeypatch):
    broken = [sys.executable, "-c", "raise ImportError('no such module')"]
    monkeypatch.setattr(gpu, "_command", lambda *a: broken)
    assert not gpu._time(tmp_path, [], "cpu", deadline=time.monotonic() + 60, limit=2.0)


def test_what_was_timed_and_what_failed_is_written(tmp_path):
    row = asdict(head_row(2.0, ms_iqr=0.1, ratio=2.0))
    lines = [
        {"index": 0, "case": "a", "rows": [row]},
        {"index": 1, "case": "b", "failed": "no end within 2 s"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / gpu_timing.LINES).write_text(text)
    assert gpu_timing.main([str(tmp_path), "--write", "--quick", "--tests", "3 passed"]) == 1
    page = (tmp_path / "results.md").read_text()
    for words in (
        "b: no end within 2 s",
        "tests before timing: 3 passed",
        "left out",
        "linear_log",
    ):
        assert words in page


def test_a_case_that_cannot_be_built_says_so_and_ends_the_process(tmp_path, monkeypatch):
    def broken(device, quick):
        return [("broken", lambda: 1 / 0)]

    monkeypatch.setattr(gpu_timing, "plans", broken)
    with pytest.raises(ZeroDivisionError):
        gpu_timing.main([str(tmp_path), "--device", "cpu", "--quick"])
    last = json.loads((tmp_path / gpu_timing.LINES).read_text().splitlines()[-1])
    assert last["failed"] == "ZeroDivisionError: division by zero"


def test_the_program_needs_nothing_that_it_is_there_to_build():
    code = "import sys, benchmarks.gpu; print('airl_fast' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def in_place(memory):
    """A case whose one variant doubles its memory, where it is."""
    ones = torch.ones(4)

    def prepare(inputs):
        return Prepared(lambda: {"x": memory.mul_(2)}, reset=lambda: memory.copy_(ones))

    return Case(
        "doubling", {"N": 4}, torch.float32, lambda: None, lambda: None,
        lambda inputs: {"x": 2 * ones.double()}, lambda inputs: {"x": Sampled(2 * ones.double())},
        ("copy", lambda inputs: ones.clone), [Variant("airl_fast", prepare, "cpu")],
    )  # fmt: skip


def test_a_call_in_place_may_be_repeated_in_a_sample_and_is_checked_on_its_inputs():
    (row,) = run_case(in_place(torch.ones(4)), Timing(rounds=3, least_s=1e-3))
    assert row.status == "ok", row.reason


def test_a_variant_that_fails_while_it_is_timed_fails_alone():
    ones, calls = torch.ones(4), []

    def prepare(inputs):
        def call():
            calls.append(1)
            if len(calls) > 3:
                raise MemoryError("no more")
            return {"x": 2 * ones}

        return Prepared(call)

    case = in_place(torch.ones(4))
    case.variants.append(Variant("plain torch", prepare))
    good, bad = run_case(case, Timing(rounds=5, least_s=0.0))
    assert good.status == "ok"
    assert (bad.status, bad.reason) == ("failed", "MemoryError: no more")
    assert bad.ms is None


def test_a_copy_that_a_cache_holds_does_not_raise_the_roof():
    def copy(elements, gb_s):
        ms = 8 * elements / gb_s / 1e6
        return Row("segment_sum", {"B": 2, "N": elements}, "float32", "airl_fast", "cpu", "main",
                   "copy", ms=ms, yardstick_ms=ms, gb_s=gb_s)  # fmt: skip

    cached, streamed = copy(10**6, 9000.0), copy(10**8, 3000.0)
    assert roofline.roof([cached, streamed])[1] == pytest.approx(3e12)
    assert roofline.roof([cached])[1] == pytest.approx(9e12)
