"""What benchmarks/gpu.py runs in processes of their own: time cases, and write what came of them.

    python -m benchmarks.gpu_timing FOLDER [--first K] [--seconds S] [--device D] [--quick]
    python -m benchmarks.gpu_timing FOLDER --write [--tests LINE] [--quick]

A fault on a GPU stays with its process, where every later call fails too. So every case leaves a
line in FOLDER/cases.jsonl when it begins and when it has ended, and a failure ends the process.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Row, Timing
from benchmarks.language import TINY, ModelShape

LINES = "cases.jsonl"
# N, D, V of: Llama 3.1 8B, Llama 3.2 1B, Qwen2.5 0.5B, Gemma-like
SHAPES = ((4096, 4096, 128256), (8192, 2048, 128256), (8192, 896, 151936), (4096, 5120, 248320))
_QUICK = ((64, 32, 512),)
_ROWS = ((2048, 128256), (1024, 248320))  # R, V
_LAYERS = ((16384, 896), (16384, 4096))  # T, D
_SEQUENCES = (2048, 20000)
QWEN = ModelShape(vocab=151936, hidden=896, inner=4864, layers=24, heads=14, kv_heads=2)

Plan = tuple[str, Callable[[], Case]]


def plans(device: str, quick: bool) -> list[Plan]:
    """The name of every case and what builds it, the most important first.

    One shape of the head, the row kernels and a whole step are before the other shapes. A case's
    module is imported when it is built: what cannot be imported fails alone.
    """
    half = {"dtype": torch.bfloat16, "device": device}
    whole = {"shape": TINY if quick else QWEN, **half}
    whole |= {"prompts": 2, "group": 4} if quick else {"prompts": 8, "group": 8}
    tokens = 8 if quick else 128  # of a sample
    heads: list[list[Plan]] = []
    for n, d, v in _QUICK if quick else SHAPES:
        sizes, at = {"n": n, "d": d, "v": v, **half}, f"{n}x{d}x{v}"
        names = ("POLICY", "ENTROPY", "FROZEN", "LOGPROB", "SCORE")
        own = [(f"heads.{o} {at}", partial(_case, "heads.head_case", o, **sizes)) for o in names]
        other = partial(_case, "cross_entropy.cross_entropy_case", None, **sizes)
        parts = [
            (f"gpu_products.{o} {at}", partial(_case, "gpu_products.product_case", o, **sizes))
            for o in ("LOGITS", "D_HIDDEN", "D_WEIGHT")
        ]
        heads.append([*own, (f"cross_entropy {at}", other), *parts])
    rows = [
        (
            f"gpu_rows.{o} {r}x{v}",
            partial(_case, "gpu_rows.row_case", o, rows=r, vocab=v, **half),
        )
        for r, v in (((8, 512),) if quick else _ROWS)
        for o in ("POLICY", "READ")
    ]
    layers = [
        (
            f"gpu_layers.{o} {t}x{d}",
            partial(_case, "gpu_layers.layer_case", o, tokens=t, width=d, **half),
        )
        for o in ("NORM", "GATE", "ROTATION")
        for t, d in (((8, 128),) if quick else _LAYERS)
    ]
    spans = {"dtype": torch.float32, "device": device, "gamma": 0.99}
    segments = [
        (f"segments.{o} {s}", partial(_case, "segments.segment_case", o, sequences=s, **spans))
        for o in ("SUM", "MEAN", "LAST", "SOFTMAX", "RETURNS")
        for s in ((8,) if quick else _SEQUENCES)
    ]
    return [
        *heads[0],
        *rows,
        ("step", partial(_case, "step.step_case", None, **whole)),
        *layers,
        *(
            (
                f"attention{' gradient' * gradient}",
                partial(_case, "attention.attention_case", None, **whole, gradient=gradient),
            )
            for gradient in (True, False)
        ),
        ("packing", partial(_case, "packing.packing_case", None, **whole)),
        ("sampling", partial(_case, "sampling.sampling_case", None, **whole, tokens=tokens)),
        *(plan for shape in heads[1:] for plan in shape),
        *segments,
    ]


def _case(function: str, operator: str | None, **options: Any) -> Case:
    module, _, name = function.partition(".")
    found = import_module(f"benchmarks.{module}")
    if operator is not None:
        options["operator"] = getattr(found, operator)
    case: Case = getattr(found, name)(seed=0, **options)
    return case


def time_cases(folder: Path, device: str, quick: bool, rounds: int, first: int, end: float) -> None:
    """Time the cases from ``first`` on until the clock (time.monotonic) is at ``end``.

    Raises:
        Exception: whatever a case raised; its line says so.
    """
    from benchmarks.runner import run_case
    from benchmarks.suite import ratios

    timing = Timing(rounds=rounds, least_s=1e-4 if quick else 0.02)
    for index, (name, build) in enumerate(plans(device, quick)):
        if index < first:
            continue
        if time.monotonic() > end:
            return
        print(f"{name}:", end=" ", file=sys.stderr, flush=True)
        _note(folder, index=index, case=name, began=True)
        try:
            rows = run_case(build(), timing)
            if device == "cuda":
                torch.cuda.synchronize()  # a fault that no call has shown yet
                torch.cuda.empty_cache()
        except Exception as error:
            _note(folder, index=index, case=name, failed=f"{type(error).__name__}: {error}"[:500])
            raise
        _note(folder, index=index, case=name, rows=[asdict(row) for row in rows])
        print(ratios(rows), file=sys.stderr)


def _note(folder: Path, **values: Any) -> None:
    with (folder / LINES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def write(folder: Path, quick: bool, rounds: int, tests: str | None) -> tuple[list[Row], list[str]]:
    """results.json, results.md and plots of the lines; the rows, and what failed as a whole."""
    from benchmarks import environment
    from benchmarks.report import write as write_results
    from benchmarks.suite import Results, Settings

    text = (folder / LINES).read_text("utf-8") if (folder / LINES).is_file() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    rows = [Row(**row) for line in lines for row in line.get("rows", [])]
    failed = [f"{line['case']}: {line['failed']}" for line in lines if "failed" in line]
    begun = {line["case"] for line in lines}
    found = environment.describe()
    found |= {"load_before": None, "load_after_timing": environment.load()}
    found["left_out"] = [name for name, _ in plans("cpu", quick) if name not in begun]
    found["failed"] = failed
    if tests is not None:
        found["tests"] = tests
    settings = Settings(quick=quick, dtype="bfloat16", rounds=rounds)
    write_results(Results(found, settings, rows), folder)
    return rows, failed


def main(arguments: list[str] | None = None) -> int:
    """Time or write; 1 if a result of this package was wrong or a case failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_timing", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER")
    add("--write", action="store_true", help="write the results of the cases timed so far")
    add("--first", type=int, default=0, help="the first case (default: %(default)s)")
    add("--seconds", type=float, default=480.0, help="begin no case later (default: %(default)g)")
    add("--device", default="cuda", help="default: %(default)s")
    add("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    add("--quick", action="store_true", help="tiny shapes: no speeds")
    add("--tests", metavar="LINE", help="what the tests before it came to, for the page")
    options = parser.parse_args(arguments)
    if not options.write:
        end = time.monotonic() + options.seconds
        time_cases(
            options.folder, options.device, options.quick, options.rounds, options.first, end
        )
        return 0
    rows, failed = write(options.folder, options.quick, options.rounds, options.tests)
    wrong = [r for r in rows if r.status == "wrong" and "airl_fast" in r.peer]
    for row in wrong:
        print(f"wrong: {row.operator} {row.backend}: {row.reason}", file=sys.stderr)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(options.folder / "results.md")
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
