"""From files to a report: a run's folder, scored traces, an evaluation's results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from airl_fast.parsing import parse_json, shown
from airl_fast.report.content import Cell, Chart, Section, Series, Table
from airl_fast.report.page import write_report
from airl_fast.report.scored import read_traces, traces_sections
from airl_fast.report.summary import EvalSummary

# Charts of what a run records: title, axis, and the metrics with their names in the legend.
_CURVES: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("Accuracy on validation problems", "pass@1", {"valid/pass@1": "pass@1"}),
    ("Right against wrong, by f", "AUC", {"valid/auc_f": "AUC of f"}),
    (
        "Discriminator accuracy",
        "share of spans",
        {
            "disc/accuracy_expert": "experts",
            "disc/accuracy_policy": "policy and wrong copies",
            "disc/accuracy": "both",
        },
    ),
    ("Mean f of a span", "f", {"disc/f_expert": "experts", "disc/f_policy": "policy"}),
    ("Discriminator loss", "loss (nats)", {"disc/loss": "loss"}),
    ("Reward of the policy's spans", "reward", {"reward/mean": "mean", "reward/std": "deviation"}),
    ("Policy entropy", "nats a token", {"policy/entropy": "entropy"}),
    (
        "Distance of the policy",
        "KL (nats a token)",
        {"policy/kl_old": "from before the step", "policy/kl_ref": "from the reference"},
    ),
    ("Length of completions", "tokens", {"rollout/length": "mean length"}),
    (
        "How completions end",
        "share",
        {"rollout/truncated": "cut off", "rollout/stopped": "stopped"},
    ),
    (
        "Gradient norms",
        "norm before clipping",
        {"policy/grad_norm": "policy", "disc/grad_norm": "discriminator"},
    ),
    ("Time of a step", "seconds", {"seconds": "seconds"}),
)
_PHASES = {"sft": "warm start", "discriminator": "discriminator", "policy": "policy"}
_FACTS = (
    ("algorithm", ("algorithm", "name")),
    ("task", ("task", "name")),
    ("policy", ("policy", "model")),
    ("granularity", ("algorithm", "granularity")),
    ("reward", ("algorithm", "reward")),
    ("seed", ("run", "seed")),
)


def report_run(
    output: Path,
    *,
    folder: Path | None = None,
    scores: Path | None = None,
    traces: Path | None = None,
    located: Path | None = None,
    evaluation: Path | None = None,
    title: str | None = None,
    max_traces: int = 1000,
) -> list[str]:
    """Write the report of a run, of scored traces, of an evaluation, or of all of them.

    Args:
        output: the HTML file.
        folder: of a run: metrics.jsonl and config.yaml.
        scores: what ``airl-fast score`` wrote.
        traces: what it read: prompts and whatever else is known of each row, line for line.
        located: what ``airl-fast locate`` wrote of the same rows, line for line.
        evaluation: JSON of ``EvalSummary``, or a list of them, there or under the key "report".
        title: of the page; by default the folder's or the file's name.
        max_traces: in the viewer; numbers and histograms are of all.

    Returns:
        What the viewer leaves out, in words; empty if nothing.

    Raises:
        ValueError: nothing to report on, or a file that is not what it should be, with its line.
        FileNotFoundError: a file is missing.
    """
    if folder is None and scores is None and evaluation is None:
        raise ValueError("nothing to report on: give a run's folder, --scores or --eval")
    if scores is None and (traces is not None or located is not None):
        raise ValueError("--traces and --located go with --scores: give the scores too")
    if max_traces < 1:
        raise ValueError(f"expected one trace or more in the viewer, got {max_traces}")
    sections: list[Section] = []
    left_out: list[str] = []
    facts: dict[str, str] = {}
    if folder is not None:
        history = read_history(folder / "metrics.jsonl")
        sections += curve_sections(history)
        facts |= {"steps": f"{len(history):,}"}
    if evaluation is not None:
        sections += _evaluation_sections(evaluation)
    if scores is not None:
        read = read_traces(scores, traces=traces, located=located)
        sections += traces_sections(read, max_traces)
        if len(read) > max_traces:
            left_out.append(f"the viewer has the first {max_traces:,} of {len(read):,} traces")
    if folder is not None and (folder / "config.yaml").exists():
        text = (folder / "config.yaml").read_text("utf-8")
        try:
            facts = _facts(text) | facts
        except ValueError as error:
            raise ValueError(f"{folder / 'config.yaml'}: not readable as YAML: {error}") from None
        sections.append(Section(title="Configuration", pre=text))
    name = (folder or scores or evaluation or output).resolve().name
    write_report(output, title or f"airl_fast: {name}", sections, facts=facts)
    return left_out


def read_history(path: Path) -> list[dict[str, Any]]:
    """Read the metrics of every step of a run, finished or not.

    A last line without its end is still being written, and is left out.

    Raises:
        ValueError: another line that is not the metrics of a step, or no steps.
        FileNotFoundError: no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; give the folder of a run of `airl-fast train`, or none (and "
            "--output) for scored traces and evaluations alone"
        )
    history = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            metrics = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if not isinstance(metrics, dict) or not isinstance(metrics.get("step"), int):
            raise ValueError(
                f"{path}, line {number}: expected an object with the number of a 'step', as a run "
                f"writes it, got {line[:60]!r}"
            )
        history.append(metrics)
    if not history:
        raise ValueError(f"{path}: no steps yet; report on the run when it has made some")
    return history


