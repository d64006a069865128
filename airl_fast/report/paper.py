"""A chart for a paper."""

from pathlib import Path

from airl_fast.report.content import Chart


def save_chart(path: Path, chart: Chart) -> None:
    """Save a chart as the format that the ending names (.pdf, .png, .svg).

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
        if series.shape == "steps":
            axes.step(series.x, series.y, where="post", label=series.name)
            continue
        style = "o" if series.shape == "points" else "-"
        (line,) = axes.plot(series.x, series.y, style, label=series.name)
        if series.low is None or series.high is None:
            continue
        if series.shape == "points":
            axes.vlines(series.x, series.low, series.high, color=line.get_color())
        else:
            axes.fill_between(series.x, series.low, series.high, color=line.get_color(), alpha=0.2)
    for place, _ in chart.marks:
        axes.axvline(place, color="0.6", linewidth=0.8)
    if chart.x_log:
        axes.set_xscale("log", base=2)
    if chart.unit_square:
        axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.legend()
    figure.savefig(path)
