"""A set of traces as HTML: the viewer's frame and data, and tables for those without a script."""

from collections.abc import Sequence
from itertools import count
from typing import Any

from airl_fast.report.content import Table
from airl_fast.report.text import escape, json_block
from airl_fast.report.traces import LABELS, SHADES, Piece, Scale, StepView, TraceSet, TraceView

_STATIC = 20  # traces that a page without scripts shows step by step
_FRAME = """
<div class="viewer" id="{id}" hidden>
<div class="controls" role="group" aria-label="What to show">
<fieldset><legend>Colour by</legend>{measures}</fieldset>
<fieldset{no_tokens}><legend>Level</legend>
<label><input type="radio" name="level" value="steps" checked> steps</label>
<label><input type="radio" name="level" value="tokens"> tokens</label></fieldset>
<label>Show <select name="filter"></select></label>
<label>Sort <select name="sort"></select></label>
</div>
<p class="keys"><b>Keys:</b> in the list <kbd>↑</kbd> <kbd>↓</kbd> choose a trace and
<kbd>Enter</kbd> goes into it; there the arrows move between steps or tokens, <kbd>Enter</kbd> opens
a step's tokens, <kbd>PgUp</kbd> <kbd>PgDn</kbd> change the trace, <kbd>Esc</kbd> goes back.</p>
<div class="panes">
<div class="side">
<div class="pager"><button type="button" data-go="-1">Previous</button>
<span class="place"></span><button type="button" data-go="1">Next</button></div>
<div class="list" role="listbox" tabindex="0" aria-label="Traces"></div>
</div>
<div class="shown">
<h4 class="name"></h4><p class="facts"></p>
<div class="jumps"><button type="button" data-jump="located" hidden>Go to located error</button>
<button type="button" data-jump="error" hidden>Go to true error</button></div>
<details class="prompt" open><summary>Prompt</summary><pre></pre></details>
<div class="scale" role="img"></div>
<div class="steps" role="listbox" tabindex="0"></div>
<p class="detail" aria-hidden="true"></p>
</div></div>
<p class="sr" role="status" aria-live="polite"></p>
<script type="application/json">{data}</script>
</div>"""


def viewer(traces: TraceSet, number: int) -> str:
    """Return the viewer of a set, the table of all its traces, and what stands in without a script.

    Args:
        traces: the set.
        number: of the set in the page, which makes ids and names its own.
    """
    radios = "".join(
        f'<label><input type="radio" name="measure" value="{escape(name)}"'
        f"{' checked' if i == 0 else ''}> {escape(LABELS.get(name, name))}</label>"
        for i, name in enumerate(_ordered(traces))
    )
    frame = _FRAME.format(
        id=f"viewer-{number}",
        measures=radios,
        no_tokens="" if traces.has_tokens else " hidden",
        data=json_block(_data(traces)),
    )
    shown = traces.traces[:_STATIC]
    which = f"the first {len(shown)} of {len(traces.traces):,}" if len(shown) < len(
        traces.traces
    ) else "all of them"  # fmt: skip
    measure = _ordered(traces)[0]
    scale = traces.scale(measure, "steps")
    steps = "".join(_static(trace, measure, scale) for trace in shown)
    return (
        f"{frame}<noscript><p>The viewer of traces needs JavaScript. Without it, {which} step by "
        f"step:</p>{_legend(measure, scale)}{steps}</noscript>"
    )


def summary_table(traces: TraceSet) -> Table:
    """One row for every trace: what is known about it, its values, its lowest step."""
    first = _ordered(traces)[0]
    totals = [m for m in _ordered(traces) if all(m in t.values for t in traces.traces)]
    number = count(1)

    def row(trace: TraceView) -> list[str | int]:
        values = [f"{trace.values[m]:.4g}" for m in totals]
        known = (trace.located, trace.error_step)
        marks = ["" if step is None else str(step + 1) for step in known]
        answer = {None: "", True: "correct", False: "wrong"}[trace.correct]
        return [next(number), trace.title, answer, *values, trace.lowest(first) + 1, *marks]

    return Table(
        title="All traces",
        columns=(
            "no.",
            "trace",
            "answer",
            *(LABELS.get(m, m) for m in totals),
            f"step with lowest {LABELS.get(first, first)}",
            "located error",
            "true error",
        ),
        rows=[row(trace) for trace in traces.traces],
        note="Steps count from 1.",
    )


def _legend(measure: str, scale: Scale) -> str:
    """The colours with their values."""
    shades = "".join(
        f'<span class="{_shade(k)}">{scale.show(scale.centre + scale.limit * k / SHADES)}</span>'
        for k in range(-SHADES, SHADES + 1)
    )
    return f'<div class="scale">{escape(LABELS.get(measure, measure))}: {shades}</div>'


def _ordered(traces: TraceSet) -> Sequence[str]:
    """The reward first: it is what the colours are about."""
    return sorted(traces.measures, key=lambda m: (m != "reward", traces.measures.index(m)))


def _shade(k: int) -> str:
    return f"n{-k}" if k < 0 else f"p{k}" if k else "z"


def _static(trace: TraceView, measure: str, scale: Scale) -> str:
    rows = []
    for i, step in enumerate(trace.steps):
        value = step.values[measure]
        marks = [
            name
            for name, at in (("located error", trace.located), ("true error", trace.error_step))
            if at == i
        ]
        rows.append(
            f'<tr><th scope="row">{i + 1}</th><td class="text {_shade(scale.shade(value))}">'
            f"{escape(step.text)}</td><td>{scale.show(value)}</td><td>{', '.join(marks)}</td></tr>"
        )
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("step", "text", escape(LABELS.get(measure, measure)), "marks")
    )
    return (
        f"<h4>{escape(trace.title)}</h4><pre>{escape(trace.prompt)}</pre>"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody>'
        "</table></div>"
    )


def _data(traces: TraceSet) -> dict[str, Any]:
    """What the viewer's script reads; columns of values are in the order of ``measures``."""
    measures = _ordered(traces)
    levels = ("steps", "tokens") if traces.has_tokens else ("steps",)

    def values(part: StepView | Piece) -> list[float]:
        return [_rounded(part.values[m]) for m in measures] if part.values else []

    def scale(measure: str, level: str) -> list[float]:
        of = traces.scale(measure, level)
        return [of.centre, of.limit, of.decimals]

    return {
        "measures": [[m, LABELS.get(m, m)] for m in measures],
        "scales": {level: [scale(m, level) for m in measures] for level in levels},
        "traces": [
            {
                "title": trace.title,
                "prompt": trace.prompt,
                "group": trace.group,
                "source": trace.source,
                "correct": trace.correct,
                "error": trace.error_step,
                "located": trace.located,
                "values": [_rounded(trace.values[m]) if m in trace.values else None
                           for m in measures],
                "steps": [
                    [values(step), [[t.text, *values(t)] for t in step.tokens] or [[step.text]]]
                    for step in trace.steps
                ],
            }
            for trace in traces.traces
        ],
    }  # fmt: skip


def _rounded(value: float) -> float:
    """Nine significant digits: every float32 keeps its value."""
    return float(f"{value:.9g}")
