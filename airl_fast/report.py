"""One run as one HTML file: conclusions, tables, learning curves, and traces coloured by reward.

The file holds everything it shows: charts are inline SVG, colours follow the reader's light or
dark setting, and nothing is fetched and no script runs. Every text from outside is escaped.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from pathlib import Path

import numpy as np

_WIDTH, _HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 44
_COLOURS = 6  # after them the same colours come back dashed


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
    """One line of a chart. NaN in ``y`` is a gap; ``low`` and ``high`` are a band around it."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None

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
    """Lines over a common x axis; charts that follow one another share a row."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    note: str = ""

    def __post_init__(self) -> None:
        if not any(math.isfinite(y) for series in self.series for y in series.y):
            raise ValueError(
                f"chart {self.title!r}: expected at least one finite value; leave the chart out"
            )


@dataclass(frozen=True, kw_only=True)
class ColouredTrace:
    """A prompt and its completion in (text, reward) spans; ``wrong`` is a span known to err."""

    title: str
    prompt: str
    spans: Sequence[tuple[str, float]]
    wrong: int | None = None


@dataclass(frozen=True, kw_only=True)
class TraceSet:
    """Traces on one colour scale: red below ``centre``, blue above it.

    The colour is full from the 90th percentile of the distance to the centre on, so that one
    outlier does not fade the rest; the legend says where that is, the tooltips give the numbers.
    """

    title: str
    traces: Sequence[ColouredTrace]
    label: str = "reward"
    centre: float = 0.0
    note: str = ""

    def __post_init__(self) -> None:
        for trace in self.traces:
            if not all(math.isfinite(reward) for _, reward in trace.spans):
                raise ValueError(f"trace {trace.title!r}: expected finite rewards")

    @property
    def limit(self) -> float:
        """The distance from the centre at which the colour is full, > 0."""
        distances = [abs(r - self.centre) for trace in self.traces for _, r in trace.spans]
        return (float(np.percentile(distances, 90)) if distances else 0.0) or 1.0


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, paragraphs, and what they are about."""

    title: str
    text: Sequence[str] = ()
    items: Sequence[Table | Chart | TraceSet] = ()


