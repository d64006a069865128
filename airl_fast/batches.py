"""Which prompts, demonstrations and negatives a training step sees.

Every draw is a function of the run's seed, a purpose and a position, never of a generator's
state: a resumed run sees the data that it would have seen.
"""

import hashlib
import random
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, overload

from airl_fast.negatives import KINDS, perturb
from airl_fast.packing import Source, Trace
from airl_fast.tasks import Example, Task, encode_completion, encode_prompt
from airl_fast.tasks.drawing import shuffled_order
from airl_fast.tasks.line_index import Streamed

SpanRule = Callable[[Sequence[int]], tuple[int, ...]]
Item = TypeVar("Item")


def derive_seed(seed: int, purpose: str, position: int) -> int:
    """A seed for one draw, independent of every other purpose and position."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True)
class Problem:
    """A prompt as token ids, with its expert completion where there is one."""

    example: Example
    prompt: tuple[int, ...]
    expert: tuple[int, ...] | None


class StreamedProblems(Sequence[Problem]):
    """Problems that are read, encoded and checked when they are drawn.

    ``checks`` are called with each that is.
    """

    def __init__(self, examples: Streamed, tokenizer: Any) -> None:
        self.examples, self.tokenizer = examples, tokenizer
        self.checks: list[Callable[[Sequence[Problem]], None]] = []

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, i: int) -> Problem: ...

    @overload
    def __getitem__(self, i: slice) -> list[Problem]: ...

    def __getitem__(self, i: int | slice) -> Problem | list[Problem]:
        """Read a problem, or some."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        problem = _problem(self.examples[i], self.tokenizer)
        for check in self.checks:
            check([problem])
        return problem


def encode(examples: Sequence[Example], tokenizer: Any) -> Sequence[Problem]:
    """Encode prompts, and completions with an end-of-text token; streamed ones when drawn."""
    if isinstance(examples, Streamed):
        return StreamedProblems(examples, tokenizer)
    return [_problem(example, tokenizer) for example in examples]


def _problem(example: Example, tokenizer: Any) -> Problem:
    return Problem(
        example=example,
        prompt=tuple(encode_prompt(example, tokenizer)),
        expert=(
            tuple(encode_completion(example.completion, tokenizer))
            if example.completion is not None
            else None
        ),
    )


def check_lengths(
    problems: Sequence[Problem], *, max_new_tokens: int, token_budget: int, context: float
) -> None:
    """Refuse, before the first step, problems whose traces would not fit later on.

    Streamed ones are checked when they are drawn.

    Args:
        problems: with their demonstrations.
        max_new_tokens: longest completion that is sampled.
        token_budget: tokens of a micro-batch.
        context: tokens that the model takes.

    Raises:
        ValueError: a trace could be longer than the budget or the context, naming the problem.
    """
    if isinstance(problems, StreamedProblems):
        problems.checks.append(
            partial(
                check_lengths,
                max_new_tokens=max_new_tokens,
                token_budget=token_budget,
                context=context,
            )
        )
        return
    for problem in problems:
        completion = max(max_new_tokens, len(problem.expert or ()))
        length = len(problem.prompt) + completion
        if length > min(token_budget, context):
            short = "run.token_budget" if length > token_budget else "the model's context"
            raise ValueError(
                f"example {problem.example.id!r}: a prompt of {len(problem.prompt)} tokens and a "
                f"completion of up to {completion} do not fit {short} of "
                f"{min(token_budget, context):.0f} tokens; raise it or leave the example out "
                "(for sampled completions, lower sampling.max_new_tokens); nothing is truncated"
            )


class Shuffled(Generic[Item]):
    """An endless sequence of epochs, each shuffled by its own seed, read by position."""

    def __init__(self, items: Sequence[Item], seed: int, purpose: str) -> None:
        self.items = items
        self.seed = seed
        self.purpose = purpose
        self._epoch = -1
        self._order = array("q")

    def take(self, start: int, count: int) -> list[Item]:
        """Items ``start`` to ``start + count - 1`` of the sequence."""
        return [self._at(position) for position in range(start, start + count)]

    def _at(self, position: int) -> Item:
        epoch, offset = divmod(position, len(self.items))
        if epoch != self._epoch:
            seed = derive_seed(self.seed, self.purpose, epoch)
            self._order = shuffled_order(len(self.items), seed)
            self._epoch = epoch
        return self.items[self._order[offset]]


class TraceMaker:
    """Turns problems and completions into traces cut at the run's granularity."""

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        rule: SpanRule,
        perturbations: Sequence[str] = KINDS,
    ) -> None:
        self.task = task
        self.tokenizer = tokenizer
        self.rule = rule
        self.perturbations = perturbations

    def trace(
        self, problem: Problem, completion: tuple[int, ...], source: Source, group: int
    ) -> Trace:
        """One trace of a problem."""
        return Trace(
            prompt=problem.prompt,
            completion=completion,
            span_lengths=self.rule(completion),
            group=group,
            source=source,
        )

    def expert(self, problem: Problem, group: int) -> Trace:
        """The problem's demonstration."""
        assert problem.expert is not None
        return self.trace(problem, problem.expert, Source.EXPERT, group)

    def check_perturbable(self, examples: Sequence[Example]) -> None:
        """Refuse, before the first step, a demonstration that cannot be made wrong.

        Streamed ones are not looked at: ``perturbed`` raises when it is given one.

        Raises:
            ValueError: no kind of perturbation changes it, naming the example.
        """
        for example in [] if isinstance(examples, Streamed) else examples:
            self._wrong(example, 0)

    def _wrong(self, example: Example, seed: int) -> str:
        assert example.completion is not None
        rng = random.Random(seed)
        try:
            return perturb(self.task, example.completion, rng, kinds=self.perturbations)
        except ValueError as error:
            raise ValueError(f"example {example.id!r}: {error}") from None

    def perturbed(self, problem: Problem, group: int, seed: int) -> Trace:
        """The problem's demonstration made wrong."""
        text = self._wrong(problem.example, seed)
        completion = tuple(encode_completion(text, self.tokenizer))
        return self.trace(problem, completion, Source.PERTURBED, group)


class Replay:
    """The last policy traces that the discriminator saw, to be drawn again as negatives."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.traces: list[Trace] = []

    def add(self, traces: Sequence[Trace]) -> None:
        """Keep these, forgetting the oldest."""
        self.traces = [*self.traces, *traces][-self.capacity :] if self.capacity else []

    def draw(self, count: int, seed: int) -> list[Trace]:
        """``count`` kept traces without replacement; all of them while fewer are kept."""
        return random.Random(seed).sample(self.traces, min(count, len(self.traces)))

    def state(self) -> list[list[Any]]:
        """JSON-able contents."""
        return [
            [list(t.prompt), list(t.completion), list(t.span_lengths), t.group] for t in self.traces
        ]

    def restore(self, state: list[list[Any]]) -> None:
        """Set what ``state`` gave."""
        self.traces = [
            Trace(
                prompt=tuple(prompt),
                completion=tuple(completion),
                span_lengths=tuple(spans),
                group=group,
            )
            for prompt, completion, spans, group in state
        ]
