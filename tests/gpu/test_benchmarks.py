"""The largest cases of benchmarks/gpu.py, at sizes that tell nothing of speed."""

import pytest

from benchmarks import gpu_timing
from benchmarks.harness import Timing
from benchmarks.runner import run_case


@pytest.mark.parametrize("name", ["step", "packing", "sampling"])
def test_a_case_is_right_before_it_is_timed(name, monkeypatch):
    monkeypatch.setenv("AIRL_FAST_BACKEND", "reference")
    build = dict(gpu_timing.plans("cuda", quick=True))[name]
    rows = run_case(build(), Timing(rounds=1, least_s=0.0))
    ours = [row for row in rows if row.peer == "airl_fast"]
    assert [row.status for row in ours] == ["ok"] * len(ours) != []
    assert "failed" not in [row.status for row in rows], rows
