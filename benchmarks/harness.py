"""Cases, variants and rows; and how a variant is checked and timed.

A case is one operator at one shape and dtype; a variant is one way of computing it: a backend of
airl_fast or a peer. Every variant is checked twice. First on small inputs, all of its outputs
against tests/oracle.py. Then on the inputs that are timed, against float64 values of sampled
elements, once before timing and once on the output of the last timed call. A variant that is
wrong is not timed any further, and its row has no speed.
"""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Outputs = Mapping[str, Tensor]
OURS = "airl_fast"  # in the name of every variant of this package


class UnavailableError(Exception):
    """This variant does not exist here; the message says why."""


@dataclass(frozen=True)
class Prepared:
    """A variant with its inputs in place.

    Attributes:
        call: what is timed; returns whatever the formulation returns.
        read: turns that into the case's outputs, in the case's layout; not timed.
        reset: undoes what the last call changed; before every call, not timed.
        parts: seconds of the parts of a call, from what it returned.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Outputs] = lambda outputs: outputs
    reset: Callable[[], None] = lambda: None
    parts: Callable[[Any], Mapping[str, float]] = lambda outputs: {}


@dataclass(frozen=True)
class Variant:
    """One way of computing a case.

    Attributes:
        peer: who computes it; "airl_fast" for ours.
        prepare: takes the case's inputs, does what is not timed; raises UnavailableError.
        backend: of airl_fast; "-" for a peer.
        context: entered around warm-up and timing, such as a forced backend.
        note: what a reader must know about the formulation.
        once: a call takes minutes: it is made once, without a warm-up, timed and checked.
    """

    peer: str
    prepare: Callable[[Any], Prepared]
    backend: str = "-"
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    note: str = ""
    once: bool = False


@dataclass(frozen=True)
class Sampled:
    """Float64 values that an output must have, at some of its indices (None: everywhere)."""

    values: Tensor
    index: Tensor | None = None

    def error(self, output: Tensor) -> float:
        """Largest error over the largest magnitude expected; NaN if the output has a NaN."""
        seen = output.detach() if self.index is None else output.detach()[self.index]
        if seen.shape != self.values.shape:
            return math.nan
        if not self.values.numel():
            return 0.0
        scale = float(self.values.abs().max()) or 1.0
        return float((seen.double() - self.values).abs().max()) / scale


@dataclass(frozen=True)
class Case:
    """One operator at one shape and dtype.

    Attributes:
        operator: its name, with the mode in brackets.
        shape: letters and sizes, as the row shows them.
        dtype: of the floating inputs.
        inputs: builds the inputs, the same at every call.
        small: builds small inputs for the oracle.
        oracle: all outputs in float64 for small inputs, from tests/oracle.py.
        expected: sampled float64 values for the inputs that are timed.
        yardstick: its name ("product" or "copy"); and what is timed, from the inputs.
        variants: the ways to compare.
        least: yardsticks that the operator cannot do without; None where that means nothing.
        traffic: bytes that must be read and written, for memory-bound operators.
        facts: more columns for each peer, such as tokens.
        rounds: the most rounds, for calls of many seconds, which are never repeated in a sample.
        memory: whether to measure peak memory: two more calls of each variant.
    """

    operator: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    inputs: Callable[[], Any]
    small: Callable[[], Any]
    oracle: Callable[[Any], Outputs]
    expected: Callable[[Any], Mapping[str, Sampled]]
    yardstick: tuple[str, Callable[[Any], Callable[[], Any]]]
    variants: Sequence[Variant]
    least: float | None = None
    traffic: int | None = None
    facts: Callable[[Any], Mapping[str, Mapping[str, float]]] | None = None
    group: str = "main"  # or "sweep": only in the plots against N and V
    rounds: int | None = None
    memory: bool = True

    @property
    def key(self) -> str:
        """A name that is the same in every process."""
        sizes = ",".join(f"{letter}={size}" for letter, size in self.shape.items())
        return f"{self.operator} {sizes} {_name(self.dtype)}"


@dataclass
class Row:
    """One line of the results. ``status``: ok, wrong, unavailable or failed."""

    operator: str
    shape: dict[str, int]
    dtype: str
    peer: str
    backend: str
    group: str
    yardstick: str
    status: str = "ok"
    reason: str = ""
    note: str = ""
    ms: float | None = None  # median of a call
    ms_iqr: float | None = None  # third quartile minus first
    yardstick_ms: float | None = None
    ratio: float | None = None  # median over rounds of time over the yardstick's, same round
    least: float | None = None
    against_ours: float | None = None  # the same over the time of the fastest airl_fast
    parts: dict[str, float] = field(default_factory=dict)  # median ms of the parts of a call
    gb_s: float | None = None
    peak_mib: float | None = None  # peak extra memory, results included
    result_mib: float | None = None  # of which results (outputs and gradients)
    error: float | None = None  # worst of both checks, relative to the largest magnitude
    rounds: int = 0
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """How to time: rounds of all variants in random order, warm-up apart.

    Attributes:
        rounds: calls (or batches of calls) per variant; the median is reported. A case with calls
            of many seconds has fewer.
        least_s: a sample repeats calls until it lasts this long, for calls of microseconds.
        seed: of the order within each round.
    """

    rounds: int = 7
    least_s: float = 0.01
    seed: int = 0


# Largest error over the largest magnitude. Float32: 100 times what plain torch makes at these
# shapes (about 1e-6). Half precision: a few units in the last of its 8 or 11 bits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float64: 1e-9}


def run_case(case: Case, timing: Timing, *, peers: Sequence[str] | None = None) -> list[Row]:
    """Check and time all variants of a case.

    Args:
        case: what to run.
        timing: how to time it.
        peers: only these peers (airl_fast is always among them); None for all.
    """
    chosen = [v for v in case.variants if peers is None or v.peer in peers or OURS in v.peer]
    rows = [_row(case, variant, timing) for variant in chosen]
    checked = [_checked_small(case, v, r) for v, r in zip(chosen, rows, strict=True)]
    if not any(checked):
        return rows
    inputs = case.inputs()
    expected = case.expected(inputs)
    facts = case.facts(inputs) if case.facts else {}
    live: list[_Live] = []
    for variant, row, passed in zip(chosen, rows, checked, strict=True):
        row.facts = dict(facts.get(variant.peer, {}))
        warmed = _warmed(case, variant, row, inputs, expected) if passed else None
        if warmed is not None:
            live.append(warmed)
    if live:
        _time(case, live, timing, inputs, expected)
    return rows


@dataclass
class _Live:
    """A variant that was right so far, with its samples: seconds, and the parts of them."""

    variant: Variant
    row: Row
    prepared: Prepared
    seconds: list[float] = field(default_factory=list)
    parts: list[Mapping[str, float]] = field(default_factory=list)

    def sample(self, repeats: int = 1) -> Any:
        """Time ``repeats`` calls and return what the last of them gave."""
        self.prepared.reset()
        seconds, result = _sample(self.prepared.call, self.variant.context, repeats)
        self.seconds.append(seconds)
        self.parts.append(self.prepared.parts(result))
        return result

    def forget(self) -> None:
        """Drop the samples: they were the warm-up."""
        self.seconds.clear()
        self.parts.clear()


def _row(case: Case, variant: Variant, timing: Timing) -> Row:
    return Row(
        operator=case.operator,
        shape=dict(case.shape),
        dtype=_name(case.dtype),
        peer=variant.peer,
        backend=variant.backend,
        group=case.group,
        yardstick=case.yardstick[0],
        note=variant.note,
        least=case.least,
        rounds=1 if variant.once else _rounds(case, timing),
    )


def _rounds(case: Case, timing: Timing) -> int:
    return timing.rounds if case.rounds is None else min(case.rounds, timing.rounds)


def _checked_small(case: Case, variant: Variant, row: Row) -> bool:
    inputs = case.small()
    expected = {name: Sampled(values) for name, values in case.oracle(inputs).items()}
    return _warmed(case, variant, row, inputs, expected, "small inputs") is not None


def _warmed(
    case: Case,
    variant: Variant,
    row: Row,
    inputs: Any,
    expected: Mapping[str, Sampled],
    where: str = "timed inputs",
) -> _Live | None:
    """Prepare, run once and check; None if that shows that the variant cannot be timed."""
    try:
        live = _Live(variant, row, variant.prepare(inputs))
        outputs = live.prepared.read(live.sample())
    except UnavailableError as reason:
        row.status, row.reason = "unavailable", str(reason)
    except Exception as error:  # a peer may fail in any way; the row says how
        row.status = "unavailable" if "was forced but cannot serve" in str(error) else "failed"
        row.reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
    else:
        if _accept(case, row, outputs, expected, where):
            if not variant.once:
                live.forget()
            return live
    return None


def _accept(
    case: Case, row: Row, outputs: Outputs, expected: Mapping[str, Sampled], where: str
) -> bool:
    limit = TOLERANCE[case.dtype]
    for name, sampled in expected.items():
        error = sampled.error(outputs[name]) if name in outputs else math.nan
        row.error = error if row.error is None or not error <= row.error else row.error
        if not error <= limit:  # a NaN is wrong, too
            row.status = "wrong"
            row.reason = f"{name} on {where}: relative error {error:.2g}, allowed {limit:.0e}"
            row.ms = row.ms_iqr = row.ratio = row.gb_s = row.yardstick_ms = None
            row.against_ours, row.parts = None, {}
            if not math.isfinite(row.error):
                row.error = None  # JSON has no NaN; the reason says it
            return False
    return True


def _time(
    case: Case,
    live: Sequence[_Live],
    timing: Timing,
    inputs: Any,
    expected: Mapping[str, Sampled],
) -> None:
    measure = case.yardstick[1](inputs)
    yardstick: list[float] = []
    taking_turns = [x for x in live if not x.variant.once]
    repeats = [_repeats(measure, nullcontext, timing.least_s)]
    # What lasts as long as a product, or many seconds, was warmed up and is called once a sample.
    if (case.least and repeats == [1]) or case.rounds is not None:
        repeats += [1] * len(taking_turns)
    else:
        repeats += [
            _repeats(x.prepared.call, x.variant.context, timing.least_s) for x in taking_turns
        ]
    order = list(range(len(repeats)))
    rng = random.Random(timing.seed)
    rounds = _rounds(case, timing)
    for turn in range(rounds):
        rng.shuffle(order)
        for which in order:
            if not which:
                yardstick.append(_sample(measure, nullcontext, repeats[0])[0])
                continue
            x = taking_turns[which - 1]
            result = x.sample(repeats[which])
            if turn == rounds - 1:
                read = x.prepared.read(result)
                _accept(case, x.row, read, expected, "the last timed output")
            del result
    right = [x for x in live if x.row.status == "ok"]
    own = [x.seconds for x in right if x.row.peer == OURS]
    ours = min(own, key=statistics.median, default=None)
    for x in right:
        _fill(x, yardstick, ours, case.traffic)


def _repeats(
    call: Callable[[], Any], context: Callable[[], AbstractContextManager[Any]], least_s: float
) -> int:
    """Calls that make one sample last ``least_s``."""
    repeats = 1
    while True:
        seconds, _ = _sample(call, context, repeats)
        if seconds * repeats >= least_s:
            return repeats
        repeats = max(2 * repeats, math.ceil(least_s / max(seconds, 1e-9)))


def _sample(
    call: Callable[[], Any], context: Callable[[], AbstractContextManager[Any]], repeats: int
) -> tuple[float, Any]:
    """Seconds per call, and the last result."""
    result = None
    collecting = gc.isenabled()
    gc.disable()
    try:
        with context():
            start = time.perf_counter()
            for _ in range(repeats):
                result = call()
            return (time.perf_counter() - start) / repeats, result
    finally:
        if collecting:
            gc.enable()


def _fill(x: _Live, yardstick: list[float], ours: list[float] | None, traffic: int | None) -> None:
    row, median = x.row, statistics.median(x.seconds)
    row.ms, row.yardstick_ms = 1e3 * median, 1e3 * statistics.median(yardstick)
    if len(x.seconds) > 1:
        first, _, third = statistics.quantiles(x.seconds, n=4, method="inclusive")
        row.ms_iqr = 1e3 * (third - first)
    row.ratio = _relative(x.seconds, yardstick)
    row.against_ours = None if ours is None else _relative(x.seconds, ours)
    row.parts = {
        part: 1e3 * statistics.median(parts[part] for parts in x.parts) for part in x.parts[0]
    }
    row.gb_s = None if traffic is None else traffic / median / 1e9


def _relative(seconds: list[float], others: list[float]) -> float:
    """Median over rounds of the quotient; that of the medians where one was timed apart."""
    if len(seconds) != len(others):
        return statistics.median(seconds) / statistics.median(others)
    return statistics.median(a / b for a, b in zip(seconds, others, strict=True))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
