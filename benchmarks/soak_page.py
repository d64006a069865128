"""What a soak found, written down: results.json, results.md and soak.png."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.environment import load
from benchmarks.soak_fit import Trend, blocks

_COMMANDS = {"train": "airl-fast train arithmetic", "serve": "airl-fast serve"}


def write(
    folder: Path,
    what: str,
    samples: Sequence[dict[str, Any]],
    trends: Sequence[Trend],
    about: dict[str, Any],
    environment: dict[str, Any],
) -> None:
    """Write all three, and print the table.

    Args:
        folder: where to.
        what: "train" or "serve".
        samples: all of them, the warm-up too.
        trends: fitted after the warm-up; none where it was too short.
        about: counts and settings of this soak.
        environment: of ``benchmarks.environment.describe``.
    """
    result = {
        "what": what,
        "minutes": samples[-1]["minutes"],
        **about,
        "load_after": load(),
        "trends": [{**asdict(trend), "verdict": trend.verdict} for trend in trends],
        "environment": environment,
    }
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    text = _markdown(result, trends)
    (folder / "results.md").write_text(text, "utf-8")
    _plot(folder / "soak.png", samples, trends, about)
    print(text)


def _markdown(result: dict[str, Any], trends: Sequence[Trend]) -> str:
    environment = result["environment"]
    facts = ", ".join(
        f"{result[key]:,} {words}"
        for key, words in (
            ("clients", "clients"),
            ("requests", "requests"),
            ("lost", "lost"),
            ("mixed_up", "mixed up"),
        )
        if key in result
    )
    lines = [
        f"# Soak: `{_COMMANDS[result['what']]}` for {result['minutes']:.1f} minutes",
        "",
        f"{environment['hardware']}, {environment['cores']} cores, {environment['date'][:10]}; "
        f"load average {result['load_before']} before and {result['load_after']} after. "
        f"{result['samples']} samples; those of the first {result['warmup_minutes']:.1f} minutes "
        f"are warm-up and not fitted. {result['pauses']} pauses of the machine. {facts}".rstrip(),
        "",
        "Theil-Sen slopes with 95% intervals. Flat: the whole interval is within the tolerance; "
        "drifts: none of it; else the soak cannot tell.",
        "",
        "| | median | slope | 95% interval | tolerance | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for trend in trends:
        quantity = trend.quantity
        lines.append(
            f"| {quantity.name} | {trend.median:.4g} {quantity.unit} | {trend.slope:+.3g} "
            f"{quantity.slope_unit} | {trend.low:+.3g} to {trend.high:+.3g} | "
            f"{quantity.tolerance:g} | {trend.verdict} |"
        )
    if not trends:
        lines.append("| too few samples after the warm-up | | | | | undecided |")
    return "\n".join([*lines, "", "![over time](soak.png)", ""])


def _plot(
    path: Path,
    samples: Sequence[dict[str, Any]],
    trends: Sequence[Trend],
    about: dict[str, Any],
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = max(1, (len(trends) + 1) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 2.4 * rows), squeeze=False, sharex=True)
    minutes = [sample["minutes"] for sample in samples]
    for axis, trend in zip(axes.flat, trends, strict=False):
        quantity = trend.quantity
        if quantity.per is None:
            values = [sample[quantity.column] for sample in samples]
            axis.plot(minutes, values, ".", markersize=2, color="0.7")
        hours, middle = blocks(samples, quantity)
        axis.plot(hours * 60, middle, color="tab:blue", linewidth=1)
        axis.axvline(about["warmup_minutes"], color="0.5", linewidth=0.8, linestyle=":")
        axis.set_title(
            f"{quantity.name}: {trend.slope:+.2g} {quantity.slope_unit}, {trend.verdict}",
            fontsize=9,
        )
        axis.set_ylabel(quantity.unit, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("minutes", fontsize=8)
    for axis in axes.flat[len(trends) :]:
        axis.set_axis_off()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
