"""A chart as inline SVG, its legend, and its numbers as a table."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from airl_fast.report.content import Chart, Series, Table
from airl_fast.report.text import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 18, 44
_STYLES = 6  # colours and dashes; after them they come again
_DOTS = 60  # a series of more points is drawn without dots
_ROWS = 200  # a table of more rows shows every second, third, ... of them

_Place = Callable[[float], float]


def legend(chart: Chart) -> str:
    """Name every series beside its line."""
    keys = []
    for i, series in enumerate(chart.series):
        mark = (
            f'<circle cx="11" cy="5" r="3.5" class="dot c{i % _STYLES}"/>'
            if series.shape == "points"
            else f'<line x1="0" y1="5" x2="22" y2="5" class="line c{i % _STYLES}"/>'
        )
        keys.append(
            f'<span class="key"><svg width="22" height="10" aria-hidden="true">{mark}</svg>'
            f"{escape(series.name)}</span>"
        )
    return f'<div class="legend">{"".join(keys)}</div>'


def svg(chart: Chart) -> str:
    """Draw a chart; what it shows is named for those who do not see it."""
    parts, px, py = _frame(chart)
    for i, series in enumerate(chart.series):
        style = f"c{i % _STYLES}"
        if series.shape == "points":
            parts += _bars(series, style, px, py)
        elif series.shape == "steps":
            parts += _steps(series, style, px, py)
        else:
            parts += _lines(series, style, px, py)
        if series.shape != "steps" and len(series.x) <= _DOTS:
            parts += _dots(chart, series, style, px, py)
    names = ", ".join(series.name for series in chart.series)
    name = escape(f"{chart.title}: {chart.y_label} against {chart.x_label}, of {names}")
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(parts)}</svg>"
    )


def numbers(chart: Chart) -> Table:
    """The chart's own table, or one of its series by x."""
    if chart.table is not None:
        return chart.table
    columns = [dict(zip(s.x, s.y, strict=True)) for s in chart.series]
    bands = [
        dict(zip(s.x, zip(s.low, s.high, strict=True), strict=True))
        if s.low is not None and s.high is not None
        else {}
        for s in chart.series
    ]
    places = sorted({x for column in columns for x in column})
    every = math.ceil(len(places) / _ROWS)

    def cell(i: int, x: float) -> str:
        y = columns[i].get(x, math.nan)
        if not math.isfinite(y):
            return ""
        return f"{y:.4g} ({bands[i][x][0]:.4g} to {bands[i][x][1]:.4g})" if bands[i] else f"{y:.4g}"

    return Table(
        title=chart.title,
        columns=(chart.x_label, *(s.name for s in chart.series)),
        rows=[[f"{x:g}", *(cell(i, x) for i in range(len(columns)))] for x in places[::every]],
        note=f"Every {every}th of {len(places):,} rows." if every > 1 else "",
    )


