"""The benchmark harness: its structure, and that a wrong operator gets no speed. Never times."""

import json
from pathlib import Path

import pytest
import torch

from airl_fast import bench, cli
from benchmarks import heads, memory, packing, segments, suite
from benchmarks.harness import Case, Prepared, Row, Timing, Variant
from benchmarks.report import markdown
from benchmarks.runner import run_case
from benchmarks.truth import head_truth
from tests import oracle

TIMING = Timing(rounds=5, least_s=0.0)
SIZES = (32, 256, 16)


def _case(operator: str = heads.LOGPROB, dtype: torch.dtype = torch.float32) -> Case:
    return heads.head_case(operator, *SIZES, dtype, seed=0)


def _with(case: Case, *variants: Variant) -> Case:
    return Case(**{**vars(case), "variants": variants})


def _broken(case: Case, peer: str = "plain torch", *, only_large: bool = False) -> Variant:
    """The peer with outputs off by a hundredth; with ``only_large`` not on small inputs."""
    (sound,) = (v for v in case.variants if v.peer == peer)

    def prepare(inputs: heads.HeadInputs) -> Prepared:
        prepared = sound.prepare(inputs)
        if only_large and len(inputs.hidden) != SIZES[0]:
            return prepared
        return Prepared(prepared.call, lambda x: {k: v * 1.01 for k, v in prepared.read(x).items()})

    return Variant("broken", prepare)


def _no_speed(row: Row) -> bool:
    speeds = (row.ms, row.ms_iqr, row.ratio, row.gb_s, row.yardstick_ms)
    return row.status == "wrong" and all(value is None for value in speeds)


@pytest.mark.parametrize("operator", heads.OPERATORS)
def test_every_formulation_of_a_head_operator_is_right(operator: str) -> None:
    peers = ["plain torch", "trl", "padded", "torch linear_cross_entropy", "liger-kernel"]
    rows = run_case(_case(operator), TIMING, peers=peers)
    assert {row.peer for row in rows} == {"airl_fast", *peers}
    for row in rows:
        assert row.status in ("ok", "unavailable"), (row.peer, row.reason)
        assert (row.status == "ok") == (row.ms is not None and row.ratio is not None)
        assert row.status == "ok" or row.reason
    assert {r.backend: r.status for r in rows if r.peer == "airl_fast"}["reference"] == "ok"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    rows = run_case(_case(heads.POLICY, dtype), TIMING, peers=["plain torch"])
    assert {row.status for row in rows} <= {"ok", "unavailable"}, [row.reason for row in rows]


@pytest.mark.parametrize("operator", [heads.LOGPROB, heads.POLICY, heads.SCORE])
@pytest.mark.parametrize("only_large", [False, True], ids=["everywhere", "timed inputs only"])
def test_a_wrong_operator_gets_no_speed(operator: str, only_large: bool) -> None:
    case = _case(operator)
    sound = next(v for v in case.variants if v.peer == "plain torch")
    wrong = _broken(case, only_large=only_large)
    row, other = run_case(_with(case, wrong, sound), TIMING)
    assert _no_speed(row)
    assert ("timed inputs" if only_large else "small inputs") in row.reason
    assert other.status == "ok"
    results = suite.Results({"versions": {}, **dict.fromkeys(_ENVIRONMENT)}, _quick(), [row])
    line = next(x for x in markdown(results).splitlines() if x.startswith("| broken"))
    assert "**wrong**" in line
    assert "relative error" in line


def test_an_operator_that_goes_wrong_while_it_is_timed_gets_no_speed() -> None:
    case = _case()
    sound = next(v for v in case.variants if v.peer == "plain torch")

    def prepare(inputs: heads.HeadInputs) -> Prepared:
        prepared, calls = sound.prepare(inputs), [0]

        def decays() -> dict[str, torch.Tensor]:
            calls[0] += 1
            return {k: v * (1 if calls[0] < 4 else torch.nan) for k, v in prepared.call().items()}

        return Prepared(decays)

    (row,) = run_case(_with(case, Variant("decays", prepare)), TIMING)
    assert _no_speed(row)
    assert "the last timed output" in row.reason


def test_a_missing_output_or_one_of_another_shape_is_wrong() -> None:
    case = _case(heads.ENTROPY)
    sound = next(v for v in case.variants if v.peer == "plain torch")

    def less(inputs: heads.HeadInputs) -> Prepared:
        return Prepared(sound.prepare(inputs).call, lambda x: {"logp": x["logp"]})

    def shorter(inputs: heads.HeadInputs) -> Prepared:
        return Prepared(sound.prepare(inputs).call, lambda x: {k: v[1:] for k, v in x.items()})

    for prepare in (less, shorter):
        (row,) = run_case(_with(case, Variant("odd", prepare)), TIMING)
        assert _no_speed(row)


