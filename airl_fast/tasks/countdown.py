"""A built-in task: reach a target from three numbers, each used at most once.

    prompt      3,17,4>63=
    completion  17+4=21;3*21=63;#63.

Numbers are 1 to 20, targets 10 to 99, results 0 to 99; a step takes two of what is there (numbers
and earlier results) and leaves its result; division is exact. Most problems have several solutions.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from airl_fast.tasks.arithmetic import (
    CHARACTERS,
    FOLDS,
    check_sets,
    make_tokenizer,
    wrong_digits,
)
from airl_fast.tasks.base import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUMBERS = 3
LARGEST_NUMBER, SMALLEST_TARGET, LARGEST = 20, 10, 99

_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+);")
_TRACE = re.compile(r"((?:\d+[-+*/]\d+=\d+;)+)#(\d+)\.")
_PROMPT = re.compile(r"(\d+(?:,\d+)*)>(\d+)=")


@dataclass(frozen=True, kw_only=True)
class Step:
    """``left operation right = result``; the result need not be right."""

    left: int
    operation: str  # + - * /
    right: int
    result: int

    def __str__(self) -> str:
        """Write it as in a trace."""
        return f"{self.left}{self.operation}{self.right}={self.result};"

    @property
    def exact(self) -> int | None:
        """What the left side gives, or None: a fraction, or outside 0 to 99."""
        return calculate(self.left, self.operation, self.right)


Solution = tuple[Step, ...]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Three numbers and the target."""

    numbers: tuple[int, ...]  # each 1 to 20, in the order of the prompt
    target: int  # 10 to 99

    @property
    def prompt(self) -> str:
        """The problem as text, such as ``3,17,4>63=``."""
        return f"{','.join(map(str, self.numbers))}>{self.target}="

    @cached_property
    def fold(self) -> int:
        """A fixed number from 0 to 7, as ``arithmetic.Problem.fold``.

        It is that of the numbers in any order, so that no problem is in two sets in two orders.
        """
        key = f"{sorted(self.numbers)}>{self.target}"
        return hashlib.sha256(key.encode()).digest()[0] % FOLDS


def calculate(left: int, operation: str, right: int) -> int | None:
    """The result of a step, or None where it is a fraction or outside 0 to 99."""
    if operation == "/":
        if right == 0 or left % right:
            return None
        return left // right
    result = {"+": left + right, "-": left - right, "*": left * right}[operation]
    return result if 0 <= result <= LARGEST else None


def sample_problem(rng: random.Random) -> tuple[Problem, Solution]:
    """Draw three numbers, and a target by calculating with them.

    Returns:
        The problem, and the solution that it was made from: one of several, as a rule.
    """
    while True:
        numbers = tuple(rng.randint(1, LARGEST_NUMBER) for _ in range(NUMBERS))
        left = list(numbers)
        steps: list[Step] = []
        while len(left) > 1:
            rng.shuffle(left)
            step = _sensible(left.pop(), rng.choice("+-*/"), left.pop())
            if step is None:
                break
            steps.append(step)
            left.append(step.result)
        else:
            if left[0] >= SMALLEST_TARGET and left[0] not in numbers:
                return Problem(numbers=numbers, target=left[0]), tuple(steps)


def _sensible(left: int, operation: str, right: int) -> Step | None:
    """A step that comes to 1 to 99 and does something: no factor or divisor of 1."""
    result = calculate(left, operation, right)
    if not result or (operation in "*/" and 1 in (left, right)):
        return None
    return Step(left=left, operation=operation, right=right, result=result)


def solutions(problem: Problem) -> Iterator[Solution]:
    """Yield every solution in sensible steps, those that differ in order too, never one twice.

    Every result but the last is used, and + and * have the larger operand first.
    """
    yield from _search(tuple(sorted(problem.numbers)), (), problem.target)


def _search(there: tuple[int, ...], unused: tuple[int, ...], target: int) -> Iterator[Solution]:
    """Go on from what is there; ``unused`` are the results among it."""
    seen = set()
    for i in range(len(there)):
        for j in range(len(there)):
            for operation in "+-*/" if i != j else "":
                left, right = there[i], there[j]
                if (operation in "+*" and left < right) or (left, operation, right) in seen:
                    continue
                seen.add((left, operation, right))
                step = _sensible(left, operation, right)
                if step is None:
                    continue
                waiting = _without(unused, left, right)
                if step.result == target and not waiting:
                    yield (step,)
                rest = [v for k, v in enumerate(there) if k not in (i, j)]
                if rest:
                    following = tuple(sorted([*rest, step.result]))
                    for more in _search(following, (*waiting, step.result), target):
                        yield (step, *more)


