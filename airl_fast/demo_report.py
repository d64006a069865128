"""The demo's results as a table, in words, as JSON and as an HTML report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airl_fast.demo import AIRL, FROZEN, GRPO, SHARPENED
from airl_fast.evaluation import bootstrap_interval, paired_bootstrap
from airl_fast.report import (
    Cell,
    Chart,
    Estimate,
    Section,
    Series,
    StepView,
    Table,
    TraceSet,
    TraceView,
    write_report,
)

if TYPE_CHECKING:
    from airl_fast.demo import Results

_NOTE = (
    "95% bootstrap intervals over the test problems, for this one seed: they do not show how much "
    "another seed would differ. Temperatures and checkpoints were chosen on validation problems."
)


def tables(results: Results) -> list[Table]:
    """Accuracy of the policies, reranking, localisation."""
    seed = results.settings["seed"]

    def estimate(values: Sequence[float]) -> Estimate:
        return Estimate(sum(values) / len(values), *bootstrap_interval(values, seed))

    def rows(of: Mapping[str, Sequence[float]]) -> list[list[Cell]]:
        return [[name, estimate(values)] for name, values in of.items()]

    policies: list[list[Cell]] = [
        [
            name,
            estimate(m.sampled),
            estimate(m.greedy),
            estimate(m.best),
            f"{m.temperature:g}",
        ]
        for name, m in results.methods.items()
    ]
    count = results.settings["rerank_samples"]
    located: list[Cell] = ["chance", results.uses.chance]
    return [
        Table(
            title="Accuracy on held-out problems",
            columns=("policy", "pass@1, T = 1", "greedy", "at its best T", "best T"),
            rows=policies,
            note=_NOTE,
        ),
        Table(
            title=f"Picking one of {count} samples of the base",
            columns=("by", "accuracy"),
            rows=rows(results.uses.rerank),
            note="f is the reward of AIRL, log pi that of the base; the oracle picks a right one "
            "if there is one.",
        ),
        Table(
            title="Lowest-scoring step is the planted error",
            columns=("by", "accuracy"),
            rows=[located, *rows(results.uses.locate)],
            note="One digit of one of the four steps is wrong, and carried through the rest.",
        ),
    ]


def conclusions(results: Results) -> list[str]:
    """What holds on these test problems and what does not, each with its difference."""
    methods = results.methods
    airl, frozen, grpo, sharpened = (methods[name] for name in (AIRL, FROZEN, GRPO, SHARPENED))
    every_sft = [m for name, m in methods.items() if name in results.chosen]
    sft = max(every_sft, key=lambda m: max(m.validation.values()))
    rerank, locate = results.uses.rerank, results.uses.locate
    claims = [
        ("AIRL beats the best SFT, each at its best temperature", airl.best, sft.best),
        ("AIRL beats the best SFT (T = 1)", airl.sampled, sft.sampled),
        ("training the reward adversarially beats the same reward frozen (T = 1)",
         airl.sampled, frozen.sampled),
        ("the learned reward trains better than the true outcome (GRPO), each at its best "
         "temperature", airl.best, grpo.best),
        ("AIRL beats the SFT whose own log pi was its reward, each at its best temperature",
         airl.best, sharpened.best),
        ("f picks better samples of the base than majority vote",
         rerank["f"], rerank["majority vote"]),
        ("f picks better samples of the base than log pi", rerank["f"], rerank["log pi"]),
        ("f finds the planted error more often than the base's log pi",
         locate["f"], locate["log pi"]),
    ]  # fmt: skip
    return [_verdict(claim, a, b, results.settings["seed"]) for claim, a, b in claims]


def _verdict(claim: str, a: Sequence[float], b: Sequence[float], seed: int) -> str:
    d = paired_bootstrap(a, b, seed)
    if d.low > 0:
        word = "Holds"
    elif d.high < 0:
        word = "Does not hold, the reverse does"
    else:
        word = "Not shown"
    points = f"{100 * d.difference:+.1f} points [{100 * d.low:+.1f}, {100 * d.high:+.1f}]"
    return f"{word}: {claim}: {points}."


def write_results(output_dir: Path, results: Results, runs: Mapping[str, Path]) -> None:
    """Write metrics.json and report.html; ``runs`` are the folders of the learning curves."""
    found = conclusions(results)
    (output_dir / "metrics.json").write_text(
        json.dumps({**asdict(results), "conclusions": found}, indent=1)
    )
    accuracy, ranking, locating = tables(results)
    traces = TraceSet(
        title="f of each step of correct traces with one planted error",
        traces=[_view(trace, i) for i, trace in enumerate(results.uses.traces, start=1)],
    )
    write_report(
        output_dir / "report.html",
        "airl_fast demo: arithmetic",
        [
            Section(title="What was found", text=found),
            Section(title="Policies", items=[accuracy]),
            Section(title="Learning curves", items=_charts(runs)),
            Section(title="The reward as a reranker", items=[ranking]),
            Section(title="The reward as a finder of errors", items=[locating, traces]),
        ],
    )


def print_results(results: Results, output_dir: Path) -> None:
    """Print the tables and what they show."""
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console()
    for table in tables(results):
        shown = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for column in table.columns:
            shown.add_column(column)
        for row in table.rows:
            shown.add_row(*(_text(cell) for cell in row))
        console.print(shown)
    console.print("\nWhat holds and what does not, on these test problems and this seed:")
    for line in conclusions(results):
        console.print(f"- {line}", highlight=False)
    console.print(
        f"\n{results.seconds:.0f} seconds. Written to {output_dir}: metrics.json, report.html, "
        "policy/ and reward/ (RewardScorer.from_pretrained reads them).",
        soft_wrap=True,
    )


def _text(cell: Any) -> str:
    if isinstance(cell, Estimate):
        return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)


def _view(trace: Mapping[str, Any], number: int) -> TraceView:
    """A trace with its planted error; the last span repeats the answer and is no step to locate."""
    f = trace["f"]
    return TraceView(
        title=f"problem {number}",
        prompt=trace["prompt"],
        steps=[
            StepView(text=text, values={"f": value})
            for text, value in zip(trace["spans"], f, strict=True)
        ],
        values={"f": sum(f)},
        correct=False,
        error_step=trace["error"],
        located=f.index(min(f[:-1])),
    )


def _charts(runs: Mapping[str, Path]) -> list[Chart]:
    """Learning curves against policy steps; the discriminator's warm-up has negative ones."""
    kept = {
        "valid/pass@1": "pass@1 on validation",
        "valid/auc_f": "AUC of f, right against wrong",
        "policy/entropy": "policy entropy (nats)",
        "disc/accuracy": "discriminator accuracy",
    }
    histories = {name: _history(path) for name, path in runs.items()}
    charts = []
    for key, label in kept.items():
        series = [
            Series(name=name, x=list(points), y=list(points.values()))
            for name, history in histories.items()
            if (points := {step: m[key] for step, m in history.items() if key in m})
        ]
        if series:
            charts.append(Chart(title=label, x_label="policy step", y_label=label, series=series))
    return charts


def _history(path: Path) -> dict[int, dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    start = next(m["step"] for m in lines if m["phase"] == "policy") - 1
    return {m["step"] - start: m for m in lines}
