"""Attention of a packed batch alone, forward, or forward and backward.

T tokens of prompts that G completions share, lengths like GSM8K's, heads of SmolLM2-135M's shape.
``airl_fast.attention.packed_attention`` beside itself with prompts repeated, and beside torch's
scaled_dot_product_attention a sequence at a time and padded to the longest; their inputs are
gathered, padded and repeated beforehand, and none needs a mask. The yardstick is one product with
the flops of the scores that are looked at: two products of them forward, five more backward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import airl_fast
from airl_fast.attention import packed_attention
from airl_fast.layout import ranges_of
from airl_fast.packing import PackedBatch, Trace, pack
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.language import TINY, ModelShape, step_traces
from tests import oracle

OPERATOR = "attention (packed)"
_GRADIENTS = "d_query", "d_key", "d_value"
_SIDE = 1024  # of the yardstick's square matrix
_LAYER = nn.Identity()  # whose attention it is: it has no say


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """A batch whose token i is token i, and its heads.

    Attributes:
        traces: what is packed; a token's id is its place in the batch.
        batch: with prompts stored once.
        query: [T, H, E].
        key: [T, Hk, E].
        value: [T, Hk, E].
        upstream: [T, H, E], the gradient at the results; 0 at prompts.
        gradient: whether a call has a backward pass.
    """

    traces: list[Trace]
    batch: PackedBatch
    query: Tensor
    key: Tensor
    value: Tensor
    upstream: Tensor
    gradient: bool

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        return self.query, self.key, self.value


def attention_inputs(
    prompts: int,
    group: int,
    shape: ModelShape,
    seed: int,
    gradient: bool,
    dtype: torch.dtype,
    device: str,
) -> AttentionInputs:
    """Random heads for the samples of a step."""
    traces = step_traces(prompts, group, shape.vocab, seed).policy
    batch = pack(traces)
    places = torch.arange(batch.num_tokens)
    traces = [_renamed(trace, rows) for trace, rows in zip(traces, _tokens(batch), strict=True)]
    size = shape.hidden // shape.heads
    generator = torch.Generator().manual_seed(seed)

    def heads(count: int) -> Tensor:
        drawn = torch.randn(len(places), count, size, generator=generator)
        return drawn.to(device, dtype)

    upstream = heads(shape.heads)
    sampled = torch.zeros(len(places), dtype=torch.bool)
    sampled[batch.action_index] = True
    upstream[~sampled] = 0
    kv = shape.kv_heads
    return AttentionInputs(
        traces, pack(traces, device=device), heads(shape.heads), heads(kv), heads(kv), upstream,
        gradient,
    )  # fmt: skip


def _tokens(batch: PackedBatch) -> list[list[int]]:
    """The places of every sequence's tokens in the batch."""
    places = []
    actions = batch.action_index.tolist()
    segments = ranges_of(batch).tolist()
    for begin, end in pairwise(batch.cu_actions.tolist()):
        first, count, prompt, shared, _ = next(
            s for s in segments if s[0] <= actions[begin] < s[0] + s[1]
        )
        assert actions[end - 1] == first + count - 1
        places.append([*range(prompt, prompt + shared), *range(first, first + count)])
    return places


def _renamed(trace: Trace, places: list[int]) -> Trace:
    prompt = len(trace.prompt)
    return Trace(
        prompt=tuple(places[:prompt]),
        completion=tuple(places[prompt:]),
        span_lengths=trace.span_lengths,
        group=trace.group,
    )