def _without(values: tuple[int, ...], *taken: int) -> tuple[int, ...]:
    left = list(values)
    for value in taken:
        if value in left:
            left.remove(value)
    return tuple(left)


def write(steps: Solution) -> str:
    """A trace as text; its answer is the last result."""
    return "".join(map(str, steps)) + f"#{steps[-1].result}."


def read(completion: str) -> tuple[Solution, int] | None:
    """The steps of a trace and its answer; None for a text that is no whole trace."""
    match = _TRACE.fullmatch(completion)
    if match is None or any(len(n) > 1 and n[0] == "0" for n in re.findall(r"\d+", completion)):
        return None
    steps = tuple(
        Step(left=int(left), operation=operation, right=int(right), result=int(result))
        for left, operation, right, result in _STEP.findall(match[1])
    )
    return steps, int(match[2])


def careless_trace(solution: Solution, rng: random.Random, forget: float = 0.6) -> str:
    """Write a trace whose author forgets a carry or borrow with probability ``forget``.

    The values it gets are carried on; where they lead to a fraction or out of 0 to 99, the whole
    trace is written without a slip.
    """
    steps: list[Step] = []
    replaced: list[tuple[int, int]] = []  # results of the solution, and what was written for them
    for step in solution:
        left, right = _carried(step, replaced)
        exact = calculate(left, step.operation, right)
        if exact is None:
            return write(solution)
        result = exact
        if rng.random() < forget:
            result = _without_carry(left, step.operation, right, exact)
        replaced.append((step.result, result))
        steps.append(Step(left=left, operation=step.operation, right=right, result=result))
    return write(tuple(steps))


def _without_carry(left: int, operation: str, right: int, exact: int) -> int:
    if operation == "+" and left % 10 + right % 10 >= 10:
        return exact - 10
    if operation == "-" and left % 10 < right % 10:
        return exact + 10
    return exact


def _carried(step: Step, replaced: list[tuple[int, int]]) -> tuple[int, int]:
    """The operands of a step after earlier results were replaced; what is used is taken away."""
    operands = []
    for value in (step.left, step.right):
        found = next((pair for pair in replaced if pair[0] == value), None)
        if found is not None:
            replaced.remove(found)
        operands.append(value if found is None else found[1])
    return operands[0], operands[1]


