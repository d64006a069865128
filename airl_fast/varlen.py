"""Attention of a packed batch on a GPU: one call of flash attention, without any padding.

    T tokens   P segments   M key tokens   H query heads   Hk key heads   E head size

Each segment's keys are gathered behind one another, those of the segment that it continues first;
its own queries are the last of them, and a causal mask aligned to the last key is then just what
packed attention means. A shared prompt's keys are copied once per completion: that reads M - T
rows more in each layer, and saves the whole trunk's work on them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from airl_fast.layout import segments_of
from airl_fast.packing import PackedBatch
from airl_fast.transfers import sent

_LARGEST_HEAD = 256  # of flash attention 2


@dataclass(frozen=True, eq=False)
class VarlenLayout:
    """Which keys each segment attends to.

    Attributes:
        cu_queries: [P + 1] int32 offsets of the segments' tokens.
        cu_keys: [P + 1] int32 offsets of their keys.
        longest_query, longest_key: tokens.
        keys: [M] int64 token of each key row; None where they are the tokens themselves (M = T).
        own: [T] int64 key row that each token has in its own segment.
        copies: [M - T] int64 the other key rows, those of one token together.
        copied: [U] int64 the tokens that have copies.
        cu_copies: [U + 1] int64 offsets of their copies.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    longest_query: int
    longest_key: int
    keys: Tensor | None
    own: Tensor
    copies: Tensor
    copied: Tensor
    cu_copies: Tensor


_layouts: "WeakKeyDictionary[PackedBatch, VarlenLayout]" = WeakKeyDictionary()


def varlen_layout_of(batch: PackedBatch) -> VarlenLayout:
    """Return the layout of ``batch``, made on first use and kept while the batch lives."""
    if batch not in _layouts:
        cu, prefix = segments_of(batch)
        with torch.inference_mode(False):  # training may use it after scoring has
            _layouts[batch] = _make_layout(cu, prefix, batch.device)
    return _layouts[batch]


def _make_layout(cu: np.ndarray, prefix: np.ndarray, device: torch.device) -> VarlenLayout:
    lengths = np.diff(cu)
    before = np.where(prefix >= 0, lengths[prefix], 0)
    cu_keys = np.concatenate([[0], np.cumsum(lengths + before)])
    pieces = []
    for p in range(len(lengths)):
        if before[p]:
            pieces.append(np.arange(cu[prefix[p]], cu[prefix[p] + 1]))
        pieces.append(np.arange(cu[p], cu[p + 1]))
    keys = np.concatenate(pieces)
    own = np.arange(cu[-1]) + np.repeat(cu_keys[:-1] + before - cu[:-1], lengths)
    is_copy = np.ones(len(keys), bool)
    is_copy[own] = False
    rows = np.flatnonzero(is_copy)
    rows = rows[np.argsort(keys[rows], kind="stable")]
    copied, counts = np.unique(keys[rows], return_counts=True)

    def there(x: np.ndarray, dtype: torch.dtype = torch.int64) -> Tensor:
        return sent(torch.from_numpy(x).to(dtype), device)

    return VarlenLayout(
        cu_queries=there(cu, torch.int32),
        cu_keys=there(cu_keys, torch.int32),
        longest_query=int(lengths.max()),
        longest_key=int((lengths + before).max()),
        keys=there(keys) if before.any() else None,
        own=there(own),
        copies=there(rows),
        copied=there(copied),
        cu_copies=there(np.concatenate([[0], np.cumsum(counts)])),
    )


class _GatherKeys(torch.autograd.Function):
    """``x [T, ...] -> x[keys] [M, ...]``; the gradients of a token's copies are added in order.

    That gives the same bits every time, which the scattered additions of index_select's own
    gradient do not on a GPU. They are added in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: VarlenLayout) -> Tensor:
        ctx.layout = layout
        assert layout.keys is not None
        return x.index_select(0, layout.keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layout: VarlenLayout = ctx.layout
        total = grad.index_select(0, layout.own)
        copies = grad.index_select(0, layout.copies).float()
        sums = torch.segment_reduce(copies, "sum", offsets=layout.cu_copies, axis=0)
        sums += total.index_select(0, layout.copied)
        return total.index_copy_(0, layout.copied, sums.to(total.dtype)), None


def serves(query: Tensor, value: Tensor, softcap: float | None, s_aux: Tensor | None) -> str | None:
    """Say why flash attention cannot take a call, if it cannot; the buckets then do."""
    if query.device.type != "cuda":
        return f"it runs on a GPU, not on {query.device}"
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {str(query.dtype).removeprefix('torch.')}"
    if softcap is not None or s_aux is not None:
        return "it knows neither soft-capped scores nor sinks"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > _LARGEST_HEAD:
        return f"it takes heads of one size for keys and values, at most {_LARGEST_HEAD}"
    if flash() is None:
        return "neither flash-attn nor torch.nn.attention.varlen is installed"
    return None


def varlen_attention(
    layout: VarlenLayout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend within the sequences of a packed batch.

    Args:
        layout: of the batch.
        query: [T, H, E].
        key: [T, Hk, E].
        value: [T, Hk, E].
        scale: of the scores.
        window: a token sees itself and the ``window - 1`` before it; None is all of them.

    Returns:
        [T, H, E].
    """
    if layout.keys is not None:
        key, value = _GatherKeys.apply(key, layout), _GatherKeys.apply(value, layout)
    attend = flash()
    assert attend is not None
    return attend(query, key, value, layout, scale, (-1 if window is None else window - 1, 0))


Flash = Callable[[Tensor, Tensor, Tensor, VarlenLayout, float, tuple[int, int]], Tensor]


@cache
def flash() -> Flash | None:
    """Return flash-attn's function where it is installed, else torch's own, else None.

    Both align a causal mask to the last query and the last key of a sequence.
    """
    if find_spec("flash_attn") is not None:
        return _flash_attn
    return None if find_spec("torch.nn.attention.varlen") is None else _torch_varlen


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float, window: tuple[int, int]
) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q,
        k,
        v,
        layout.cu_queries,
        layout.cu_keys,
        layout.longest_query,
        layout.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=window,
        deterministic=torch.is_grad_enabled(),
    )


def _torch_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float, window: tuple[int, int]
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    known = signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    if "scale" in known:
        options["scale"] = scale
    else:  # the kernel's own scale is 1 / sqrt(E)
        q = q * (scale * q.shape[-1] ** 0.5)
    if "window_size" in known:
        options["window_size"] = window
    elif window[0] == -1:
        options["is_causal"] = True
    else:
        raise ValueError(
            f"torch {torch.__version__} has no sliding window in varlen_attn: install flash-attn, "
            "or torch 2.11"
        )
    out = varlen_attn(
        q,
        k,
        v,
        layout.cu_queries,
        layout.cu_keys,
        layout.longest_query,
        layout.longest_key,
        **options,
    )
    assert isinstance(out, Tensor)  # no log-sum-exps were asked for
    return out
