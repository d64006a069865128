"""Language models of random weights, and traces of GSM8K-like lengths, for the end-to-end cases.

A case runs a few prompts of a step and knows the lengths of the whole step: what a formulation
pads to is the longest of the step, and time grows with the number of prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from airl_fast.packing import Source, Trace
from benchmarks.lengths import completion_lengths, prompt_lengths

STEP_PROMPTS = 16  # of the whole step


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
        longest_prompt: tokens, of all prompts of the step.
        longest_completion: tokens, of all samples and demonstrations of the step.
    """

    policy: list[Trace]
    experts: list[Trace]
    longest_prompt: int
    longest_completion: int


def random_model(
    shape: ModelShape, seed: int, dtype: torch.dtype = torch.float32
) -> LlamaForCausalLM:
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
        return LlamaForCausalLM(config).to(dtype).eval()


def step_traces(
    prompts: int, group: int, vocab: int, seed: int, of: int = STEP_PROMPTS
) -> StepTraces:
    """The first ``prompts`` of a step of ``of`` prompts, ``group`` samples each; spans of a token.

    Raises:
        ValueError: more prompts than the step has.
    """
    if prompts > of:
        raise ValueError(f"expected at most the step's {of} prompts, received {prompts}")
    rng = np.random.default_rng(seed)
    lengths = prompt_lengths(of, rng)
    samples = [completion_lengths(group, rng) for _ in range(of)]
    demonstrations = completion_lengths(of, rng)

    def drawn(length: int) -> tuple[int, ...]:
        return tuple(rng.integers(3, vocab, length).tolist())

    def traces(counts: Sequence[int], prompt: int, source: Source) -> list[Trace]:
        return [
            Trace(
                prompt=prompt_ids[prompt],
                completion=drawn(count),
                span_lengths=(1,) * count,
                group=prompt,
                source=source,
            )
            for count in counts
        ]

    prompt_ids = [drawn(length) for length in lengths[:prompts]]
    return StepTraces(
        policy=[t for i in range(prompts) for t in traces(samples[i], i, Source.POLICY)],
        experts=[t for i in range(prompts) for t in traces([demonstrations[i]], i, Source.EXPERT)],
        longest_prompt=max(lengths),
        longest_completion=max(max(map(max, samples)), max(demonstrations)),
    )


def head_product(weight: Tensor, traces: Sequence[Trace]) -> Callable[[], Tensor]:
    """The head's matrix product over the traces' actions, into memory that is already there."""
    weight = weight.detach()
    actions = sum(len(trace.completion) for trace in traces)
    hidden = weight.new_ones(actions, weight.shape[1])
    return partial(torch.mm, hidden, weight.T, out=hidden.new_zeros(actions, len(weight)))
