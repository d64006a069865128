"""What a trained reward says: values per token, per step and in all, ranks, the weakest step."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from airl_fast.spans import Granularity

if TYPE_CHECKING:
    from airl_fast.calibration import Calibration

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

    def __post_init__(self) -> None:
        if self.interval < 1 or not 0 < self.temperature < math.inf:
            raise ValueError(
                "expected an interval of 1 or more and a finite temperature above 0, received "
                f"{self.interval} and {self.temperature}"
            )
        try:
            re.compile(self.boundary)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"boundary is no regular expression ({error})") from None


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
    """Values of one step; ``text`` is ``Scored.text[start:end]``.

    ``num_tokens`` are those of the reward's tokenizer, end of text included.
    """

    text: str
    start: int
    end: int
    f: float
    reward: float | None
    num_tokens: int = 1


@dataclass(frozen=True, kw_only=True)
class SpanScore:
    """Values of one span of the granularity that the reward was trained for.

    Attributes:
        start: its first character in ``Scored.text``.
        end: the character after its last.
        first: its first token in ``Scored.tokens``.
        last: its last token, at which training credits its reward.
        f: of the span.
        reward: f - log pi of the span; None without a policy.
    """

    start: int
    end: int
    first: int
    last: int
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
        spans: those of ``granularity``, in order: where the model was trained to give a reward.
            Values at another granularity (steps of a dense reward, tokens of a sparse one) are
            read or summed there, and no training has checked them.
    """

    text: str
    f: float
    reward: float | None
    granularity: Granularity
    steps: tuple[StepScore, ...]
    tokens: TokenScores = field(repr=False)
    spans: tuple[SpanScore, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """One completion's place: ``index`` is its position among those given."""

    index: int
    score: float
    scored: Scored = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Location:
    """The step that deviates.

    Attributes:
        step: its 0-based index: the located one of a calibrated scorer, None where it finds no
            step that deviates; the lowest of an uncalibrated one.
        text: of the step; None without one, as ``start`` and ``end``.
        start: its first character in ``scored.text``.
        end: the character after its last.
        scores: f of every step.
        margin: how much lower the lowest f is than the second lowest; None when there is one step.
        scored: everything else.
        lowest: the step with the lowest f, the first of equals, whatever was decided.
        confidence: probability that ``step`` is the first wrong one (that none is wrong, for
            None); None without a calibration.
        values: what a calibration compared of every step with its ``threshold``; or None.
        threshold: below it, a step deviates.
    """

    step: int | None
    text: str | None
    start: int | None
    end: int | None
    scores: tuple[float, ...]
    margin: float | None
    scored: Scored = field(repr=False)
    lowest: int
    confidence: float | None = None
    values: tuple[float, ...] | None = None
    threshold: float | None = None


def locate_step(scored: Scored, calibration: Calibration | None = None) -> Location:
    """Find the step of a scored completion that deviates: the lowest, or the calibrated one."""
    scores = tuple(step.f for step in scored.steps)
    lowest = scores.index(min(scores))
    others = scores[:lowest] + scores[lowest + 1 :]
    step: int | None = lowest
    confidence, values, threshold = None, None, None
    if calibration is not None:
        decider = calibration.decider
        step, confidence, values = decider.decide(scores, [s.num_tokens for s in scored.steps])
        threshold = decider.threshold
    found = None if step is None else scored.steps[step]
    return Location(
        step=step,
        text=None if found is None else found.text,
        start=None if found is None else found.start,
        end=None if found is None else found.end,
        scores=scores,
        margin=min(others) - scores[lowest] if others else None,
        scored=scored,
        lowest=lowest,
        confidence=confidence,
        values=values,
        threshold=threshold,
    )


def known(reward: float | None) -> float:
    """Return a reward that is there.

    Raises:
        ValueError: there is none: no policy was given.
    """
    if reward is None:
        raise ValueError("these completions were scored without a policy: rank by 'f'")
    return reward
