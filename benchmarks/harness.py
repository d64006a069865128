"""What a case, a variant and a row are.

A case is one operator at one shape and dtype; a variant is one way of computing it: a backend of
airl_fast or a peer. runner.py checks and times them.
"""

import math
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
        reset: undoes what calls in place changed; before every sample, not timed. Of a sample of
            several calls all but the first work on results: a call more is checked then.
        parts: seconds of the parts of a call, from what it returned.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Outputs] = lambda outputs: outputs
    reset: Callable[[], None] | None = None
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
        tolerance: of the largest error over the largest magnitude, if not the dtype's.
        once: a call takes minutes: it is made once, without a warm-up, timed and checked.
    """

    peer: str
    prepare: Callable[[Any], Prepared]
    backend: str = "-"
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    note: str = ""
    once: bool = False
    tolerance: float | None = None


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
        values = self.values.to(seen.device)
        scale = float(values.abs().max()) or 1.0
        return float((seen.double() - values).abs().max()) / scale


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
        return f"{self.operator} {sizes} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        """The dtype without its module."""
        return str(self.dtype).removeprefix("torch.")


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
