"""Traces with known faults, from the files that others publish: ProcessBench, PRM800K, JSON lines.

Rows are read as a stream; a malformed one raises and is named. What a format's own rules leave out
(a PRM800K row that was never labelled to its end) is counted by reason, never silent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from airl_fast.parsing import parse_json, shown, shown_names
from airl_fast.tasks.rows import Row, RowFile

Format = Literal["jsonl", "processbench", "prm800k"]
FORMATS: tuple[Format, ...] = get_args(Format)

_PROCESSBENCH = (
    'a ProcessBench row is {"id": "gsm8k-0", "generator": "...", "problem": "...", "steps": '
    '["...", "..."], "final_answer_correct": true, "label": -1}'
)
_PRM800K = (
    'a PRM800K row is {"question": {"problem": "..."}, "label": {"steps": [{"completions": '
    '[{"text": "...", "rating": 1}], "human_completion": null, "chosen_completion": 0}], '
    '"finish_reason": "solution"}}'
)
_JSONL = (
    'a row is {"prompt": ..., "completions": ["...", "..."], "correct": [true, false]} or '
    '{"prompt": ..., "steps": ["...", "..."], "label": -1}'
)


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Completions of one prompt, each known to be right or wrong.

    Attributes:
        prompt: as ``RewardScorer.score`` takes it; so are the completions.
        completions: one or more.
        correct: one flag each.
        answers: the final answer of each in a form that can be compared, None where there is
            none; None: they were not given.
        where: the row, for messages.
        id: the row's, or the empty text.
    """

    prompt: Any
    completions: tuple[Any, ...]
    correct: tuple[bool, ...]
    answers: tuple[str | None, ...] | None
    where: str
    id: str = ""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """One trace whose first wrong step is known.

    Attributes:
        prompt: as ``RewardScorer.score`` takes it.
        steps: one or more texts.
        label: 0-based index of the first wrong step, -1 where all are right.
        where: the row, for messages.
        id: the row's, or the empty text.
    """

    prompt: Any
    steps: tuple[str, ...]
    label: int
    where: str
    id: str = ""


class Reading:
    """The items of a file, read anew each time they are iterated over, and never held.

    Args:
        path: JSON lines, compressed (.gz) or not; for ProcessBench a JSON array (.json) too,
            which is read whole.
        format: "jsonl", "processbench" or "prm800k".

    Attributes:
        rows: how many rows were read so far.
        dropped: how many of them gave no item, by reason.

    Raises:
        ValueError: no such file or format; while iterating, a malformed row, with its line, or a
            file that has changed since it was given.
    """

    def __init__(self, path: Path, format: Format = "jsonl") -> None:
        if format not in FORMATS:
            raise ValueError(f"expected a format of {', '.join(FORMATS)}, received {format!r}")
        if not path.is_file():
            raise ValueError(f"{path}: no such file; give a file of JSON lines")
        self.path = path
        self.format = format
        self._lines = RowFile(path)
        self.rows = 0
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Candidates | Steps]:
        self.rows = 0
        self.dropped.clear()
        parse = {"jsonl": _plain, "processbench": _processbench, "prm800k": _prm800k}[self.format]
        for row in _array(self.path) if self.path.suffix == ".json" else self._lines:
            self.rows += 1
            item = parse(row)
            if isinstance(item, str):
                self.dropped[item] += 1
            else:
                yield item


def _array(path: Path) -> Iterator[Row]:
    try:
        values = parse_json(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected an array of objects") from None
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: expected a JSON array of one object or more")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, row {i}: {type(value).__name__}, expected an object")
        yield Row(values=value, where=f"{path}, row {i}")


def _processbench(row: Row) -> Steps:
    steps = _texts(row, "steps", _PROCESSBENCH)
    label = _label(row, len(steps), _PROCESSBENCH)
    if not isinstance(row.values.get("final_answer_correct"), bool):
        raise ValueError(
            f"{row.where}: 'final_answer_correct' is "
            f"{shown(row.values.get('final_answer_correct'))}, expected true or false; "
            f"{_PROCESSBENCH}"
        )
    return Steps(
        prompt=row.text("problem", _PROCESSBENCH),
        steps=steps,
        label=label,
        where=row.where,
        id=row.text("id", _PROCESSBENCH),
    )


