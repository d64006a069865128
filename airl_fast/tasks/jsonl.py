"""Your own traces: JSON lines of prompt, completion and answer, or of messages."""

import logging
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from airl_fast.parsing import shown
from airl_fast.tasks.answers import canonical, find_answer, same_answer, wrong_number
from airl_fast.tasks.base import Example, Message, Prompt
from airl_fast.tasks.drawing import draw_rows
from airl_fast.tasks.line_index import IndexedFile, Streamed, open_indexed
from airl_fast.tasks.rows import Row, iter_rows, local_files, split_of

_log = logging.getLogger(__name__)

STREAMED_BYTES = 64 * 2**20  # files from this size on are not loaded; tests lower it

_REMEDY = (
    'a row is {"prompt": "...", "completion": "...", "answer": "..."} or {"messages": [{"role": '
    '"user", "content": "..."}, {"role": "assistant", "content": "..."}], "answer": "..."}'
)
_BARE = "write null for a prompt without demonstration"
_ROLES = ("system", "user", "assistant")


class JSONLines:
    """Expert traces from a local file or folder of JSON lines.

    A row has ``prompt`` (a text, or a list of messages) and ``completion`` (a text, or null for a
    prompt without demonstration); or ``messages``, whose last one, if the assistant's, is the
    completion. ``answer`` (a text or a number) is needed in validation and test rows only. Other
    columns are not read.

    A file of 64 MiB or more is not loaded: an index beside it (`line_index`; built once, when
    every row is checked) says where each row is, and examples are read when they are asked for. The
    sets are the same, in the same order. A compressed file (.gz) is always loaded whole, since it
    cannot be read from its middle; a large one is said to be (`airl_fast.tasks.jsonl`'s logger).

    Args:
        path: a file (all sets are drawn from it), or a folder with train.jsonl and, where there
            are any, validation.jsonl and test.jsonl.
        seed: of the shuffles that the subsets are drawn from.
        demonstrations: number of training traces; None takes all that remain.
        unlabelled: number of training prompts used without demonstration.
        validation: number of validation prompts.
        test: number of test prompts.

    Raises:
        ValueError: a file or row that is not as expected, named with its line, or too few rows.
    """

    name = "jsonl"
    step_boundary = r"\n"

    def __init__(
        self,
        path: str,
        *,
        seed: int = 0,
        demonstrations: int | None = None,
        unlabelled: int = 0,
        validation: int = 200,
        test: int = 400,
    ) -> None:
        files = local_files(Path(path))
        sources = {split: _Rows(file, split) for split, file in files.items()}
        drawn = draw_rows(
            {split: source.split for split, source in sources.items()},
            seed=seed,
            demonstrations=demonstrations,
            unlabelled=unlabelled,
            validation=validation,
            test=test,
        )
        train = sources["train"]
        self.train = train.examples(drawn.train)
        self.unlabelled = train.examples(drawn.unlabelled, bare=True)
        self.validation = list(sources[drawn.validation[0]].examples(drawn.validation[1]))
        self.test = list(sources[drawn.test[0]].examples(drawn.test[1]))
        for key, (split, rows), examples in (
            ("validation", drawn.validation, self.validation),
            ("test", drawn.test, self.test),
        ):
            for row, example in zip(rows.tolist(), examples, strict=True):
                if example.answer is None:
                    raise ValueError(
                        f"{sources[split].where(row)}: no column 'answer', which the {key} set "
                        f"needs; add it, or set task.{key}=0 to go without"
                    )

    @staticmethod
    def extract_answer(completion: str) -> str | None:
        r"""Return the final answer (``####``, ``<answer>``, ``\boxed{}``, ``the answer is``).

        In a comparable form: numbers without separators and units, words without case.
        """
        found = find_answer(completion)
        return None if found is None else canonical(found)

    def is_correct(self, completion: str, example: Example) -> bool:
        """Say whether the completion's final answer is the example's."""
        if example.answer is None:
            raise ValueError(
                f"example {example.id!r} has no answer to compare with; add the column 'answer'"
            )
        found = find_answer(completion)
        return found is not None and same_answer(found, example.answer)

    def corrupt(self, completion: str, rng: random.Random) -> tuple[str, int]:
        """Make one number wrong in one line; return the text and the 0-based line.

        Raises:
            ValueError: the text has no number.
        """
        return wrong_number(completion, self.step_boundary, rng)


