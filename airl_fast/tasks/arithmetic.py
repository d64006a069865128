"""A built-in task: four chained additions and subtractions, with imperfect experts.

    prompt      68+4+2+9-6=
    completion  68+4=72;72+2=74;74+9=83;83-6=77;#77.

The start is 1 to 99, each operand 1 to 9, each result 0 to 99.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from airl_fast.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

OPERANDS = 4
LARGEST = 99
CHARACTERS = "0123456789+-=;#."
PAD, END_OF_TEXT = "<pad>", "<eos>"

_STEP = re.compile(r"(?P<left>\d+)(?P<operand>[+-]\d+)=(?P<result>\d+);")
_TRACE = re.compile(r"(?:\d+[+-]\d+=\d+;)+#\d+\.")
_ANSWER = re.compile(r"[^#]*#(\d+)\.")
FOLDS = 8  # of the problems: one in eight may be in a test set, one in eight in a validation set


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A start value and the signed operands applied to it in turn."""

    start: int  # 1 to 99
    operands: tuple[int, ...]  # each 1 to 9 or -9 to -1

    @property
    def prompt(self) -> str:
        """The problem as text, such as ``68+4+2+9-6=``."""
        return str(self.start) + "".join(f"{operand:+d}" for operand in self.operands) + "="

    @property
    def results(self) -> tuple[int, ...]:
        """The correct result of each step."""
        return tuple(self.start + sum(self.operands[: i + 1]) for i in range(len(self.operands)))

    @property
    def answer(self) -> str:
        """The correct final answer."""
        return str(self.results[-1])

    def trace(self, results: tuple[int, ...] | None = None) -> str:
        """Write the steps with these results (default: the correct ones), each carried on."""
        results = self.results if results is None else results
        values = (self.start, *results)
        steps = (
            f"{values[i]}{operand:+d}={values[i + 1]};" for i, operand in enumerate(self.operands)
        )
        return "".join(steps) + f"#{values[-1]}."

    @cached_property
    def fold(self) -> int:
        """A fixed number from 0 to 7: 0 is kept for test sets, 1 for validation sets.

        It depends on the problem alone, so what one seed trains on, no seed tests on; data made
        elsewhere (a base model's) keeps clear of every test set with ``fold >= 2``.
        """
        return hashlib.sha256(self.prompt.encode()).digest()[0] % FOLDS


def sample_problem(rng: random.Random) -> Problem:
    """Draw a problem; a step that would leave 0 to 99 is drawn again."""
    value = start = rng.randint(1, LARGEST)
    operands: list[int] = []
    while len(operands) < OPERANDS:
        operand = rng.choice((-1, 1)) * rng.randint(1, 9)
        if 0 <= value + operand <= LARGEST:
            operands.append(operand)
            value += operand
    return Problem(start=start, operands=tuple(operands))


def careless_trace(problem: Problem, rng: random.Random, forget: float = 0.6) -> str:
    """Write a trace whose author forgets a carry or borrow with probability ``forget``.

    The values it gets are carried on. A correct step from a wrong value can leave 0 to 99
    (``98+9``); there the carry is always forgotten, which keeps every result in range.
    """
    value, results = problem.start, []
    for operand in problem.operands:
        exact = value + operand
        forgotten = value // 10 * 10 + exact % 10  # the tens digit stays
        slips = forgotten != exact and rng.random() < forget
        value = forgotten if slips or not 0 <= exact <= LARGEST else exact
        results.append(value)
    return problem.trace(tuple(results))


def wrong_digits(value: int) -> list[int]:
    """Return every number of as many digits that differs from ``value`` in exactly one."""
    text, found = str(value), []
    for place, old in enumerate(text):
        for new in "0123456789":
            leading_zero = new == "0" and place == 0 and len(text) > 1
            if new != old and not leading_zero:
                found.append(int(text[:place] + new + text[place + 1 :]))
    return found


