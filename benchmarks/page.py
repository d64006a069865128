"""docs/performance.md: its tables come from the JSON of the measurements, never from a keyboard.

The document holds blocks between ``<!-- NAME -->`` and ``<!-- /NAME -->``; a run rewrites those
that it knows and leaves the words around them alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
FOLDER = DOCUMENT.with_suffix("")
_DPI = 110
_DETERMINED = 0.5  # widest interval of an exponent that is worth a number


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """Put new contents into the marked blocks of a document.

    Raises:
        ValueError: a block has no place in the document, naming it.
    """
    for name, contents in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, c=contents: f"{m[1]}\n{c.strip()}\n\n{m[2]}", text)
        if count != 1:
            raise ValueError(
                f"expected one block between '<!-- {name} -->' and '<!-- /{name} -->', found "
                f"{count}: put the markers back where the table belongs"
            )
    return text


def write_growth(found: dict[str, Any], order: Sequence[str], folder: Path) -> Path:
    """Write growth.json, growth.md and plots; sweeps that were not run keep their last results."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "growth.json"
    before = json.loads(path.read_text("utf-8"))["sweeps"] if path.is_file() else []
    sweeps = {sweep["name"]: sweep for sweep in [*before, *found["sweeps"]]}
    found = {**found, "sweeps": [sweeps[name] for name in order if name in sweeps]}
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    plots = _plots(found["sweeps"], folder)
    blocks = growth_blocks(found)
    text = "\n\n".join(["# How cost grows", *blocks.values(), *(f"![{p}]({p})" for p in plots)])
    (folder / "growth.md").write_text(text + "\n", "utf-8")
    _update(blocks, folder)
    return folder / "growth.md"


def growth_blocks(found: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of the sweeps."""
    return {
        "growth machine": machine(found["environment"]),
        "growth exponents": exponents(found["sweeps"]),
        "growth points": points(found["sweeps"]),
    }


def write_costs(found: dict[str, Any], folder: Path) -> Path:
    """Write cost_model.json and cost_model.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1) + "\n"
    (folder / "cost_model.json").write_text(text, "utf-8")
    blocks = cost_blocks(found)
    (folder / "cost_model.md").write_text(
        "\n\n".join(["# The cost model", *blocks.values()]) + "\n", "utf-8"
    )
    _update(blocks, folder)
    return folder / "cost_model.md"


def _update(blocks: Mapping[str, str], folder: Path) -> None:
    if folder == FOLDER:
        DOCUMENT.write_text(fill(DOCUMENT.read_text("utf-8"), blocks), "utf-8")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(env: Mapping[str, Any]) -> str:
    """One line: what the numbers were measured with."""
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v)
    return (
        f"Measured {str(env['date'])[:10]} on {env['hardware']}, {env['cores']} cores, "
        f"{env['threads']} threads, {env['memory_gib']} GiB, {env['cpu_capability']}, float32; "
        f"{versions}."
    )


def exponents(sweeps: Sequence[Mapping[str, Any]]) -> str:
    """Exponents of time and memory of every sweep."""
    rows = []
    for sweep in sweeps:
        first, last = sweep["points"][0], sweep["points"][-1]
        fit, held = sweep["time"], sweep.get("memory")
        rows.append(
            [
                sweep["name"],
                sweep["fixed"],
                f"{first['x']:,} to {last['x']:,}",
                sweep["expected"],
                _exponent(fit),
                f"{fit['slope']:.2f} ± {fit['slope_error']:.2f}",
                "" if held is None else f"{held['slope']:.2f} ± {held['slope_error']:.2f}",
            ]
        )
    header = ["what", "held", "sizes", "expected p", "time: p of a + b x^p (95%)",
              "time: log-log slope", "extra memory: log-log slope"]  # fmt: skip
    return table(header, rows)


def _exponent(fit: Mapping[str, float]) -> str:
    if fit["high"] - fit["low"] > 2 * _DETERMINED:
        return f"not determined ({fit['low']:.1f} to {fit['high']:.1f})"
    return f"**{fit['exponent']:.2f}** ({fit['low']:.2f} to {fit['high']:.2f})"


