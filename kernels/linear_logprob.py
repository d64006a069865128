"""Log-probabilities and entropies of a linear head whose logits are never in memory.

K rows that count of N, D hidden size, V vocabulary, S splits of it. A program takes a block of
rows and one split: it multiplies tile after tile, ``hidden [BM, D]`` by ``weight [BN, D]^T``, into
float32 registers, and keeps of each tile what the log-sum-exp needs: per row the largest z, the sum
of ``exp(z - largest)``, that of ``exp(z - largest) (largest - z)`` for the entropy, and z at the
target. These go to ``partial [4, S, K]`` and a second kernel puts the splits together in a fixed
order, so that results are the same bits every time. The columns of a split are a constant: a row's
result depends neither on N nor on the rows beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from airl_fast.kernels._maths import column_of, rescale, shape_logits
from airl_fast.kernels.launch import (
    DotConfig,
    capability,
    dot_config,
    interpreted,
    on_device,
    options,
)
from airl_fast.ops._gpu_rows import RowHead

PARTIAL_BYTES = 64 * 2**20  # of what the splits leave behind; rows beyond that take another launch
_COMBINED_ROWS = 128


@triton.jit
def halved(a):
    """The left and the right half of the columns of ``a [R, C]``; the registers stay."""
    return tl.split(a.reshape(a.shape[0], 2, a.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def take_in(
    a,  # [BM, C] float32: logits of the columns from start on
    stats,  # the rows' largest, total, gap and taken so far, [BM] float32 each
    target,
    bias,
    start,
    vocab,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
):
    """Statistics of rows after some more columns; those from ``vocab`` on do not count."""
    largest, total, gap, taken = stats
    column = start + tl.arange(0, a.shape[1])
    valid = column < vocab
    b = 0.0
    if HAS_BIAS:
        b = tl.load(bias + column, mask=valid, other=0.0)[None, :]
    z, _ = shape_logits(a, b, inner, outer, CAPPED)
    z = tl.where(valid[None, :], z, float("-inf"))
    top = tl.maximum(largest, tl.max(z, 1))
    base, shrink, rise = rescale(largest, top)
    x = z - base[:, None]
    e = tl.exp(x)
    hit = tl.where(column[None, :] == target[:, None], z, 0.0)
    if ENTROPY:
        gap = shrink * (gap + rise * total) - tl.sum(e * tl.where(valid[None, :], x, 0.0), 1)
    return top, shrink * total + tl.sum(e, 1), gap, taken + tl.sum(hit, 1)


@triton.jit(do_not_specialize=["targets", "partial", "count", "vocab"])
def split_kernel(
    hidden,  # [count, D]
    weight,  # [V, D]
    bias,  # [V] float32, or anything without HAS_BIAS
    targets,  # [count] int64
    partial,  # [4, S, count] float32
    count,
    vocab,
    width,
    hidden_stride,
    weight_stride,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    FLOAT32: tl.constexpr,  # multiply in float32; otherwise hidden and weight share a half dtype
    EVEN: tl.constexpr,  # D is a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TILES: tl.constexpr,  # tiles of a split
    GROUP: tl.constexpr,  # row blocks that read a split of the weight one after the other
):
    """Leave the statistics of BM rows over one split of the vocabulary in ``partial``."""
    block = tl.program_id(2) * GROUP + tl.program_id(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    if block * BM >= count:  # the last group may have fewer blocks
        return

    # 64-bit offsets to the block and the tile, 32 bits within: a tile's pointers fit registers.
    place = tl.minimum(tl.arange(0, BM), count - 1 - block * BM)  # repeats are not stored
    target = column_of(tl.load(targets + block * BM + place), vocab)
    inside = tl.arange(0, BK)
    x_start = hidden + (block * BM).to(tl.int64) * hidden_stride
    x_offset = place[:, None] * hidden_stride + inside[None, :]

    largest = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    gap = tl.zeros((BM,), tl.float32)
    taken = tl.where(target < 0, float("nan"), 0.0)
    left = split * TILES * BN
    w_start = weight + left.to(tl.int64) * weight_stride
    end = tl.minimum(left + TILES * BN, vocab)
    for start in range(left, end, BN):
        near = tl.minimum(tl.arange(0, BN), vocab - 1 - start)  # what lies past the end is masked
        w_offset = near[None, :] * weight_stride + inside[:, None]
        a = tl.zeros((BM, BN), tl.float32)
        for k in range(0, width, BK):
            if EVEN:
                x_tile = tl.load(x_start + k + x_offset)
                w_tile = tl.load(w_start + k + w_offset)
            else:
                x_tile = tl.load(
                    x_start + k + x_offset, mask=inside[None, :] < width - k, other=0.0
                )
                w_tile = tl.load(
                    w_start + k + w_offset, mask=inside[:, None] < width - k, other=0.0
                )
            if FLOAT32:
                a = tl.dot(x_tile.to(tl.float32), w_tile.to(tl.float32), a, input_precision="ieee")
            else:
                a = tl.dot(x_tile, w_tile, a)

        # In pieces, one after the other: all at once would not fit the registers.
        SIDES: tl.constexpr = 2 if BN > 128 else 1
        sides = halved(a) if SIDES == 2 else (a,)
        for h in tl.static_range(SIDES):
            pieces = halved(sides[h])
            for i in tl.static_range(2):
                halves = halved(pieces[i])
                for j in tl.static_range(2):
                    quarters = halved(halves[j])
                    for k in tl.static_range(2):
                        largest, total, gap, taken = take_in(
                            quarters[k],
                            (largest, total, gap, taken),
                            target,
                            bias,
                            start + (8 * h + 4 * i + 2 * j + k) * (BN // SIDES // 8),
                            vocab,
                            inner,
                            outer,
                            HAS_BIAS,
                            CAPPED,
                            ENTROPY,
                        )
        w_start += BN * weight_stride

    row = block * BM + tl.arange(0, BM)
    split = (end - 1) // (TILES * BN)  # found again: kept, it would take a register of the loop's
    out = partial + split.to(tl.int64) * count + row
    stored = row < count
    part = splits.to(tl.int64) * count
    tl.store(out, largest, mask=stored)
    tl.store(out + part, total, mask=stored)
    tl.store(out + 2 * part, gap, mask=stored)
    tl.store(out + 3 * part, taken, mask=stored)


@triton.jit(do_not_specialize=["partial", "logp", "entropy", "count", "splits"])
def combine_kernel(
    partial,  # [4, S, count] float32
    logp,  # [count] float32
    entropy,  # [count] float32, or anything without ENTROPY
    count,
    splits,
    ENTROPY: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Put the splits together, from the first to the last: logp and entropy of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    stored = row < count
    part = splits.to(tl.int64) * count
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    gap = tl.zeros((ROWS,), tl.float32)
    taken = tl.zeros((ROWS,), tl.float32)
    at = partial + row
    for _ in range(0, splits):
        peak = tl.load(at, mask=stored, other=0.0)
        sums = tl.load(at + part, mask=stored, other=1.0)
        top = tl.maximum(largest, peak)
        _, shrink, rise = rescale(largest, top)
        _, fresh, climb = rescale(peak, top)
        if ENTROPY:
            gaps = tl.load(at + 2 * part, mask=stored, other=0.0)
            gap = shrink * (gap + rise * total) + fresh * (gaps + climb * sums)
        total = shrink * total + fresh * sums
        taken += tl.load(at + 3 * part, mask=stored, other=0.0)
        largest = top
        at += count

    # float64: the fast float32 logarithm is off by 1e-7 near 1, where log p nears 0.
    log_total = tl.log(total.to(tl.float64))
    tl.store(logp + row, ((taken - largest) - log_total).to(tl.float32), mask=stored)
    if ENTROPY:
        tl.store(entropy + row, (log_total + gap / total).to(tl.float32), mask=stored)


def read_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    head: RowHead,
    index: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    config: DotConfig | None = None,
) -> None:
    """Fill ``logp [K]`` and ``entropy [K]`` of the rows ``index [K]`` of hidden, or of all N.

    Args:
        hidden: ``[N, D]`` bfloat16, float16 or float32, contiguous within a row.
        weight: ``[V, D]``, likewise. Two half tensors of one dtype are multiplied in it on the
            tensor cores; anything else in float32, without them ("ieee").
        targets: ``[K]`` int64; logp of a row whose target is not in ``[0, V)`` is NaN.
        head: how logits become z.
        index: ``[K]`` int64, or None for all N rows (K = N). The rows are copied, one launch's
            at a time.
        logp: ``[K]`` float32.
        entropy: ``[K]`` float32, or None.
        config: tiles; None for those of the table in launch.py.
    """
    vocab, width = weight.shape
    dtype = product_dtype(hidden, weight)
    config = config or dot_config(width, vocab, dtype, capability(hidden))
    splits = triton.cdiv(vocab, config.split_columns)
    limit = launch_rows(splits)
    partial = torch.empty(
        4 * splits * min(limit, len(targets)), dtype=torch.float32, device=hidden.device
    )
    # The interpreter has no product of bfloat16; in float32 the same products are exact.
    wide = dtype == torch.float32 or interpreted()
    for first in range(0, len(targets), limit):
        part = slice(first, min(first + limit, len(targets)))
        x = hidden[part if index is None else index[part]]
        with on_device(hidden):
            blocks = triton.cdiv(len(x), config.BM)
            grid = (min(config.GROUP, blocks), splits, triton.cdiv(blocks, config.GROUP))
            split_kernel[grid](
                x,
                weight,
                weight if head.bias is None else head.bias,
                targets[part],
                partial,
                len(x),
                vocab,
                width,
                x.stride(0),
                weight.stride(0),
                head.inner,
                head.outer,
                HAS_BIAS=head.bias is not None,
                CAPPED=head.outer != 0,
                ENTROPY=entropy is not None,
                FLOAT32=wide,
                EVEN=width % config.BK == 0,
                **config.constants(),
                **config.options(),
            )
            combine_kernel[(triton.cdiv(len(x), _COMBINED_ROWS),)](
                partial,
                logp[part],
                logp if entropy is None else entropy[part],
                len(x),
                splits,
                ENTROPY=entropy is not None,
                ROWS=_COMBINED_ROWS,
                **options(warps=4),
            )


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype that tiles are multiplied in: the inputs', or float32 where those differ."""
    return hidden.dtype if hidden.dtype == weight.dtype else torch.float32


def launch_rows(splits: int) -> int:
    """Rows of a launch: a multiple of 16, which keeps the rows of the next on 16 bytes."""
    return max(16, PARTIAL_BYTES // (16 * splits) // 16 * 16)
