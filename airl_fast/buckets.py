"""Attention of a packed batch by torch's operations: segments of like size share a call.

T tokens   H query heads   Hk key heads   E head size
n segments of a bucket, padded to l query tokens and m key tokens (layout.py says which)
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from airl_fast.layout import Bucket, PackedLayout, layout_of
from airl_fast.packing import PackedBatch


class Scoring(NamedTuple):
    """What a layer makes of its queries and keys.

    Attributes:
        scale: of the scores.
        window: a token sees itself and the ``window - 1`` before it; None: all of them.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        s_aux: [H] scores of a sink that takes its share of the softmax and adds nothing (gpt-oss).
    """

    scale: float
    window: int | None
    softcap: float | None
    s_aux: Tensor | None


def attend_in_buckets(
    batch: PackedBatch, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """What the queries [1, H, T, E] of a batch take from its keys [1, Hk, T, E]: [1, T, H, Ev]."""
    outputs, layout = [], layout_of(batch)
    for bucket, q, k, v in _gather(layout, query, key, value):
        out = attend(bucket, q, k, v, scoring)
        outputs.append(out.transpose(1, 2).flatten(0, 1))  # [n * l, H, Ev]
    return torch.cat(outputs).index_select(0, layout.restore)[None]


def _gather(
    layout: PackedLayout, query: Tensor, key: Tensor, value: Tensor
) -> Iterator[tuple[Bucket, Tensor, Tensor, Tensor]]:
    """Yield each bucket with its queries [n, H, l, E], keys [n, Hk, m, E] and values."""
    gathered = []
    for x, index, dim in (
        (query, layout.queries, 1),
        (key, layout.keys, 2),
        (value, layout.keys, 2),
    ):
        # [T, H, E]: a token's heads lie together, so that gathering copies whole rows
        rows = x[0].transpose(0, 1).index_select(0, index)
        pieces = rows.split([b.shape[0] * b.shape[dim] for b in layout.buckets])
        gathered.append(
            [
                piece.unflatten(0, (b.shape[0], b.shape[dim])).transpose(1, 2)
                for piece, b in zip(pieces, layout.buckets, strict=True)
            ]
        )
    yield from zip(layout.buckets, *gathered, strict=True)


def attend(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """What the queries [n, H, l, E] of a bucket take from its keys [n, Hk, m, E]: [n, H, l, Ev]."""
    if scoring.softcap is None and scoring.s_aux is None:
        return _sdpa(bucket, q, k, v, scoring.scale, scoring.window)
    return _explicit(bucket, q, k, v, scoring)


def _sdpa(
    bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of one bucket, [n, H, l, Ev]."""
    window = None if window is None or window >= bucket.shape[2] else window
    causal = bucket.causal and window is None
    shape = q.shape
    if shape[2] == 1 and not causal:  # the heads of a key head are its queries: nothing is repeated
        q = q.reshape(shape[0], k.shape[1], -1, shape[-1])
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if causal else bucket.mask(window, q.dtype),
        is_causal=causal,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.reshape(*shape[:3], -1)


def _explicit(bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
    """The same with the scores written out, [n, H, l, m], for soft-capping and sinks."""
    scale, window, softcap, s_aux = scoring
    n, num_queries, num_keys = bucket.shape
    heads, key_heads = q.shape[1], k.shape[1]
    q = q.unflatten(1, (key_heads, -1))  # [n, Hk, H / Hk, l, E]
    scores = q @ k[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + bucket.mask(window, scores.dtype)[:, None]
    if s_aux is not None:
        sink = s_aux.to(scores.dtype).view(1, key_heads, -1, 1, 1)
        scores = torch.cat([scores, sink.expand(n, -1, -1, num_queries, 1)], dim=-1)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide)[..., :num_keys].to(v.dtype)
    return (weights @ v[:, :, None]).view(n, heads, num_queries, -1)
