"""Language models of random weights, and traces of GSM8K-like lengths, for the end-to-end cases.

A case runs a few prompts of a step, of mean size: time grows with their number. What a formulation
pads to is the longest of a whole step, in the mean over many steps: that of one draw is a matter
of luck.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from airl_fast.packing import Source, Trace
from benchmarks.lengths import COMPLETION, PROMPT, completion_lengths, prompt_lengths

STEP_PROMPTS = 8  # of the whole step
_STEPS = 256  # over which the longest is averaged


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; the defaults are SmolLM2-135M's."""

    vocab: int = 49152
    hidden: int = 576
    inner: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3


TINY = ModelShape(vocab=97, hidden=24, inner=32, layers=2, heads=4, kv_heads=2)


@dataclass(frozen=True)
class StepTraces:
    """What a case runs of a step.

    Attributes:
        policy: G samples of each prompt, in the order of their prompts.
        experts: one demonstration of each prompt.
        longest_prompt: tokens of the longest prompt of a step.
        longest_completion: tokens of the longest sample or demonstration of a step.
    """

    policy: list[Trace]
    experts: list[Trace]
    longest_prompt: int
    longest_completion: int


def random_model(shape: ModelShape, seed: int) -> LlamaForCausalLM:
    """A Llama of this shape with transformers' own initial weights, its head tied."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # transformers draws from the global generator
        config = LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()


def step_traces(
    prompts: int, group: int, vocab: int, seed: int, of: int = STEP_PROMPTS
) -> StepTraces:
    """``prompts`` of a step of ``of`` prompts, ``group`` samples each; spans of a token.

    Those whose tokens, samples and a demonstration included, are nearest to the mean of all steps.

    Raises:
        ValueError: more prompts than the step has.
    """
    if prompts > of:
        raise ValueError(f"expected at most the step's {of} prompts, received {prompts}")
    rng = np.random.default_rng(seed)
    lengths, samples, demonstrations = _lengths(of, group, rng)
    tokens = [lengths[i] + sum(samples[i]) + demonstrations[i] for i in range(of)]
    mean = PROMPT + (group + 1) * COMPLETION
    chosen = sorted(range(of), key=lambda i: abs(tokens[i] - mean))[:prompts]

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocab, length).tolist())

    def traces(counts: Sequence[int], place: int, source: Source) -> list[Trace]:
        return [
            Trace(
                prompt=ids[place],
                completion=drawn(count),
                span_lengths=(1,) * count,
                group=place,
                source=source,
            )
            for count in counts
        ]

    ids = [drawn(lengths[i]) for i in chosen]
    places = list(enumerate(chosen))
    policy = [t for k, i in places for t in traces(samples[i], k, Source.POLICY)]
    experts = [t for k, i in places for t in traces([demonstrations[i]], k, Source.EXPERT)]
    longest_prompt, longest_completion = _mean_longest(of, group)
    return StepTraces(
        policy=policy,
        experts=experts,
        longest_prompt=max(longest_prompt, *map(len, ids)),
        longest_completion=max(longest_completion, *(len(t.completion) for t in policy + experts)),
    )


def _lengths(
    of: int, group: int, rng: np.random.Generator
) -> tuple[list[int], list[list[int]], list[int]]:
    """Tokens of the prompts of a step, of their samples, and of their demonstrations."""
    prompts = prompt_lengths(of, rng)
    return prompts, [completion_lengths(group, rng) for _ in range(of)], completion_lengths(of, rng)


@cache
def _mean_longest(of: int, group: int) -> tuple[int, int]:
    """Tokens of the longest prompt and of the longest completion of a step, in the mean."""
    rng = np.random.default_rng(0)
    steps = [_lengths(of, group, rng) for _ in range(_STEPS)]
    prompts = [max(prompts) for prompts, _, _ in steps]
    completions = [max(max(map(max, samples)), max(experts)) for _, samples, experts in steps]
    return round(np.mean(prompts)), round(np.mean(completions))


def head_product(weight: Tensor, traces: Sequence[Trace]) -> Callable[[], Tensor]:
    """The head's matrix product over the traces' actions, into memory that is already there."""
    weight = weight.detach()
    actions = sum(len(trace.completion) for trace in traces)
    hidden = weight.new_ones(actions, weight.shape[1])
    return partial(torch.mm, hidden, weight.T, out=hidden.new_zeros(actions, len(weight)))
