"""The products of a decoder's layers beside MKL's: ``python -m benchmarks.products``.

M tokens through layers of a hidden size D and an inner size I: the four products of a layer going
forward (q, k and v as one; o; gate and up with silu; down), and their gradients at the input and at
the weight. Every layer has weights of its own, so that they come from memory as in a model. The
yardstick is torch's float32 product with the weights of the same layer. Errors are against float64,
over what the terms' sizes add up to.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from airl_fast import _C
from airl_fast.ops import _cpu_products as products
from airl_fast.ops._cpu_products import Factor, Norm
from benchmarks.environment import describe

_PRECISIONS = "highest", "high", "medium"
Call = Callable[[Tensor], object]  # with one layer's weight


def main() -> int:
    """Read the options, measure, write results.json and results.md."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.products",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--tokens", type=int, default=1792, help="M (default: %(default)s)")
    add("--hidden", type=int, default=576, help="D (default: %(default)s, SmolLM2-135M's)")
    add("--inner", type=int, default=1536, help="I (default: %(default)s)")
    add("--layers", type=int, default=20, help="(default: %(default)s)")
    add("--rounds", type=int, default=5, help="(default: %(default)s)")
    add("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    add("--output", type=Path, help="folder of results.json and results.md; default: print only")
    options = parser.parse_args()
    if not _C.products_ready():
        sys.exit("this processor has no AMX: torch multiplies, and there is nothing to compare")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shown = {name: value for name, value in vars(options).items() if name != "output"}
    found = {"environment": describe(), "options": shown, "rows": list(_rows(options))}
    print(text := markdown(found))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "results.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (options.output / "results.md").write_text(text + "\n", "utf-8")
    return 0


def _rows(options: argparse.Namespace) -> Any:
    tokens, hidden, inner = options.tokens, options.hidden, options.inner
    for name, width, columns in (
        ("q, k, v, o", hidden, hidden),
        ("gate, up", hidden, 2 * inner),
        ("down", inner, hidden),
    ):
        x, grad = torch.randn(tokens, width), torch.randn(tokens, columns)
        weights = [torch.randn(columns, width) for _ in range(options.layers)]
        for pass_, a, b in (
            ("forward", lambda w, x=x: x, lambda w: w.t()),
            ("at the input", lambda w, grad=grad: grad, lambda w: w),
            ("at the weight", lambda w, grad=grad: grad.t(), lambda w, x=x: x),
        ):
            yield _measured(name, pass_, a, b, weights, options.rounds)
    yield _gated(tokens, hidden, inner, options)


def _measured(
    name: str,
    pass_: str,
    a: Callable[[Tensor], Tensor],
    b: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    rounds: int,
) -> dict[str, Any]:
    """One product, by MKL and by the tiles at every precision."""
    left, right = a(weights[0]), b(weights[0])
    out = torch.empty(left.shape[0], right.shape[1])
    truth, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()

    def tiles(precision: str) -> Call:
        def call(weight: Tensor) -> None:
            torch.set_float32_matmul_precision(precision)
            products.multiply(a(weight), b(weight), out)
            torch.set_float32_matmul_precision("highest")

        return call

    calls: dict[str, Call] = {"MKL": lambda w: torch.mm(a(w), b(w), out=out)}
    calls |= {precision: tiles(precision) for precision in _PRECISIONS}
    errors = {}
    for label, call in calls.items():
        out.fill_(float("nan"))
        call(weights[0])
        errors[label] = float(((out.double() - truth).abs() / size).max())
    flops = 2.0 * left.shape[0] * left.shape[1] * right.shape[1]
    return _row(name, pass_, calls, weights, rounds, flops, errors)


def _gated(tokens: int, hidden: int, inner: int, options: argparse.Namespace) -> dict[str, Any]:
    """``silu(norm(x) G) * (norm(x) U)`` in one call, and as torch's operations."""
    x, norm = torch.randn(tokens, hidden), Norm(torch.rand(hidden) + 0.5, 1e-5)
    weights = [torch.randn(2 * inner, hidden) for _ in range(options.layers)]
    out = torch.empty(tokens, inner)

    def theirs(weight: Tensor) -> None:
        normed = functional.rms_norm(x, (hidden,), norm.weight, norm.epsilon)
        gate = functional.linear(normed, weight[:inner])
        out.copy_(functional.silu(gate) * functional.linear(normed, weight[inner:]))

    def tiles(precision: str) -> Call:
        def call(weight: Tensor) -> None:
            torch.set_float32_matmul_precision(precision)
            products.multiply_gated(x, Factor(weight[:inner].t(), out), weight[inner:].t(), norm)
            torch.set_float32_matmul_precision("highest")

        return call

    calls: dict[str, Call] = {"MKL": theirs, **{p: tiles(p) for p in _PRECISIONS}}
    wide = x.double()
    wide = norm.weight * wide / (wide.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
    left, right = (wide @ w.double().t() for w in weights[0].split(inner))
    truth = left * left.sigmoid() * right
    errors = {}
    for label, call in calls.items():
        out.fill_(float("nan"))
        call(weights[0])
        errors[label] = float((out.double() - truth).abs().max() / truth.abs().max())
    flops = 4.0 * tokens * hidden * inner
    return _row(
        "gate, up", "forward with norm and silu", calls, weights, options.rounds, flops, errors
    )


def _row(
    name: str,
    pass_: str,
    calls: dict[str, Call],
    weights: Sequence[Tensor],
    rounds: int,
    flops: float,
    errors: dict[str, float],
) -> dict[str, Any]:
    """Time the variants in turns, each over all layers."""
    seconds: dict[str, list[float]] = {label: [] for label in calls}
    rng = random.Random(0)
    for turn in range(rounds + 1):  # the first warms up
        for label in rng.sample(list(calls), len(calls)):
            start = time.perf_counter()
            for weight in weights:
                calls[label](weight)
            if turn:
                seconds[label].append((time.perf_counter() - start) / len(weights))
    return {
        "product": name,
        "pass": pass_,
        "variants": {
            label: {
                "gflops": flops / statistics.median(taken) / 1e9,
                "over": statistics.median(
                    theirs / own for theirs, own in zip(seconds["MKL"], taken, strict=True)
                ),
                "error": errors[label],
                "seconds": taken,
            }
            for label, taken in seconds.items()
        },
    }


def markdown(found: dict[str, Any]) -> str:
    """The results as a table."""
    env, options = found["environment"], found["options"]
    lines = [
        "# Products on a CPU's tiles beside MKL",
        "",
        f"- {env['date']}, {env['hardware']}, {env['threads']} threads",
        "- " + ", ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "- options: " + ", ".join(f"{name} {value}" for name, value in options.items()),
        "- GFLOP/s; times MKL: median of MKL's time over it, same round; error: largest",
        "",
        "| product | pass | MKL | error | "
        + " | ".join(f"{p} | times MKL | error" for p in _PRECISIONS)
        + " |",
        "| --- | --- | --- | --- | " + " | ".join(["--- | --- | ---"] * len(_PRECISIONS)) + " |",
    ]
    for row in found["rows"]:
        mkl = row["variants"]["MKL"]
        cells = [row["product"], row["pass"], f"{mkl['gflops']:.0f}", f"{mkl['error']:.0e}"]
        for precision in _PRECISIONS:
            one = row["variants"][precision]
            cells += [f"{one['gflops']:.0f}", f"{one['over']:.2f}", f"{one['error']:.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