class Countdown:
    """Seeded problems in four disjoint sets; see the module's first lines for the format.

    Args:
        seed: draws the problems, the experts' solutions and their errors.
        demonstrations: size of ``train``; its completions are imperfect, see ``expert_error``.
        unlabelled: size of ``unlabelled``: prompts without completion.
        validation: size of ``validation``; its completions are correct.
        test: size of ``test``; its completions are correct.
        expert_error: the probability that a demonstration has one wrong digit in a step's
            result, carried through the rest, so that it misses the target.

    Raises:
        ValueError: a negative size, or a probability outside 0 to 1.
    """

    name = "countdown"
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
            self._example("train", i, problem, self._expert(problem, solution, expert_error))
            for i, (problem, solution) in enumerate(trained[:demonstrations])
        ]
        self.unlabelled = [
            self._example("unlabelled", i, problem, None)
            for i, (problem, _) in enumerate(trained[demonstrations:])
        ]
        self.validation = self._reference("validation", validation, 1)
        self.test = self._reference("test", test, 0)

    def _draw(self, split: str, count: int, folds: range) -> list[tuple[Problem, Solution]]:
        """Draw ``count`` distinct problems of these folds, each with a solution."""
        rng = random.Random(f"countdown/{self.seed}/{split}")
        drawn: dict[tuple[object, int], tuple[Problem, Solution]] = {}  # in the order drawn
        while len(drawn) < count:
            problem, solution = sample_problem(rng)
            if problem.fold in folds:
                key = tuple(sorted(problem.numbers)), problem.target
                drawn.setdefault(key, (problem, solution))
        return list(drawn.values())

    def _example(self, split: str, i: int, problem: Problem, completion: str | None) -> Example:
        return Example(
            prompt=problem.prompt,
            completion=completion,
            answer=str(problem.target),
            id=f"countdown-{split}-{i}",
        )

    def _reference(self, split: str, count: int, fold: int) -> list[Example]:
        drawn = self._draw(split, count, range(fold, fold + 1))
        return [self._example(split, i, p, write(steps)) for i, (p, steps) in enumerate(drawn)]

    def _expert(self, problem: Problem, solution: Solution, error: float) -> str:
        """Write the demonstration; whether it errs depends on the seed and the problem alone."""
        rng = random.Random(f"countdown/{self.seed}/expert/{problem.prompt}")
        trace = write(solution)
        return self.corrupt(trace, rng)[0] if rng.random() < error else trace

    @staticmethod
    def extract_answer(completion: str) -> str | None:
        """Return the solution in a comparable form, or None for a text that is no whole trace.

        The target is in the prompt, so the answer is how it was reached: the steps, whatever their
        order and that of the operands of + and *.
        """
        found = read(completion)
        if found is None:
            return None
        steps = []
        for step in found[0]:
            left, right = step.left, step.right
            if step.operation in "+*" and left < right:
                left, right = right, left
            steps.append(f"{left}{step.operation}{right}={step.result}")
        return ";".join(sorted(steps))

    def is_correct(self, completion: str, example: Example) -> bool:
        """Say whether the trace reaches the target by right steps from the given numbers."""
        return self.first_wrong_step(completion, example) is None

    def first_wrong_step(self, completion: str, example: Example) -> int | None:
        """Return the 0-based index of the first wrong step, None where the whole trace is right.

        A step is wrong that takes what is not there (any more), or whose result is not that of its
        left side. The answer counts as a last step: it has to be the last result and the target.
        What cannot be read is the first wrong step.

        Raises:
            ValueError: an example that is none of this task's.
        """
        problem = _PROMPT.fullmatch(example.prompt) if isinstance(example.prompt, str) else None
        if problem is None or example.answer != problem[2]:
            raise ValueError(
                f"example {example.id!r}: expected a prompt such as '3,17,4>63=' with its "
                f"target as the answer, received {str(example.prompt)[:80]!r} and "
                f"{str(example.answer)[:20]!r}; take the task's own examples"
            )
        there, position, last = [int(n) for n in problem[1].split(",")], 0, None
        count = 0
        while match := _STEP.match(completion, position):
            left, operation, right, result = match.groups()
            for operand in (left, right):
                if int(operand) not in there or str(int(operand)) != operand:
                    return count
                there.remove(int(operand))
            exact = calculate(int(left), operation, int(right))
            if exact is None or str(exact) != result:
                return count
            there.append(exact)
            position, last, count = match.end(), result, count + 1
        right_end = last == problem[2] and completion[position:] == f"#{last}."
        return None if right_end else count

    def corrupt(self, completion: str, rng: random.Random) -> tuple[str, int]:
        """Plant one wrong digit in the result of one step and carry it through the rest.

        Args:
            completion: a trace in the task's format, correct or not.
            rng: draws the step and the digit.

        Returns:
            The changed trace and the 0-based index of the planted step, the only one that is
            wrong if the trace was right.

        Raises:
            ValueError: a text that is not a trace.
        """
        found = read(completion)
        if found is None:
            raise ValueError(
                "corrupt takes a trace such as '17+4=21;3*21=63;#63.', received "
                f"{completion[:80]!r}; perturb free text with airl_fast.negatives"
            )
        steps = found[0]
        for i in rng.sample(range(len(steps)), len(steps)):
            changed = [
                made
                for value in wrong_digits(steps[i].result)
                if value not in (0, steps[i].exact) and (made := _replant(steps, i, value))
            ]
            if changed:
                return write(rng.choice(changed)), i
        raise AssertionError("the last step always takes a wrong digit")


def _replant(steps: Solution, at: int, value: int) -> Solution | None:
    """The trace with another result of one step, carried on; None where that cannot be."""
    planted = steps[at]
    made = [*steps[:at], Step(**{**vars(planted), "result": value})]
    replaced = [(planted.result, value)]
    for step in steps[at + 1 :]:
        left, right = _carried(step, replaced)
        wrong_already = step.result != step.exact
        result = step.result if wrong_already else calculate(left, step.operation, right)
        if result is None:
            return None
        replaced.append((step.result, result))
        made.append(Step(left=left, operation=step.operation, right=right, result=result))
    return tuple(made)


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """Make the tokenizer of both built-in tasks: arithmetic's tokens, then ``* / , >``."""
    return make_tokenizer(CHARACTERS + "*/,>")
