"""Sampling completions with transformers' generate, with the log-probs they were sampled at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from airl_fast.attention import standard_attention
from airl_fast.loading import LanguageModel

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
        seed: the same seed, model and prompts give the same completions (on the same device).
        temperature: of the softmax; 0 decodes greedily (``logp`` is then at temperature 1).
        stop: strings that end a completion.
        batch_size: sequences generated at once.

    Returns:
        ``len(prompts) * group_size`` rollouts.

    Raises:
        ValueError: an empty prompt, or a temperature below 0.
    """
    empty = [i for i, prompt in enumerate(prompts) if not len(prompt)]
    if empty:
        raise ValueError(f"prompt {empty[0]} is empty: expected at least one token")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, received {temperature}")
    # Prompts of like length go together, so that little of a batch is padding.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    per_batch = max(1, batch_size // group_size)
    groups: dict[int, list[Rollout]] = {}
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), standard_attention(policy.causal_lm):
        torch.manual_seed(seed)
        for start in range(0, len(order), per_batch):
            indices = order[start : start + per_batch]
            rollouts = _generate(
                policy,
                [tuple(prompts[i]) for i in indices],
                group_size,
                max_new_tokens,
                temperature,
                list(stop),
            )
            for position, index in enumerate(indices):
                groups[index] = rollouts[position * group_size : (position + 1) * group_size]
    return [rollout for index in range(len(prompts)) for rollout in groups[index]]


class _Recorder:
    """A logits processor that sets the temperature and keeps the log-prob of what was drawn.

    The token drawn from one step's scores is seen at the next step, so one [B, V] tensor is held,
    not one per step.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature or 1.0
        self.previous: Tensor | None = None
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.collect(input_ids)
        self.previous = torch.log_softmax(scores.float() / self.temperature, dim=-1)
        return self.previous

    def collect(self, input_ids: Tensor) -> None:
        """Keep the log-prob of the last token of ``input_ids`` under the previous scores."""
        if self.previous is not None:
            self.logp.append(self.previous.gather(1, input_ids[:, -1:])[:, 0])


@torch.no_grad()
def _generate(
    policy: LanguageModel,
    prompts: list[tuple[int, ...]],
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    stop: list[str],
) -> list[Rollout]:
    from transformers import LogitsProcessorList

    tokenizer = policy.tokenizer
    width = max(len(prompt) for prompt in prompts)
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    recorder = _Recorder(temperature)
    ends = _ends_of_text(policy)
    with policy.active():
        output = policy.causal_lm.generate(
            input_ids=ids.repeat_interleave(group_size, 0).to(policy.device),
            attention_mask=mask.repeat_interleave(group_size, 0).to(policy.device),
            generation_config=_generation_config(policy, max_new_tokens, temperature, stop),
            logits_processor=LogitsProcessorList([recorder]),
            tokenizer=tokenizer if stop else None,
        )
    recorder.collect(output)
    logp = torch.stack(recorder.logp, 1).tolist()
    new = output[:, width:].tolist()
    return [
        _rollout(prompts[row // group_size], new[row], logp[row], tokenizer, stop, ends)
        for row in range(len(new))
    ]


def _generation_config(
    policy: LanguageModel, max_new_tokens: int, temperature: float, stop: list[str]
) -> Any:
    """The model's end of text, and nothing of its settings that would change the distribution."""
    from transformers import GenerationConfig

    # The recorder divides by the temperature; top-k and top-p would renormalise what is left.
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        pad_token_id=policy.tokenizer.pad_token_id,
        eos_token_id=sorted(_ends_of_text(policy)),
        stop_strings=stop or None,
        **(drawing if temperature > 0 else {"do_sample": False}),
    )


def _ends_of_text(policy: LanguageModel) -> set[int]:
    configured = policy.causal_lm.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in [*ids, policy.tokenizer.eos_token_id] if i is not None}


def _rollout(
    prompt: tuple[int, ...],
    ids: list[int],
    logp: list[float],
    tokenizer: Any,
    stop: list[str],
    ends: set[int],
) -> Rollout:
    # Rows that finish before their neighbours are padded on the right, perhaps with end-of-text.
    end_at = next((i + 1 for i, token in enumerate(ids) if token in ends), None)
    stop_at = _first_stop(ids[:end_at], tokenizer, stop)
    length, finish = len(ids), "length"
    if stop_at is not None:
        length, finish = stop_at, "stop"
    elif end_at is not None:
        length, finish = end_at, "end"
    return Rollout(
        prompt=prompt,
        completion=tuple(ids[:length]),
        logp=tuple(logp[:length]),
        finish=cast(FinishReason, finish),
        text=tokenizer.decode(ids[:length], skip_special_tokens=True),
    )


def _first_stop(ids: list[int], tokenizer: Any, stop: list[str]) -> int | None:
    """How many tokens it takes until the text holds a stop string; None if it never does."""

    def stopped(count: int) -> bool:
        text = tokenizer.decode(ids[:count], skip_special_tokens=True)
        return any(string in text for string in stop)

    if not stop or not stopped(len(ids)):
        return None
    return next(count for count in range(1, len(ids) + 1) if stopped(count))
