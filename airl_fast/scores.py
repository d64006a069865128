"""What a trained reward says: values per token, per step and in all, ranks, the weakest step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from airl_fast.spans import Granularity

By = Literal["f", "reward"]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a reward was trained for.

    Attributes:
        granularity: the spans that it gave a reward to.
        interval: tokens of a span of "interval".
        boundary: regular expression that ends a step.
        logit: what told experts from policy: "f-logp" (AIRL), "f" or "wgan".
        reward: what the policy was trained on: "f" or "f-logp".
        temperature: of log pi.
        task: the task's name.
    """

    granularity: Granularity
    interval: int
    boundary: str
    logit: str
    reward: str
    temperature: float
    task: str


@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Values of every token of a completion, each read with the token as a span of its own.

    ``offsets`` are start and end characters in ``Scored.text``. ``logp`` and ``reward`` (f - log
    pi) are None without a policy.
    """

    ids: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]
    f: tuple[float, ...]
    logp: tuple[float, ...] | None
    reward: tuple[float, ...] | None


@dataclass(frozen=True, kw_only=True)
class StepScore:
    """Values of one step; ``text`` is ``Scored.text[start:end]``."""

    text: str
    start: int
    end: int
    f: float
    reward: float | None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Values of one completion.

    Attributes:
        text: the completion as its tokens spell it, without end of text; offsets refer to it.
        f: the sum of f over the spans of ``granularity``, which the model was trained for.
        reward: the same sum of f - log pi, the AIRL reward; None without a policy. Where the
            discriminator was not trained on f - log pi (``Trained.logit``), f is the reward.
        granularity: of the spans that ``f`` and ``reward`` sum over.
        steps: in order.
        tokens: in order, end of text included.
    """

    text: str
    f: float
    reward: float | None
    granularity: Granularity
    steps: tuple[StepScore, ...]
    tokens: TokenScores = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One completion's place: ``index`` is its position among those given."""

    index: int
    score: float
    scored: Scored = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Location:
    """The step with the lowest f.

    Attributes:
        step: its 0-based index; the first of equals.
        text: of the step.
        start: its first character in ``scored.text``.
        end: the character after its last.
        scores: f of every step.
        margin: how much lower it is than the second lowest; None when there is one step.
        scored: everything else.
    """

    step: int
    text: str
    start: int
    end: int
    scores: tuple[float, ...]
    margin: float | None
    scored: Scored = field(repr=False)


def rank(scored: Sequence[Scored], by: By) -> list[Ranked]:
    """Rank scored completions, best first; equals stay in the order given."""
    ranked = [
        Ranked(index=i, score=one.f if by == "f" else _known(one.reward), scored=one)
        for i, one in enumerate(scored)
    ]
    return sorted(ranked, key=lambda one: -one.score)


def lowest_step(scored: Scored) -> Location:
    """Find the step with the lowest f of a scored completion."""
    scores = tuple(step.f for step in scored.steps)
    step = scores.index(min(scores))
    others = scores[:step] + scores[step + 1 :]
    found = scored.steps[step]
    return Location(
        step=step,
        text=found.text,
        start=found.start,
        end=found.end,
        scores=scores,
        margin=min(others) - scores[step] if others else None,
        scored=scored,
    )


def _known(reward: float | None) -> float:
    if reward is None:
        raise ValueError("these completions were scored without a policy: rank by 'f'")
    return reward
