"""Score, rerank, locate and calibrate on files of JSON lines; but for the last, a line out a row.

Every row is checked before the models are loaded, and encoded before the first is scored; what is
wrong is named with its line. The file is read once for each of these, and no more of it is held
than what is scored at once. An output file is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from airl_fast.encoding import EncodedPair
from airl_fast.parsing import shown, shown_names
from airl_fast.ranking import AnswerReader, Method, check_method, rank
from airl_fast.scores import By, Location, Scored, locate_step
from airl_fast.tasks.rows import Row, RowFile

if TYPE_CHECKING:
    from airl_fast.calibration import Calibration
    from airl_fast.scorer import RewardScorer

_CHUNK = 64  # completions scored between two lines of output and of progress
Pairs = list[tuple[Any, Any]]  # prompt and completion
Load = Callable[[], "RewardScorer"]


def score_file(load: Load, source: Path, target: Path | None, *, end_of_text: bool = True) -> None:
    """Write ``Scored`` of every row of ``prompt`` and ``completion``.

    Args:
        load: makes the scorer, once the rows are known to be well formed.
        source: JSON lines.
        target: where to write; None for standard output.
        end_of_text: as ``RewardScorer.score``.

    Raises:
        ValueError: a row that is malformed or cannot be scored, with its line.
    """
    rows = _Rows(source, lambda row: [(_value(row, "prompt"), _value(row, "completion"))])
    results = _scored(load, rows, end_of_text)
    _write(target, ({**_kept(row), **asdict(one[0])} for row, one in results), len(rows))


def rerank_file(
    load: Load,
    source: Path,
    target: Path | None,
    *,
    end_of_text: bool = True,
    by: By = "f",
    method: Method = "best",
    temperature: float = 1.0,
) -> None:
    """Write the order of the ``completions`` of every row's ``prompt``; as ``score_file``.

    A row may have ``answers``, one a completion; otherwise the task's reader finds them.

    Raises:
        ValueError: as ``score_file`` and ``RewardScorer.rerank``.
    """
    check_method(method, temperature)
    given: set[bool] = set()  # whether a row has no answers, of every row

    def pairs(row: Row) -> Pairs:
        given.add(_answers(row) is None)
        return [(_value(row, "prompt"), one) for one in _completions(row)]

    rows = _Rows(source, pairs)

    def loaded() -> RewardScorer:
        scorer = load()
        scorer.check_by(by)
        if True in given:
            readers.append(scorer.answer_reader(method))
        return scorer

    readers: list[AnswerReader | None] = []
    lines = (
        _ranked(row, found, _answers(row), readers, by=by, method=method, temperature=temperature)
        for row, found in _scored(loaded, rows, end_of_text)
    )
    _write(target, lines, len(rows))


def _ranked(
    row: Row,
    found: Sequence[Scored],
    answers: Sequence[str | None] | None,
    readers: Sequence[AnswerReader | None],
    *,
    by: By,
    method: Method,
    temperature: float,
) -> dict[str, Any]:
    if answers is None and readers[0] is not None:
        answers = [readers[0](one.text) for one in found]
    ranking = rank(found, by, method=method, answers=answers, temperature=temperature)
    return {
        **_kept(row),
        "method": method,
        "by": by,
        "order": ranking.order,
        "scores": [one.score for one in ranking],
        "answer": ranking.answer,
        "weight": ranking.weight,
        "votes": [asdict(vote) for vote in ranking.votes],
    }


def locate_file(load: Load, source: Path, target: Path | None, *, end_of_text: bool = True) -> None:
    """Write the ``Location`` of every row's deviating step; as ``score_file``.

    A row has ``prompt`` and ``completion``, or ``problem`` and ``steps`` as in ProcessBench.

    Raises:
        ValueError: as ``score_file``.
    """
    rows = _Rows(source, lambda row: [traced(row)])
    scorers: list[RewardScorer] = []

    def loaded() -> RewardScorer:
        scorers.append(load())
        return scorers[0]

    lines = (
        _located(row, locate_step(one[0], scorers[0].calibration))
        for row, one in _scored(loaded, rows, end_of_text)
    )
    _write(target, lines, len(rows))


def _located(row: Row, location: Location) -> dict[str, Any]:
    names = (
        "step", "text", "start", "end", "confidence", "lowest", "margin", "scores", "values",
        "threshold",
    )  # fmt: skip
    return {**_kept(row), **{name: getattr(location, name) for name in names}}


def calibrate_file(
    load: Load,
    folder: Path,
    source: Path,
    *,
    end_of_text: bool = True,
    folds: int = 5,
    seed: int = 0,
) -> Calibration:
    """Fit ``locate`` to labelled rows, and write the result into the reward's folder.

    A row is one of ``locate_file`` with ``label``: the 0-based first wrong step, -1 for none.

    Args:
        load: as ``score_file``.
        folder: of a run, or of a reward.
        source: JSON lines.
        end_of_text: as ``RewardScorer.score``; later completions have to be scored alike.
        folds: of the cross-validation.
        seed: of the folds.

    Raises:
        ValueError: as ``score_file`` and ``calibrating.calibrate``.
    """
    from airl_fast.calibrating import LabelledSteps, calibrate
    from airl_fast.reward_folder import CALIBRATION, reward_folder, weights_digest

    reward = reward_folder(folder)

    def pairs(row: Row) -> Pairs:
        _label(row)
        return [traced(row)]

    rows = _Rows(source, pairs)
    traces = []
    results = _scored(load, rows, end_of_text)
    for row, (one,) in _followed(results, len(rows), shown=True):
        label = _label(row)
        if label >= len(one.steps):
            raise ValueError(
                f"{row.where}: 'label' is {label}, expected -1 or one of the {len(one.steps)} "
                "steps, counted from 0"
            )
        traces.append(
            LabelledSteps(
                f=tuple(step.f for step in one.steps),
                num_tokens=tuple(step.num_tokens for step in one.steps),
                label=label,
            )
        )
    made = calibrate(traces, folds=folds, seed=seed, weights=weights_digest(reward))
    made.save(reward / CALIBRATION)
    return made


def _label(row: Row) -> int:
    label = _value(row, "label")
    if not isinstance(label, int) or isinstance(label, bool) or label < -1:
        raise ValueError(
            f"{row.where}: 'label' is {shown(label)}, expected the 0-based first wrong step, or -1"
        )
    return label


def _completions(row: Row) -> list[Any]:
    completions = _value(row, "completions")
    if not isinstance(completions, list) or not completions:
        raise ValueError(
            f"{row.where}: 'completions' is {shown(completions)}, expected a list of one or more"
        )
    return completions


def _answers(row: Row) -> list[str | None] | None:
    answers = row.values.get("answers")
    if answers is None:
        return None
    size = len(_completions(row))
    texts = isinstance(answers, list) and all(a is None or isinstance(a, str) for a in answers)
    if not texts or len(answers) != size:
        raise ValueError(
            f"{row.where}: 'answers' is {shown(answers)}, expected {size} texts (or null), one "
            "for each completion"
        )
    return list(answers)


class _Rows:
    """The rows of a file with their completions to score, all checked; read whenever iterated over.

    Raises:
        ValueError: no file, or a malformed row.
    """

    def __init__(self, source: Path, pairs: Callable[[Row], Pairs]) -> None:
        if not source.exists() or source.is_dir():
            raise ValueError(f"{source}: no such file; give a file of JSON lines")
        self._file, self._pairs = RowFile(source), pairs
        self._count = sum(1 for _ in self)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Row, Pairs]]:
        for row in self._file:
            yield row, self._pairs(row)


def _value(row: Row, key: str) -> Any:
    if key not in row.values:
        found = shown_names(row.values)
        raise ValueError(f"{row.where}: no column {key!r} among {found}; add it")
    return row.values[key]


def traced(row: Row) -> tuple[Any, Any]:
    """Prompt and completion of a row, in either of the forms of ``locate_file``."""
    if "steps" not in row.values and "problem" not in row.values:
        return _value(row, "prompt"), _value(row, "completion")
    steps = _value(row, "steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise ValueError(f"{row.where}: 'steps' is {shown(steps)}, expected a list of texts")
    return _value(row, "problem"), steps


def _kept(row: Row) -> dict[str, Any]:
    """What of a row is passed on to its result."""
    return {key: row.values[key] for key in ("id", "label") if key in row.values}


def _scored(load: Load, rows: _Rows, end_of_text: bool) -> Iterator[tuple[Row, list[Scored]]]:
    """Yield every row with its completions scored."""
    scorer = load()
    for _ in _encoded(scorer, rows, end_of_text):
        pass  # the last row is known to be sound before the first is scored
    chunk: list[tuple[Row, list[EncodedPair]]] = []
    size = 0
    for row, pairs in _encoded(scorer, rows, end_of_text):
        if chunk and size + len(pairs) > _CHUNK:
            yield from _scored_chunk(scorer, chunk)
            chunk, size = [], 0
        chunk.append((row, pairs))
        size += len(pairs)
    yield from _scored_chunk(scorer, chunk)


def _encoded(
    scorer: RewardScorer, rows: _Rows, end_of_text: bool
) -> Iterator[tuple[Row, list[EncodedPair]]]:
    for row, pairs in rows:
        try:
            encoded = [scorer.encode(*pair, end_of_text=end_of_text) for pair in pairs]
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        yield row, encoded


def _scored_chunk(
    scorer: RewardScorer, chunk: Sequence[tuple[Row, list[EncodedPair]]]
) -> Iterator[tuple[Row, list[Scored]]]:
    found = iter(scorer.score_encoded([pair for _, pairs in chunk for pair in pairs]))
    for row, pairs in chunk:
        yield row, [next(found) for _ in pairs]


def _write(target: Path | None, lines: Iterable[dict[str, Any]], total: int) -> None:
    with _opened(target) as file:
        for line in _followed(lines, total, shown=target is not None):
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            if target is None:
                file.flush()


def _followed(lines: Iterable[Any], total: int, shown: bool) -> Iterator[Any]:
    """Show progress on standard error; results on standard output are progress enough."""
    if not shown:
        yield from lines
        return
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(lines, description="scoring", total=total, console=console)
        return
    for done, line in enumerate(lines, start=1):
        yield line
        if done == total or done % (16 * _CHUNK) == 0:
            console.print(f"{done} of {total} lines", highlight=False)


@contextmanager
def _opened(target: Path | None) -> Iterator[TextIO]:
    """Open a file under another name, renamed when the block ends well; or standard output."""
    if target is None:
        yield sys.stdout
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