def axis(
    values: Sequence[float], *, tight: bool
) -> tuple[list[tuple[float, str]], tuple[float, float]]:
    """About five round ticks with their texts, and the range to draw.

    A tight axis ends at the data, as time does; the other at the ticks around them.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = []
    for i in range(first, last + 1):
        inside = low - step * 1e-6 <= i * step <= high + step * 1e-6
        if inside or not tight:
            large = abs(i * step) >= 1e6
            ticks.append((i * step, f"{i * step:.3g}" if large else f"{i * step:.{decimals}f}"))
    return ticks, ((low, high) if tight else (first * step, last * step))


def _doublings(values: Sequence[float]) -> tuple[list[tuple[float, str]], tuple[float, float]]:
    """Ticks at the powers of two of a logarithmic axis that ends at the data."""
    low, high = min(values), max(values)
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    every = math.ceil(len(powers) / 10)
    return [(2.0**k, f"{2.0**k:g}") for k in powers[::every]], (low, high)


def _frame(chart: Chart) -> tuple[list[str], _Place, _Place]:
    """Axes, grid and marks; and where a value stands."""
    xs = [x for s in chart.series for x in s.x]
    bounds = [v for s in chart.series for part in (s.y, s.low, s.high) if part for v in part]
    if chart.unit_square:
        xs = bounds = [0.0, 1.0]
    logs = chart.x_log and min(xs) < max(xs)
    x_ticks, x_range = _doublings(xs) if logs else axis(xs, tight=True)
    y_ticks, y_range = axis([v for v in bounds if math.isfinite(v)], tight=False)

    def px(x: float) -> float:
        low, high = x_range
        share = math.log(x / low) / math.log(high / low) if logs else (x - low) / (high - low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = (y - y_range[0]) / (y_range[1] - y_range[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    parts, floor = [], HEIGHT - BOTTOM
    for value, text in y_ticks:
        y = py(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" class="end">{text}</text>')
    for value, text in x_ticks:
        parts.append(f'<path class="tick" d="M{px(value):.1f} {floor}v4"/>')
        parts.append(f'<text x="{px(value):.1f}" y="{floor + 17}" class="mid">{text}</text>')
    parts.append(f'<path class="tick" d="M{LEFT} {floor}H{WIDTH - RIGHT}"/>')
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + floor) / 2
    parts.append(
        f'<text x="{middle_x}" y="{HEIGHT - 8}" class="mid">{escape(chart.x_label)}</text>'
    )
    turned = f'transform="translate(13 {middle_y}) rotate(-90)"'
    parts.append(f'<text {turned} class="mid">{escape(chart.y_label)}</text>')
    ends = [px(place) for place, _ in chart.marks[1:]] + [WIDTH]
    for (place, name), end in zip(chart.marks, ends, strict=False):
        x = px(place)
        parts.append(f'<path class="mark" d="M{x:.1f} {TOP}V{floor}"/>')
        if end - x > 6.5 * len(name):  # else it would run into the next
            parts.append(f'<text x="{x + 3:.1f}" y="{TOP - 5}" class="small">{escape(name)}</text>')
    if chart.unit_square:
        parts.append(f'<path class="mark" d="M{px(0):.1f} {py(0):.1f}L{px(1):.1f} {py(1):.1f}"/>')
    return parts, px, py


def _lines(series: Series, style: str, px: _Place, py: _Place) -> Iterator[str]:
    if series.low is not None and series.high is not None:
        for run in _runs(series.x, series.low, series.high):
            edge = [f"{px(x):.1f},{py(high):.1f}" for x, _, high in run]
            edge += [f"{px(x):.1f},{py(low):.1f}" for x, low, _ in reversed(run)]
            yield f'<polygon class="band {style}" points="{" ".join(edge)}"/>'
    for run in _runs(series.x, series.y):
        yield _polyline(run, style, px, py)


def _steps(series: Series, style: str, px: _Place, py: _Place) -> Iterator[str]:
    corners = [(series.x[0], 0.0)]
    for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
        corners.append((x, y))
        if i + 1 < len(series.x):
            corners.append((series.x[i + 1], y))
    area = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in corners)
    yield f'<polygon class="band {style}" points="{area}"/>'
    yield _polyline(corners, style, px, py)


def _bars(series: Series, style: str, px: _Place, py: _Place) -> Iterator[str]:
    if series.low is not None and series.high is not None:
        for x, low, high in zip(series.x, series.low, series.high, strict=True):
            place = f"M{px(x):.1f} {py(low):.1f}V{py(high):.1f}"
            yield f'<path class="bar {style}" d="{place}"/>'


def _dots(chart: Chart, series: Series, style: str, px: _Place, py: _Place) -> Iterator[str]:
    radius = 4 if series.shape == "points" else 2.6
    for run in _runs(series.x, series.y):
        for x, y in run:
            tip = escape(f"{series.name}, {chart.x_label} {x:.4g}: {y:.4g}")
            yield (
                f'<circle class="dot {style}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="{radius}">'
                f"<title>{tip}</title></circle>"
            )


def _polyline(points: Sequence[tuple[float, ...]], style: str, px: _Place, py: _Place) -> str:
    line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
    return f'<polyline class="line {style}" points="{line}"/>'


def _runs(*columns: Sequence[float]) -> Iterator[list[tuple[float, ...]]]:
    """The stretches of points without a gap."""
    points = zip(*columns, strict=True)
    for finite, run in groupby(points, key=lambda point: all(math.isfinite(v) for v in point)):
        if finite:
            yield list(run)
