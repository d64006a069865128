"""Sampling with log-probabilities, the first part of a step.

``airl_fast.rollout.sample`` beside transformers' ``generate`` with its logits kept and gathered
from, on the prompts of step.py. The models know no end of text, so that every completion is as
long as it may be. A sample cannot be compared with another; what is checked is that the
log-probabilities that come with it are those of its tokens, run alone in float64.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from airl_fast.attention import standard_attention
from airl_fast.language_model import LanguageModel, Origin
from airl_fast.packing import Trace
from airl_fast.rollout import Rollout, sample
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.language import TINY, ModelShape, head_product, random_model, step_traces
from benchmarks.padded import alone, log_probs

OPERATOR = "sampling (with log-probs)"
_CHECKED = 3  # completions that are run alone
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class SamplingInputs:
    """A policy, prompts as token ids, completions of a prompt, tokens of a completion."""

    policy: LanguageModel
    prompts: list[tuple[int, ...]]
    group: int
    tokens: int
    seed: int


def sampling_inputs(
    prompts: int,
    group: int,
    tokens: int,
    shape: ModelShape,
    seed: int,
    *,
    dtype: torch.dtype,
    device: str,
) -> SamplingInputs:
    """The prompts of a step, and a model that never ends a text."""
    model = random_model(shape, seed).to(device, dtype)
    model.generation_config.eos_token_id = None
    words = {f"<{i}>": i for i in range(shape.vocab)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words)), pad_token="<0>"
    )
    step = step_traces(prompts, group, shape.vocab, seed)
    ids = [trace.prompt for trace in step.experts]
    policy = LanguageModel(model, tokenizer, Origin(model="random"))
    return SamplingInputs(policy, ids, group, tokens, seed)


def sampling_case(
    prompts: int,
    group: int,
    tokens: int,
    shape: ModelShape,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """``group`` completions of each of ``prompts`` prompts, ``tokens`` tokens each."""
    inputs = partial(sampling_inputs, dtype=dtype, device=device)
    peer = partial(Variant, "transformers generate", _generate)
    # of log-probabilities, absolute: those of half precision are of rounded logits
    tolerance = None if dtype == torch.float32 else 0.2
    return Case(
        operator=OPERATOR,
        shape={
            "prompts": prompts, "G": group, "tokens": tokens, "V": shape.vocab, "D": shape.hidden,
        },
        dtype=dtype,
        inputs=partial(inputs, prompts, group, tokens, shape, seed),
        small=partial(inputs, 2, 2, 5, TINY, seed),
        oracle=_wanted,
        expected=lambda inputs: {k: Sampled(v) for k, v in _wanted(inputs).items()},
        yardstick=("product", _product),
        variants=[
            Variant("airl_fast", _ours, "default", tolerance=tolerance),
            peer(note="log_softmax of the kept logits", tolerance=tolerance),
        ],
        rounds=_ROUNDS,
        memory=False,
    )  # fmt: skip


def _product(inputs: SamplingInputs) -> Callable[[], Tensor]:
    count = len(inputs.prompts) * inputs.group
    ones = (1,) * inputs.tokens
    traces = [Trace(prompt=(1,), completion=ones, span_lengths=ones)] * count
    return head_product(inputs.policy.head.weight, traces)


def _wanted(inputs: SamplingInputs) -> Outputs:
    count = len(inputs.prompts) * inputs.group
    return {
        "lengths": torch.full((count,), float(inputs.tokens), dtype=torch.float64),
        "logp less that of the tokens": torch.zeros(
            min(count, _CHECKED) * inputs.tokens, dtype=torch.float64
        ),
    }


def _ours(inputs: SamplingInputs) -> Prepared:
    def call() -> list[Rollout]:
        return sample(
            inputs.policy,
            inputs.prompts,
            group_size=inputs.group,
            max_new_tokens=inputs.tokens,
            seed=inputs.seed,
        )

    def read(rollouts: list[Rollout]) -> Outputs:
        completions = [rollout.completion for rollout in rollouts]
        return _read(inputs, completions, [torch.tensor(rollout.logp) for rollout in rollouts])

    return Prepared(call, read)


def _generate(inputs: SamplingInputs) -> Prepared:
    model: LlamaForCausalLM = inputs.policy.model
    wide = max(map(len, inputs.prompts))
    device = inputs.policy.device
    ids = torch.tensor([[0] * (wide - len(p)) + list(p) for p in inputs.prompts], device=device)
    mask = torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in inputs.prompts]).to(device)

    def call() -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), standard_attention(model):
            torch.manual_seed(inputs.seed)
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                num_return_sequences=inputs.group,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=inputs.tokens,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            drawn = output.sequences[:, wide:]
            steps = [
                logits.float().log_softmax(-1).gather(1, drawn[:, i, None])
                for i, logits in enumerate(output.logits)
            ]
            return drawn, torch.cat(steps, 1)

    def read(result: tuple[Tensor, Tensor]) -> Outputs:
        drawn, logp = result
        return _read(inputs, [tuple(row) for row in drawn.tolist()], list(logp))

    return Prepared(call, read)


def _read(
    inputs: SamplingInputs, completions: list[tuple[int, ...]], logp: list[Tensor]
) -> Outputs:
    model: LlamaForCausalLM = deepcopy(inputs.policy.model).double()
    differences = []
    with torch.no_grad(), standard_attention(model):
        for i in range(min(len(completions), _CHECKED)):
            ids = completions[i]
            trace = Trace(
                prompt=inputs.prompts[i // inputs.group],
                completion=ids,
                span_lengths=(1,) * len(ids),
            )
            wanted = log_probs(model, alone(trace, model.device))[0]
            differences.append(logp[i].to(wanted) - wanted)
    return {
        "lengths": torch.tensor([float(len(ids)) for ids in completions]),
        "logp less that of the tokens": torch.cat(differences),
    }
