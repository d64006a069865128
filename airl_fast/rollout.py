"""Sampling completions of prompts, with the log-probs they were sampled at.

Every token is drawn by a number of its own: a function of the seed, the completion's place among
all that are asked for, and the token's place in it. So a completion does not depend, but for the
rounding of its logits, on what is sampled beside it or on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from airl_fast.batches import derive_seed
from airl_fast.decoding import Rows
from airl_fast.language_model import LanguageModel
from airl_fast.ops._draw import draw
from airl_fast.transfers import sent

FinishReason = Literal["end", "stop", "length"]

_UNREAD = {"cpu": 1}  # tokens of a row that are drawn before it is read for its end; 16 on a GPU
_FEWER = 7 / 8  # of the rows still go on: the others are left behind


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled completion of one prompt."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]  # the end-of-text token included, where there is one
    logp: tuple[float, ...]  # of each token, at the temperature it was sampled at
    finish: FinishReason  # "end": end-of-text; "stop": a stop string; "length": truncated
    text: str  # the completion decoded without special tokens


def sample(
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    batch_size: int = 256,
) -> list[Rollout]:
    """Sample ``group_size`` completions of every prompt.

    Nothing is cut off by top-p or top-k, so the log-probs are those of the whole distribution.

    Args:
        policy: the model that is sampled.
        prompts: token ids of each prompt, at least one token each.
        group_size: completions per prompt, adjacent in the result.
        max_new_tokens: longest completion; one that reaches it is marked "length".
        seed: the same seed, model and prompts give the same completions (on the same device);
            other prompts beside them change a completion only by rounding.
        temperature: of the softmax; 0 decodes greedily (``logp`` is then at temperature 1).
        stop: strings that end a completion, at the token that completes one; none may begin in
            the prompt.
        batch_size: sequences generated at once.

    Returns:
        ``len(prompts) * group_size`` rollouts. Of a sharded model all processes call this with the
        same arguments; each samples a share of the prompts, and has all rollouts in the end.

    Raises:
        ValueError: an empty prompt, a token id that the policy does not know, a prompt that leaves
            no room for the completion in its context, or an option out of its range.
        FloatingPointError: the policy's log-probs are not finite.
    """
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: expected at least one token")
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature must be at least 0, received {temperature}: 1 draws from the policy "
            "itself, 0 decodes greedily"
        )
    for name, number in (
        ("group_size", group_size),
        ("max_new_tokens", max_new_tokens),
        ("batch_size", batch_size),
    ):
        if number < 1:
            raise ValueError(f"expected a {name} of 1 or more, received {number}: raise it")
    if "" in stop:
        raise ValueError("expected stop strings of a character or more, received '': leave it out")
    vocabulary = policy.head.weight.shape[0]
    for i, prompt in enumerate(prompts):
        for token in prompt:
            if not isinstance(token, int) or not 0 <= token < vocabulary:
                raise ValueError(
                    f"prompt {i}: expected token ids from 0 to {vocabulary - 1}, received "
                    f"{token!r}: encode with the model's own tokenizer"
                )
        if len(prompt) + max_new_tokens > policy.context:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens: with max_new_tokens={max_new_tokens} it may "
                f"pass the policy's context of {policy.context:.0f}; expected a shorter one, or "
                "lower max_new_tokens"
            )
    # Prompts of like length go together: rows have room for the keys of the longest beside them.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    mine, per_batch = policy.world.share(order), max(1, batch_size // group_size)
    groups: dict[int, list[Rollout]] = {}

    def run() -> None:
        for start in range(0, len(mine), per_batch):
            indices = mine[start : start + per_batch]
            rollouts = _generate(
                policy,
                [tuple(prompts[i]) for i in indices],
                [
                    derive_seed(seed, "completion", i * group_size + k)
                    for i in indices
                    for k in range(group_size)
                ],
                max_new_tokens,
                temperature,
                list(stop),
            )
            for position, index in enumerate(indices):
                groups[index] = rollouts[position * group_size : (position + 1) * group_size]

    with policy.whole(), policy.active():
        policy.inside(run)
    for part in policy.world.gather(groups):
        groups |= part
    return [rollout for index in range(len(prompts)) for rollout in groups[index]]


def summarise(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Mean length, how many were cut off or ended by a stop string, how little they repeat."""
    if not rollouts:
        return {}
    count = len(rollouts)
    distinct = distinct_ngrams([r.completion for r in rollouts])
    return {
        "rollout/length": sum(len(r.completion) for r in rollouts) / count,
        "rollout/truncated": sum(r.finish == "length" for r in rollouts) / count,
        "rollout/stopped": sum(r.finish == "stop" for r in rollouts) / count,
        **({} if distinct is None else {"rollout/distinct": distinct}),
    }


def distinct_ngrams(completions: Sequence[Sequence[int]], n: int = 4) -> float | None:
    """Mean over completions of their different n-grams over all of them (distinct-n of Li et al.

    2016, arXiv 1510.03055, within a text): 1 without repetition, near 0 in a loop. Completions
    shorter than n have none; None if no other is there.
    """
    shares = []
    for tokens in completions:
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None


