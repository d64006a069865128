"""Results as JSON, as a Markdown table, and as plots."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import roofline
from benchmarks.environment import slug
from benchmarks.harness import Row
from benchmarks.suite import Results

_ROOT = Path(__file__).resolve().parent / "results"
_COLUMNS = [
    "peer", "backend", "ms (iqr)", "ratio", "over ours", "GB/s", "peak MiB (results)", "error",
    "note",
]  # fmt: skip
_DPI = 120


def write(results: Results, folder: Path | None = None) -> Path:
    """Write results.json, results.md and the plots.

    Args:
        results: of a run.
        folder: where; by default benchmarks/results/HARDWARE-DATE, "-quick" behind it if so.

    Returns:
        The folder.
    """
    if folder is None:
        name = slug(results.environment) + ("-quick" if results.settings.quick else "")
        folder = _ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results.as_json(), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", "utf-8")
    plots = _plots(results, folder)
    (folder / "results.md").write_text(markdown(results, plots), "utf-8")
    return folder


def markdown(results: Results, plots: Iterable[str] = ()) -> str:
    """All rows, one table for each operator and shape."""
    lines = ["# Benchmarks", "", *_preamble(results), ""]
    for (operator, sizes, dtype), rows in _grouped(results.rows).items():
        lines += [f"## {operator}, {sizes}, {dtype}", "", _yardstick(rows), ""]
        lines += [
            "| " + " | ".join(_COLUMNS) + " |",
            "| " + " | ".join("---" for _ in _COLUMNS) + " |",
        ]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
        lines.append("")
    lines += [line for name in plots for line in (f"![{name}]({name})", "")]
    return "\n".join(lines)


def _preamble(results: Results) -> list[str]:
    env, settings = results.environment, results.settings
    versions = env["versions"]
    assert isinstance(versions, dict)
    named = ", ".join(f"{k} {v or 'not installed'}" for k, v in versions.items())
    return [
        f"- {env['date']}, {_gpu(env)}{env['hardware']}, {env['cores']} cores, "
        f"{env['threads']} threads, "
        f"{env['memory_gib']} GiB, {env['cpu_capability']}, {env['matrix_library']}, "
        f"{env['system']}",
        f"- {named}",
        f"- load average (1 min) before {env['load_before']}, after timing "
        f"{env['load_after_timing']}; seed {settings.seed}",
        "- ms: median of the rounds, interquartile range in brackets. All variants and the "
        "yardstick take turns in random order; ratio is the median over rounds of the time over "
        "the yardstick's in the same round; over ours: the same over the fastest airl_fast. "
        "Warm-up and compilation are not timed. A time without a range is of one call.",
        "- peak: growth of the resident set of a separate process during one call, results "
        "(outputs and gradients) included; benchmarks/memory.py says how.",
        "- error: largest error over the largest magnitude, against tests/oracle.py on small "
        "inputs and against float64 samples of the timed output. A wrong result has no speed.",
        *(["- The run was interrupted: some cases are missing."] if "interrupted" in env else []),
        *([f"- tests before timing: {env['tests']}"] if "tests" in env else []),
        *[f"- left out for want of time: {key}" for key in env.get("left_out", [])],
        *[f"- **failed**: {line}" for line in env.get("failed", [])],
        *(["- QUICK RUN: tiny shapes, the times mean nothing."] if settings.quick else []),
    ]


def _gpu(env: dict[str, object]) -> str:
    return f"{env['gpu']}, " if env.get("gpu") else ""


def _grouped(rows: Iterable[Row]) -> dict[tuple[str, str, str], list[Row]]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        sizes = ", ".join(f"{letter} = {size:,}" for letter, size in row.shape.items())
        groups.setdefault((row.operator, sizes, row.dtype), []).append(row)
    return groups


def _yardstick(rows: list[Row]) -> str:
    times = [row.yardstick_ms for row in rows if row.yardstick_ms is not None]
    measured = f"{times[0]:.4g} ms" if times else "not measured"
    least = f"; the operator needs at least {rows[0].least:g}" if rows[0].least else ""
    return f"One {rows[0].yardstick}: {measured}{least}."


def _cells(row: Row) -> list[str]:
    if row.status != "ok":
        speed = ["**wrong**" if row.status == "wrong" else row.status, "", "", "", ""]
    else:
        speed = [
            f"{row.ms:.4g}" + _or_blank(row.ms_iqr, " ({:.2g})"),
            _or_blank(row.ratio, "{:.2f}"),
            _or_blank(row.against_ours, "{:.2f}"),
            _or_blank(row.gb_s, "{:.1f}"),
            "" if row.peak_mib is None else f"{row.peak_mib:.0f} ({row.result_mib:.0f})",
        ]
    facts = [f"{name}: {value:,.0f}" for name, value in row.facts.items()]
    facts += [f"{part}: {ms:,.0f} ms" for part, ms in row.parts.items()]
    note = "; ".join(part for part in (row.note, *facts, row.reason) if part)
    cells = [row.peer, row.backend, *speed, _or_blank(row.error, "{:.0e}"), note]
    return [cell.replace("|", "\\|").replace("\n", " ") for cell in cells]


def _or_blank(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _plots(results: Results, folder: Path) -> list[str]:
    """The parts of a step; time against N and V, memory against N, of what was swept."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: matplotlib is not installed")
        return []
    mpl.use("Agg")
    names = [_plot_parts(folder, rows) for rows in _grouped(results.rows).values() if _parted(rows)]
    names += [name for name in [roofline.plot(results.rows, folder)] if name is not None]
    swept = sorted({row.operator for row in results.rows if row.group == "sweep"})
    for operator in swept:
        rows = [r for r in results.rows if r.operator == operator and r.status == "ok"]
        sizes = [(r.shape["N"], r.shape["V"]) for r in rows if r.group == "sweep"]
        if not sizes:
            continue
        width = next(r.shape["D"] for r in rows if r.group == "sweep")
        rows = [r for r in rows if r.shape["D"] == width]
        for letter, other in (("N", "V"), ("V", "N")):
            fixed = _commonest(rows, letter, other)
            line = [r for r in rows if r.shape[other] == fixed]
            what = f"{other} = {fixed:,}, D = {width:,}"
            names.append(_plot(folder, operator, line, letter, "time", what, lambda r: r.ms))
            if letter == "N" and any(r.peak_mib is not None for r in line):
                names.append(
                    _plot(folder, operator, line, letter, "memory", what, lambda r: r.peak_mib)
                )
    return names


