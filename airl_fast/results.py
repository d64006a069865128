"""The numbers of a reading, in the typed result of every pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import fsum
from typing import Any

from torch import Tensor

from airl_fast.encoding import EncodedPair
from airl_fast.scores import Scored, SpanScore, StepScore, TokenScores
from airl_fast.spans import Granularity


def columns(values: Sequence[Tensor | None], counts: Sequence[int]) -> list[tuple[Any, ...]]:
    """Cut columns of a batch into those of its pairs, as tuples of numbers; None stays."""
    parts = [
        [None] * len(counts)
        if column is None
        else [tuple(p.tolist()) for p in column.split(counts)]
        for column in values
    ]
    return list(zip(*parts, strict=True))


def result(
    pair: EncodedPair,
    granularity: Granularity,
    cut: tuple[int, ...],
    of_tokens: tuple[Any, ...],
    of_steps: tuple[Any, ...],
    of_spans: tuple[Any, ...],
) -> Scored:
    """Build what is said of one pair.

    Args:
        pair: K steps, L tokens.
        granularity: that the reward was trained for.
        cut: the S spans of that granularity, in tokens.
        of_tokens: f, log pi and f - log pi [L], each of the latter two or None.
        of_steps: f and f - log pi [K], the latter or None.
        of_spans: f and f - log pi [S], the latter or None.
    """
    f, logp, reward = of_tokens
    steps = tuple(
        StepScore(
            text=pair.text[start:end],
            start=start,
            end=end,
            f=step_f,
            reward=step_reward,
            num_tokens=last + 1 - first,
        )
        for start, end, first, last, step_f, step_reward in _placed(
            pair, pair.step_lengths, *of_steps
        )
    )
    spans = tuple(
        SpanScore(start=start, end=end, first=first, last=last, f=span_f, reward=span_reward)
        for start, end, first, last, span_f, span_reward in _placed(pair, cut, *of_spans)
    )
    return Scored(
        text=pair.text,
        f=fsum(of_spans[0]),
        reward=None if of_spans[1] is None else fsum(of_spans[1]),
        granularity=granularity,
        steps=steps,
        tokens=TokenScores(
            ids=pair.completion, offsets=pair.offsets, f=f, logp=logp, reward=reward
        ),
        spans=spans,
    )


def _placed(
    pair: EncodedPair,
    lengths: tuple[int, ...],
    f: Sequence[float],
    reward: Sequence[float] | None,
) -> Iterator[tuple[int, int, int, int, float, float | None]]:
    """Yield spans as first and last character, first and last token, f and reward."""
    ends = list(accumulate(lengths))
    rewards: Sequence[float | None] = [None] * len(ends) if reward is None else reward
    for first, end, span_f, span_reward in zip([0, *ends[:-1]], ends, f, rewards, strict=True):
        start, stop = pair.offsets[first][0], pair.offsets[end - 1][1]
        yield start, stop, first, end - 1, span_f, span_reward