def largest_mismatch(rollouts: Sequence[Rollout], logp: Sequence[Tensor]) -> float:
    """Largest difference from other log-probs of the same tokens, one tensor per rollout."""
    sampled = torch.tensor([value for rollout in rollouts for value in rollout.logp])
    other = torch.cat(list(logp)).cpu()
    return float((sampled - other).abs().max())


class _Drawer:
    """Draws the next token of every row by the row's own numbers.

    Args:
        seeds: of each row.
        length: most tokens that are drawn.
        temperature: of the softmax; 0 takes the likeliest token.
        device: where the logits are.
    """

    def __init__(
        self, seeds: list[int], length: int, temperature: float, device: torch.device
    ) -> None:
        self.temperature = temperature
        generator = torch.Generator()  # of the CPU: the numbers are the same on every device
        draws = [
            torch.rand(length, generator=generator.manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.draws = sent(torch.stack(draws), device)  # [rows, length], uniform in [0, 1)

    def __call__(self, logits: Tensor, rows: Tensor, place: int) -> tuple[Tensor, Tensor]:
        """The tokens [R] of ``rows`` [R] at their ``place``, and their log-probs [R] float32."""
        if self.temperature:
            return draw(logits, self.draws[rows, place], self.temperature)
        logp, token = torch.log_softmax(logits, dim=-1).max(-1)
        return token, logp


class _Ends:
    """Notes where and why each row ended.

    Args:
        tokenizer: decodes the rows to look for stop strings.
        stop: strings that end a row.
        ends: tokens that end a row.
        rows: how many there are.
    """

    def __init__(self, tokenizer: Any, stop: list[str], ends: set[int], rows: int) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        self.ends = ends
        self.special = set(tokenizer.all_special_ids)
        # A stop string is looked for in the last tokens, each of a byte or more; the further ones
        # keep a character that is cut in two away from it.
        self.window = 8 + max((len(string.encode()) for string in stop), default=0)
        self.lengths = [0] * rows
        self.reasons: list[FinishReason | None] = [None] * rows
        self.shown: list[list[int]] = [[] for _ in range(rows)]  # the tokens that are text

    def read(self, rows: list[int], tokens: list[list[int]]) -> list[int]:
        """Read further tokens of rows; the places among them of those that go on."""
        for row, further in zip(rows, tokens, strict=True):
            for token in further:
                if self.reasons[row] is None:
                    self.lengths[row] += 1
                    self.reasons[row] = self._reason(self.shown[row], token)
        return [i for i, row in enumerate(rows) if self.reasons[row] is None]

    def _reason(self, shown: list[int], token: int) -> FinishReason | None:
        if self.stop and token not in self.special:
            shown.append(token)
            if self._stopped(shown[-self.window :]) and self._stopped(shown):
                return "stop"
        return "end" if token in self.ends else None

    def _stopped(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(string in text for string in self.stop)


@torch.no_grad()
def _generate(
    policy: LanguageModel,
    prompts: list[tuple[int, ...]],
    seeds: list[int],
    max_new_tokens: int,
    temperature: float,
    stop: list[str],
) -> list[Rollout]:
    """A completion for every seed; each prompt has as many, adjacent."""
    device, count = policy.device, len(seeds)
    of = [row * len(prompts) // count for row in range(count)]
    drawer = _Drawer(seeds, max_new_tokens, temperature, device)
    ends = _Ends(policy.tokenizer, stop, _ends_of_text(policy), count)
    tokens = torch.zeros(count, max_new_tokens, dtype=torch.int64, device=device)
    logp = torch.zeros(count, max_new_tokens, dtype=torch.float32, device=device)
    rows, alive = Rows(policy, prompts, of), torch.arange(count, device=device)
    every, read = _UNREAD.get(device.type, 16), 0
    for place in range(max_new_tokens):
        drawn, logp[alive, place] = drawer(policy.logits(rows.hidden), alive, place)
        tokens[alive, place] = drawn
        last = place + 1 == max_new_tokens
        if last or (place + 1) % every == 0:
            going = ends.read(alive.tolist(), tokens[alive, read : place + 1].tolist())
            read = place + 1
            if last or not going:
                break
            if len(going) <= _FEWER * len(alive):
                kept = sent(torch.tensor(going), device)
                rows.only(kept)
                alive, drawn = alive[kept], drawn[kept]
        rows.go_on(drawn)
    texts = zip(of, ends.lengths, ends.reasons, tokens.tolist(), logp.tolist(), strict=True)
    rollouts = [
        Rollout(
            prompt=prompts[prompt],
            completion=tuple(ids[:length]),
            logp=tuple(values[:length]),
            finish=reason or "length",
            text=policy.tokenizer.decode(ids[:length], skip_special_tokens=True),
        )
        for prompt, length, reason, ids, values in texts
    ]
    if not all(isfinite(value) for rollout in rollouts for value in rollout.logp):
        raise FloatingPointError(
            "log-probs of sampled tokens are not finite: expected finite logits from the policy; "
            "look for non-finite weights, or go on from an earlier checkpoint"
        )
    return rollouts


def _ends_of_text(policy: LanguageModel) -> set[int]:
    configured = policy.causal_lm.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, policy.tokenizer.eos_token_id] if i is not None}
