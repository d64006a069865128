"""Packed against padded: log-probabilities of sampled completions under a small language model.

G completions of each prompt, GSM8K-like lengths, a Llama-shaped model of random weights (the
default has the shape of SmolLM2-135M). The padded formulations pad prompts on the left and
completions on the right, run the whole rectangle, and materialise the logits of the completion
part: once padded to the longest of the batch, once to the fixed 300 + 824 tokens of the seed
paper's configurations. They go through the batch a few rows at a time, to fit in memory.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

import airl_fast
from airl_fast.attention import enable_packed_attention, packed_forward, standard_attention
from airl_fast.packing import PackedBatch, Trace, pack
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.lengths import MAX_COMPLETION, MAX_PROMPT, completion_lengths, prompt_lengths

OPERATOR = "packing (scoring a batch)"
_REPEATED = "airl_fast, prompts repeated"
_ROWS = 4  # of a padded forward pass
_CHECKED = 3  # sequences that are run alone in float64


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


@dataclass(frozen=True, eq=False)
class PackingInputs:
    """The model and the traces, in the order of their prompts."""

    model: LlamaForCausalLM
    traces: list[Trace]


@lru_cache(maxsize=1)
def packing_inputs(prompts: int, group: int, shape: ModelShape, seed: int) -> PackingInputs:
    """Random prompts and completions of GSM8K-like lengths."""
    torch.manual_seed(seed)  # transformers draws initial weights from the global generator
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
    model = LlamaForCausalLM(config).eval()
    enable_packed_attention(model)
    rng = np.random.default_rng(seed)
    traces = []
    for number, length in enumerate(prompt_lengths(prompts, rng)):
        prompt = tuple(rng.integers(3, shape.vocab, length).tolist())
        for count in completion_lengths(group, rng):
            completion = tuple(rng.integers(3, shape.vocab, count).tolist())
            traces.append(
                Trace(prompt=prompt, completion=completion, span_lengths=(count,), group=number)
            )
    return PackingInputs(model, traces)


def packing_case(prompts: int, group: int, shape: ModelShape, seed: int) -> Case:
    """Score ``prompts`` x ``group`` completions with a model of this shape, in float32."""
    return Case(
        operator=OPERATOR,
        shape={"prompts": prompts, "G": group, "V": shape.vocab, "D": shape.hidden},
        dtype=torch.float32,
        inputs=partial(packing_inputs, prompts, group, shape, seed),
        small=partial(packing_inputs, 2, 2, TINY, seed),
        oracle=lambda inputs: {"logp": torch.cat(_alone(inputs, range(len(inputs.traces))))},
        expected=_expected,
        yardstick=("product", _product),
        variants=[
            Variant("airl_fast", partial(_packed, True), "default", note="prompts stored once"),
            Variant(_REPEATED, partial(_packed, False), "default"),
            Variant("padded", partial(_padded, False), note=f"to the longest; {_ROWS} rows a pass"),
            Variant(
                "padded, fixed",
                partial(_padded, True),
                note=f"to {MAX_PROMPT} + {MAX_COMPLETION} tokens; {_ROWS} rows a pass",
            ),
        ],
        facts=_tokens,
    )


def _product(inputs: PackingInputs) -> Callable[[], Tensor]:
    """The head's product over the batch's actions."""
    weight = inputs.model.lm_head.weight.detach()
    actions = sum(len(trace.completion) for trace in inputs.traces)
    hidden = torch.ones(actions, weight.shape[1])
    return partial(torch.mm, hidden, weight.T, out=hidden.new_zeros(actions, len(weight)))


def _packed(share: bool, inputs: PackingInputs) -> Prepared:
    batch = pack(inputs.traces, share_prompts=share)
    return Prepared(partial(_packed_logp, inputs.model, batch))


def _packed_logp(model: LlamaForCausalLM, batch: PackedBatch) -> Outputs:
    with torch.no_grad():
        hidden = packed_forward(model.get_decoder(), batch)[batch.state_index]
        weight = model.lm_head.weight
        return {"logp": airl_fast.linear_logprob(hidden, weight, batch.targets)}


def _padded(fixed: bool, inputs: PackingInputs) -> Prepared:
    ids, mask, width = _rectangle(inputs.traces, fixed)
    lengths = [len(trace.completion) for trace in inputs.traces]

    def call() -> Tensor:
        pieces = []
        with torch.no_grad(), standard_attention(inputs.model):
            for rows, seen in zip(ids.split(_ROWS), mask.split(_ROWS), strict=True):
                positions = (seen.cumsum(1) - 1).clamp(min=0)
                logits = inputs.model(
                    input_ids=rows,
                    attention_mask=seen,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=width + 1,
                ).logits[:, :-1]
                log_probs = functional.log_softmax(logits.float(), -1)
                pieces.append(log_probs.gather(-1, rows[:, -width:, None]).squeeze(-1))
        return torch.cat(pieces)

    return Prepared(
        call,
        lambda logp: {"logp": torch.cat([row[:n] for row, n in zip(logp, lengths, strict=True)])},
    )


def _rectangle(traces: list[Trace], fixed: bool) -> tuple[Tensor, Tensor, int]:
    """Ids and mask ``[B, left + width]``; prompts end, and completions begin, in one column."""
    left = MAX_PROMPT if fixed else max(len(trace.prompt) for trace in traces)
    width = MAX_COMPLETION if fixed else max(len(trace.completion) for trace in traces)
    ids = torch.zeros(len(traces), left + width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, trace in enumerate(traces):
        begin, end = left - len(trace.prompt), left + len(trace.completion)
        ids[row, begin:end] = torch.tensor(trace.prompt + trace.completion)
        mask[row, begin:end] = 1
    return ids, mask, width


def _alone(inputs: PackingInputs, chosen: range) -> list[Tensor]:
    """Float64 log-probabilities of the chosen traces, each run alone."""
    model = LlamaForCausalLM(deepcopy(inputs.model.config)).double().eval()
    model.load_state_dict(inputs.model.state_dict())
    results = []
    with torch.no_grad(), standard_attention(model):
        for index in chosen:
            trace = inputs.traces[index]
            ids = torch.tensor([trace.prompt + trace.completion])
            log_probs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
            states = log_probs[len(trace.prompt) - 1 : -1]
            results.append(states.gather(1, ids[0, len(trace.prompt) :, None]).squeeze(1))
    return results


def _expected(inputs: PackingInputs) -> Mapping[str, Sampled]:
    count = len(inputs.traces)
    chosen = range(0, count, max(1, count // _CHECKED))
    ends = np.cumsum([len(trace.completion) for trace in inputs.traces])
    rows = [torch.arange(ends[i] - len(inputs.traces[i].completion), ends[i]) for i in chosen]
    return {"logp": Sampled(torch.cat(_alone(inputs, chosen)), torch.cat(rows))}


def _tokens(inputs: PackingInputs) -> Mapping[str, Mapping[str, float]]:
    """Tokens that each formulation runs through the model."""
    return {
        "airl_fast": {"tokens": pack(inputs.traces).num_tokens},
        _REPEATED: {"tokens": sum(trace.num_tokens for trace in inputs.traces)},
        "padded": {"tokens": _rectangle(inputs.traces, False)[0].numel()},
        "padded, fixed": {"tokens": len(inputs.traces) * (MAX_PROMPT + MAX_COMPLETION)},
    }
