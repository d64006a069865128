"""Attention of a packed batch on a CPU, forward and backward: csrc/varlen_attention.h.

T tokens of queries   U of keys   P segments   H query heads   Hk key heads   E head size
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from airl_fast import _C
from airl_fast.ops._cpu_products import floats
from airl_fast.ops.dispatch import forced

_PLAIN = (Tensor, torch.nn.Parameter)
_ALL = 1 << 62  # a window that hides nothing


def serves(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    queries: int,
    keys: int,
) -> bool:
    """Whether the kernel takes these: plain float32 in a CPU's memory, and not forced off.

    Args:
        query: [1, H, T, E].
        key: [1, Hk, U, E].
        value: [1, Hk, U, Ev].
        scale: of the scores; one that is not above 0 is left to torch.
        window: as is a window that lets a token not see itself.
        queries: T as it is to be; torch says what is wrong with others.
        keys: U as it is to be.
    """
    alike = (
        query.shape[::2] == (1, queries)
        and key.shape[::2] == value.shape[::2] == (1, keys)
        and key.shape[1] == value.shape[1] > 0
        and query.shape[1] % key.shape[1] == 0
        and query.shape[3] == key.shape[3]
    )
    plain = all(
        type(x) in _PLAIN and x.device.type == "cpu" and x.dtype == torch.float32
        for x in (query, key, value)
    )
    usual = isinstance(scale, (float, int)) and scale > 0 and (window is None or window > 0)
    return alike and plain and usual and forced() in (None, "cpu") and not _transformed()


def _transformed() -> bool:
    """Whether torch.func runs: its tensors have no memory of their own."""
    return torch._C._are_functorch_transforms_active()


def _is_many(grad: Tensor) -> bool:
    """Whether it stands for many gradients (is_grads_batched), which have no such memory either."""
    return torch._C._functorch.is_legacy_batchedtensor(grad)


def attend(
    segments: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """softmax(scale q K^T) V over the keys that each query sees.

    Args:
        segments: [P, 5] int64: the first query, the number of queries, the first of the keys that
            all of them see, how many these are, and the first of as many keys as queries, of
            which each sees those up to its own. Every query is in one segment.
        query: [T, H, E].
        key: [U, Hk, E]; H is a multiple of Hk.
        value: [U, Hk, Ev].
        scale: of the scores.
        window: a token sees itself and the ``window - 1`` before it; None is all of them.

    Returns:
        [T, H, Ev].
    """
    given = (_rows(x.resolve_neg()) for x in (query, key, value))
    result: Tensor = _Attention.apply(segments, *given, scale, _ALL if window is None else window)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        window: int,
    ) -> Tensor:
        ctx.scoring = scale, window
        tokens, heads, _ = query.shape
        out = floats((tokens, heads, value.shape[-1]))
        statistics = floats((tokens, heads, 2)) if any(ctx.needs_input_grad) else None
        _C.attend_segments(
            *_inputs(segments, query, key, value, *ctx.scoring), out.data_ptr(),
            0 if statistics is None else statistics.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if statistics is not None:
            ctx.save_for_backward(segments, query, key, value, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        segments, *given, out, statistics = ctx.saved_tensors
        if torch.is_grad_enabled() or _transformed() or _is_many(grad):
            return None, *_gradients_in_torch(ctx, segments, given, grad), None, None
        grad, (query, key, value) = _rows(grad.resolve_neg()), map(_rows, given)
        segments, out, statistics = (x.contiguous() for x in (segments, out, statistics))
        d_query, d_key, d_value = (floats(x.shape) for x in (query, key, value))
        _C.differentiate_segments(
            *_inputs(segments, query, key, value, *ctx.scoring), out.data_ptr(),
            statistics.data_ptr(), _heads(grad), d_query.data_ptr(), d_key.data_ptr(),
            d_value.data_ptr(), key.shape[0], torch.get_num_threads(),
        )  # fmt: skip
        return None, d_query, d_key, d_value, None, None


def _gradients_in_torch(
    ctx: Any, segments: Tensor, given: list[Tensor], grad: Tensor
) -> Iterator[Tensor | None]:
    """Gradients that have gradients themselves, or many at once."""
    again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:4]
    with torch.enable_grad():
        # of these places alone, even where one tensor stands at two
        inputs = [x.view_as(x) if again else x.detach() for x in given]
        wanted = [x.requires_grad_() for x, need in zip(inputs, needed, strict=True) if need]
        query, key, value = inputs
        out = _in_torch(segments, query, key, value, *ctx.scoring)
        grads = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return (next(grads) if need else None for need in needed)


def _in_torch(
    segments: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> Tensor:
    """The same segment by segment, every score written out."""
    outs, group = [], query.shape[1] // key.shape[1]
    for first, count, first_shared, shared, first_own in segments.tolist():
        seen = torch.arange(shared + count, device="cpu")
        token = torch.where(seen < shared, first_shared + seen, first_own + seen - shared)
        keys, values = (x[token].repeat_interleave(group, 1) for x in (key, value))
        scores = scale * torch.einsum("ihe,jhe->hij", query[first : first + count], keys)
        place = torch.arange(shared, shared + count, device="cpu")[:, None]
        hidden = (seen > place) | (seen <= place - window)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhe->ihe", weights, values))
    return torch.cat(outs)


def _rows(x: Tensor) -> Tensor:
    """Let the numbers of a head lie together."""
    return x if x.stride(-1) == 1 else x.contiguous()


_Heads = tuple[int, int, int]
_Inputs = tuple[
    tuple[int, int, int, int, int, float], tuple[int, int], _Heads, _Heads, _Heads
]  # as _C.attend_segments has them


def _heads(x: Tensor) -> _Heads:
    return x.data_ptr(), x.stride(0), x.stride(1)


def _inputs(
    segments: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> _Inputs:
    heads, size = query.shape[1:]
    sizes = heads, key.shape[1], size, value.shape[-1], window, scale
    table = segments.data_ptr(), len(segments)
    return sizes, table, _heads(query), _heads(key), _heads(value)