def points(sweeps: Sequence[Mapping[str, Any]]) -> str:
    """Every point: seconds, in products where there is one, and MiB beyond the results."""
    rows = []
    for sweep in sweeps:
        for point in sweep["points"]:
            product = point.get("product_seconds")
            peak = point.get("peak_mib")
            rows.append(
                [
                    sweep["name"],
                    f"{point['x']:,}",
                    f"{point['seconds']:.3f}",
                    "" if product is None else f"{point['seconds'] / product:.2f}",
                    "" if peak is None else f"{peak - point['result_mib']:.0f}",
                    "" if peak is None else f"{point['result_mib']:.0f}",
                ]
            )
    header = ["what", "size", "seconds", "in matrix products", "extra MiB", "results, MiB"]
    return table(header, rows)


def _plots(sweeps: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Log-log plots of time and memory, the head and the model apart."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("no plots: matplotlib is not installed (pip install airl-fast[report])")
        return []
    mpl.use("Agg")
    names = []
    for title, mine in (
        ("head", [s for s in sweeps if s["name"].startswith("linear")]),
        ("model", [s for s in sweeps if not s["name"].startswith("linear")]),
    ):
        if mine:
            names.append(_plot(folder / f"growth-{title}.png", mine))
    return names


def _plot(path: Path, sweeps: Sequence[Mapping[str, Any]]) -> str:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for sweep in sweeps:
        x = [point["x"] for point in sweep["points"]]
        fit = sweep["time"]
        label = f"{sweep['name']} (p = {fit['exponent']:.2f})"
        (line,) = axes[0].plot(
            x, [p["seconds"] for p in sweep["points"]], "o", label=label, markersize=4
        )
        curve = [fit["fixed"] + fit["scale"] * size ** fit["exponent"] for size in x]
        axes[0].plot(x, curve, color=line.get_color(), linewidth=1)
        if "memory" in sweep:
            extra = [max(p["peak_mib"] - p["result_mib"], 2**-8) for p in sweep["points"]]
            label = f"{sweep['name']} (slope {sweep['memory']['slope']:.2f})"
            axes[1].plot(x, extra, "o-", label=label, markersize=4, linewidth=1)
    for axis, what in zip(axes, ("seconds", "peak extra MiB, results left out"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="size", ylabel=what)
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=_DPI)
    pyplot.close(figure)
    return path.name


def cost_blocks(found: Mapping[str, Any]) -> dict[str, str]:
    """The blocks of the cost model."""
    return {
        "cost machine": machine(found["environment"]),
        "cost rates": rates(found["rates"]),
        "cost validation": validation(found["validation"]),
        "cost verdict": verdict(found["validation"], found["allowed"]),
        "cost outside": validation(found["outside"]),
        "cost gpus": gpus(found["gpus"]),
        "cost scaling": scaling(found["scaling"]),
        "cost break-even": break_even(found["gpus"]),
    }


_UNITS = {
    "product": ("GFLOP/s", 1e9, "matrix products, operands at hand"),
    "product_backward": ("GFLOP/s", 1e9, "both their gradients"),
    "memory": ("GB/s", 1e9, "a weight read and laid out by a product"),
    "fresh": ("GB/s", 1e9, "memory written for the first time"),
    "attention": ("GFLOP/s", 1e9, "attention, forward"),
    "attention_backward": ("GFLOP/s", 1e9, "attention, backward"),
    "elementwise": ("GB/s", 1e9, "norms, rotary, gathers, SwiGLU, residuals"),
    "elementwise_backward": ("GB/s", 1e9, "the same, backward"),
    "layer": ("ms", 1e-3, "dispatch of one layer"),
    "layer_backward": ("ms", 1e-3, "the same, backward"),
    "optimiser": ("M weights/s", 1e6, "clipping and AdamW, matrices up to 32 MiB"),
    "optimiser_large": ("M weights/s", 1e6, "the same, larger matrices"),
}
_HEADS = {
    "score": "linear_logprob, no gradient",
    "policy": "linear_policy_loss",
    "gradient": "linear_logprob and its backward",
}


def rates(measured: Mapping[str, Any]) -> str:
    """The calibrated constants."""
    rows = [
        [name.replace("_", " "), f"{measured[name] / scale:.3g} {unit}", what]
        for name, (unit, scale, what) in _UNITS.items()
    ]
    for name, what in _HEADS.items():
        rate = measured[name]
        value = f"{rate['logit'] * 1e9:.2g} ns a logit, {rate['weight'] * 1e9:.2g} ns a weight"
        rows.append([f"head: {name}", value, f"{what}: beyond its products"])
    return table(["constant", "here", "of what"], rows)


def validation(rows: Sequence[Mapping[str, Any]]) -> str:
    """Predicted against measured seconds."""
    phases = list(rows[0]["measured"])
    lines = []
    for row in rows:
        s, w = row["shape"], row["seen"]
        sizes = f"L {s['layers']}, D {s['hidden']}, I {s['inner']}, V {s['vocab']:,}"
        batch = f"{row['sequences']}, T {w['tokens']:,}, N {w['actions']:,}, M {w['micro_batches']}"
        cells = [
            f"{row['measured'][p]:.3g} / {row['predicted'][p]:.3g} ({row['error'][p]:+.0%})"
            for p in phases
        ]
        lines.append([row["name"], sizes, batch, *cells])
    return table(["", "model", "sequences", *phases], lines)


def verdict(rows: Sequence[Mapping[str, Any]], allowed: float) -> str:
    """One line: how many predictions are within what is allowed."""
    errors = [abs(error) for row in rows for error in row["error"].values()]
    steps = [abs(row["error"]["step"]) for row in rows]
    return (
        f"Of {len(steps)} steps {sum(e <= allowed for e in steps)} are predicted within "
        f"{allowed:.0%}, the worst off by {max(steps):.0%}; of all {len(errors)} numbers in the "
        f"table {sum(e <= allowed for e in errors)} are, the worst off by {max(errors):.0%}."
    )


def gpus(rows: Sequence[Mapping[str, Any]]) -> str:
    """Predictions for GPUs, none of them measured."""
    header = ["model, lengths", "GPUs", "prompts a step", "tokens a GPU", "compute, s", "gather, s",
              "reduce, s", "step, predicted, s", "share of peak", "sampling, s, at least",
              "GB a GPU"]  # fmt: skip
    lines = [
        [
            f"{row['model']}, {row['lengths']}",
            f"{row['gpus']:,}",
            f"{row['prompts']:,}",
            f"{row['tokens per GPU']:,.0f}",
            *(_short(row[part]) for part in ("compute", "gather", "reduce")),
            f"{_short(row['overlapped'])} to {_short(row['not overlapped'])}",
            f"{row['share of peak']:.0%}",
            _short(row["sampling at least"]),
            f"{row['GB per GPU']:.0f}" + ("" if row["fits"] else " (too much)"),
        ]
        for row in rows
    ]
    return table(header, lines)


def _short(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def scaling(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same batch on more and more GPUs."""
    first = {row["model"]: row for row in reversed(rows)}
    lines = []
    for row in rows:
        base = first[row["model"]]
        gain = base["not overlapped"] / row["not overlapped"] * base["gpus"] / row["gpus"]
        parts = [f"{row[part] * 1e3:,.0f}" for part in ("compute", "launch", "gather", "reduce")]
        lines.append(
            [row["model"], f"{row['gpus']:,}", f"{row['tokens per GPU']:,.0f}", *parts,
             f"{row['overlapped'] * 1e3:,.0f} to {row['not overlapped'] * 1e3:,.0f}",
             f"{gain:.0%}"]
        )  # fmt: skip
    header = ["model", "GPUs", "tokens a GPU", "compute, ms", "launch, ms", "gather, ms",
              "reduce, ms", "step, predicted, ms", "efficiency"]  # fmt: skip
    return table(header, lines)


def break_even(rows: Sequence[Mapping[str, Any]]) -> str:
    """One sentence a model: the micro-batch whose gathers take as long as its products."""
    tokens = {(r["model"], r["lengths"]): r["break-even tokens"] for r in rows}
    parts = [f"{value:,.0f} tokens ({model}, {lengths})" for (model, lengths), value in
             tokens.items()]  # fmt: skip
    return (
        "Gathering the weights takes as long as computing with them at micro-batches of "
        + ", ".join(parts)
        + "; smaller ones wait for NVLink."
    )
