"""MedReason: medical questions with reasoning (UCSC-VLAA/MedReason), and its evaluation sets."""

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

from airl_fast.parsing import shown
from airl_fast.tasks.answers import canonical
from airl_fast.tasks.base import Example
from airl_fast.tasks.choices import LETTERS, MultipleChoice
from airl_fast.tasks.rows import Row, draw_subsets, load_rows, read_rows

HUB_NAME = "UCSC-VLAA/MedReason"
DATASETS = ("medqa", "medmcqa")  # of the column dataset_name: what the paper keeps

_CUT = ". Explanation:"
_OPTION = re.compile(r"^[ \t]*\(?([A-J])[.):][ \t]*(.+?)[ \t]*$", re.MULTILINE)
_TRACE = (
    'a MedReason row is {"dataset_name": "medqa", "question": "...", "options": "A. ...\\nB. ...", '
    '"reasoning": "...", "answer": "... Explanation: ..."}'
)
_EVALUATION = (
    'an evaluation row is {"question": "...", "options": {"A": "...", "B": "..."}, '
    '"answer_idx": "A"}'
)


class MedReason(MultipleChoice):
    """MedReason's reasoning as demonstrations, its evaluation sets as test set.

    Of the traces, those whose ``dataset_name`` is medqa or medmcqa are kept. The answer is the
    option that the column ``answer`` names, up to ". Explanation:"; the demonstration is the
    reasoning, closed by "The answer is (X).".

    Args:
        path: a file of traces, a folder with train.jsonl (validation.jsonl and test.jsonl, where
            there are any, hold evaluation rows or traces), or a hub name; None is
            ``UCSC-VLAA/MedReason``.
        evaluation: a file of an evaluation set, which the test set is drawn from; without one,
            and without test.jsonl, the test set comes from the traces.
        seed: of the shuffles that the subsets are drawn from.
        demonstrations: number of training traces; None takes all that remain.
        unlabelled: number of further training prompts, their traces left out.
        validation: number of validation questions.
        test: number of test questions.
        chat: prompts as one user message; otherwise as the plain text ``choices.PLAIN``.

    Attributes:
        dropped: how many traces were left out, by reason.

    Raises:
        ValueError: a file or row that is not as expected, named with its line; data that cannot
            be loaded; or too few rows.
    """

    name = "medreason"

    def __init__(
        self,
        path: str | None = None,
        *,
        evaluation: str | None = None,
        seed: int = 0,
        demonstrations: int | None = None,
        unlabelled: int = 0,
        validation: int = 200,
        test: int = 400,
        chat: bool = True,
    ) -> None:
        self.chat = chat
        self.dropped: Counter[str] = Counter()
        rows = load_rows(path or HUB_NAME)
        if evaluation is not None:
            if not Path(evaluation).is_file():
                raise ValueError(f"task.evaluation={shown(evaluation)}: no such file")
            rows["test"] = read_rows(Path(evaluation))
        splits = {
            split: [
                example
                for i, row in enumerate(of_split)
                if (example := self._example(row, f"medreason-{split}-{i}")) is not None
            ]
            for split, of_split in rows.items()
        }
        if self.dropped:
            listed = ", ".join(f"{count} {why}" for why, count in self.dropped.items())
            logging.getLogger(__name__).warning("medreason: traces left out: %s", listed)
        subsets = draw_subsets(
            splits,
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

    def _example(self, row: Row, name: str) -> Example | None:
        if "dataset_name" not in row.values:
            return self._evaluation_example(row, name)
        source = row.text("dataset_name", _TRACE)
        if source not in DATASETS:
            self.dropped[f"of {source}"] += 1
            return None
        options = _listed(row)
        answer = row.text("answer", _TRACE).split(_CUT)[0]
        letters = [
            letter
            for letter, option in zip(LETTERS, options, strict=False)
            if canonical(option) == canonical(answer)
        ]
        if len(letters) != 1:
            self.dropped["whose answer is not one of the options"] += 1
            return None
        reasoning = row.text("reasoning", _TRACE).strip()
        return Example(
            prompt=self.prompt(row.text("question", _TRACE).strip(), options),
            completion=f"{reasoning}\nThe answer is ({letters[0]}).",
            answer=letters[0],
            id=name,
        )

    def _evaluation_example(self, row: Row, name: str) -> Example:
        options: Any = row.values.get("options")
        if (
            not isinstance(options, dict)
            or list(options) != list(LETTERS[: len(options)])
            or len(options) < 2
            or not all(isinstance(option, str) and option.strip() for option in options.values())
        ):
            raise ValueError(
                f"{row.where}: 'options' is {shown(options)}, expected texts by letter from A on; "
                f"{_EVALUATION}. {_TRACE}"
            )
        letter = row.text("answer_idx", _EVALUATION)
        if letter not in options:
            raise ValueError(
                f"{row.where}: 'answer_idx' is {shown(letter)}, expected one of "
                f"{', '.join(options)}; {_EVALUATION}"
            )
        question = row.text("question", _EVALUATION).strip()
        return Example(
            prompt=self.prompt(question, [option.strip() for option in options.values()]),
            answer=letter,
            id=name,
        )


def _listed(row: Row) -> list[str]:
    """Return the options of a trace, which are one text of a line each: ``A. ...``."""
    found = _OPTION.findall(row.text("options", _TRACE))
    if len(found) < 2 or [letter for letter, _ in found] != list(LETTERS[: len(found)]):
        raise ValueError(
            f"{row.where}: 'options' is {shown(row.values['options'])}, expected a line each from "
            f"'A. ...' on; {_TRACE}"
        )
    return [option for _, option in found]
