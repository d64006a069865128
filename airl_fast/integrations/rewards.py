"""What every integration gives a trainer: rewards of spans, from the scorer's public methods.

The spans are those that the reward was trained for, whatever they are. A span's reward belongs to
its last token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, get_args

from airl_fast.encoding import Completion, EncodedPair, Prompt
from airl_fast.scores import By, Scored
from airl_fast.spans import SpanRule, span_rule

if TYPE_CHECKING:
    from airl_fast.scorer import RewardScorer

Reduce = Literal["sum", "mean", "min", "last"]


@dataclass(frozen=True, kw_only=True)
class SpanRewards:
    """The rewards of one completion of N tokens, cut into S spans.

    Attributes:
        lengths: tokens of every span; they sum to N.
        values: the reward of every span.
        scored: everything else; its steps are the spans.
    """

    lengths: tuple[int, ...]
    values: tuple[float, ...]
    scored: Scored

    def of_tokens(self) -> list[float]:
        """The rewards of the N tokens: a span's at its last token, 0 elsewhere."""
        rewards = [0.0] * sum(self.lengths)
        for end, value in zip(accumulate(self.lengths), self.values, strict=True):
            rewards[end - 1] = value
        return rewards


@dataclass(frozen=True, kw_only=True)
class RewardReader:
    """A scorer, and which of its values is the reward.

    Attributes:
        scorer: the trained reward.
        value: "f", or "reward" for f - log pi with pi the scorer's own policy, which stays as it
            was loaded while another trainer changes its policy.
        reduce: one number out of the spans': their sum, mean or minimum, or the last one's.

    Raises:
        ValueError: an unknown value or reduction, or "reward" without a policy.
    """

    scorer: RewardScorer
    value: By = "f"
    reduce: Reduce = "sum"

    def __post_init__(self) -> None:
        if self.value not in get_args(By):
            raise ValueError(f"expected value='f' or 'reward', received {self.value!r}")
        if self.reduce not in get_args(Reduce):
            raise ValueError(
                f"expected reduce to be one of {', '.join(get_args(Reduce))}, received "
                f"{self.reduce!r}"
            )
        self.scorer.check_by(self.value)

    def encode(
        self, prompt: Prompt, completion: Completion, *, end_of_text: bool = True
    ) -> EncodedPair:
        """Encode as the scorer does; the steps are the spans that the reward was trained for.

        Raises:
            ValueError: as ``RewardScorer.encode``.
        """
        pair = self.scorer.encode(prompt, completion, end_of_text=end_of_text)
        if self.scorer.trained.granularity == "step":
            return pair
        return replace(pair, step_lengths=self._rule(pair.completion))

    def read(self, pair: EncodedPair, scored: Scored) -> SpanRewards:
        """The rewards in what ``score_encoded`` made of a pair of ``encode``."""
        values = [step.f if self.value == "f" else step.reward for step in scored.steps]
        known = tuple(value for value in values if value is not None)
        assert len(known) == len(pair.step_lengths), "check_by has seen that there is a policy"
        return SpanRewards(lengths=pair.step_lengths, values=known, scored=scored)

    def rewards(self, pairs: Sequence[EncodedPair]) -> list[SpanRewards]:
        """Score pairs that ``encode`` made; in their order."""
        scored = self.scorer.score_encoded(pairs)
        return [self.read(pair, one) for pair, one in zip(pairs, scored, strict=True)]

    def scalar(self, rewards: SpanRewards) -> float:
        """One reward for the completion."""
        values = rewards.values
        if self.reduce == "sum":
            return sum(values)
        if self.reduce == "mean":
            return sum(values) / len(values)
        return min(values) if self.reduce == "min" else values[-1]

    @cached_property
    def _rule(self) -> SpanRule:
        trained = self.scorer.trained
        return span_rule(
            trained.granularity,
            interval=trained.interval,
            boundary=trained.boundary,
            tokenizer=self.scorer.tokenizer,
        )