def attention_case(
    prompts: int,
    group: int,
    shape: ModelShape,
    seed: int,
    gradient: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    """The samples of ``prompts`` prompts, ``group`` of each."""
    make = partial(attention_inputs, seed=seed, gradient=gradient, dtype=dtype, device=device)
    return Case(
        operator=OPERATOR.replace(")", ", gradient)") if gradient else OPERATOR,
        shape={
            "prompts": prompts, "G": group, "H": shape.heads, "Hk": shape.kv_heads,
            "E": shape.hidden // shape.heads,
        },
        dtype=dtype,
        inputs=partial(make, prompts, group, shape),
        small=partial(make, 2, 2, TINY),
        oracle=_oracle,
        expected=lambda inputs: {k: Sampled(v) for k, v in _oracle(inputs).items()},
        yardstick=("product", _product),
        variants=[
            Variant("airl_fast", partial(_packed, True), "default", note="prompts stored once"),
            *([] if device != "cpu" else [_BY_TORCH]),
            Variant("airl_fast, prompts repeated", partial(_packed, False), "default"),
            Variant("torch, a sequence at a time", _one_by_one),
            Variant("torch, padded", _padded, note="to the longest, on the right"),
        ],
        facts=lambda inputs: {"airl_fast": {"tokens": inputs.batch.num_tokens}},
        memory=False,
    )  # fmt: skip


def _product(inputs: AttentionInputs) -> Callable[[], Tensor]:
    scores = sum(n * shared + n * (n + 1) // 2 for _, n, _, shared, _ in _table(inputs))
    products = 7 if inputs.gradient else 2
    flops = products * 2 * scores * inputs.query.shape[1] * inputs.query.shape[2]
    rows = max(1, flops // (2 * _SIDE * _SIDE))
    a, b = inputs.query.new_ones(rows, _SIDE), inputs.query.new_ones(_SIDE, _SIDE)
    return partial(torch.mm, a, b, out=a.new_zeros(rows, _SIDE))


def _table(inputs: AttentionInputs) -> list[list[int]]:
    rows: list[list[int]] = ranges_of(inputs.batch).tolist()
    return rows


def _scale(inputs: AttentionInputs) -> float:
    return float(inputs.query.shape[-1] ** -0.5)


def _oracle(inputs: AttentionInputs) -> Outputs:
    leaves = [x.detach().clone().requires_grad_() for x in inputs.heads]
    out = oracle.attention(ranges_of(inputs.batch), *leaves, _scale(inputs), None)
    outputs = {"out": out.detach()[inputs.batch.action_index]}
    if inputs.gradient:
        grads = torch.autograd.grad((out * inputs.upstream).sum(), leaves)
        outputs |= dict(zip(_GRADIENTS, (g.double() for g in grads), strict=True))
    return outputs


def _call(
    inputs: AttentionInputs,
    places: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Prepared:
    """``attend`` over heads gathered by ``places``.

    Args:
        inputs: of the case.
        places: of any shape, which token of the batch each row is; all of them are there.
        attend: takes heads [*places, H, E] and returns as many.
    """
    counts = torch.bincount(places.flatten(), minlength=len(inputs.query))
    leaves = [x[places].requires_grad_(inputs.gradient) for x in inputs.heads]
    upstream = inputs.upstream[places]
    # a token that is there again, as padding, gives no gradient twice: completions come once each
    first = torch.zeros_like(places, dtype=torch.bool).flatten()
    _, order = places.flatten().sort(stable=True)
    first[order[(counts.cumsum(0) - counts)[counts > 0]]] = True
    upstream = upstream * first.view(*places.shape, 1, 1)

    def call() -> Sequence[Tensor]:
        if not inputs.gradient:
            with torch.no_grad():
                return (attend(*leaves),)
        out = attend(*leaves)
        return out, *torch.autograd.grad(out, leaves, upstream)

    def read(results: Sequence[Tensor]) -> Outputs:
        def at_tokens(x: Tensor) -> Tensor:
            rows = x.detach().flatten(0, places.ndim - 1).float()
            return x.new_zeros(len(inputs.query), *rows.shape[1:], dtype=torch.float32).index_add_(
                0, places.flatten(), rows
            )

        out, *grads = results
        rows = out.detach().flatten(0, places.ndim - 1)[first]
        at_first = torch.empty_like(rows)
        at_first[places.flatten()[first]] = rows
        outputs = {"out": at_first[inputs.batch.action_index]}
        if inputs.gradient:
            outputs |= dict(zip(_GRADIENTS, map(at_tokens, grads), strict=True))
        return outputs

    return Prepared(call, read)


def _packed(share: bool, inputs: AttentionInputs) -> Prepared:
    batch = inputs.batch
    if not share:
        batch = pack(inputs.traces, share_prompts=False, device=batch.device)

    def attend(*heads: Tensor) -> Tensor:
        query, key, value = (x[None].transpose(1, 2) for x in heads)
        return packed_attention(_LAYER, query, key, value, None, packed_batch=batch)[0][0]

    return _call(inputs, batch.input_ids, attend)


def _one_by_one(inputs: AttentionInputs) -> Prepared:
    lengths = [trace.num_tokens for trace in inputs.traces]
    places = [torch.tensor(trace.prompt + trace.completion) for trace in inputs.traces]

    def attend(*heads: Tensor) -> Tensor:
        pieces = zip(*(x.split(lengths) for x in heads), strict=True)
        return torch.cat([_sdpa(*(x[None] for x in piece))[0] for piece in pieces])

    return _call(inputs, torch.cat(places).to(inputs.query.device), attend)


def _padded(inputs: AttentionInputs) -> Prepared:
    longest = max(trace.num_tokens for trace in inputs.traces)
    rows = [trace.prompt + trace.completion for trace in inputs.traces]
    places = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows])
    return _call(inputs, places.to(inputs.query.device), _sdpa)


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[B, L, H, E] of each."""
    heads = (x.transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)


_BY_TORCH = Variant(
    "airl_fast",
    partial(_packed, True),
    "reference",
    partial(airl_fast.backend, "reference"),
    "torch's, segments of like size at once",
)
