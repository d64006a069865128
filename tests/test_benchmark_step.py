"""The whole AIRL step of the benchmarks: padded and packed agree, and a wrong step has no speed."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import attention, memory, sampling, segments, step, suite
from benchmarks.harness import Case, Outputs, Prepared, Row, Timing, Variant
from benchmarks.language import TINY
from benchmarks.report import markdown
from benchmarks.runner import run_case
from benchmarks.step_inputs import StepInputs, StepResult
from benchmarks.suite import Results, Settings

TIMING = Timing(rounds=5, least_s=0.0)
_OUTPUTS = (
    "logp", "f", "advantages", "losses", "gradient norms", "discriminator gradients",
    "policy gradients",
)  # fmt: skip
# The operators return float32 whatever they are given (roundings of 6e-8), and sums cancel.
_ROUNDED = 1e-5


def _case() -> Case:
    return step.step_case(1, 3, TINY, seed=0)


def _run(variant: Variant, inputs: StepInputs) -> Outputs:
    prepared = variant.prepare(inputs)
    prepared.reset()
    outputs = prepared.read(prepared.call())
    prepared.reset()
    return outputs


@pytest.mark.parametrize("peer", ["padded", "padded, fixed"])
def test_packed_equals_padded_in_float64_with_every_entry_of_every_gradient(peer: str) -> None:
    case = _case()
    inputs = case.small().copy(torch.float64)
    ours, padded = (next(v for v in case.variants if v.peer == p) for p in ("airl_fast", peer))
    found, expected = _run(ours, inputs), _run(padded, inputs)
    assert set(found) == set(expected) == set(_OUTPUTS)
    pieces = {name: ([found[name]], [expected[name]]) for name in _OUTPUTS[:-2]}
    for model, learner in (
        ("policy", inputs.policy_learner),
        ("discriminator", inputs.disc_learner),
    ):
        sizes = [p.numel() for p in learner.optimiser.parameters]
        name = f"{model} gradients"
        pieces[name] = (found[name].split(sizes), expected[name].split(sizes))
    for name, (ours_all, padded_all) in pieces.items():
        for one, other in zip(ours_all, padded_all, strict=True):
            error, scale = (one.double() - other.double()).abs().max(), other.double().abs().max()
            assert scale > 0, f"{name}: all zero, so that nothing was compared"
            assert error <= _ROUNDED * scale, f"{name} {tuple(one.shape)}: {error / scale:.2g}"


def test_a_step_starts_from_the_same_weights_every_time() -> None:
    case = _case()
    inputs = case.small()
    ours = next(v for v in case.variants if v.peer == "airl_fast")
    first, again = _run(ours, inputs), _run(ours, inputs)
    for name in _OUTPUTS:
        assert torch.equal(first[name], again[name]), name


def _spoilt(name: str, inputs: StepInputs, *, on: str) -> Prepared:
    """Our step with one of its results off by a hundredth."""
    prepared = step.packed_step(inputs)
    small = inputs.samples > 64
    if (on == "small inputs") != small:
        return prepared

    def read(result: StepResult) -> Outputs:
        outputs = dict(prepared.read(result))
        return {**outputs, name: outputs[name] * 1.01}

    return replace(prepared, read=read)


@pytest.mark.parametrize("name", _OUTPUTS)
def test_a_wrong_step_prints_no_speed(name: str) -> None:
    _has_no_speed(name, "small inputs")


def test_a_step_that_is_wrong_on_the_timed_inputs_alone_prints_no_speed() -> None:
    _has_no_speed("policy gradients", "timed inputs")


def _has_no_speed(name: str, on: str) -> None:
    case = _case()
    sound = next(v for v in case.variants if v.peer == "padded")
    wrong = Variant("spoilt", partial(_spoilt, name, on=on))
    row, other = run_case(replace(case, variants=[wrong, sound]), TIMING)
    assert row.status == "wrong"
    assert row.reason.startswith(f"{name} on {on}: relative error")
    assert (row.ms, row.ms_iqr, row.ratio, row.against_ours, row.parts) == (None,) * 4 + ({},)
    assert other.status == "ok", other.reason
    line = _line(row)
    assert "**wrong**" in line
    assert " ms" not in line


def test_the_report_shows_times_over_ours_and_the_parts() -> None:
    rows = run_case(_case(), TIMING)
    assert [row.status for row in rows] == ["ok"] * 3, [row.reason for row in rows]
    ours, padded, fixed = rows
    assert ours.against_ours == 1.0
    assert {ours.rounds, padded.rounds} == {3}
    assert fixed.rounds == 1
    for row in rows:
        assert set(row.parts) == {"scoring", "discriminator update", "policy update"}
        assert row.against_ours is not None
        line = _line(row)
        assert f"| {row.against_ours:.2f} |" in line
        assert "policy update: " in line
    assert ours.facts["tokens"] < padded.facts["tokens"] < fixed.facts["tokens"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradient", [False, True])
def test_every_formulation_of_attention_is_right(gradient: bool, dtype: torch.dtype) -> None:
    case = attention.attention_case(3, 2, TINY, 0, gradient, dtype)
    rows = run_case(case, TIMING)
    assert [row.status for row in rows] == ["ok"] * 5, [row.reason for row in rows]
    outputs = {"out", *(["d_query", "d_key", "d_value"] if gradient else [])}
    assert set(case.expected(case.inputs())) == outputs


def test_memory_is_measured_where_the_case_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    monkeypatch.setattr(memory, "supported", lambda: True)
    monkeypatch.setattr(memory, "measure", lambda _, rows, keys: seen.append(set(keys.values())))
    only = (sampling.OPERATOR, segments.OPERATORS[0])
    results = suite.run(Settings(quick=True, only=only, rounds=5))
    assert all(row.operator.startswith(only) for row in results.rows)
    assert {row.operator.split(" (")[0] for row in results.rows} == {"sampling", only[1]}
    (keys,) = seen
    assert keys
    assert all(key.startswith(segments.OPERATORS[0]) for key in keys)
    assert not _case().memory


def _line(row: Row) -> str:
    keys = (
        "date", "hardware", "cores", "threads", "memory_gib", "cpu_capability", "matrix_library",
        "system", "load_before", "load_after_timing",
    )  # fmt: skip
    results = Results({"versions": {}, **dict.fromkeys(keys)}, Settings(quick=True), [row])
    return next(x for x in markdown(results).splitlines() if x.startswith(f"| {row.peer}"))