def test_a_peer_that_raises_says_so_and_harms_no_other() -> None:
    case = _case()

    def prepare(inputs: heads.HeadInputs) -> Prepared:
        raise MemoryError("too large")

    sound = next(v for v in case.variants if v.peer == "plain torch")
    row, other = run_case(_with(case, Variant("large", prepare), sound), TIMING)
    assert (row.status, row.reason, row.ms) == ("failed", "MemoryError: too large", None)
    assert other.status == "ok"


def test_dividing_by_powers_of_gamma_is_refused_for_long_sequences() -> None:
    short = segments.segment_case(segments.RETURNS, 4, torch.float32, 0, gamma=0.99)
    long = segments.segment_case(segments.RETURNS, 2, torch.float32, 0, length=2048, gamma=0.9)
    (of_short,) = [r for r in run_case(short, TIMING, peers=["padded"]) if r.peer == "padded"]
    (of_long,) = [r for r in run_case(long, TIMING, peers=["padded"]) if r.peer == "padded"]
    assert of_short.status == "ok"
    assert _no_speed(of_long)
    assert "nan" in of_long.reason


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
@pytest.mark.parametrize("operator", segments.OPERATORS)
def test_segment_formulations(operator: str, gradient: bool) -> None:
    case = segments.segment_case(operator, 16, torch.float32, 0, gamma=0.95, gradient=gradient)
    for row in run_case(case, TIMING):
        assert row.status in ("ok", "unavailable"), (row.peer, row.reason)
        assert row.status != "ok" or row.gb_s is not None


def test_truth_in_blocks_is_the_oracle() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, generator=generator) * 9
    weight = torch.randn(9001, 3, generator=generator)
    targets = torch.tensor([0, 4095, 4096, 8192, 9000])
    logp, entropy, _ = head_truth(hidden, weight, targets)
    expected = oracle.linear_logprob(hidden, weight, targets)
    torch.testing.assert_close((logp, entropy), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not memory.supported(), reason="the peak cannot be reset here")
@pytest.mark.parametrize("kept", [True, False], ids=["returned", "freed"])
def test_peak_counts_what_a_call_takes(kept: bool) -> None:
    def call() -> torch.Tensor:
        taken = torch.ones(64, 2**18)
        return taken if kept else taken.sum()

    found = memory.peak_of_call(call)
    assert found["peak_mib"] == pytest.approx(64, abs=2)  # of one huge page
    assert found["result_mib"] == (64 if kept else 4 / 2**20)


def test_quick_run_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--quick", "--only", heads.ENTROPY, "--only", "packing", "--threads", "1"]
    options += ["--peers", "padded", "--output-dir", str(tmp_path)]
    assert cli.main(["bench", *options]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "results.md")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["seed"] == 0
    assert {"date", "hardware", "threads", "versions", "load_before"} <= set(results["environment"])
    assert {row["group"] for row in results["rows"]} == {"main", "sweep"}
    for row in results["rows"]:
        assert row["status"] in ("ok", "unavailable"), row
        if row["status"] == "ok":
            assert row["rounds"] >= (3 if row["operator"] == packing.OPERATOR else 5)
            assert row["ms"] > 0
            assert (row["peak_mib"] is not None) == memory.supported()
    tokens = {r["peer"]: r["facts"]["tokens"] for r in results["rows"] if r["facts"]}
    assert tokens["airl_fast"] < tokens["airl_fast, prompts repeated"] < tokens["padded"]
    text = (tmp_path / "results.md").read_text()
    assert "QUICK RUN" in text
    plots = {p.name for p in tmp_path.glob("*.png")}
    assert len(plots) == 3 + memory.supported()  # against N, against V, roofline; memory
    assert all(f"]({name})" in text for name in plots)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "linear_nothing"], "expected the start of one of: linear_logprob"),
        (["--rounds", "4"], "expected 5 or more"),
        (["--threads", "0"], "expected 1 or more"),
    ],
)
def test_options_that_mean_nothing(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site-packages/airl_fast/bench.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--quick"]) == 2
    assert "run this in a checkout of the repository" in capsys.readouterr().err


_ENVIRONMENT = (
    "date", "hardware", "cores", "threads", "memory_gib", "cpu_capability", "matrix_library",
    "system", "load_before", "load_after_timing",
)  # fmt: skip


def _quick() -> suite.Settings:
    return suite.Settings(quick=True)
