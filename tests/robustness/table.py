"""What a row of docs/robustness.md is: a call of a public entry point, and what must come of it.

The tests run the rows and the page is written from them (``python -m tests.robustness.page``), so
that neither can say what the other does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAULTS = {
    "shape": "another number of dimensions, rows or columns than the other arguments have",
    "dtype": "another type of number, or of Python value",
    "device": "tensors on two devices, or a device that is not there",
    "offsets": "`cu_*` offsets, or lengths of spans, that are no partition",
    "range": "a number above its range: a target, an index, a share, a label",
    "negative": "a number below its range: a negative target, count or weight",
    "non-finite": "NaN or infinity",
    "empty": "nothing: no rows, no text, no file content",
    "option": "an unknown option, or two that contradict each other",
    "file": "a file or folder that is missing, damaged or of another kind",
    "model": "a model, reward or tokenizer of another kind",
}


class CommandRefused(Exception):  # noqa: N818 - what a command prints where Python would raise
    """A command's exit status 2, with what it printed on standard error."""


class Answered(Exception):  # noqa: N818 - an HTTP answer
    """An HTTP status from 400 on, with the message of the answer."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A call that raises.

    Attributes:
        entry: the public entry point.
        fault: one of ``FAULTS``.
        given: the fault, in a few words.
        call: makes the call; its argument is a ``things.Things``.
        received: a part of the message that says what was received.
        remedy: a part of the message that says what to do.
        error: what is raised.
    """

    entry: str
    fault: str
    given: str
    call: Callable[[Any], object]
    received: str
    remedy: str
    error: type[Exception] = ValueError


@dataclass(frozen=True, kw_only=True)
class Served:
    """A call that looks like a fault and is none: it returns True where the result is right."""

    entry: str
    fault: str
    given: str
    call: Callable[[Any], object]
    result: str


@dataclass(frozen=True, kw_only=True)
class Senseless:
    """A cell that makes no sense, and why."""

    entry: str
    fault: str
    why: str


Cell = Refused | Served | Senseless


class Entry:
    """Collects the cells of one entry point.

    Args:
        name: as users write it.
        cells: where they go.
        **senseless: reasons by fault ("-" written as "_").
    """

    def __init__(self, name: str, cells: list[Cell], **senseless: str) -> None:
        self.name, self.cells = name, cells
        for fault, why in senseless.items():
            cells.append(Senseless(entry=name, fault=fault.replace("_", "-"), why=why))

    def refuses(
        self,
        fault: str,
        given: str,
        call: Callable[[Any], object],
        received: str,
        remedy: str,
        error: type[Exception] = ValueError,
    ) -> Entry:
        """Add a `Refused`."""
        self.cells.append(
            Refused(
                entry=self.name,
                fault=fault,
                given=given,
                call=call,
                received=received,
                remedy=remedy,
                error=error,
            )
        )
        return self

    def serves(self, fault: str, given: str, call: Callable[[Any], object], result: str) -> Entry:
        """Add a `Served`."""
        self.cells.append(
            Served(entry=self.name, fault=fault, given=given, call=call, result=result)
        )
        return self
