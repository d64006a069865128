"""GSM8K: grade-school maths with worked solutions (openai/grade-school-math, MIT)."""

import random
import re

from airl_fast.tasks.answers import find_answer, parse_number, wrong_number
from airl_fast.tasks.base import Example, Message, Prompt
from airl_fast.tasks.rows import Row, draw_subsets, load_rows

HUB_NAME = "openai/gsm8k"
INSTRUCTION = (
    "Solve the problem step by step, one step a line. End with a line that holds only "
    "#### and the answer as a number."
)
PLAIN = "Question: {question}\nAnswer:\n"

_MARK = re.compile(r"<<[^<>]*>>")
_REMEDY = 'a GSM8K row is {"question": "...", "answer": "steps\\n#### 72"}'


class GSM8K:
    """GSM8K from the hub or from local JSON lines with the columns question and answer.

    Args:
        path: a file (all sets are drawn from it), a folder with train.jsonl and, where there are
            any, validation.jsonl and test.jsonl, or a hub name; None is ``openai/gsm8k``.
        seed: of the shuffles that the subsets are drawn from.
        demonstrations: number of training traces; None takes all that remain.
        unlabelled: number of further training prompts, their solutions left out.
        validation: number of validation problems; GSM8K has no such split, so they come from
            the training split and are not trained on.
        test: number of test problems.
        chat: prompts as one user message (the question and ``INSTRUCTION``); otherwise as the
            plain text ``PLAIN``.
        calculator_marks: keep ``<<48/2=24>>`` in the solutions.

    Raises:
        ValueError: a file or row that is not as expected, named with its line; data that cannot
            be loaded; or too few rows.
    """

    name = "gsm8k"
    step_boundary = r"\n"

    def __init__(
        self,
        path: str | None = None,
        *,
        seed: int = 0,
        demonstrations: int | None = None,
        unlabelled: int = 0,
        validation: int = 200,
        test: int = 400,
        chat: bool = True,
        calculator_marks: bool = False,
    ) -> None:
        self.chat = chat
        self.calculator_marks = calculator_marks
        splits = {
            split: [self._example(row, f"gsm8k-{split}-{i}") for i, row in enumerate(rows)]
            for split, rows in load_rows(path or HUB_NAME, "main").items()
        }
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

    def _example(self, row: Row, name: str) -> Example:
        solution = row.text("answer", _REMEDY).strip()
        answer = self.extract_answer(solution)
        if answer is None:
            raise ValueError(
                f"{row.where}: 'answer' has no line '#### NUMBER' ({solution[-60:]!r}); {_REMEDY}"
            )
        if not self.calculator_marks:
            solution = _MARK.sub("", solution)
        return Example(
            prompt=self.prompt(row.text("question", _REMEDY).strip()),
            completion=solution,
            answer=answer,
            id=name,
        )

    def prompt(self, question: str) -> Prompt:
        """Put a question as this task puts its own."""
        if self.chat:
            return (Message(role="user", content=f"{question}\n\n{INSTRUCTION}"),)
        return PLAIN.format(question=question)

    @staticmethod
    def extract_answer(completion: str) -> str | None:
        r"""Return the number after ``####``, in ``\boxed{}`` or after ``the answer is``.

        In one canonical form: ``$1,200.00`` gives ``1200``. None where there is no such number.
        """
        found = find_answer(completion)
        return None if found is None else parse_number(found)

    def is_correct(self, completion: str, example: Example) -> bool:
        """Say whether the completion's final number equals the example's."""
        if example.answer is None:
            raise ValueError(f"example {example.id!r} has no answer to compare with")
        found = self.extract_answer(completion)
        return found is not None and found == parse_number(example.answer)

    def corrupt(self, completion: str, rng: random.Random) -> tuple[str, int]:
        """Make one number wrong in one line; return the text and the 0-based line.

        Raises:
            ValueError: the text has no number.
        """
        return wrong_number(completion, self.step_boundary, rng)