def _parted(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.status == "ok" and row.parts]


def _plot_parts(folder: Path, rows: list[Row]) -> str:
    """A bar for each formulation, made of its parts."""
    from matplotlib import pyplot

    rows = _parted(rows)[::-1]  # the first on top
    figure, axes = pyplot.subplots(figsize=(7, 0.7 + 0.6 * len(rows)), layout="constrained")
    ends = [0.0] * len(rows)
    for part in rows[0].parts:
        seconds = [row.parts[part] / 1e3 for row in rows]
        axes.barh([row.peer for row in rows], seconds, left=ends, label=part)
        ends = [end + more for end, more in zip(ends, seconds, strict=True)]
    axes.set(xlabel="seconds", title=rows[0].operator)
    axes.legend(fontsize=8)
    name = f"{_slug(rows[0].operator)}-parts.png"
    figure.savefig(folder / name, dpi=_DPI)
    pyplot.close(figure)
    return name


def _slug(operator: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in operator).strip("-").replace("--", "-")


def _commonest(rows: list[Row], letter: str, other: str) -> int:
    """The value of ``other`` at which most values of ``letter`` were measured."""
    values = {row.shape[other] for row in rows}
    return max(values, key=lambda v: len({r.shape[letter] for r in rows if r.shape[other] == v}))


def _plot(
    folder: Path,
    operator: str,
    rows: list[Row],
    letter: str,
    what: str,
    fixed: str,
    value: Callable[[Row], float | None],
) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        label = row.peer if row.backend == "-" else f"{row.peer} ({row.backend})"
        y = value(row)
        if y is not None:
            lines.setdefault(label, {})[row.shape[letter]] = y
        if what == "time" and row.yardstick_ms is not None:
            lines.setdefault("one matrix product", {})[row.shape[letter]] = row.yardstick_ms
    for label, points in lines.items():
        ours, product = label.startswith("airl_fast"), label == "one matrix product"
        axes.plot(
            *zip(*sorted(points.items()), strict=True),
            label=label,
            marker="o",
            markersize=4,
            linewidth=2.2 if ours else 1.2,
            color="black" if product else None,
            linestyle="--" if product else "-",
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=letter,
        ylabel="milliseconds" if what == "time" else "peak extra MiB, results included",
        title=f"{operator}: {what} against {letter} ({fixed})",
    )
    sizes = sorted({size for points in lines.values() for size in points})
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    name = f"{_slug(operator)}-{what}-against-{letter}.png"
    figure.savefig(folder / name, dpi=_DPI)
    pyplot.close(figure)
    return name
