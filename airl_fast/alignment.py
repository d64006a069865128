"""Where texts in the tokens of two tokenizers meet: at step ends, in exact character offsets.

    L token ids of a text   K steps

A step end serves both when the text is the same, a token of each ends there, and neither token
holds a byte of the character after it. Everything else is refused, with the reason; steps are
joined only if asked for.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from airl_fast.encoding import EncodedPair, PairEncoder, Prompt, text_offsets
from airl_fast.scores import By, Scored, known
from airl_fast.spans import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Credit = Literal["last", "spread"]
_REMEDY = (
    "rewards of one tokenizer reach the tokens of another only at step ends that both have: pass "
    "merge_steps=True to join the step with the next one, or use steps that end where both cut"
)


class Aligner:
    """Writes pairs in the policy's tokens too, step for step.

    Args:
        reward: encodes in the reward's tokens.
        policy: encodes in the policy's.
        merge_steps: join a step whose end one of the tokenizers lacks with the next one.
    """

    def __init__(self, reward: PairEncoder, policy: PairEncoder, *, merge_steps: bool) -> None:
        self.reward = reward
        self.policy = policy
        self.merge_steps = merge_steps

    def align(self, prompt: Prompt, pair: EncodedPair) -> EncodedPair:
        """Return the pair with ``of_policy``; and with fewer steps where they had to be joined.

        Args:
            prompt: what ``pair.prompt`` was made of: a text or messages, no token ids.
            pair: in the reward's tokens.

        Raises:
            ValueError: a prompt of token ids, special tokens at the end that are not one end of
                text, a text that the policy's tokenizer writes otherwise, or (without
                ``merge_steps``) a step end that it lacks.
        """
        if not isinstance(prompt, str) and all(isinstance(item, int) for item in prompt):
            raise ValueError(
                "the prompt is token ids, which mean nothing to the policy's other tokenizer: give "
                "it as a text or as messages"
            )
        other = self.policy.encode(prompt, pair.text, end_of_text=self._ended(pair))
        if other.text != pair.text:
            raise ValueError(
                "the tokenizers of reward and policy write the completion differently: "
                f"{_difference(pair.text, other.text)}; use characters that both keep"
            )
        steps = list(accumulate(pair.step_lengths))
        kept, ends = [], []
        for i, step in enumerate(steps[:-1]):
            character = pair.offsets[step - 1][1]
            reason = _cut_through(
                pair.completion, step, pair.text, character, self.reward.tokenizer
            )
            end, other_reason = _end_at(other, character, self.policy.tokenizer)
            reason = reason or other_reason
            if reason is None:
                kept.append(step)
                ends.append(end)
            elif not self.merge_steps:
                raise ValueError(f"step {i} ends at character {character}, {reason}; {_REMEDY}")
        kept.append(steps[-1])
        ends.append(len(other.completion))
        policys = replace(other, step_lengths=_lengths(ends))
        return replace(pair, step_lengths=_lengths(kept), of_policy=policys)

    def _ended(self, pair: EncodedPair) -> bool:
        """Whether the completion ends with the end of text, and with no other special token."""
        length = len(pair.text)
        special = [
            token
            for token, offset in zip(pair.completion, pair.offsets, strict=True)
            if offset == (length, length) and token in self.reward.tokenizer.all_special_ids
        ]
        if special and special != [self.reward.tokenizer.eos_token_id]:
            raise ValueError(
                f"the completion ends with the special tokens {special}, which the policy's other "
                "tokenizer lacks: end it with one end of text, or give it as a text"
            )
        return bool(special)


def project(
    scored: Scored,
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    by: By = "f",
    credit: Credit = "last",
    merge_steps: bool = False,
) -> list[float]:
    """Give every token of a completion, in any tokenizer, its share of the steps' rewards.

    Args:
        scored: the completion's values.
        ids: [L] token ids of the same text, special tokens at their end or none.
        tokenizer: of ``ids``.
        by: "f" or "reward" (f - log pi).
        credit: "last": a step's value at the step's last token (end of text included, for the last
            step), as training credits it, and 0 elsewhere; "spread": in equal parts over its
            tokens. Either way a step's tokens sum to its value.
        merge_steps: add the value of a step that ends inside a token to the next step's.

    Returns:
        [L] values.

    Raises:
        ValueError: no tokens, another text, a step that ends inside a token, or no ``reward``.
    """
    if credit not in ("last", "spread"):
        raise ValueError(f"expected credit 'last' or 'spread', received {credit!r}")
    if by not in get_args(By):
        raise ValueError(f"expected by='f' or 'reward', received {by!r}")
    if not ids:
        raise ValueError("expected token ids of the completion, received none")
    text, offsets = text_offsets(tuple(ids), tokenizer)
    if text != scored.text:
        raise ValueError(
            "the token ids do not spell the completion that was scored: "
            f"{_difference(scored.text, text)}; score the text that these tokens decode to"
        )
    pair = EncodedPair(
        prompt=(), completion=tuple(ids), text=text, offsets=offsets, step_lengths=(len(ids),)
    )
    values, waiting, start = [0.0] * len(ids), 0.0, 0
    for i, step in enumerate(scored.steps):
        waiting += step.f if by == "f" else known(step.reward)
        end, reason = len(ids), None
        if i + 1 < len(scored.steps):
            end, reason = _end_at(pair, step.end, tokenizer)
        if reason is not None:
            if not merge_steps:
                raise ValueError(f"step {i} ends at character {step.end}, {reason}; {_REMEDY}")
            continue
        if credit == "last":
            values[end - 1] = waiting
        else:
            values[start:end] = [waiting / (end - start)] * (end - start)
        waiting, start = 0.0, end
    return values


def _end_at(pair: EncodedPair, character: int, tokenizer: Any) -> tuple[int, str | None]:
    """Return the number of tokens up to a character, or the reason why no token ends there."""
    end = bisect_left([end for _, end in pair.offsets], character) + 1
    return end, _cut_through(pair.completion, end, pair.text, character, tokenizer)


def _cut_through(
    ids: Sequence[int], end: int, text: str, character: int, tokenizer: Any
) -> str | None:
    """Say why the first ``end`` tokens are not exactly the text up to ``character``, if so."""
    spelled = decode(ids[:end], tokenizer)
    if spelled == text[:character]:
        return None
    token = decode([ids[end - 1]], tokenizer)
    return f"inside the token {token!r} of {type(tokenizer).__name__} (token {end - 1})"


def _lengths(ends: Sequence[int]) -> tuple[int, ...]:
    return tuple(end - start for start, end in pairwise([0, *ends]))


def _difference(one: str, other: str) -> str:
    """The first place where two texts differ, quoted."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    place = min(len(one), len(other)) if at is None else at
    return f"{one[place : place + 40]!r} becomes {other[place : place + 40]!r} at character {place}"
