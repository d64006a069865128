"""Operators of torch that have CUDA kernels alone, in plain torch: products and flash attention.

H query heads   G key heads   E head size   q, k tokens of one sequence
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_kept: list[torch.library.Library] = []  # an implementation goes when its library does


def register() -> None:
    """Give them to the device."""
    library = torch.library.Library("aten", "IMPL")
    for name, function in {
        "mm.dtype": lambda a, b, dtype: _mm(a, b, dtype).to(a.device),
        "mm.dtype_out": lambda a, b, dtype, *, out: out.copy_(_mm(a, b, dtype)),
        "addmm.dtype": lambda c, a, b, dtype, *, beta=1, alpha=1: _addmm(
            c, a, b, dtype, beta=beta, alpha=alpha
        ).to(a.device),
        "addmm.dtype_out": lambda c, a, b, dtype, *, beta=1, alpha=1, out: out.copy_(
            _addmm(c, a, b, dtype, beta=beta, alpha=alpha)
        ),
        "_flash_attention_forward": _attention,
        "_flash_attention_backward": _attention_backward,
    }.items():
        library.impl(name, function, "CUDA")
    _kept.append(library)


def _mm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """In the CPU's memory, so that the device's holds no more than on a GPU."""
    return a.cpu().to(dtype) @ b.cpu().to(dtype)


def _addmm(
    c: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = alpha * _mm(a, b, dtype)
    return product + beta * c.cpu().to(dtype) if beta else product  # cuBLAS does not read c times 0


def _attention(
    query: Tensor,  # [T, H, E]
    key: Tensor,  # [M, G, E]
    value: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: object,
) -> tuple[Tensor, ...]:
    """Output [T, H, E] and log-sum-exps [H, T]; masks are aligned to the last query and key."""
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert {query.dtype} == {key.dtype, value.dtype}
    assert cu_query.dtype == cu_key.dtype == torch.int32
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert dropout == 0
    assert not any(other is not None for other in others.values())
    assert int(cu_query.diff().max()) <= longest_query
    assert int(cu_key.diff().max()) <= longest_key
    causal = causal or window_size_right == 0
    out, sums = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float32)
    for own, of in _sequences(cu_query, cu_key):
        q, k, v = (_heads(x, query.shape[1]) for x in (query[own], key[of], value[of]))
        scores = _scores(q, k, scale, causal, window_size_left)
        sums[:, own] = scores.logsumexp(-1)
        out[own] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    nothing = query.new_empty(0)
    return out, sums, torch.zeros(2, dtype=torch.int64, device=query.device), nothing, nothing


def _attention_backward(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    sums: Tensor,
    cu_query: Tensor,
    cu_key: Tensor,
    longest_query: int,
    longest_key: int,
    dropout: float,
    causal: bool,
    state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, by the formulas of the softmax (arXiv 2205.14135, appendix B)."""
    causal = causal or window_size_right == 0
    heads, factor = query.shape[1], scale if scale is not None else query.shape[-1] ** -0.5
    d_query, d_key, d_value = (torch.empty_like(x) for x in (query, key, value))
    for own, of in _sequences(cu_query, cu_key):
        q, k, v, d = (_heads(x, heads) for x in (query[own], key[of], value[of], d_out[own]))
        p = (_scores(q, k, scale, causal, window_size_left) - sums[:, own, None]).exp()
        d_p = d @ v.transpose(1, 2)
        d_scores = p * (d_p - (d_p * p).sum(-1, keepdim=True)) * factor
        d_query[own] = (d_scores @ k).transpose(0, 1).to(query.dtype)
        for gradient, whole in ((d_key, d_scores.transpose(1, 2) @ q), (d_value, p.mT @ d)):
            groups = whole.unflatten(0, (key.shape[1], -1)).sum(1)
            gradient[of] = groups.transpose(0, 1).to(key.dtype)
    return d_query, d_key, d_value


def _sequences(cu_query: Tensor, cu_key: Tensor) -> Iterator[tuple[slice, slice]]:
    ends = zip(cu_query[1:].tolist(), cu_key[1:].tolist(), strict=True)
    starts = zip(cu_query[:-1].tolist(), cu_key[:-1].tolist(), strict=True)
    for (a, b), (c, d) in zip(starts, ends, strict=True):
        yield slice(a, c), slice(b, d)


def _heads(x: Tensor, heads: int) -> Tensor:
    """``[l, G, E] -> [H, l, E]`` float32, each key head for the query heads that share it."""
    return x.float().transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)


def _scores(q: Tensor, k: Tensor, scale: float | None, causal: bool, left: int | None) -> Tensor:
    scores = (q @ k.transpose(1, 2)) * (scale if scale is not None else q.shape[-1] ** -0.5)
    last = torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1]
    at = torch.arange(k.shape[1], device=q.device)
    hidden = (at > last) if causal else torch.zeros_like(at > last)
    if left is not None and left >= 0:
        hidden = hidden | (at < last - left)
    return scores.masked_fill(hidden, -torch.inf)