def _prm800k(row: Row) -> Steps | str:
    """Follow the labellers' path: the chosen completion of every step, or the human's.

    The first error is the first chosen completion rated -1 (0, neutral, is none). Where labelling
    stopped because every completion of a step was bad, none is chosen: the first of them rated -1
    ends the trace.
    """
    question, label = row.values.get("question"), row.values.get("label")
    if not isinstance(question, dict) or not isinstance(label, dict):
        raise ValueError(f"{row.where}: expected objects 'question' and 'label'; {_PRM800K}")
    problem = Row(values=question, where=row.where).text("problem", _PRM800K)
    reason, listed = label.get("finish_reason"), label.get("steps")
    if reason not in ("solution", "found_error", "give_up", "bad_problem"):
        raise ValueError(
            f"{row.where}: 'finish_reason' is {shown(reason)}, expected solution, found_error, "
            f"give_up or bad_problem; {_PRM800K}"
        )
    if not isinstance(listed, list):
        raise ValueError(f"{row.where}: 'steps' is {shown(listed)}, expected a list; {_PRM800K}")
    if reason in ("give_up", "bad_problem"):
        return f"that ended in {reason}"
    texts = []
    for i, step in enumerate(listed):
        text, rating = _chosen(step, f"{row.where}, label.steps[{i}]")
        if text is None:
            return "without a labelled step"
        texts.append(text)
        if rating == -1:
            return Steps(prompt=problem, steps=tuple(texts), label=i, where=row.where)
        if rating is None:
            return "with a step that nobody rated"
    if reason == "found_error":
        return "that ended in found_error without a step rated -1"
    if not texts:
        return "without a labelled step"
    return Steps(prompt=problem, steps=tuple(texts), label=-1, where=row.where)


def _chosen(step: Any, where: str) -> tuple[str | None, int | None]:
    """Return the text of the step that was gone on from, and its rating (a human's own: 1)."""
    if not isinstance(step, dict):
        raise ValueError(f"{where}: {shown(step)}, expected an object; {_PRM800K}")
    human, chosen = step.get("human_completion"), step.get("chosen_completion")
    completions = step.get("completions") or []
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise ValueError(f"{where}: 'completions' is no list of objects; {_PRM800K}")
    if chosen is None and human is not None:
        text = human.get("text") if isinstance(human, dict) else human
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: 'human_completion' has no text; {_PRM800K}")
        return text, 1
    if chosen is None:
        wrong = [c for c in completions if c.get("rating") == -1]
        if not wrong:
            return None, None
        found = wrong[0]
    elif isinstance(chosen, bool) or not isinstance(chosen, int):
        raise ValueError(
            f"{where}: 'chosen_completion' is {shown(chosen)}, expected a number or null"
        )
    elif not 0 <= chosen < len(completions):
        raise ValueError(
            f"{where}: 'chosen_completion' is {chosen} among {len(completions)} completions; "
            f"{_PRM800K}"
        )
    else:
        found = completions[chosen]
    rating = found.get("rating")
    if isinstance(rating, bool) or rating not in (-1, 0, 1, None):
        raise ValueError(
            f"{where}: 'rating' is {shown(rating)}, expected -1, 0, 1 or null; {_PRM800K}"
        )
    return Row(values=found, where=where).text("text", _PRM800K), rating


def _plain(row: Row) -> Candidates | Steps:
    values = row.values
    if "steps" in values and "completions" in values:
        raise ValueError(f"{row.where}: both 'steps' and 'completions'; keep one. {_JSONL}")
    if "prompt" not in values:
        raise ValueError(f"{row.where}: no column 'prompt' among {shown_names(values)}; {_JSONL}")
    name = values.get("id", "")
    if "steps" in values:
        steps = _texts(row, "steps", _JSONL)
        return Steps(
            prompt=values["prompt"],
            steps=steps,
            label=_label(row, len(steps), _JSONL),
            where=row.where,
            id=str(name),
        )
    completions = values.get("completions")
    if not isinstance(completions, list) or not completions:
        raise ValueError(
            f"{row.where}: 'completions' is {shown(completions)}, expected a list of one or more; "
            f"{_JSONL}"
        )
    correct = _column(row, "correct", len(completions))
    if not all(isinstance(flag, bool) for flag in correct):
        raise ValueError(
            f"{row.where}: 'correct' is {shown(correct)}, expected true and false; {_JSONL}"
        )
    answers = _column(row, "answers", len(completions)) if "answers" in values else None
    if answers is not None and not all(a is None or isinstance(a, str) for a in answers):
        raise ValueError(
            f"{row.where}: 'answers' is {shown(answers)}, expected texts or null; {_JSONL}"
        )
    return Candidates(
        prompt=values["prompt"],
        completions=tuple(completions),
        correct=tuple(correct),
        answers=None if answers is None else tuple(answers),
        where=row.where,
        id=str(name),
    )


def _column(row: Row, key: str, length: int) -> list[Any]:
    found = row.values.get(key)
    if not isinstance(found, list) or len(found) != length:
        raise ValueError(
            f"{row.where}: {key!r} is {shown(found)}, expected a list of {length}, one for each "
            f"completion; {_JSONL}"
        )
    return found


def _texts(row: Row, key: str, remedy: str) -> tuple[str, ...]:
    found = row.values.get(key)
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(text, str) and text.strip() for text in found)
    ):
        raise ValueError(
            f"{row.where}: {key!r} is {shown(found)}, expected a list of one text or more; {remedy}"
        )
    return tuple(found)


def _label(row: Row, steps: int, remedy: str) -> int:
    label = row.values.get("label")
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < steps:
        raise ValueError(
            f"{row.where}: 'label' is {shown(label)}, expected -1 or the 0-based index of one of "
            f"the {steps} steps; {remedy}"
        )
    return label
