"""How the variants of a case are checked and timed.

Every variant is checked twice. First on small inputs, all of its outputs against tests/oracle.py.
Then on the inputs that are timed, against values of sampled elements, float64 where that is
affordable, once before timing and once on the output of the last timed call. A variant that is
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

from benchmarks.harness import (
    OURS,
    TOLERANCE,
    Case,
    Outputs,
    Prepared,
    Row,
    Sampled,
    Timing,
    UnavailableError,
    Variant,
)


def run_case(
    case: Case,
    timing: Timing,
    *,
    peers: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
) -> list[Row]:
    """Check and time all variants of a case.

    Args:
        case: what to run.
        timing: how to time it.
        peers: only these peers (airl_fast is always among them); None for all.
        backends: only these of airl_fast, where it has several; None for all.
    """
    chosen = [v for v in case.variants if _is_wanted(v, peers, backends)]
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


def _is_wanted(
    variant: Variant, peers: Sequence[str] | None, backends: Sequence[str] | None
) -> bool:
    if OURS in variant.peer:
        return backends is None or variant.backend in (*backends, "default")
    return peers is None or variant.peer in peers


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
        self.reset()
        seconds, result = _sample(self.prepared.call, self.variant.context, repeats)
        self.seconds.append(seconds)
        self.parts.append(self.prepared.parts(result))
        return result

    def reset(self) -> None:
        """Undo what calls changed."""
        if self.prepared.reset is not None:
            self.prepared.reset()

    def on_its_inputs(self, result: Any, repeats: int) -> Any:
        """The result of a sample; of a call more if all but its first worked on results."""
        if self.prepared.reset is None or repeats == 1:
            return result
        self.reset()
        with self.variant.context():
            return self.prepared.call()

    def fail(self, error: Exception) -> None:
        """Take the speed from the row, which says why."""
        self.row.status, self.row.reason = "failed", _said(error)

    def forget(self) -> None:
        """Drop the samples: they were the warm-up."""
        self.seconds.clear()
        self.parts.clear()


def _row(case: Case, variant: Variant, timing: Timing) -> Row:
    return Row(
        operator=case.operator,
        shape=dict(case.shape),
        dtype=case.dtype_name,
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
        row.reason = _said(error)
    else:
        if _accept(case, live, outputs, expected, where):
            del outputs
            if variant.once:
                return live
            live.forget()
            try:
                _note_gpu_memory(live)
            except Exception as error:  # as above
                live.fail(error)
            else:
                return live
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def _note_gpu_memory(live: _Live) -> None:
    """Peak extra memory of one more call, by the allocator's own count."""
    if not torch.cuda.is_initialized():
        return
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    # on one thread: one of autograd's own would let go of the graph at a time of its own
    with live.variant.context(), torch.autograd.set_multithreading_enabled(False):
        result = live.prepared.call()
    torch.cuda.synchronize()
    live.row.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    live.row.result_mib = (torch.cuda.memory_allocated() - before) / 2**20
    del result
    live.reset()


def _accept(
    case: Case, live: _Live, outputs: Outputs, expected: Mapping[str, Sampled], where: str
) -> bool:
    row, own = live.row, live.variant.tolerance
    limit = TOLERANCE[case.dtype] if own is None else own
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
            if x.row.status != "ok":
                continue
            try:
                result = x.sample(repeats[which])
                if turn == rounds - 1:
                    read = x.prepared.read(x.on_its_inputs(result, repeats[which]))
                    _accept(case, x, read, expected, "the last timed output")
                del result
            except Exception as error:  # a peer may fail in any way; the row says how
                x.fail(error)
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
            _finish()
            start = time.perf_counter()
            for _ in range(repeats):
                result = call()
            _finish()
            return (time.perf_counter() - start) / repeats, result
    finally:
        if collecting:
            gc.enable()


def _finish() -> None:
    """Wait for what a GPU has still to do."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


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
