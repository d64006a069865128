"""The rates of the cost model, measured on this machine: a handful of small experiments.

All experiments take turns, with the steps that they predict, so that a disturbance falls on one
sample of each and the median drops it, and a slow minute slows all of them. A rate is worked out
from what its experiment took less what the rates before it explain.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import airl_fast
from airl_fast.ops._cpu_products import linear
from airl_fast.ops._packed_attention import attend
from airl_fast.optimisation import Optimiser
from airl_fast.packing import pack
from benchmarks.cost_steps import random_model, random_traces
from benchmarks.costs import (
    HeadRate,
    Rates,
    Workload,
    attention_scores,
    trunk_backward_s,
    trunk_s,
)
from benchmarks.packing import ModelShape

_FLOAT = 4
_FREE = HeadRate(0.0, 0.0)
_REFERENCE = ModelShape(vocab=256, hidden=512, inner=1408, layers=3, heads=8, kv_heads=4)
_DISPATCH = ModelShape(vocab=64, hidden=64, inner=128, layers=12, heads=2, kv_heads=1)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of the experiments; none is the shape of a validation."""

    product: tuple[tuple[int, int, int], ...] = ((1536, 1280, 512), (1536, 512, 1280))  # m, n, k
    few_rows: tuple[int, int, int] = (256, 8192, 512)  # the fewest that the CPU's tiles take
    fresh_mib: int = 96
    attention: tuple[int, int, int, int] = (4, 8, 256, 128)  # segments, H, own, shared tokens
    reference: ModelShape = _REFERENCE
    traces: tuple[int, int, int, int] = (2, 6, 120, 110)  # prompts, G, tokens of each
    dispatch: ModelShape = _DISPATCH
    narrow: tuple[int, int, int] = (1200, 24576, 128)  # N, V, D: logits rule
    few: tuple[int, int, int] = (4, 24576, 768)  # weights rule
    weights: tuple[int, int] = (12, 1 << 20)  # tensors and size
    large_weights: tuple[int, int] = (1, 3 << 23)


QUICK = Sizes(
    product=((32, 48, 64),),
    few_rows=(2, 1024, 64),
    fresh_mib=1,
    attention=(2, 2, 8, 4),
    reference=ModelShape(vocab=32, hidden=32, inner=64, layers=2, heads=2, kv_heads=1),
    traces=(1, 2, 6, 5),
    dispatch=ModelShape(vocab=32, hidden=16, inner=16, layers=2, heads=2, kv_heads=1),
    narrow=(16, 128, 8),
    few=(2, 128, 32),
    weights=(2, 256),
    large_weights=(1, 512),
)


class Calibration:
    """The experiments, and what each round of them took.

    Args:
        sizes: of the experiments; a round of the defaults takes about three seconds on two cores.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self._calls = _experiments(sizes)
        self._samples: dict[str, list[float]] = {name: [] for name in self._calls}
        for call in self._calls.values():
            call()

    def round(self) -> None:
        """Run every experiment once more."""
        for name, call in self._calls.items():
            self._samples[name].append(_seconds(call))

    def seconds(self) -> dict[str, float]:
        """The median of each experiment."""
        return {name: statistics.median(taken) for name, taken in self._samples.items()}

    def rates(self) -> Rates:
        """What they say of the machine."""
        return solve(self.sizes, self.seconds())


def _seconds(call: Callable[[], Any], least_s: float = 0.02) -> float:
    start, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - start < least_s:
        call()
        calls += 1
    return (time.perf_counter() - start) / calls


def _experiments(sizes: Sizes) -> dict[str, Callable[[], Any]]:
    calls: dict[str, Callable[[], Any]] = {}
    for i, (m, n, k) in enumerate(sizes.product):
        calls[f"product {i}"], calls[f"product backward {i}"] = _product(m, n, k)
    calls["few rows"], _ = _product(*sizes.few_rows)
    calls["fresh"] = _fresh(sizes.fresh_mib)
    calls["attention"], calls["attention backward"] = _attention(*sizes.attention)
    for name, shape, traces in (
        ("reference", sizes.reference, sizes.traces),
        ("dispatch", sizes.dispatch, (1, 1, 4, 4)),
    ):
        calls[name], calls[f"{name} backward"] = _trunk(shape, traces)
    for name, (n, v, d) in (("narrow", sizes.narrow), ("few", sizes.few)):
        for operator, call in _heads(n, v, d).items():
            calls[f"{operator} {name}"] = call
    calls["optimiser"] = _optimiser(*sizes.weights)
    calls["optimiser large"] = _optimiser(*sizes.large_weights)
    return calls


def solve(sizes: Sizes, times: dict[str, float]) -> Rates:
    """The rates from the experiments' seconds, each with those before it."""
    flops = [2 * m * n * k for m, n, k in sizes.product]
    forward = sum(times[f"product {i}"] for i in range(len(flops)))
    both = sum(times[f"product backward {i}"] for i in range(len(flops)))
    product = sum(flops) / forward
    m, n, k = sizes.few_rows
    memory = n * k * _FLOAT / _rest(times["few rows"], 2 * m * n * k / product)
    count, heads, own, shared = sizes.attention
    scores = attention_scores(np.full(count, own), np.full(count, shared))
    per_pass = heads * scores * _HEAD_SIZE
    known = Rates(
        product=product,
        product_backward=2 * sum(flops) / _rest(both, forward),
        memory=memory,
        fresh=sizes.fresh_mib * 2**20 / times["fresh"],
        attention=4 * per_pass / times["attention"],
        attention_backward=10 * per_pass / _rest(times["attention backward"], times["attention"]),
        elementwise=float("inf"),
        elementwise_backward=float("inf"),
        layer=times["dispatch"] / sizes.dispatch.layers,
        layer_backward=_rest(times["dispatch backward"], times["dispatch"]) / sizes.dispatch.layers,
        optimiser=math.prod(sizes.weights) / times["optimiser"],
        optimiser_large=math.prod(sizes.large_weights) / times["optimiser large"],
        score=_FREE,
        policy=_FREE,
        gradient=_FREE,
    )
    known = _with_elementwise(sizes, times, known)
    return replace(
        known,
        score=_head_rate(sizes, times, "score", 1, product),
        policy=_head_rate(sizes, times, "policy", 3, product),
        gradient=_head_rate(sizes, times, "gradient", 4, product),
    )


