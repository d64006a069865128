"""The program for a machine with a GPU, tried out on a CPU; and what it makes of results."""

import json

import pytest
import torch

from airl_fast import cli
from benchmarks import gpu, gpu_rows, roofline
from benchmarks.cross_entropy import cross_entropy_case
from benchmarks.harness import Row, Timing
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


def test_every_operator_is_among_the_cases():
    named = " ".join(case.operator for case in gpu.cases("cpu", quick=True))
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
