"""How cost grows: ``python -m benchmarks.growth --help``.

Time and peak extra memory against one size at a time, the others held; `fits.py` has the curve
that is laid through them. Two operators over the head against N and V; scoring a packed batch with
a small Llama-shaped model against completions per prompt, sequence length and sequences; an AIRL
step through the learners against sequences, at a fixed token budget.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from airl_fast.packing import Source, Trace
from airl_fast.passes import action_logp
from benchmarks import environment, heads, memory, page
from benchmarks.cost_steps import StepRunner, random_model, random_traces
from benchmarks.fits import fit_growth
from benchmarks.harness import Timing
from benchmarks.packing import TINY, ModelShape
from benchmarks.runner import run_case

_ROOT = Path(__file__).resolve().parent.parent
_BUDGET = 1024  # tokens of a micro-batch of the steps
_SIZES = (64, 96, 128, 192, 256, 384, 512, 768, 1024)  # enough for an exponent with its interval
_SCORED = ModelShape(vocab=16384, hidden=384, inner=1024, layers=6, heads=6, kv_heads=2)
_TRAINED = ModelShape(vocab=8192, hidden=256, inner=704, layers=4, heads=4, kv_heads=2)


@dataclass(frozen=True)
class Sweep:
    """One size that grows.

    Attributes:
        name: of the sweep.
        size: what grows, as an axis shows it.
        fixed: what does not.
        sizes: its values.
        build: makes the call that is measured at a size (for a head: the case).
        expected: exponent of time that the algorithm has, in words.
        head: the operator, where it is one over the head.
    """

    name: str
    size: str
    fixed: str
    sizes: tuple[int, ...]
    build: Callable[[int], Any]
    expected: str
    head: str | None = None


def sweeps(quick: bool) -> list[Sweep]:
    """All sweeps; tiny ones where ``quick``."""
    model, trained = (TINY, TINY) if quick else (_SCORED, _TRAINED)
    n, v, width = (32, 256, 32) if quick else (256, 32768, 512)
    ns = (16, 32, 48, 64) if quick else _SIZES
    vs = (128, 256, 384, 512) if quick else tuple(128 * n for n in _SIZES)
    prompt, completion = (6, 5) if quick else (138, 124)
    groups = (1, 2, 3, 4) if quick else (1, 2, 3, 4, 6, 8, 12, 16)
    total = 48 if quick else 3072
    lengths = (8, 12, 16, 24) if quick else (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 3072)
    made = []
    for operator, name in (
        (heads.LOGPROB, "linear_logprob"),
        (heads.POLICY, "linear_policy_loss"),
    ):
        for size, sizes, fixed, build in (
            ("N", ns, f"V = {v:,}, D = {width}", partial(_head, operator, v=v, d=width)),
            ("V", vs, f"N = {n:,}, D = {width}", partial(_head_of_v, operator, n=n, d=width)),
        ):
            made.append(Sweep(f"{name} against {size}", size, fixed, sizes, build, "1", operator))
    shape = _words(model)
    ours = f"{shape}, {prompt} + {completion} tokens"

    def scored(traces: Callable[[int], list[Trace]]) -> Callable[[int], Callable[[], Any]]:
        return lambda x: _scoring(model, traces(x))

    made += [
        Sweep("scoring against G", "completions of one prompt", ours, groups,
              scored(lambda x: random_traces(model.vocab, 1, x, prompt, completion)), "1"),
        Sweep("scoring against length", "tokens of one sequence", shape, lengths,
              scored(lambda x: _halves(model, x, 1)), "1 to 2"),
        Sweep("scoring against length, tokens held", "tokens of a sequence",
              f"{shape}, {total:,} tokens in all", lengths,
              scored(lambda x: _halves(model, x, total // x)), "0 to 1"),
        Sweep("scoring against sequences", "sequences", f"{ours}, a prompt each", groups,
              scored(lambda x: random_traces(model.vocab, x, 1, prompt, completion)), "1"),
        Sweep("step against sequences", "sequences",
              f"{_words(trained)}, micro-batches of {_BUDGET:,} tokens",
              (4, 8, 12, 16) if quick else (4, 8, 12, 16, 24, 32, 48, 64),
              lambda x: _step(trained, x, prompt // 2, completion // 2), "1"),
    ]  # fmt: skip
    return made


def _words(shape: ModelShape) -> str:
    return f"{shape.layers} layers, D = {shape.hidden}, V = {shape.vocab:,}"


# What is measured


def _head(operator: str, n: int, *, v: int, d: int) -> Any:
    case = heads.head_case(operator, n, v, d, torch.float32, 0)
    return replace(case, variants=[x for x in case.variants if x.backend == "cpu"])


def _head_of_v(operator: str, v: int, *, n: int, d: int) -> Any:
    return _head(operator, n, v=v, d=d)


_model = lru_cache(maxsize=1)(random_model)


def _scoring(shape: ModelShape, traces: Sequence[Trace]) -> Callable[[], Any]:
    model = _model(shape)
    return lambda: {"logp": torch.cat(action_logp(model, traces, 1 << 20))}


def _halves(shape: ModelShape, length: int, count: int) -> list[Trace]:
    """Sequences that are half prompt and half completion."""
    return random_traces(shape.vocab, count, 1, length // 2, length - length // 2)


def _step(shape: ModelShape, sequences: int, prompt: int, completion: int) -> Callable[[], Any]:
    lengths = (prompt, completion)
    samples = random_traces(shape.vocab, sequences // 4, 3, *lengths)
    experts = random_traces(shape.vocab, sequences // 4, 1, *lengths, source=Source.EXPERT)
    runner = StepRunner(shape, _BUDGET)

    def step() -> dict[str, torch.Tensor]:
        runner.run(samples, experts)
        return {}

    return step


def time_sweep(sweep: Sweep, rounds: int) -> list[dict[str, float]]:
    """Median seconds at every size; all sizes take turns in random order.

    Raises:
        RuntimeError: an operator's result is wrong, or it cannot run here.
    """
    if sweep.head:
        return [_timed_head(sweep, x, rounds) for x in sweep.sizes]
    calls = {x: sweep.build(x) for x in sweep.sizes}
    for call in calls.values():
        call()
    taken: dict[int, list[float]] = {x: [] for x in sweep.sizes}
    order, rng = list(sweep.sizes), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)
        for x in order:
            start = time.perf_counter()
            calls[x]()
            taken[x].append(time.perf_counter() - start)
    return [
        {"x": x, "seconds": statistics.median(s), "spread": max(s) / min(s)}
        for x, s in taken.items()
    ]


def _timed_head(sweep: Sweep, x: int, rounds: int) -> dict[str, float]:
    """An operator, checked against float64 before and after by the harness."""
    (row,) = run_case(sweep.build(x), Timing(rounds=rounds, least_s=1e-3))
    if row.status != "ok" or row.ms is None or row.ms_iqr is None or row.yardstick_ms is None:
        raise RuntimeError(f"{sweep.name} at {x}: {row.status}: {row.reason}")
    point = {"x": x, "seconds": row.ms / 1e3, "spread": 1 + row.ms_iqr / row.ms}
    return {**point, "product_seconds": row.yardstick_ms / 1e3}


def peaks(name: str, quick: bool, threads: int) -> list[dict[str, float]]:
    """Peak extra memory at every size of a sweep, in a process of its own.

    Raises:
        RuntimeError: the process failed, most likely for want of memory.
    """
    command = [sys.executable, "-m", "benchmarks.growth", "--peaks-of", name]
    command += ["--threads", str(threads), *(["--quick"] if quick else [])]
    env = {**os.environ, **memory.ENVIRONMENT}
    done = subprocess.run(command, cwd=_ROOT, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name!r} ended with {done.returncode}")
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peaks_here(sweep: Sweep) -> list[dict[str, float]]:
    points = []
    for x in sweep.sizes:
        built = sweep.build(x)
        if sweep.head:
            points.append(memory.peak_of(built, built.variants[0]))
        else:
            points.append(memory.peak_of_call(built))
    return points


def measure(sweep: Sweep, *, quick: bool, rounds: int) -> dict[str, Any]:
    """Measure and fit a sweep."""
    points = time_sweep(sweep, rounds)
    if memory.supported():
        found = peaks(sweep.name, quick, torch.get_num_threads())
        points = [{**point, **peak} for point, peak in zip(points, found, strict=True)]
    return _summary(sweep, points)


def _summary(sweep: Sweep, points: list[dict[str, float]]) -> dict[str, Any]:
    x = [point["x"] for point in points]
    summary = {
        "name": sweep.name,
        "size": sweep.size,
        "fixed": sweep.fixed,
        "expected": sweep.expected,
        "points": points,
        "time": asdict(fit_growth(x, [point["seconds"] for point in points])),
    }
    if "peak_mib" in points[0]:
        # a call of no memory at all would have no logarithm; a page is the least there is
        extra = [max(p["peak_mib"] - p["result_mib"], 2**-8) for p in points]
        summary["memory"] = asdict(fit_growth(x, extra))
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweeps that are asked for and write them down."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="How time and memory grow with each size, with fitted exponents. Writes "
        "growth.json, growth.md and plots, and the tables of docs/performance.md.",
    )
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NAME",
        help="the start of a sweep's name; others keep their last results")  # fmt: skip
    add("--quick", action="store_true", help="tiny sizes: does everything work? no speeds")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--rounds", type=int, default=3, metavar="N", help="timed calls (default: %(default)s)")
    add("--output-dir", type=Path, default=page.FOLDER, metavar="DIR",
        help="default: docs/performance; only that one updates the document")  # fmt: skip
    add("--peaks-of", metavar="NAME", help=argparse.SUPPRESS)  # a worker's
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.peaks_of:
        (sweep,) = (s for s in sweeps(options.quick) if s.name == options.peaks_of)
        print(json.dumps(_peaks_here(sweep)))
        return 0
    known = [sweep.name for sweep in sweeps(options.quick)]
    chosen = [
        sweep
        for sweep in sweeps(options.quick)
        if not options.only or sweep.name.startswith(tuple(options.only))
    ]
    if not chosen:
        print(f"growth: --only: expected the start of one of: {'; '.join(known)}", file=sys.stderr)
        return 2
    if options.quick and options.output_dir == page.FOLDER:
        print("growth: --quick needs an --output-dir of its own", file=sys.stderr)
        return 2
    found = {"environment": environment.describe(), "rounds": options.rounds}
    for sweep in chosen:  # each is written as soon as it is done
        start = time.perf_counter()
        results = [measure(sweep, quick=options.quick, rounds=options.rounds)]
        path = page.write_growth({**found, "sweeps": results}, known, options.output_dir)
        print(f"{sweep.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
