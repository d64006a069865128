"""What an evaluation hands over to the report, as dataclasses and as JSON.

The JSON is the dataclasses' own fields, with a point as [n, mean, low, high] and a bin as
[p_mean, fraction, count]:

    {"title": "GSM8K", "numbers": {"AUC of f": [0.81, 0.78, 0.84], "pass@1": 0.31},
     "curves": {"f": [[1, 0.31, 0.28, 0.34], [4, 0.45, 0.41, 0.49]]},
     "reliability": {"f, calibrated": [[0.1, 0.12, 50], [0.3, 0.27, 40]]},
     "histograms": {"correct": [1.2, 0.4], "wrong": [-0.3]}, "histogram_label": "f",
     "notes": ["95% bootstrap intervals over problems"]}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from airl_fast.evaluation import binomial_interval
from airl_fast.parsing import shown
from airl_fast.report.content import Cell, Chart, Estimate, Section, Series, Table


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Accuracy of one of ``n`` samples, chosen somehow, with its interval."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """``count`` predictions of mean probability ``p_mean``, of which ``fraction`` came true."""

    p_mean: float
    fraction: float
    count: int


@dataclass(frozen=True, kw_only=True)
class EvalSummary:
    """Results of one evaluation; whatever is empty is left out of the report.

    Attributes:
        title: of the section.
        numbers: by name; with an interval or without.
        curves: best-of-N, by way of choosing.
        reliability: bins by predictor; empty bins are left out by whoever makes them.
        histograms: values by group, all of one quantity.
        histogram_label: what that quantity is.
        notes: paragraphs, such as how the intervals were made.
    """

    title: str = "Evaluation"
    numbers: Mapping[str, float | Estimate] = field(default_factory=dict)
    curves: Mapping[str, Sequence[CurvePoint]] = field(default_factory=dict)
    reliability: Mapping[str, Sequence[ReliabilityBin]] = field(default_factory=dict)
    histograms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    histogram_label: str = "reward"
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, bins in self.reliability.items():
            if not bins:
                raise ValueError(f"reliability of {shown(name)}: expected bins, got none")
            for b in bins:
                if not (0 <= b.p_mean <= 1 and 0 <= b.fraction <= 1 and 0 < b.count < 2**53):
                    raise ValueError(
                        f"reliability of {shown(name)}: expected p_mean and fraction in [0, 1] and "
                        f"a count from 1 to 2^53, got {shown(b)}; leave empty bins out"
                    )
        for name, points in self.curves.items():
            finite = all(math.isfinite(p.mean + p.low + p.high) for p in points)
            if not finite or any(not 1 <= p.n < 2**53 for p in points):
                raise ValueError(
                    f"curve {shown(name)}: expected n >= 1, below 2^53, and finite values"
                )
        for name, values in self.histograms.items():
            if not np.all(np.isfinite(np.asarray(values, np.float64))):
                raise ValueError(f"histogram of {shown(name)}: expected finite values")

    def to_json(self) -> dict[str, Any]:
        """Return what ``from_json`` reads."""
        return {
            "title": self.title,
            "numbers": {k: _listed(v, Estimate) for k, v in self.numbers.items()},
            "curves": {k: [_listed(p, CurvePoint) for p in v] for k, v in self.curves.items()},
            "reliability": {
                k: [_listed(b, ReliabilityBin) for b in v] for k, v in self.reliability.items()
            },
            "histograms": {k: [float(x) for x in v] for k, v in self.histograms.items()},
            "histogram_label": self.histogram_label,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, value: Any, where: str = "summary") -> EvalSummary:
        """Build a summary from its JSON; ``where`` names it in errors.

        Raises:
            ValueError: an unknown key, or a value of another shape.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(value, dict) or not value.keys() <= set(known):
            raise ValueError(
                f"{where}: expected an object with keys among {', '.join(known)}, got "
                f"{shown(list(value)) if isinstance(value, dict) else type(value).__name__}"
            )

        def number(x: Any) -> float | Estimate:
            return Estimate(*map(float, x)) if isinstance(x, list) else float(x)

        def point(x: Any) -> CurvePoint:
            n, mean, low, high = x
            return CurvePoint(n=int(n), mean=float(mean), low=float(low), high=float(high))

        def reliability_bin(x: Any) -> ReliabilityBin:
            p_mean, fraction, count = x
            return ReliabilityBin(p_mean=float(p_mean), fraction=float(fraction), count=int(count))

        def each(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
            return lambda rows: [make(row) for row in rows]

        makers = {
            "numbers": number,
            "curves": each(point),
            "reliability": each(reliability_bin),
            "histograms": each(float),
        }
        read: dict[str, Any] = {k: v for k, v in value.items() if k not in makers}
        for key in value.keys() & makers.keys():
            try:
                read[key] = {name: makers[key](part) for name, part in value[key].items()}
            except (TypeError, ValueError, AttributeError, OverflowError) as error:
                raise ValueError(
                    f"{where}: {key!r} is not as documented ({str(error)[:300]}); see "
                    "airl_fast.report.EvalSummary for what each value is"
                ) from None
        words = [read.get("title", ""), read.get("histogram_label", "")]
        notes = read.get("notes", ())
        if not isinstance(notes, list | tuple) or not all(
            isinstance(word, str) for word in (*words, *notes)
        ):
            raise ValueError(f"{where}: expected texts as 'title', 'histogram_label' and 'notes'")
        return cls(**read)

    def section(self) -> Section:
        """The section of a report that shows this."""
        items: list[Table | Chart] = []
        if self.numbers:
            rows: list[list[Cell]] = [[name, value] for name, value in self.numbers.items()]
            items.append(Table(title="Numbers", columns=("measure", "value"), rows=rows))
        if self.curves:
            items.append(best_of_n_chart(self.curves))
        if self.reliability:
            items.append(reliability_chart(self.reliability))
        if self.histograms:
            items.append(histogram(self.histograms, label=self.histogram_label))
        return Section(title=self.title, text=self.notes, items=items)


def best_of_n_chart(curves: Mapping[str, Sequence[CurvePoint]]) -> Chart:
    """Accuracy against the number of samples that one is chosen from."""
    series = []
    for name, points in curves.items():
        ordered = sorted(points, key=lambda p: p.n)
        series.append(
            Series(
                name=name,
                x=[p.n for p in ordered],
                y=[p.mean for p in ordered],
                low=[p.low for p in ordered],
                high=[p.high for p in ordered],
            )
        )
    return Chart(
        title="Best of N", x_label="samples N", y_label="accuracy", series=series, x_log=True
    )


def reliability_chart(reliability: Mapping[str, Sequence[ReliabilityBin]]) -> Chart:
    """What came true against what was predicted, with 95% Wilson intervals, and the ECE."""
    series, errors = [], []
    rows: list[list[Cell]] = []
    for name, bins in reliability.items():
        ordered = sorted(bins, key=lambda b: b.p_mean)
        intervals = [binomial_interval(round(b.fraction * b.count), b.count) for b in ordered]
        series.append(
            Series(
                name=name,
                x=[b.p_mean for b in ordered],
                y=[b.fraction for b in ordered],
                low=[low for low, _ in intervals],
                high=[high for _, high in intervals],
                shape="points",
            )
        )
        total = sum(b.count for b in ordered)
        error = sum(b.count * abs(b.p_mean - b.fraction) for b in ordered) / total
        errors.append(f"{name}: {error:.3f}")
        rows += [
            [name, f"{b.p_mean:.4g}", Estimate(b.fraction, *interval), b.count]
            for b, interval in zip(ordered, intervals, strict=True)
        ]
    title = "Reliability"
    return Chart(
        title=title,
        x_label="predicted probability of being right",
        y_label="share that is right",
        series=series,
        unit_square=True,
        note=f"On the diagonal what is predicted comes true. Bars: 95% Wilson intervals. Expected "
        f"calibration error over these bins: {'; '.join(errors)}.",
        table=Table(title=title, columns=("of", "predicted", "came true", "count"), rows=rows),
    )


def histogram(groups: Mapping[str, Sequence[float]], *, label: str, title: str = "") -> Chart:
    """Shares of each group's values in common bins, by the Freedman-Diaconis rule, 10 to 60.

    Raises:
        ValueError: a group without values.
    """
    arrays = {name: np.asarray(values, np.float64) for name, values in groups.items()}
    if any(array.size == 0 for array in arrays.values()):
        raise ValueError(f"histogram of {label!r}: a group has no values; leave it out")
    pooled = np.concatenate(list(arrays.values()))
    edges = np.histogram_bin_edges(pooled, _bins(pooled))
    count = len(edges) - 1
    counts = {name: np.histogram(array, edges)[0] for name, array in arrays.items()}
    title = title or f"Distribution of {label}"
    rows: list[list[Cell]] = [
        [f"{edges[i]:.4g} to {edges[i + 1]:.4g}", *(int(c[i]) for c in counts.values())]
        for i in range(count)
    ]
    sizes = [f"{name}: {array.size:,}, mean {array.mean():.4g}" for name, array in arrays.items()]
    return Chart(
        title=title,
        x_label=label,
        y_label="share of the group",
        series=[
            Series(name=name, x=edges.tolist(), y=[*(c / c.sum()).tolist(), 0.0], shape="steps")
            for name, c in counts.items()
        ],
        note="; ".join(sizes),
        table=Table(title=title, columns=(label, *arrays), rows=rows),
    )


def _bins(values: NDArray[np.float64]) -> int:
    low, high = np.quantile(values, [0.25, 0.75])
    width = 2 * (high - low) / np.cbrt(values.size)
    return int(np.clip(np.ptp(values) / width, 10, 60)) if width > 0 else 10


def _listed(value: Any, kind: type) -> Any:
    return [getattr(value, f.name) for f in fields(kind)] if isinstance(value, kind) else value
