"""Packed against padded: log-probabilities of sampled completions under a small language model.

G completions of each prompt, GSM8K-like lengths, a Llama-shaped model of random weights (the
default has the shape of SmolLM2-135M). The padded formulations pad prompts on the left and
completions on the right, run the whole rectangle, and materialise the logits of the completion
part: once padded to the longest of a step (language.py), once to the fixed 300 + 824 tokens of the
seed paper's configurations. They go through the batch as many rows at a time as is fastest.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import airl_fast
from airl_fast.attention import enable_packed_attention, packed_forward, standard_attention
from airl_fast.packing import PackedBatch, Trace, pack
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.language import (
    STEP_PROMPTS,
    TINY,
    ModelShape,
    StepTraces,
    head_product,
    random_model,
    step_traces,
)
from benchmarks.lengths import MAX_COMPLETION, MAX_PROMPT
from benchmarks.padded import alone, log_probs, padding, rectangle, rows_a_pass

OPERATOR = "packing (scoring a batch)"
_REPEATED = "airl_fast, prompts repeated"
_CHECKED = 3  # sequences that are run alone in float64
_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class PackingInputs:
    """The model and the traces, in the order of their prompts."""

    model: LlamaForCausalLM
    step: StepTraces

    @property
    def traces(self) -> list[Trace]:
        """The samples."""
        return self.step.policy


@lru_cache(maxsize=1)
def packing_inputs(
    prompts: int,
    group: int,
    shape: ModelShape,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> PackingInputs:
    """Random prompts and completions of GSM8K-like lengths."""
    model = random_model(shape, seed).to(device, dtype)
    enable_packed_attention(model)
    return PackingInputs(model, step_traces(prompts, group, shape.vocab, seed))


def packing_case(
    prompts: int,
    group: int,
    shape: ModelShape,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """Score ``prompts`` x ``group`` completions with a model of this shape."""
    rows, fixed_rows = rows_a_pass(device)
    return Case(
        operator=OPERATOR,
        shape={
            "prompts": prompts, "of": STEP_PROMPTS, "G": group, "V": shape.vocab, "D": shape.hidden,
        },
        dtype=dtype,
        inputs=partial(packing_inputs, prompts, group, shape, seed, dtype, device),
        small=partial(packing_inputs, 2, 2, TINY, seed, dtype, device),
        oracle=lambda inputs: {"logp": torch.cat(_alone(inputs, range(len(inputs.traces))))},
        expected=_expected,
        yardstick=("product", lambda x: head_product(x.model.lm_head.weight, x.traces)),
        variants=[
            Variant("airl_fast", partial(_packed, True), "default", note="prompts stored once"),
            Variant(_REPEATED, partial(_packed, False), "default"),
            Variant(
                "padded",
                partial(_padded, False),
                note=f"to the longest of a step of {STEP_PROMPTS} prompts; {rows} rows a pass",
            ),
            Variant(
                "padded, fixed",
                partial(_padded, True),
                note=f"to {MAX_PROMPT} + {MAX_COMPLETION} tokens; rows a pass: {fixed_rows}; once",
                once=True,
            ),
        ],
        facts=_tokens,
        rounds=_ROUNDS,
    )  # fmt: skip


def _packed(share: bool, inputs: PackingInputs) -> Prepared:
    batch = pack(inputs.traces, share_prompts=share, device=inputs.model.device)
    return Prepared(partial(_packed_logp, inputs.model, batch))


def _packed_logp(model: LlamaForCausalLM, batch: PackedBatch) -> Outputs:
    with torch.no_grad():
        hidden = packed_forward(model.get_decoder(), batch)[batch.state_index]
        weight = model.lm_head.weight
        return {"logp": airl_fast.linear_logprob(hidden, weight, batch.targets)}


def _padded(fixed: bool, inputs: PackingInputs) -> Prepared:
    device = inputs.model.device
    left, width = padding(inputs.step, fixed)
    whole = rectangle(inputs.traces, left, width, device)
    batches = [batch for _, batch in whole.split(rows_a_pass(device)[fixed])]

    def call() -> Tensor:
        with torch.no_grad(), standard_attention(inputs.model):
            return torch.cat([log_probs(inputs.model, batch) for batch in batches])

    return Prepared(call, lambda logp: {"logp": logp[whole.actions]})


def _alone(inputs: PackingInputs, chosen: range) -> list[Tensor]:
    """Float64 log-probabilities of the chosen traces, each run alone."""
    model = LlamaForCausalLM(deepcopy(inputs.model.config)).double().eval().to(inputs.model.device)
    model.load_state_dict(inputs.model.state_dict())
    with torch.no_grad(), standard_attention(model):
        return [log_probs(model, alone(inputs.traces[i], model.device))[0] for i in chosen]


def _expected(inputs: PackingInputs) -> Mapping[str, Sampled]:
    count = len(inputs.traces)
    chosen = range(0, count, max(1, count // _CHECKED))
    ends = np.cumsum([len(trace.completion) for trace in inputs.traces])
    rows = [torch.arange(ends[i] - len(inputs.traces[i].completion), ends[i]) for i in chosen]
    return {"logp": Sampled(torch.cat(_alone(inputs, chosen)), torch.cat(rows))}


def _tokens(inputs: PackingInputs) -> Mapping[str, Mapping[str, float]]:
    """Tokens that each formulation runs through the model."""
    padded, fixed = (sum(padding(inputs.step, to)) for to in (False, True))
    return {
        "airl_fast": {"tokens": pack(inputs.traces).num_tokens},
        _REPEATED: {"tokens": sum(trace.num_tokens for trace in inputs.traces)},
        "padded": {"tokens": len(inputs.traces) * padded},
        "padded, fixed": {"tokens": len(inputs.traces) * fixed},
    }