def _carry_on(value: int, operands: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the results from ``value`` on, or None when one leaves 0 to 99."""
    results = []
    for operand in operands:
        value += operand
        if not 0 <= value <= LARGEST:
            return None
        results.append(value)
    return tuple(results)


def check_sets(sizes: tuple[int, ...], expert_error: float) -> None:
    """Refuse what a built-in task's sets cannot be drawn with.

    Raises:
        ValueError: a negative size, or a probability outside 0 to 1.
    """
    if not 0 <= expert_error <= 1:
        raise ValueError(f"expert_error is {expert_error}; expected a probability, 0 to 1")
    if min(sizes) < 0:
        raise ValueError(f"the sets have sizes {sizes}; expected 0 or more each")


class Arithmetic:
    """Seeded problems in four disjoint sets; see the module's first lines for the format.

    Args:
        seed: draws the problems and the experts' errors.
        demonstrations: size of ``train``; its completions are imperfect, see ``expert_error``.
        unlabelled: size of ``unlabelled``: prompts without completion.
        validation: size of ``validation``; its completions are correct.
        test: size of ``test``; its completions are correct.
        expert_error: the probability that a demonstration has one wrong digit in a step's
            result, carried through the rest, so that its answer is wrong.

    Raises:
        ValueError: a negative size, or a probability outside 0 to 1.
    """

    name = "arithmetic"
    step_boundary = r";"

    def __init__(
        self,
        seed: int = 0,
        *,
        demonstrations: int = 600,
        unlabelled: int = 3000,
        validation: int = 200,
        test: int = 400,
        expert_error: float = 0.3,
    ) -> None:
        check_sets((demonstrations, unlabelled, validation, test), expert_error)
        self.seed = seed
        trained = self._draw("train", demonstrations + unlabelled, range(2, FOLDS))
        self.train = [
            Example(
                prompt=problem.prompt,
                completion=self._expert(problem, expert_error),
                answer=problem.answer,
                id=f"arithmetic-train-{i}",
            )
            for i, problem in enumerate(trained[:demonstrations])
        ]
        self.unlabelled = [
            Example(prompt=problem.prompt, answer=problem.answer, id=f"arithmetic-unlabelled-{i}")
            for i, problem in enumerate(trained[demonstrations:])
        ]
        self.validation = self._reference("validation", validation, 1)
        self.test = self._reference("test", test, 0)

    def _draw(self, split: str, count: int, folds: range) -> list[Problem]:
        """Draw ``count`` distinct problems of these folds."""
        rng = random.Random(f"arithmetic/{self.seed}/{split}")
        problems: dict[Problem, None] = {}  # keeps the order in which they were drawn
        while len(problems) < count:
            problem = sample_problem(rng)
            if problem.fold in folds:
                problems[problem] = None
        return list(problems)

    def _reference(self, split: str, count: int, fold: int) -> list[Example]:
        return [
            Example(
                prompt=problem.prompt,
                completion=problem.trace(),
                answer=problem.answer,
                id=f"arithmetic-{split}-{i}",
            )
            for i, problem in enumerate(self._draw(split, count, range(fold, fold + 1)))
        ]

    def _expert(self, problem: Problem, error: float) -> str:
        """Write the demonstration; what it is depends on the seed and the problem alone."""
        rng = random.Random(f"arithmetic/{self.seed}/expert/{problem.prompt}")
        trace = problem.trace()
        return self.corrupt(trace, rng)[0] if rng.random() < error else trace

    @staticmethod
    def extract_answer(completion: str) -> str | None:
        """Return the digits between ``#`` and the full stop that ends the text, or None."""
        match = _ANSWER.fullmatch(completion)
        return match[1] if match else None

    def is_correct(self, completion: str, example: Example) -> bool:
        """Say whether the text ends in ``#answer.`` with exactly the example's answer."""
        if example.answer is None:
            raise ValueError(f"example {example.id!r} has no answer to compare with")
        return self.extract_answer(completion) == example.answer

    def corrupt(
        self, completion: str, rng: random.Random, *, carry: bool = True
    ) -> tuple[str, int]:
        """Plant one wrong digit in the result of one step, drawn evenly among the steps.

        Args:
            completion: a trace in the task's format, correct or not.
            rng: draws the step and the digit.
            carry: carry the wrong value through the rest, so that the planted step is the only
                wrong one. Otherwise nothing after the planted result changes, and the following
                step (or the answer) disagrees with it.

        Returns:
            The changed trace and the 0-based index of the planted step.

        Raises:
            ValueError: a text that is not a trace.
        """
        if not _TRACE.fullmatch(completion):
            raise ValueError(
                "corrupt takes a trace such as '68+4=72;72+2=74;#74.', received "
                f"{completion[:80]!r}; perturb free text with airl_fast.negatives"
            )
        steps = list(_STEP.finditer(completion))
        operands = tuple(int(step["operand"]) for step in steps)
        for i in rng.sample(range(len(steps)), len(steps)):
            step, later = steps[i], operands[i + 1 :]
            exact, result = int(step["left"]) + operands[i], int(step["result"])
            wrong = [value for value in wrong_digits(result) if value != exact]
            before = completion[: step.start("result")]
            if not carry:
                return f"{before}{rng.choice(wrong)}{completion[step.end('result') :]}", i
            rests = {
                value: rest for value in wrong if (rest := _carry_on(value, later)) is not None
            }
            if rests:  # otherwise every wrong digit here leads out of 0 to 99 further on
                value = rng.choice(list(rests))
                carried = Problem(start=value, operands=later).trace(rests[value])
                return f"{before}{value};{carried}", i
        raise AssertionError("the last step always takes a wrong digit")


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Make the task's tokenizer, of the characters ``0123456789+-=;#.``."""
    return make_tokenizer(CHARACTERS)


def make_tokenizer(characters: str) -> "PreTrainedTokenizerFast":
    """Make a tokenizer: one token per character, plus padding and end of text.

    Encoding and decoding round-trip exactly; a character that is not among these is an error, not
    an unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((PAD, END_OF_TEXT, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # of prompts, when a model continues a batch of them
    )
