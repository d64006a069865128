"""The cost model from the command line: ``python -m benchmarks.cost_model --help``.

`costs.py` is the model, `cost_rates.py` its calibration, `cost_steps.py` its validation and
`cost_gpus.py` what it says about GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from airl_fast.packing import Source
from benchmarks import cost_gpus, cost_rates, cost_steps, environment, page
from benchmarks.costs import Rates, Workload, step_s
from benchmarks.packing import ModelShape

ALLOWED = 0.25  # largest relative error of a prediction
ROUNDS = 9
_HELP = {
    "calibrate": "measure this machine's rates",
    "all": "measure them and steps, predict those and GPUs (the default); about 5 minutes",
    "predict": "predict a step from the stored rates; --layers 24 --group 16 and so on",
    "gpus": "predictions for 8 and for 1,024 GPUs",
}


def _measured(quick: bool, steps: Mapping[str, Sequence[cost_steps.Step]]) -> dict[str, Any]:
    """The rates, and the steps held against them: rounds of all, one after the other."""
    _warm_up(0.1 if quick else 3.0)
    calibration = cost_rates.Calibration(cost_rates.QUICK if quick else cost_rates.Sizes())
    runs = {key: [cost_steps.Validation(step) for step in given] for key, given in steps.items()}
    for _ in track(range(3 if quick else ROUNDS), "rounds", console=Console(stderr=True)):
        calibration.round()
        for run in chain(*runs.values()):
            run.round()
    rates = calibration.rates()
    found = {
        "environment": environment.describe(),
        "rates": rates.as_json(),
        "experiments": calibration.seconds(),
    }
    if steps:
        found["allowed"] = ALLOWED
    for key, given in runs.items():
        found[key] = [run.against(rates) for run in given]
        for row in found[key]:
            errors = ", ".join(f"{name} {error:+.0%}" for name, error in row["error"].items())
            print(f"{row['name']}: {errors}", file=sys.stderr, flush=True)
    return found


def _warm_up(seconds: float) -> None:
    """A core that has idled is slow for its first second."""
    x, start = torch.randn(1024, 1024), time.perf_counter()
    while time.perf_counter() - start < seconds:
        x @ x


def _steps(quick: bool) -> dict[str, Sequence[cost_steps.Step]]:
    if quick:
        return {"validation": cost_steps.QUICK_STEPS, "outside": cost_steps.QUICK_STEPS}
    return {"validation": cost_steps.STEPS, "outside": cost_steps.OUTSIDE}


def _predict(options: argparse.Namespace, rates: Rates) -> None:
    shape = ModelShape(**{field.name: getattr(options, field.name) for field in fields(ModelShape)})
    sizes = (shape.vocab, options.prompts)
    lengths = (options.prompt, options.completion)
    samples = cost_steps.random_traces(*sizes, options.group, *lengths)
    experts = cost_steps.random_traces(*sizes, 1, *lengths, source=Source.EXPERT)
    seen = Workload.of([*samples, *experts], options.token_budget)
    parts = step_s(shape, seen, Workload.of(samples, options.token_budget), rates)
    print(f"{seen.tokens:,} packed tokens, {seen.actions:,} actions, {seen.micro_batches} "
          "micro-batches; predicted seconds after sampling:")  # fmt: skip
    for phase, seconds in parts.items():
        print(f"  {phase:22} {seconds:10.3f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_model",
        description="Predicts the time of an AIRL step from the model's shape. Writes "
        "cost_model.json and cost_model.md, and the tables of docs/performance.md.",
        epilog="\n".join(f"{name:10} {text}" for name, text in _HELP.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", nargs="?", choices=tuple(_HELP), default="all")
    add("--quick", action="store_true", help="tiny shapes: does everything work? no speeds")
    add("--threads", type=int, default=2, metavar="N", help="default: %(default)s")
    add("--output-dir", type=Path, default=page.FOLDER, metavar="DIR",
        help="default: docs/performance; only that one updates the document")  # fmt: skip
    sizes = parser.add_argument_group("predict: the model (default: SmolLM2-135M) and the batch")
    for field in fields(ModelShape):
        sizes.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    for name, default in (("prompts", 8), ("group", 8), ("prompt", 138), ("completion", 124),
                          ("token-budget", 16384)):  # fmt: skip
        sizes.add_argument(f"--{name}", type=int, default=default)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command says."""
    options = _parser().parse_args(arguments)
    path = options.output_dir / "cost_model.json"
    if options.quick and options.output_dir == page.FOLDER:
        print("cost_model: --quick needs an --output-dir of its own", file=sys.stderr)
        return 2
    fresh = options.command in ("all", "calibrate")
    if not fresh and not path.is_file():
        print(f"cost_model: {path} does not exist: run 'calibrate' first", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    if fresh:
        found = _measured(options.quick, _steps(options.quick) if options.command == "all" else {})
    else:
        found = json.loads(path.read_text("utf-8"))
    if options.command == "predict":
        _predict(options, Rates.from_json(found["rates"]))
        return 0
    found["gpus"], found["scaling"] = cost_gpus.scenarios(), cost_gpus.scaling()
    if "validation" not in found:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(page.rates(found["rates"]))
        return 0
    print(page.write_costs(found, options.output_dir))
    worst = max(abs(row["error"]["step"]) for row in found["validation"])
    if options.command == "gpus" or options.quick or worst <= ALLOWED:
        return 0
    print(f"a step is predicted {worst:.0%} off, allowed {ALLOWED:.0%}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