class _Rows:
    """The examples of one file: in memory or, where it is large, read when they are asked for."""

    def __init__(self, file: Path, split: str) -> None:
        self.file, self.name = file, split
        self.indexed: IndexedFile | None = None
        self.loaded: list[Example] = []
        self.places: list[str] = []
        if file.stat().st_size >= STREAMED_BYTES:
            if file.suffix != ".gz":
                self.indexed = open_indexed(file, self._parse)
                self.split = self.indexed.split
                return
            _log.warning(
                "%s is held in memory whole: a compressed file cannot be read from its middle; "
                "unpack it (gunzip -k) to have its rows read from disk as they are needed",
                file,
            )
        for i, row in enumerate(iter_rows(file)):
            self.loaded.append(self._parse(row, i))
            self.places.append(row.where)
        self.split = split_of(self.loaded)

    def _parse(self, row: Row, number: int) -> Example:
        return _example(row, f"jsonl-{self.name}-{number}")

    def examples(self, rows: np.ndarray, *, bare: bool = False) -> Sequence[Example]:
        """These rows, in this order; ``bare`` ones without their completions."""
        if self.indexed is not None:
            return Streamed(self.indexed, rows, bare=bare)
        found = [self.loaded[row] for row in rows.tolist()]
        return [replace(e, completion=None) for e in found] if bare else found

    def where(self, row: int) -> str:
        """A row's place, for messages."""
        if self.indexed is None:
            return self.places[row]
        return f"{self.file}, line {self.indexed.records[row]['line']}"


def _example(row: Row, name: str) -> Example:
    values = row.values
    prompt: Prompt
    completion: str | None
    if "messages" in values:
        both = [key for key in ("prompt", "completion") if key in values]
        if both:
            raise ValueError(f"{row.where}: both 'messages' and {both[0]!r}; keep one. {_REMEDY}")
        turns = _messages(row, "messages")
        completion = turns[-1].content if turns[-1].role == "assistant" else None
        prompt = turns if completion is None else turns[:-1]
        if not prompt:
            raise ValueError(f"{row.where}: 'messages' has no turn before the completion")
    else:
        is_chat = isinstance(values.get("prompt"), list)
        prompt = _messages(row, "prompt") if is_chat else row.text("prompt", _REMEDY)
        if "completion" in values and values["completion"] is None:
            completion = None
        else:
            completion = row.text("completion", f"{_REMEDY}; {_BARE}")
    return Example(prompt=prompt, completion=completion, answer=_answer(row), id=name)


def _answer(row: Row) -> str | None:
    value = row.values.get("answer")
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return repr(value)
    return row.text("answer", "give a text or a number")


def _messages(row: Row, key: str) -> tuple[Message, ...]:
    """Return a column of messages, each checked."""
    turns: Any = row.values[key]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{row.where}: {key!r} is {shown(turns)}, expected a list of messages")
    messages = []
    for i, turn in enumerate(turns):
        where = f"{row.where}, {key}[{i}]"
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: {shown(turn)}, expected an object with role and content")
        inner = Row(values=turn, where=where)
        role = inner.text("role", f"a role is one of {', '.join(_ROLES)}")
        if role not in _ROLES:
            raise ValueError(f"{where}: role {shown(role)}, expected one of {', '.join(_ROLES)}")
        messages.append(Message(role=role, content=inner.text("content", "a turn has a text")))
    return tuple(messages)