def curve_sections(history: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Learning curves of a run: the last numbers, known metrics together, the rest one by one."""
    marks = [
        (float(now["step"]), _PHASES.get(now["phase"], str(now["phase"])))
        for before, now in zip([{}, *history[:-1]], history, strict=True)
        if "phase" in now and before.get("phase") != now["phase"]
    ]
    marks = marks if len(marks) > 1 else []
    charts, used = [], {"step", "phase"}
    for title, label, names in _CURVES:
        used |= names.keys()
        series = [s for key, name in names.items() if (s := _series(history, key, name))]
        if series:
            charts.append(_chart(title, label, series, marks))
    rest = sorted({key for metrics in history for key in metrics} - used)
    others = [_chart(key, key, [s], marks) for key in rest if (s := _series(history, key, key))]
    begin = ", ".join(f"{name} from step {x:g}" for x, name in marks)
    text = [f"Dotted lines show where a phase begins: {begin}."] if marks else []
    sections = [Section(title="Learning curves", text=text, items=[_last(history), *charts])]
    if others:
        sections.append(Section(title="Other metrics of the run", items=others))
    return sections


def _chart(
    title: str, label: str, series: Sequence[Series], marks: Sequence[tuple[float, str]]
) -> Chart:
    places = [x for s in series for x in s.x]
    inside = [(x, name) for x, name in marks if min(places) <= x <= max(places)]
    return Chart(title=title, x_label="step", y_label=label, series=series, marks=inside)


def _series(history: Sequence[Mapping[str, Any]], key: str, name: str) -> Series | None:
    """A metric over the steps that have it; a value that is not finite is a gap."""
    points = {m["step"]: m[key] for m in history if _is_number(m.get(key))}
    if not any(math.isfinite(y) for y in points.values()):
        return None
    return Series(name=name, x=list(points), y=[float(y) for y in points.values()])


def _last(history: Sequence[Mapping[str, Any]]) -> Table:
    """Where the main metrics began, went and ended."""
    names = {"valid/pass@1": "pass@1", "valid/auc_f": "AUC of f", "disc/accuracy": "discriminator",
             "reward/mean": "mean reward of a span", "rollout/length": "tokens a completion",
             "policy/entropy": "entropy (nats a token)"}  # fmt: skip
    rows: list[list[Cell]] = []
    for key, name in names.items():
        values = [m[key] for m in history if _is_number(m.get(key)) and math.isfinite(m[key])]
        if values:
            shown = (values[0], min(values), max(values), values[-1])
            rows.append([name, *(f"{value:.4g}" for value in shown)])
    columns = ("metric", "first", "lowest", "highest", "last")
    return Table(title="In numbers", columns=columns, rows=rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _facts(config: str) -> dict[str, str]:
    from airl_fast.config import load_yaml

    values = load_yaml(config)
    found = {}
    for name, (section, key) in _FACTS:
        branch = values.get(section) if isinstance(values, dict) else None
        value = branch.get(key) if isinstance(branch, dict) else None
        if value is not None:
            found[name] = value if isinstance(value, str) else shown(value)
    return found


def _evaluation_sections(path: Path) -> list[Section]:
    """The sections of an evaluation's file."""
    try:
        value = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if isinstance(value, dict) and "report" in value:
        value = value["report"]
    summaries = value if isinstance(value, list) else [value]
    return [EvalSummary.from_json(one, str(path)).section() for one in summaries]
