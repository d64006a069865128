"""What a report is made of, as data: tables, charts and the sections that hold them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from airl_fast.report.traces import TraceSet


@dataclass(frozen=True)
class Estimate:
    """A measured value with its interval."""

    value: float
    low: float
    high: float


Cell = str | int | float | Estimate


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells; the first column names the row. ``note`` says how intervals were made."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: expected {len(self.columns)} cells in every row, row "
                    f"{i} has {len(row)}; use an empty string for an empty cell"
                )


@dataclass(frozen=True, kw_only=True)
class Series:
    """One part of a chart.

    Attributes:
        name: in the legend.
        x: finite.
        y: as long as ``x``; NaN is a gap.
        low: with ``high``, a band around a line, or the bars of points.
        high: as ``low``.
        shape: a line through the points; points alone; or steps, whose value at ``x[i]`` holds up
            to ``x[i + 1]``.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    shape: Literal["line", "points", "steps"] = "line"

    def __post_init__(self) -> None:
        others = [v for v in (self.y, self.low, self.high) if v is not None]
        if any(len(v) != len(self.x) for v in others) or (self.low is None) != (self.high is None):
            raise ValueError(
                f"series {self.name!r}: expected y, and low and high or neither, as long as x "
                f"({len(self.x)}), got lengths {[len(v) for v in others]}"
            )
        if not all(math.isfinite(x) for x in self.x):
            raise ValueError(f"series {self.name!r}: expected finite x; leave such points out")


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Series over a common x axis; charts that follow one another share a row.

    Attributes:
        title: of the chart.
        x_label: of the axis.
        y_label: of the axis.
        series: in the order of the legend.
        note: shown under the chart.
        marks: places on the x axis and what begins there.
        x_log: the x axis doubles at equal distances; every x is above 0.
        unit_square: both axes go from 0 to 1, with the diagonal drawn.
        table: the numbers in words; by default those of the series.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""
    marks: Sequence[tuple[float, str]] = ()
    x_log: bool = False
    unit_square: bool = False
    table: Table | None = None

    def __post_init__(self) -> None:
        if not any(math.isfinite(y) for series in self.series for y in series.y):
            raise ValueError(
                f"chart {self.title!r}: expected at least one finite value; leave the chart out"
            )
        if self.x_log and any(x <= 0 for series in self.series for x in series.x):
            raise ValueError(f"chart {self.title!r}: expected x above 0 on a logarithmic axis")


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs, and what they are about; ``pre`` is text to unfold, as it is."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[Table | Chart | TraceSet] = ()
    pre: str = ""