def write_report(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    conclusions: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write the report.

    Args:
        path: the HTML file; its folder is made if it does not exist.
        title: of the page.
        sections: in reading order.
        conclusions: what holds and what does not, in plain words, shown first.
        facts: how the run was made (command, versions, machine), shown under the title.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    body = [f"<h1>{escape(title)}</h1>"]
    if facts:
        rows = (f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        body.append(f"<dl>{''.join(rows)}</dl>")
    if conclusions:
        lines = "".join(f"<li>{escape(text)}</li>" for text in conclusions)
        body.append(f'<section class="conclusions"><h2>Conclusions</h2><ul>{lines}</ul></section>')
    body.extend(_section(section) for section in sections)
    path.write_text(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n",
        encoding="utf-8",
    )


def save_chart(path: Path, chart: Chart) -> None:
    """Save a chart for a paper, as the format that the ending names (.pdf, .png, .svg).

    Raises:
        ImportError: matplotlib, the ``report`` extra, is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('save_chart needs matplotlib: pip install "airl-fast[report]"') from error
    figure = Figure(figsize=(5, 3), layout="constrained", dpi=200)
    axes = figure.subplots()
    for series in chart.series:
        (line,) = axes.plot(series.x, series.y, label=series.name)
        if series.low is not None and series.high is not None:
            axes.fill_between(series.x, series.low, series.high, color=line.get_color(), alpha=0.2)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.legend()
    figure.savefig(path)


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts.extend(f"<p>{escape(text)}</p>" for text in section.text)
    for is_chart, items in groupby(section.items, key=lambda item: isinstance(item, Chart)):
        shown = "".join(_item(item) for item in items)
        parts.append(f'<div class="charts">{shown}</div>' if is_chart else shown)
    return f"<section>{''.join(parts)}</section>"


def _item(item: Table | Chart | TraceSet) -> str:
    match item:
        case Table():
            shown = _table(item)
        case Chart():
            shown = _legend(item) + _svg(item)
        case TraceSet():
            traces = "".join(_trace(trace, item) for trace in item.traces)
            shown = f'{_trace_legend(item)}<div class="traces">{traces}</div>'
    note = f'<p class="note">{escape(item.note)}</p>' if item.note else ""
    return f"<figure><figcaption>{escape(item.title)}</figcaption>{shown}{note}</figure>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    rows = []
    for row in table.rows:
        cells = "".join(f"<td>{_cell(cell)}</td>" for cell in row[1:])
        rows.append(f'<tr><th scope="row">{_cell(row[0])}</th>{cells}</tr>')
    body = "".join(rows)
    content = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{content}</table></div>'


def _cell(cell: Cell) -> str:
    match cell:
        case Estimate():
            interval = f"{cell.low:.3f} to {cell.high:.3f}"
            return f'{cell.value:.3f} <span class="interval">{interval}</span>'
        case float():
            return f"{cell:.3f}"
    return escape(str(cell))


def _legend(chart: Chart) -> str:
    keys = (
        f'<span class="key"><svg width="22" height="10" aria-hidden="true">'
        f'<line x1="0" y1="5" x2="22" y2="5" class="{_classes(i)}"/></svg>{escape(s.name)}</span>'
        for i, s in enumerate(chart.series)
    )
    return f'<div class="legend">{"".join(keys)}</div>'


def _svg(chart: Chart) -> str:
    xs = [x for s in chart.series for x in s.x]
    bounds = [v for s in chart.series for part in (s.y, s.low, s.high) if part for v in part]
    x_ticks, x_range = _axis(xs, tight=True)
    y_ticks, y_range = _axis([v for v in bounds if math.isfinite(v)], tight=False)

    def px(x: float) -> float:
        share = (x - x_range[0]) / (x_range[1] - x_range[0])
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def py(y: float) -> float:
        share = (y - y_range[0]) / (y_range[1] - y_range[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
    ]
    for value, text in y_ticks:
        y = py(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" class="end">{text}</text>')
    floor = _HEIGHT - _BOTTOM
    for value, text in x_ticks:
        parts.append(f'<path class="tick" d="M{px(value):.1f} {floor}v4"/>')
        parts.append(f'<text x="{px(value):.1f}" y="{floor + 17}" class="mid">{text}</text>')
    parts.append(f'<path class="tick" d="M{_LEFT} {floor}H{_WIDTH - _RIGHT}"/>')
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + floor) / 2
    x_label, y_label = escape(chart.x_label), escape(chart.y_label)
    parts.append(f'<text x="{middle_x}" y="{_HEIGHT - 8}" class="mid name">{x_label}</text>')
    turned = f'transform="translate(13 {middle_y}) rotate(-90)"'
    parts.append(f'<text {turned} class="mid name">{y_label}</text>')
    for i, series in enumerate(chart.series):
        if series.low is not None and series.high is not None:
            for run in _runs(series.x, series.low, series.high):
                edge = [f"{px(x):.1f},{py(high):.1f}" for x, _, high in run]
                edge += [f"{px(x):.1f},{py(low):.1f}" for x, low, _ in reversed(run)]
                parts.append(f'<polygon class="band c{i % _COLOURS}" points="{" ".join(edge)}"/>')
        for run in _runs(series.x, series.y):
            line = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in run)
            parts.append(f'<polyline class="{_classes(i)}" points="{line}"/>')
            for x, y in run:
                tip = f"{escape(series.name)}, {x_label} {x:g}: {y:.4g}"
                shape = "dot" if len(series.x) <= 40 else "dot hidden"
                parts.append(
                    f'<circle class="{shape} c{i % _COLOURS}" cx="{px(x):.1f}" cy="{py(y):.1f}" '
                    f'r="2.6"><title>{tip}</title></circle>'
                )
    return "".join([*parts, "</svg>"])


def _classes(index: int) -> str:
    return f"line c{index % _COLOURS}" + (" dashed" if index >= _COLOURS else "")


def _runs(*columns: Sequence[float]) -> Iterator[list[tuple[float, ...]]]:
    """The stretches of points without a gap."""
    points = zip(*columns, strict=True)
    for finite, run in groupby(points, key=lambda point: all(math.isfinite(v) for v in point)):
        if finite:
            yield list(run)


def _axis(
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


def _trace_legend(traces: TraceSet) -> str:
    low, high = traces.centre - traces.limit, traces.centre + traces.limit
    return (
        f'<div class="legend">{escape(traces.label)}: <span>&le; {low:.3g}</span>'
        f'<span class="scale"></span><span>&ge; {high:.3g}</span></div>'
    )


def _trace(trace: ColouredTrace, traces: TraceSet) -> str:
    spans = []
    for i, (text, reward) in enumerate(trace.spans):
        distance = (reward - traces.centre) / traces.limit
        strength = 0.75 * min(1.0, abs(distance))
        kind = ("hi" if distance > 0 else "lo") + (" wrong" if i == trace.wrong else "")
        tip = f"span {i}: {traces.label} {reward:+.4g}"
        if i == trace.wrong:
            tip += " (known to be wrong)"
        shown = escape(text).replace("\n", '<i class="nl">&crarr;</i>\n')
        spans.append(
            f'<span class="s {kind}" style="--a:{strength:.2f}" tabindex="0" '
            f'data-tip="{escape(tip)}">{shown}</span>'
        )
    return (
        f'<div class="trace"><h3>{escape(trace.title)}</h3>'
        f'<pre class="prompt">{escape(trace.prompt)}</pre><pre>{"".join(spans)}</pre></div>'
    )


# Series colours: Okabe and Ito's, told apart by colour-blind readers, lightened in the dark.
_STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c1e21;--dim:#62676e;--rule:#e1e4e8;--card:#f6f7f9;
--lo:214 48 49;--hi:30 110 190;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b8860b;--c5:#56b4e9}
@media(prefers-color-scheme:dark){:root{--bg:#14161a;--fg:#e4e6ea;--dim:#9aa1ab;--rule:#2d3138;
--card:#1d2026;--lo:255 92 87;--hi:84 160 255;
--c0:#4aa8e8;--c1:#ff8a3d;--c2:#2fcf9f;--c3:#e79bc5;--c4:#e0b23c;--c5:#9fd8f7}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.55 system-ui,sans-serif}
main{max-width:1120px;margin:0 auto;padding:2rem 1.25rem 6rem}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 .75rem}
h2{font-size:1.2rem;margin:2.5rem 0 .5rem}
h3{font-size:.9rem;margin:0 0 .35rem}
p{max-width:46rem;margin:.5rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;margin:0;font-size:.85rem;
color:var(--dim)}
dd{margin:0;font-family:ui-monospace,monospace;overflow-wrap:anywhere}
.conclusions{background:var(--card);border-left:4px solid var(--c0);border-radius:4px;
padding:.9rem 1.4rem;margin:1.5rem 0}
.conclusions h2{margin:0}.conclusions ul{margin:.4rem 0 0;padding-left:1.1rem}
.conclusions li{margin:.25rem 0;max-width:54rem}
figure{margin:1.25rem 0}
figcaption{font-weight:600;margin-bottom:.35rem}
.note{font-size:.85rem;color:var(--dim)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.95rem}
th,td{padding:.4rem 1.1rem .4rem 0;text-align:right;border-bottom:1px solid var(--rule);
font-weight:400;white-space:nowrap}
thead th{color:var(--dim);font-size:.85rem;vertical-align:bottom;white-space:normal}
th:first-child{text-align:left}
.interval{color:var(--dim);font-size:.8rem;margin-left:.35rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:0 2rem}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.15rem .9rem;font-size:.85rem;
color:var(--dim);margin-bottom:.3rem}
.key{display:inline-flex;align-items:center;gap:.4rem}
svg{max-width:100%;display:block;overflow:visible}
figure>svg{width:100%;max-width:720px;height:auto}
text{fill:var(--dim);font-size:12px}.mid{text-anchor:middle}.end{text-anchor:end}
.grid{stroke:var(--rule);fill:none}.tick{stroke:var(--dim);fill:none}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.dashed{stroke-dasharray:6 4}
.band{fill:var(--c);opacity:.16}
.dot{fill:var(--c);stroke:var(--bg)}.hidden{opacity:0}.dot:hover{opacity:1;stroke:var(--fg)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}
.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}
.scale{width:9rem;height:.8rem;border-radius:2px;
background:linear-gradient(90deg,rgb(var(--lo)/.75),transparent,rgb(var(--hi)/.75))}
.trace{background:var(--card);border-radius:6px;padding:.8rem 1.1rem}
.traces{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:.75rem}
pre{margin:.2rem 0 0;font:14px/1.75 ui-monospace,monospace;white-space:pre-wrap;
overflow-wrap:anywhere}
.prompt{color:var(--dim)}
.s{position:relative;border-radius:2px;padding:.15em 0}
.lo{background:rgb(var(--lo)/var(--a))}.hi{background:rgb(var(--hi)/var(--a))}
.wrong{text-decoration:underline wavy var(--fg) 1px;text-underline-offset:4px}
.nl{opacity:.4;font-style:normal;text-decoration:none}
.s:hover,.s:focus{outline:1.5px solid var(--fg)}
.s:hover::after,.s:focus::after{content:attr(data-tip);position:absolute;left:0;top:1.9em;
z-index:1;background:var(--fg);color:var(--bg);padding:.1rem .55rem;border-radius:4px;
font:12px/1.6 system-ui,sans-serif;white-space:nowrap}
@media print{.s:hover::after{content:none}}
"""
