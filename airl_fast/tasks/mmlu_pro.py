"""MMLU-Pro: questions with up to ten options (TIGER-Lab/MMLU-Pro), and models' answers to them."""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from airl_fast.parsing import shown
from airl_fast.tasks.base import Example
from airl_fast.tasks.choices import LETTERS, MultipleChoice, find_choice, own_text
from airl_fast.tasks.rows import (
    Row,
    compressed_or_not,
    draw_subsets,
    hub_rows,
    is_hub_name,
    read_rows,
)

HUB_NAME = "TIGER-Lab/MMLU-Pro"

_QUESTION = (
    'a question is {"question_id": 70, "question": "...", "options": ["...", "..."], "answer": "A"}'
)
_RESPONSE = 'a model\'s answer is {"question_id": 70, "response": "... The answer is (A)."}'


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question; ``answer`` is the letter of the right option."""

    id: int
    category: str
    text: str
    options: tuple[str, ...]
    answer: str


class MMLUPro(MultipleChoice):
    """MMLU-Pro with one model's chains of thought as demonstrations.

    Args:
        path: a folder with questions.jsonl and the models' files, a file of questions, or a hub
            name; None is ``TIGER-Lab/MMLU-Pro``. Files may be compressed (.gz).
        traces: whose answers are the demonstrations: the name of a file in the folder (less its
            ending), or a file. None takes ``cot_content`` of the questions, which the 70
            validation questions of the hub have.
        seed: of the shuffle that the subsets are drawn from.
        demonstrations: number of training traces; None takes all that remain.
        unlabelled: number of further training prompts.
        validation: number of validation questions.
        test: number of test questions.
        chat: prompts as one user message; otherwise as the plain text ``choices.PLAIN``.
        correct_only: demonstrations with a wrong answer are left out.

    A demonstration whose answer cannot be read is left out; its question can still be in the other
    sets.

    Attributes:
        dropped: how many demonstrations were left out, by reason.

    Raises:
        ValueError: a file or row that is not as expected, named with its line; data that cannot
            be loaded; or too few rows.
    """

    name = "mmlu_pro"

    def __init__(
        self,
        path: str | None = None,
        *,
        traces: str | None = None,
        seed: int = 0,
        demonstrations: int | None = None,
        unlabelled: int = 0,
        validation: int = 200,
        test: int = 400,
        chat: bool = True,
        correct_only: bool = False,
    ) -> None:
        self.chat = chat
        self.correct_only = correct_only
        self.dropped: Counter[str] = Counter()
        rows = [row for split in _load(path or HUB_NAME).values() for row in split]
        questions = [(parse_question(row), row) for row in rows]
        responses = self._responses(path, traces, questions)
        examples = [
            self._example(question, responses.get(question.id)) for question, _ in questions
        ]
        if self.dropped:
            listed = ", ".join(f"{count} {why}" for why, count in self.dropped.items())
            logging.getLogger(__name__).warning("mmlu_pro: demonstrations left out: %s", listed)
        shown = [example for example in examples if example.completion is not None or unlabelled]
        subsets = draw_subsets(
            {"train": shown, "validation": examples, "test": examples},
            seed=seed,
            demonstrations=demonstrations,
            unlabelled=unlabelled,
            validation=validation,
            test=test,
        )
        self.train = subsets.train
        self.unlabelled = subsets.unlabelled
        self.validation = subsets.validation
        self.test = subsets.test

    def _responses(
        self, path: str | None, traces: str | None, questions: list[tuple[Question, Row]]
    ) -> dict[int, str]:
        if traces is not None:
            file = _traces_file(path, traces)
            return dict(read_responses(file))
        found = {}
        for question, row in questions:
            text = row.values.get("cot_content")
            if isinstance(text, str) and text.strip():
                found[question.id] = text.strip().removeprefix("A: Let's think step by step.")
        if not found:
            raise ValueError(
                f"task.path={shown(path or HUB_NAME)} has questions and no chain of thought "
                "(cot_content): set task.traces to a file of a model's answers, or to the name of "
                "one in the folder, such as task.traces=llama-3.1-70b-instruct"
            )
        return found

    def _example(self, question: Question, response: str | None) -> Example:
        completion = own_text(response) if response is not None else None
        if completion is not None:
            found = find_choice(completion, len(question.options))
            if found is None:
                self.dropped["without a readable answer"] += 1
                completion = None
            elif self.correct_only and found != question.answer:
                self.dropped["with a wrong answer"] += 1
                completion = None
        return Example(
            prompt=self.prompt(question.text, question.options),
            completion=completion,
            answer=question.answer,
            id=f"mmlu_pro-{question.id}",
        )


def parse_question(row: Row) -> Question:
    """Read one question.

    Raises:
        ValueError: a column is missing or malformed, naming the row.
    """
    values = row.values
    number, options = values.get("question_id"), values.get("options")
    if not isinstance(number, int) or isinstance(number, bool):
        raise ValueError(
            f"{row.where}: 'question_id' is {shown(number)}, expected a number; {_QUESTION}"
        )
    if (
        not isinstance(options, list)
        or not 2 <= len(options) <= len(LETTERS)
        or not all(isinstance(option, str) and option.strip() for option in options)
    ):
        raise ValueError(
            f"{row.where}: 'options' is {shown(options)}, expected 2 to {len(LETTERS)} texts; "
            f"{_QUESTION}"
        )
    answer = row.text("answer", _QUESTION).strip()
    if answer not in list(LETTERS[: len(options)]):
        raise ValueError(
            f"{row.where}: 'answer' is {shown(answer)}, expected a letter from A to "
            f"{LETTERS[len(options) - 1]}; {_QUESTION}"
        )
    category = values.get("category")
    return Question(
        id=number,
        category=category if isinstance(category, str) else "",
        text=row.text("question", _QUESTION).strip(),
        options=tuple(option.strip() for option in options),
        answer=answer,
    )


def read_responses(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the question's number and the response of every row of a model's answers.

    Raises:
        ValueError: a malformed row, or a question that was answered before, naming the row.
    """
    seen: set[int] = set()
    for row in read_rows(file):
        number = row.values.get("question_id")
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(
                f"{row.where}: 'question_id' is {shown(number)}, expected a number; {_RESPONSE}"
            )
        if number in seen:
            raise ValueError(f"{row.where}: question {number} a second time; keep one answer")
        seen.add(number)
        yield number, row.text("response", _RESPONSE)


def _load(path: str) -> dict[str, list[Row]]:
    local = Path(path)
    if not local.exists() and is_hub_name(path):
        return hub_rows(path)
    file = compressed_or_not(local / "questions.jsonl") if local.is_dir() else local
    if not file.is_file():
        raise ValueError(
            f"task.path={path!r}: expected questions.jsonl (or questions.jsonl.gz) in the folder, "
            "or a file of questions"
        )
    return {"questions": read_rows(file)}


def _traces_file(path: str | None, traces: str) -> Path:
    if Path(traces).is_file():
        return Path(traces)
    folder = Path(path or ".")
    file = compressed_or_not(folder / f"{traces}.jsonl")
    if not file.is_file():
        raise ValueError(
            f"task.traces={shown(traces)}: no such file, and no {traces}.jsonl (or .gz) in "
            f"{str(folder)!r}; name a file of a model's answers"
        )
    return file
