"""Sampling completions with transformers' generate, with the log-probs they were sampled at.

Every token is drawn by a number of its own: a function of the seed, the completion's place among
all that are asked for, and the token's place in it. So a completion does not depend, but for the
rounding of its logits, on what is sampled beside it or on how many processes share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from airl_fast.attention import standard_attention
from airl_fast.batches import derive_seed
from airl_fast.language_model import LanguageModel

FinishReason = Literal["end", "stop", "length"]


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
        ValueError: an empty prompt, a token id that the policy does not know, or an option out of
            its range.
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
    # Prompts of like length go together, so that little of a batch is padding.
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

    with policy.whole(), standard_attention(policy.causal_lm):
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
    """A logits processor that draws the next token of every row and keeps its log-prob.

    generate() decodes greedily what it returns: 0 for the token that was drawn, -inf elsewhere.

    Args:
        seeds: of each row.
        length: most tokens that are drawn.
        temperature: of the softmax; 0 takes the likeliest token.
        device: where the scores are.
    """

    def __init__(
        self, seeds: list[int], length: int, temperature: float, device: torch.device
    ) -> None:
        self.temperature = temperature
        self.logp: list[Tensor] = []  # [rows] of each token
        generator = torch.Generator()  # of the CPU: the numbers are the same on every device
        draws = [
            torch.rand(length, generator=generator.manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
        self.draws = torch.stack(draws, 1).to(device)  # [length, rows], uniform in [0, 1)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logp = torch.log_softmax(scores.float() / (self.temperature or 1.0), dim=-1)
        token = self._drawn(logp) if self.temperature else logp.argmax(-1, keepdim=True)
        self.logp.append(logp.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)

    def _drawn(self, logp: Tensor) -> Tensor:
        """The inverse of the distribution function, [rows, 1]: the first token that passes u."""
        total = logp.double().exp().cumsum(-1)
        u = self.draws[len(self.logp)][:, None] * total[:, -1:]  # the sum is 1 but for rounding
        total[:, -1] = torch.inf  # the last token ends the range, however u was rounded
        last = total.shape[-1] - 1  # beyond it only for NaN, which is refused at the end
        return torch.searchsorted(total, u, right=True).clamp_(max=last)


class _Ends:
    """A stopping criterion that notes where and why each row ended.

    transformers' own criteria do not tell which rows they ended, and its stop strings may begin in
    the prompt: a row that ends so cannot be told from one that draws padding.
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

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        for row, token in enumerate(input_ids[:, -1].tolist()):
            if self.reasons[row] is None:
                self.lengths[row] += 1
                self.reasons[row] = self._reason(self.shown[row], token)
        done = [reason is not None for reason in self.reasons]
        return torch.tensor(done, device=input_ids.device)

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
    from transformers import LogitsProcessorList, StoppingCriteriaList

    tokenizer = policy.tokenizer
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    group_size = len(seeds) // len(prompts)
    drawer = _Drawer(seeds, max_new_tokens, temperature, policy.device)
    tokens_that_end = _ends_of_text(policy)
    ends = _Ends(tokenizer, stop, tokens_that_end, len(seeds))
    with policy.active(), _no_settings_of_its_own(policy.causal_lm):
        output = policy.causal_lm.generate(
            input_ids=ids.repeat_interleave(group_size, 0).to(policy.device),
            attention_mask=mask.repeat_interleave(group_size, 0).to(policy.device),
            generation_config=_generation_config(pad, tokens_that_end, max_new_tokens),
            logits_processor=LogitsProcessorList([drawer]),
            stopping_criteria=StoppingCriteriaList([ends]),
            synced_gpus=False,  # the weights are whole here: no rank waits for another
        )
    drawn = torch.stack(drawer.logp, 1)
    if not drawn.isfinite().all():
        raise FloatingPointError(
            "log-probs of sampled tokens are not finite: expected finite logits from the policy; "
            "look for non-finite weights, or go on from an earlier checkpoint"
        )
    logp = drawn.tolist()
    new = output[:, width:].tolist()
    return [
        Rollout(
            prompt=prompts[row // group_size],
            completion=tuple(new[row][:length]),
            logp=tuple(logp[row][:length]),
            finish=ends.reasons[row] or "length",
            text=tokenizer.decode(new[row][:length], skip_special_tokens=True),
        )
        for row, length in enumerate(ends.lengths)
    ]


@contextmanager
def _no_settings_of_its_own(model: Any) -> Iterator[None]:
    """Take a model's generation settings away: generate() falls back on them, whatever it is given.

    A repetition penalty or top-k there would change the distribution and not the log-probs.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _generation_config(pad: int, ends: set[int], max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        do_sample=False,  # the drawer has drawn
    )


def _ends_of_text(policy: LanguageModel) -> set[int]:
    configured = policy.causal_lm.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, policy.tokenizer.eos_token_id] if i is not None}
