"""The plots of ``airl-fast eval``: best-of-n curves, reliability, histograms, first errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {
    "f": "#0b62c4",
    "f - log pi": "#6f42c1",
    "log pi (sum)": "#b35900",
    "log pi (mean)": "#d9a400",
    "majority": "#2e7d32",
    "vote weighted by f": "#00838f",
    "random": "#888888",
    "oracle": "#222222",
}


def require() -> None:
    """Refuse before anything is scored.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(
            "plots need matplotlib: pip install 'airl-fast[report]', or pass --no-plots"
        ) from None


def draw(metrics: dict[str, Any], folder: Path) -> list[Path]:
    """Draw every section that was measured; return the files."""
    drawn = []
    for name, plot in (
        ("best_of_n", _best_of_n),
        ("calibration", _reliability),
        ("histogram", _histograms),
        ("localisation", _localisation),
    ):
        if "skipped" in metrics[name]:
            (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier evaluation
            continue
        figure = plot(metrics[name])
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=130)
        drawn.append(path)
    return drawn


def _figure(width: float = 6.4, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: no display, nothing global

    figure = Figure(figsize=(width, 4.2), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _best_of_n(section: dict[str, Any]) -> Any:
    figure, (axes,) = _figure()
    for name, curve in section["curves"].items():
        colour = _COLOURS.get(name)
        axes.plot(section["k"], curve["value"], marker="o", ms=3, label=name, color=colour)
        if name == "f":
            axes.fill_between(section["k"], curve["low"], curve["high"], alpha=0.15, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(section["k"], [str(k) for k in section["k"]])
    axes.minorticks_off()
    axes.set(xlabel="completions to choose from", ylabel="accuracy", title="Best of n")
    axes.legend(fontsize=8)
    return figure


def _reliability(section: dict[str, Any]) -> Any:
    figure, (axes,) = _figure()
    axes.plot([0, 1], [0, 1], color="#888888", lw=1, ls="--", label="calibrated")
    for name, found in section["by_score"].items():
        points = [
            (p, a)
            for p, a in zip(found["probability"], found["accuracy"], strict=True)
            if p is not None
        ]
        label = f"{name} (ECE {found['ece']:.3f})"
        axes.plot(*zip(*points, strict=True), marker="o", ms=4, label=label, color=_COLOURS[name])
    axes.set(xlabel="probability of being right", ylabel="share that is right", title="Reliability")
    axes.legend(fontsize=8)
    return figure


def _histograms(section: dict[str, Any]) -> Any:
    scores = section["by_score"]
    figure, all_axes = _figure(3.4 * len(scores) + 1, len(scores))
    for axes, (name, found) in zip(all_axes, scores.items(), strict=True):
        for kind, colour in (("right", "#0b62c4"), ("wrong", "#c62828")):
            axes.stairs(found[kind], found["edges"], label=kind, color=colour, fill=True, alpha=0.5)
        axes.set(xlabel=name, ylabel="traces")
        axes.legend(fontsize=8)
    return figure


def _localisation(section: dict[str, Any]) -> Any:
    figure, (axes,) = _figure()
    scores = section["by_score"]
    names = [*scores, "random"]
    lowest = [scores[name]["lowest_step"]["value"] for name in scores]
    bars = [*lowest, section["random"]["lowest_step"]]
    bounds = [(scores[n]["lowest_step"]["low"], scores[n]["lowest_step"]["high"]) for n in scores]
    errors = [
        [*(v - low for v, (low, _) in zip(lowest, bounds, strict=True)), 0.0],
        [*(high - v for v, (_, high) in zip(lowest, bounds, strict=True)), 0.0],
    ]
    axes.bar(names, bars, yerr=errors, color=[_COLOURS[name] for name in names], capsize=3)
    axes.set(ylim=(0, 1), ylabel="share", title="The lowest-scoring step is the first wrong one")
    axes.tick_params(axis="x", labelsize=8)
    return figure
