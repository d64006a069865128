"""Score, rerank and locate on files of JSON lines: one line out for every row, in order.

Every row is checked before the models are loaded, and encoded before the first is scored; what is
wrong is named with its line. An output file is written whole or not at all.
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
from airl_fast.scores import By, Scored, lowest_step, rank
from airl_fast.tasks.rows import Row, read_rows

if TYPE_CHECKING:
    from airl_fast.scorer import RewardScorer

_CHUNK = 64  # completions scored between two lines of output and of progress
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
    rows = _rows(source)
    inputs = [[(_value(row, "prompt"), _value(row, "completion"))] for row in rows]
    results = _scored(load, rows, inputs, end_of_text)
    _write(target, ({**_kept(row), **asdict(one[0])} for row, one in results), len(rows))


def rerank_file(
    load: Load, source: Path, target: Path | None, *, end_of_text: bool = True, by: By = "f"
) -> None:
    """Write the order of the ``completions`` of every row's ``prompt``; as ``score_file``.

    Raises:
        ValueError: as ``score_file``; or ``by="reward"`` without a policy.
    """
    rows = _rows(source)
    inputs = []
    for row in rows:
        completions = _value(row, "completions")
        if not isinstance(completions, list) or not completions:
            raise ValueError(
                f"{row.where}: 'completions' is {completions!r}, expected a list of one or more"
            )
        inputs.append([(_value(row, "prompt"), completion) for completion in completions])

    def loaded() -> RewardScorer:
        scorer = load()
        scorer.check_by(by)
        return scorer

    results = _scored(loaded, rows, inputs, end_of_text)
    ranked = ((row, rank(found, by)) for row, found in results)
    lines = (
        {
            **_kept(row),
            "by": by,
            "order": [r.index for r in best],
            "scores": [r.score for r in best],
        }
        for row, best in ranked
    )
    _write(target, lines, len(rows))


def locate_file(load: Load, source: Path, target: Path | None, *, end_of_text: bool = True) -> None:
    """Write the ``Location`` of every row's weakest step; as ``score_file``.

    A row has ``prompt`` and ``completion``, or ``problem`` and ``steps`` as in ProcessBench.

    Raises:
        ValueError: as ``score_file``.
    """
    rows = _rows(source)
    inputs = [[_located(row)] for row in rows]
    found = ((row, lowest_step(one[0])) for row, one in _scored(load, rows, inputs, end_of_text))
    lines = (
        {
            **_kept(row),
            "step": location.step,
            "text": location.text,
            "start": location.start,
            "end": location.end,
            "scores": location.scores,
            "margin": location.margin,
        }
        for row, location in found
    )
    _write(target, lines, len(rows))


def _rows(source: Path) -> list[Row]:
    if not source.exists() or source.is_dir():
        raise ValueError(f"{source}: no such file; give a file of JSON lines")
    return read_rows(source)


def _value(row: Row, key: str) -> Any:
    if key not in row.values:
        found = ", ".join(map(repr, row.values)) or "nothing"
        raise ValueError(f"{row.where}: no column {key!r} among {found}; add it")
    return row.values[key]


def _located(row: Row) -> tuple[Any, Any]:
    if "steps" not in row.values and "problem" not in row.values:
        return _value(row, "prompt"), _value(row, "completion")
    steps = _value(row, "steps")
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) for s in steps):
        raise ValueError(f"{row.where}: 'steps' is {steps!r}, expected a list of texts")
    return _value(row, "problem"), steps


def _kept(row: Row) -> dict[str, Any]:
    """What of a row is passed on to its result."""
    return {key: row.values[key] for key in ("id", "label") if key in row.values}


def _scored(
    load: Load,
    rows: Sequence[Row],
    inputs: Sequence[Sequence[tuple[Any, Any]]],
    end_of_text: bool,
) -> Iterator[tuple[Row, list[Scored]]]:
    """Yield every row with its completions scored."""
    scorer = load()
    groups: list[list[EncodedPair]] = []
    for row, pairs in zip(rows, inputs, strict=True):
        try:
            groups.append([scorer.encode(*pair, end_of_text=end_of_text) for pair in pairs])
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
    first = 0
    while first < len(rows):
        last, size = first + 1, len(groups[first])
        while last < len(rows) and size + len(groups[last]) <= _CHUNK:
            size += len(groups[last])
            last += 1
        found = iter(scorer.score_encoded([pair for group in groups[first:last] for pair in group]))
        for i in range(first, last):
            yield rows[i], [next(found) for _ in groups[i]]
        first = last


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
