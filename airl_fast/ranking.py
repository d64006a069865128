"""Which of several completions of a prompt to keep: the best, or the answer that most weight backs.

    N completions of a prompt

- ``best``: the completion of the highest score (best of N).
- ``weighted``: every completion backs its answer with its share of a softmax over the N scores;
  the answer with the most weight wins.
- ``majority``: every completion that has an answer backs it alike; of equally frequent answers the
  one whose completions have the highest total score wins.

Whatever is equal after that stays in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import exp, fsum
from typing import Literal, get_args, overload

from airl_fast.scores import By, Ranked, Scored, known
from airl_fast.tasks import TASKS, task_class

Method = Literal["best", "weighted", "majority"]
AnswerReader = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One answer, the share of the weight behind it, and the completions that gave it."""

    answer: str
    weight: float
    indices: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Ranking(Sequence[Ranked]):
    """Completions of one prompt, best first, and what they elect; a sequence of ``Ranked``.

    Attributes:
        method: "best", "weighted" or "majority".
        by: what scores are: "f" or "reward".
        ranked: all N. With votes: the winner's completions first, then the runner-up's, each by
            score; those without an answer last.
        answer: that won; with "best" that of the first completion; None where there is none.
        weight: the winner's share of the weight, in [0, 1]; None with "best".
        votes: every answer, the winner first; none with "best".
    """

    method: Method
    by: By
    ranked: tuple[Ranked, ...] = field(repr=False)
    answer: str | None
    weight: float | None
    votes: tuple[Vote, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """Indices of the completions, best first."""
        return tuple(one.index for one in self.ranked)

    @overload
    def __getitem__(self, index: int) -> Ranked: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Ranked]: ...
    def __getitem__(self, index: int | slice) -> Ranked | Sequence[Ranked]:
        """The completion of a rank, 0 the best."""
        return self.ranked[index]

    def __len__(self) -> int:
        """N."""
        return len(self.ranked)


def rank(
    scored: Sequence[Scored],
    by: By,
    *,
    method: Method = "best",
    answers: Sequence[str | None] | None = None,
    temperature: float = 1.0,
) -> Ranking:
    """Rank scored completions of one prompt.

    Args:
        scored: N.
        by: "f" or "reward".
        method: "best", "weighted" or "majority".
        answers: N, None where a completion has no answer: it has no vote. Needed but for "best".
        temperature: of the softmax of "weighted", in units of the score, above 0. Towards 0 the
            best completion decides alone; the larger, the nearer to the majority.

    Raises:
        ValueError: an unknown method, no answers or not N, a temperature that is not positive, or
            ``by="reward"`` without one.
    """
    check_method(method, temperature)
    scores = [one.f if by == "f" else known(one.reward) for one in scored]
    best_first = sorted(range(len(scored)), key=lambda i: -scores[i])
    if answers is None and method != "best":
        raise ValueError(
            f"method={method!r} needs the completions' answers, received none: pass answers=, a "
            "list or a function that reads them"
        )
    if answers is not None and len(answers) != len(scored):
        raise ValueError(
            f"expected {len(scored)} answers, one a completion, "
            f"received {len(answers)}: pass None for one without an answer"
        )
    votes: tuple[Vote, ...] = ()
    if method != "best":
        assert answers is not None
        votes = _votes(answers, scores, method, temperature)
        place = {i: rank for rank, vote in enumerate(votes) for i in vote.indices}
        best_first.sort(key=lambda i: place.get(i, len(votes)))
    first = None if answers is None or not best_first else answers[best_first[0]]
    return Ranking(
        method=method,
        by=by,
        ranked=tuple(Ranked(index=i, score=scores[i], scored=scored[i]) for i in best_first),
        answer=votes[0].answer if votes else first,
        weight=votes[0].weight if votes else None,
        votes=votes,
    )


def check_method(method: str, temperature: float) -> None:
    """Refuse an unknown method or a temperature that is none.

    Raises:
        ValueError: one of them is.
    """
    if method not in get_args(Method):
        raise ValueError(f"expected method {', '.join(get_args(Method))}, received {method!r}")
    if not temperature > 0:
        raise ValueError(f"expected a temperature above 0, received {temperature}")


def task_reader(task: str) -> AnswerReader:
    """Return what reads the final answer of a completion of a task.

    Raises:
        ValueError: a task that this package does not know.
    """
    if task not in TASKS:
        raise ValueError(
            f"the reward's task {task!r} is none of {', '.join(TASKS)}, so that its answers "
            "cannot be read: pass answers=, a list or a function that reads them"
        )
    reader: AnswerReader = task_class(task).extract_answer
    return reader


def _votes(
    answers: Sequence[str | None], scores: Sequence[float], method: Method, temperature: float
) -> tuple[Vote, ...]:
    """Every answer with its share of the weight, the winner first."""
    members: dict[str, list[int]] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            members.setdefault(answer, []).append(i)
    if not members:
        return ()
    voters = [i for indices in members.values() for i in indices]
    top = max(scores[i] for i in voters)
    ballots = {
        i: 1.0 if method == "majority" else exp((scores[i] - top) / temperature) for i in voters
    }
    total = fsum(ballots.values())
    votes = [
        Vote(
            answer=answer,
            weight=fsum(ballots[i] for i in indices) / total,
            indices=tuple(indices),
        )
        for answer, indices in members.items()
    ]
    return tuple(
        sorted(votes, key=lambda vote: (-vote.weight, -fsum(scores[i] for i in vote.indices)))
    )
