"""Files of scored traces: ``asdict(Scored)`` a line, and what else is known of each trace.

Beside the scores, a line of them or of the traces that were scored may have

    prompt       a text, chat messages or token ids; "problem" is the same
    correct      true or false; "label" may be the same
    label        as in ProcessBench: the 0-based first wrong step, -1 for none
    error_step   the same as a number
    located      the step that a reward takes for it, or null; "step" in the files of ``locate``
    group        what traces of one prompt share; the prompt if there is none
    source       such as "expert", "policy" or "perturbed"
    title, id    names the trace
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from airl_fast.evaluation import auc
from airl_fast.parsing import shown
from airl_fast.report.content import Cell, Chart, Section, Table
from airl_fast.report.summary import histogram
from airl_fast.report.traces import LABELS, TraceSet, TraceView
from airl_fast.scores import Scored, StepScore, TokenScores
from airl_fast.tasks.rows import Row, read_rows


def read_traces(
    scores: Path, *, traces: Path | None = None, located: Path | None = None
) -> list[TraceView]:
    """Read scored traces, with what the files beside them say of each, line for line.

    Raises:
        ValueError: a line that is not what it should be, or files of different rows.
        FileNotFoundError: a file is missing.
    """
    rows = read_rows(scores)
    beside = _beside(rows, scores, traces) if traces is not None else [{}] * len(rows)
    steps: list[dict[str, Any]] = [{}] * len(rows)
    if located is not None:
        steps = [{"located": _step(row)} for row in _beside_rows(rows, scores, located)]
    return [
        _trace(row, {**given, **row.values, **step}, number)
        for number, (row, given, step) in enumerate(zip(rows, beside, steps, strict=True), start=1)
    ]


def parse_scored(row: Row) -> Scored:
    """Read one line of ``airl-fast score``; what it holds beyond a result is left aside.

    Raises:
        ValueError: something is missing or of another type, with the line.
    """
    try:
        v = row.values
        tokens = v["tokens"]
        read = Scored(
            text=v["text"],
            f=float(v["f"]),
            reward=_optional(v["reward"]),
            granularity=v["granularity"],
            steps=tuple(
                StepScore(
                    text=s["text"],
                    start=int(s["start"]),
                    end=int(s["end"]),
                    f=float(s["f"]),
                    reward=_optional(s["reward"]),
                )
                for s in v["steps"]
            ),
            tokens=TokenScores(
                ids=tuple(tokens["ids"]),
                offsets=tuple((int(start), int(end)) for start, end in tokens["offsets"]),
                f=_column(tokens["f"]),
                logp=_column(tokens["logp"]) if tokens["logp"] is not None else None,
                reward=_column(tokens["reward"]) if tokens["reward"] is not None else None,
            ),
        )
        _check_columns(read)
        return read
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)[:300]
        raise ValueError(
            f"{row.where}: not a line of `airl-fast score` ({what}); score the traces first"
        ) from None


def _check_columns(scored: Scored) -> None:
    """Refuse texts that are none, and columns of different lengths."""
    texts = [scored.text, scored.granularity, *(step.text for step in scored.steps)]
    wrong = [text for text in texts if not isinstance(text, str)]
    if wrong:
        raise ValueError(f"expected a text, got {shown(wrong[0])}")
    if any(not 0 <= step.start <= step.end <= len(scored.text) for step in scored.steps):
        raise ValueError("steps that do not lie in the text")
    tokens = scored.tokens
    columns = (tokens.ids, tokens.offsets, tokens.f, tokens.logp, tokens.reward)
    lengths = {len(column) for column in columns if column is not None}
    if len(lengths) > 1:
        raise ValueError(f"columns of {sorted(lengths)} tokens, expected as many values as ids")


def traces_sections(traces: Sequence[TraceView], max_traces: int) -> list[Section]:
    """The rewards of traces in numbers and histograms, and the viewer of the first of them."""
    measures = [m for m in LABELS if all(m in trace.values for trace in traces)]
    groups = _groups(traces)
    charts: list[Chart] = []
    for measure in measures:
        values = {name: [t.values[measure] for t in members] for name, members in groups.items()}
        label = LABELS[measure]
        charts.append(histogram(values, label=f"{label} of a trace", title=f"{label} of traces"))
    shown = traces[:max_traces]
    note = "" if len(shown) == len(traces) else (
        f"The first {len(shown):,} of {len(traces):,} traces; numbers and histograms are of all."
    )  # fmt: skip
    return [
        Section(title="Rewards of traces", items=[_numbers(traces, measures), *charts]),
        Section(title="Traces", items=[TraceSet(title="Trace viewer", traces=shown, note=note)]),
    ]


def _numbers(traces: Sequence[TraceView], measures: Sequence[str]) -> Table:
    rows: list[list[Cell]] = [["traces", f"{len(traces):,}"]]
    labelled = [t for t in traces if t.correct is not None]
    right = [t for t in labelled if t.correct]
    if labelled:
        rows.append(["of them known to be right", f"{len(right):,} of {len(labelled):,}"])
    if 0 < len(right) < len(labelled):
        labels = [bool(t.correct) for t in labelled]
        for m in measures:
            area = auc([t.values[m] for t in labelled], labels)
            rows.append([f"AUC of {LABELS[m]}, right against wrong", area])
    known = [t for t in traces if t.error_step is not None]
    if any(t.located is not None for t in known):
        hits = sum(t.located == t.error_step for t in known)
        chance = sum(1 / len(t.steps) for t in known) / len(known)
        rows.append(["known errors located", f"{hits:,} of {len(known):,}"])
        rows.append(["by a guess among the steps, expected", f"{chance * len(known):.1f}"])
    return Table(title="In numbers", columns=("what", "value"), rows=rows)


def _groups(traces: Sequence[TraceView]) -> dict[str, list[TraceView]]:
    """By source where there are sources, else by correctness where that is known."""
    names = {None: "not labelled", True: "correct", False: "wrong"}
    groups: dict[str, list[TraceView]] = {}
    for trace in traces:
        name = trace.source or names[trace.correct]
        groups.setdefault("all" if name == "not labelled" else name, []).append(trace)
    return groups


def _trace(row: Row, values: Mapping[str, Any], number: int) -> TraceView:
    scored = parse_scored(row)
    prompt = _text(values.get("prompt", values.get("problem", "")))
    title = str(values.get("title", values.get("id", "")))
    try:
        correct, error_step = _truth(values)
        return TraceView.from_scored(
            scored,
            title=title or _first_words(prompt or scored.text, number),
            prompt=prompt,
            correct=correct,
            error_step=error_step,
            located=_index(values, "located"),
            group=str(values.get("group", prompt)),
            source=str(values.get("source", "")),
        )
    except ValueError as error:
        raise ValueError(f"{row.where}: {error}") from None


def _truth(values: Mapping[str, Any]) -> tuple[bool | None, int | None]:
    """Whether the trace is right, and its first wrong step."""
    label, correct = values.get("label"), values.get("correct")
    if correct is None and isinstance(label, bool):
        correct = label
    error = _index(values, "error_step")
    if isinstance(label, int) and not isinstance(label, bool) and "error_step" not in values:
        error = label if label >= 0 else None
        correct = label < 0 if correct is None else correct
    if correct is not None and not isinstance(correct, bool):
        raise ValueError(f"expected 'correct' to be true, false or null, got {shown(correct)}")
    return correct, error


def _index(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"expected {key!r} to be the 0-based index of a step, got {shown(value)}")
    return value


def _beside(rows: Sequence[Row], scores: Path, path: Path) -> list[dict[str, Any]]:
    kept = {"prompt", "problem", "correct", "label", "error_step", "group", "source", "title", "id"}
    found = _beside_rows(rows, scores, path)
    return [{k: v for k, v in row.values.items() if k in kept} for row in found]


def _beside_rows(rows: Sequence[Row], scores: Path, path: Path) -> list[Row]:
    """The rows of another file about the same traces."""
    found = read_rows(path)
    if len(found) != len(rows):
        raise ValueError(
            f"{path}: {len(found):,} rows, and {scores} has {len(rows):,}; give files of the same "
            "traces in the same order"
        )
    for row, other in zip(rows, found, strict=True):
        if row.values.get("id") != other.values.get("id") and {"id"} <= row.values.keys():
            raise ValueError(
                f"{other.where}: 'id' is {shown(other.values.get('id'))}, and {row.where} has "
                f"{shown(row.values['id'])}; give files of the same traces in the same order"
            )
    return found


def _step(row: Row) -> int | None:
    if "step" not in row.values:
        raise ValueError(f"{row.where}: no 'step'; give what `airl-fast locate` wrote")
    return _index(row.values, "step")


def _text(prompt: Any) -> str:
    """A prompt to read: chat messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt):
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
    return json.dumps(prompt, ensure_ascii=False)


def _first_words(text: str, number: int) -> str:
    words = " ".join(text[:400].split())
    return f"{words[:60]}…" if len(words) > 60 else words or f"trace {number}"


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _column(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
