"""The micro level under pytest-benchmark: ``python -m pytest benchmarks/test_micro.py``.

Segment operators, returns and packing, whose calls last microseconds. The cases are the suite's
own, and so are the checks: a wrong variant fails instead of being timed.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from airl_fast.packing import Trace, pack
from airl_fast.planning import plan_traces
from benchmarks import segments
from benchmarks.harness import TOLERANCE, Case, Sampled, Variant
from benchmarks.lengths import completion_lengths, prompt_lengths

pytest.importorskip("pytest_benchmark", reason="pip install airl-fast[test]")

_SEQUENCES, _SEED = 256, 0
_CASES = [
    segments.segment_case(operator, _SEQUENCES, torch.float32, _SEED, gamma=0.99)
    for operator in segments.OPERATORS
]


@pytest.mark.parametrize(
    ("case", "variant"),
    [
        pytest.param(case, variant, id=f"{case.operator}-{variant.peer}-{variant.backend}")
        for case in _CASES
        for variant in case.variants
    ],
)
def test_segments(benchmark: Any, case: Case, variant: Variant) -> None:
    inputs = case.inputs()
    prepared = variant.prepare(inputs)
    benchmark.group = case.key
    with variant.context():
        outputs = prepared.read(benchmark(prepared.call))
    for name, values in case.oracle(inputs).items():
        assert Sampled(values).error(outputs[name]) <= TOLERANCE[case.dtype]


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    """32 prompts, 8 completions each."""
    rng = np.random.default_rng(_SEED)
    made = []
    for group, length in enumerate(prompt_lengths(32, rng)):
        prompt = tuple(rng.integers(3, 1000, length).tolist())
        for count in completion_lengths(8, rng):
            completion = tuple(rng.integers(3, 1000, count).tolist())
            spans = (count,)
            made.append(
                Trace(prompt=prompt, completion=completion, span_lengths=spans, group=group)
            )
    return made


@pytest.mark.parametrize("share", [True, False], ids=["shared", "repeated"])
def test_pack(benchmark: Any, traces: list[Trace], share: bool) -> None:
    benchmark.group = "pack 256 traces"
    batch = benchmark(partial(pack, traces, share_prompts=share))
    assert batch.unpack() == traces


def test_plan(benchmark: Any, traces: list[Trace]) -> None:
    benchmark.group = "plan 256 traces"
    plan = benchmark(partial(plan_traces, traces, 8192))
    assert sorted(index for batch in plan for index in batch) == list(range(len(traces)))