def _with_elementwise(sizes: Sizes, times: dict[str, float], known: Rates) -> Rates:
    """What the reference trunk takes beyond its products, its attention and its dispatch."""
    shape = sizes.reference
    work = Workload.of(random_traces(shape.vocab, *sizes.traces), 1 << 20)
    unit = replace(known, elementwise=1.0, elementwise_backward=1.0)
    moved = trunk_s(shape, work, unit) - trunk_s(shape, work, known)  # bytes, at 1 byte/s
    forward, both = times["reference"], times["reference backward"]
    return replace(
        known,
        elementwise=moved / _rest(forward, trunk_s(shape, work, known)),
        elementwise_backward=moved / _rest(both - forward, trunk_backward_s(shape, work, known)),
    )


def _head_rate(
    sizes: Sizes, times: dict[str, float], operator: str, products: int, rate: float
) -> HeadRate:
    """Two experiments, many logits over a narrow head and few over a wide one: two unknowns."""
    rows, extra = [], []
    for name, (n, v, d) in (("narrow", sizes.narrow), ("few", sizes.few)):
        rows.append([float(n * v), float(v * d)])
        extra.append(max(times[f"{operator} {name}"] - products * 2 * n * v * d / rate, 0.0))
    logit, weight = torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(extra, dtype=torch.float64)
    ).tolist()
    return HeadRate(max(logit, 0.0), max(weight, 0.0))


def _rest(seconds: float, explained: float) -> float:
    """What is left to explain; at least 2% of it, where noise has eaten the difference."""
    return max(seconds - explained, 0.02 * abs(seconds))


# The experiments

_HEAD_SIZE = 64


def _product(m: int, n: int, k: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    x, weight = torch.randn(m, k, requires_grad=True), torch.randn(n, k, requires_grad=True)
    upstream = torch.randn(m, n)

    def both() -> None:
        torch.autograd.grad(linear(x, weight), (x, weight), upstream)

    return torch.no_grad()(lambda: linear(x, weight)), both


def _fresh(mib: int) -> Callable[[], Any]:
    return lambda: torch.full((mib * 2**18,), 1.0)  # large: the allocator maps it anew each time


def _attention(
    count: int, heads: int, own: int, shared: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Segments of ``own`` tokens that all continue the same ``shared``, which have no queries."""
    segments = torch.tensor([(i * own, own, 0, shared, shared + i * own) for i in range(count)])
    q = torch.randn(count * own, heads, _HEAD_SIZE, requires_grad=True)
    k, v = torch.randn(2, shared + count * own, heads, _HEAD_SIZE, requires_grad=True).unbind()
    upstream = torch.randn_like(q)

    def forward() -> Tensor:
        return attend(segments, q, k, v, _HEAD_SIZE**-0.5, None)

    return torch.no_grad()(forward), lambda: torch.autograd.grad(forward(), (q, k, v), upstream)


def _trunk(
    shape: ModelShape, traces: tuple[int, int, int, int]
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    model = random_model(shape)
    batch = pack(random_traces(shape.vocab, *traces))
    upstream = torch.randn(batch.num_tokens, shape.hidden)

    def both() -> None:
        model.hidden(batch).backward(upstream)
        model.zero_grad(set_to_none=True)

    return torch.no_grad()(lambda: model.hidden(batch)), both


def _heads(n: int, v: int, d: int) -> dict[str, Callable[[], Any]]:
    hidden = torch.randn(n, d, requires_grad=True)
    weight = (torch.randn(v, d) / d**0.5).requires_grad_()
    targets, ones = torch.randint(v, (n,)), torch.ones(n)
    cu_seqs = torch.tensor([0, n], dtype=torch.int32)

    def score() -> None:
        with torch.no_grad():
            airl_fast.linear_logprob(hidden, weight, targets, return_entropy=True)

    def policy() -> None:
        loss, _ = airl_fast.linear_policy_loss(hidden, weight, targets, ones, cu_seqs=cu_seqs)
        loss.backward()
        hidden.grad = weight.grad = None

    def gradient() -> None:
        airl_fast.linear_logprob(hidden, weight, targets).sum().backward()
        hidden.grad = weight.grad = None

    return {"score": score, "policy": policy, "gradient": gradient}


def _optimiser(count: int, size: int) -> Callable[[], Any]:
    weights = {str(i): torch.nn.Parameter(torch.randn(size)) for i in range(count)}
    gradients = [torch.randn(size) for _ in range(count)]
    optimiser = Optimiser(
        weights, learning_rate=1e-6, weight_decay=0.01, betas=(0.9, 0.98), clip_norm=1.0
    )

    def step() -> None:
        for weight, gradient in zip(weights.values(), gradients, strict=True):
            weight.grad = gradient
        optimiser.step()

    return step
