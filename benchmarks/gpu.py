"""``python -m benchmarks.gpu``: on a bare machine with a GPU, build, verify and time everything.

Needs torch, triton, transformers and, for the CUDA kernels, nvcc; fetches nothing. It builds the
extensions in place, runs the tests of the GPU backends, and times operators, row kernels,
segments, packing and one whole step beside their peers, the most important first. What does not
fit in the minutes given is left out, and named. The results are those of the other benchmarks:
results.json, results.md and plots; ``airl-fast bench --report FILE`` draws them again.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks import environment, gpu_rows, heads, packing, segments, step
from benchmarks.cross_entropy import cross_entropy_case
from benchmarks.harness import Case, Row, Timing
from benchmarks.language import TINY, ModelShape
from benchmarks.report import write
from benchmarks.runner import run_case
from benchmarks.suite import Results, Settings, ratios

_ROOT = Path(__file__).resolve().parent.parent
_DTYPE = torch.bfloat16
# N, D, V of: Llama 3.1 8B, Llama 3.2 1B, Qwen2.5 0.5B, Gemma-like
SHAPES = ((4096, 4096, 128256), (8192, 2048, 128256), (8192, 896, 151936), (4096, 5120, 248320))
_QUICK = ((64, 32, 512),)
_HEADS = (
    heads.POLICY, heads.ENTROPY, heads.FROZEN, heads.LOGPROB, heads.SCORE,
)  # fmt: skip
_ROWS = ((2048, 128256), (1024, 248320))  # R, V
_SEQUENCES = (2048, 20000)
QWEN = ModelShape(vocab=151936, hidden=896, inner=4864, layers=24, heads=14, kv_heads=2)
_TESTS = ("tests/kernels", "tests/cuda", "tests/test_varlen.py")


def main(arguments: list[str] | None = None) -> int:
    """Read the options and run; 1 if a result of this package was wrong or a test failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Build, verify and time everything on this machine's GPU.",
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="in all (default: %(default)g)")
    add("--quick", action="store_true", help="tiny shapes: does everything work? no speeds")
    add("--no-build", dest="build", action="store_false", help="the extensions are built already")
    add("--no-tests", dest="tests", action="store_false", help="time without the tests before it")
    add("--device", default="cuda", help="cpu tries the program out (default: %(default)s)")
    add("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    add("--output-dir", type=Path, metavar="DIR", help="default: benchmarks/results/GPU-DATE")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU here; --device cpu tries it out", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    failed = options.build and not _build()
    found = environment.describe()
    if options.tests:
        found["tests"] = tests = _tests(deadline)
        failed |= "failed" in tests or "error" in tests
    timing = Timing(rounds=options.rounds, least_s=1e-4 if options.quick else 0.02)
    rows, left_out = _run(options.device, options.quick, timing, deadline)
    found |= {"left_out": left_out, "load_before": None, "load_after_timing": environment.load()}
    settings = Settings(quick=options.quick, dtype="bfloat16", rounds=options.rounds)
    print(write(Results(found, settings, rows), options.output_dir) / "results.md")
    wrong = [r for r in rows if r.status == "wrong" and "airl_fast" in r.peer]
    for row in wrong:
        print(f"wrong: {row.operator} {row.backend}: {row.reason}", file=sys.stderr)
    return 1 if wrong or failed else 0


def _build() -> bool:
    """Compile the extensions where they are imported from."""
    print("building ...", end=" ", file=sys.stderr, flush=True)
    start = time.monotonic()
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    print(f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
    return done.returncode == 0


def _tests(deadline: float) -> str:
    """Pytest's closing line over the GPU backends, on the GPU."""
    print("tests ...", end=" ", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", *_TESTS]
    limit = max(30.0, 0.4 * (deadline - time.monotonic()))
    known = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=_ROOT, capture_output=True, text=True, timeout=limit, env=known
        )
    except subprocess.TimeoutExpired:
        line = f"error: no end within {limit:.0f} s"
    else:
        line = (done.stdout.strip().splitlines() or ["error: nothing printed"])[-1]
        if done.returncode:
            print(done.stdout[-6000:], file=sys.stderr)
    print(line, file=sys.stderr)
    return line


def _run(device: str, quick: bool, timing: Timing, deadline: float) -> tuple[list[Row], list[str]]:
    """Rows of what there was time for, and the keys of what there was none for."""
    rows: list[Row] = []
    left_out: list[str] = []
    for case in cases(device, quick):
        if time.monotonic() > deadline:
            left_out.append(case.key)
            continue
        print(f"{case.key}:", end=" ", file=sys.stderr, flush=True)
        own = run_case(case, timing)
        rows += own
        print(ratios(own), file=sys.stderr)
        if device == "cuda":
            torch.cuda.empty_cache()
    for key in left_out:
        print(f"left out for want of time: {key}", file=sys.stderr)
    return rows, left_out


def cases(device: str, quick: bool) -> Iterator[Case]:
    """All cases, the most important first."""
    head = partial(heads.head_case, dtype=_DTYPE, seed=0, device=device)
    for n, d, v in _QUICK if quick else SHAPES:
        for operator in _HEADS:
            yield head(operator, n, v, d)
        yield cross_entropy_case(n, v, d, _DTYPE, 0, device)
    for rows, vocab in ((8, 512),) if quick else _ROWS:
        for operator in gpu_rows.OPERATORS:
            yield gpu_rows.row_case(operator, rows, vocab, _DTYPE, 0, device)
    model = TINY if quick else QWEN
    for prompts, group in ((2, 4),) if quick else ((8, 8),):
        yield packing.packing_case(prompts, group, model, 0, _DTYPE, device)
        yield step.step_case(prompts, group, model, 0, _DTYPE, device)
    for operator in segments.OPERATORS:
        for sequences in (8,) if quick else _SEQUENCES:
            yield segments.segment_case(
                operator, sequences, torch.float32, 0, gamma=0.99, device=device
            )


if __name__ == "__main__":
    sys.exit(main())
