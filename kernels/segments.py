"""Sums, means, last values, softmax and discounted scans of the segments of a flat vector.

N values, S segments; segment s holds ``x[cu[s]:cu[s + 1]]``. A program takes ROWS segments, COLUMNS
values of each at a time, and adds in float64. Segments are independent: a value that is not finite
reaches no other segment, and results are the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from airl_fast.kernels.launch import SegmentConfig, on_device, segment_config

_MODES = ("sum", "mean", "last")


@triton.jit
def bounds(cu, segments, total, ROWS: tl.constexpr):
    """First value, length and number of a program's segments; 0 long past the last.

    Inside the ``total`` values, whatever the offsets are.
    """
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = segment < segments
    first = tl.load(cu + segment, mask=exists, other=0).to(tl.int64)
    stop = tl.load(cu + segment + 1, mask=exists, other=0).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), total)
    stop = tl.minimum(tl.maximum(stop, first), total)
    return first, stop - first, segment, exists


@triton.jit(do_not_specialize=["x", "cu", "out", "segments", "total"])
def reduce_kernel(
    x,  # [N]
    cu,  # [S + 1] int32
    out,  # [S] float32
    segments,
    total,
    MODE: tl.constexpr,  # 0 sum, 1 mean, 2 last
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Reduce ROWS segments to a number each."""
    first, length, segment, exists = bounds(cu, segments, total, ROWS)
    if MODE == 2:
        at = x + first + length - 1
        value = tl.load(at, mask=length > 0, other=float("nan")).to(tl.float64)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float64)
        for start in range(0, tl.max(length, 0), COLUMNS):
            place = start + tl.arange(0, COLUMNS)[None, :]
            inside = place < length[:, None]
            total += tl.load(x + first[:, None] + place, mask=inside, other=0.0).to(tl.float64)
        value = tl.sum(total, 1)
        if MODE == 1:
            value = value / tl.where(exists, length, 1).to(tl.float64)
    tl.store(out + segment, value.to(tl.float32), mask=exists)


@triton.jit(do_not_specialize=["x", "cu", "out", "segments", "total"])
def softmax_kernel(
    x,  # [N]
    cu,  # [S + 1] int32
    out,  # [N] float32
    segments,
    total,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``exp(x - m) / sum of exp(x - m)`` within ROWS segments, m being the segment's largest."""
    first, length, _, _ = bounds(cu, segments, total, ROWS)
    longest = tl.max(length, 0)
    top = tl.full((ROWS, COLUMNS), float("-inf"), tl.float64)
    for start in range(0, longest, COLUMNS):
        place = start + tl.arange(0, COLUMNS)[None, :]
        at = x + first[:, None] + place
        value = tl.load(at, mask=place < length[:, None], other=float("-inf"))
        top = tl.maximum(top, value.to(tl.float64))
    largest = tl.max(top, 1)[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for start in range(0, longest, COLUMNS):
        place = start + tl.arange(0, COLUMNS)[None, :]
        inside = place < length[:, None]
        value = tl.load(x + first[:, None] + place, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, tl.exp(value - largest), 0.0)
    whole = tl.sum(total, 1)[:, None]
    for start in range(0, longest, COLUMNS):
        place = start + tl.arange(0, COLUMNS)[None, :]
        inside = place < length[:, None]
        value = tl.load(x + first[:, None] + place, mask=inside, other=0.0).to(tl.float64)
        p = (tl.exp(value - largest) / whole).to(tl.float32)
        tl.store(out + first[:, None] + place, p, mask=inside)


@triton.jit
def follow(decay, value, next_decay, next_value):
    """One step ``y -> decay y + value`` after another, as one step."""
    return decay * next_decay, value * next_decay + next_value


@triton.jit(do_not_specialize=["x", "cu", "out", "gamma", "segments", "total"])
def scan_kernel(
    x,  # [N]
    cu,  # [S + 1] int32
    out,  # [N] float32
    gamma,  # [1] float64
    segments,
    total,
    FORWARDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``y_i = x_i + gamma y_{i+1}`` within ROWS segments, or of ``y_{i-1}`` with FORWARDS.

    A block of COLUMNS is scanned as a composition of the steps; the last y of one block is carried
    into the next, so that any length is exact and no power of gamma is divided by.
    """
    first, length, _, _ = bounds(cu, segments, total, ROWS)
    discount = tl.load(gamma)
    lane = tl.arange(0, COLUMNS)[None, :]
    carry = tl.zeros((ROWS,), tl.float64)
    decay = tl.zeros((ROWS, COLUMNS), tl.float64) + discount
    for start in range(0, tl.max(length, 0), COLUMNS):
        step = start + lane  # of the scan
        inside = step < length[:, None]
        place = first[:, None] + step
        if not FORWARDS:
            place = first[:, None] + length[:, None] - 1 - step
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float64)
        powers, partial = tl.associative_scan((decay, value), 1, follow)
        y = partial + powers * carry[:, None]
        tl.store(out + place, y.to(tl.float32), mask=inside)
        carry = tl.sum(tl.where(lane == COLUMNS - 1, y, 0.0), 1)


def reduce(x: Tensor, cu: Tensor, mode: str, config: SegmentConfig | None = None) -> Tensor:
    """Sum, mean or last value ``[S]`` float32 of each segment of ``x [N]``, any floating dtype."""
    out = x.new_empty(len(cu) - 1, dtype=torch.float32)
    _launch(reduce_kernel, x, cu, out, (), config, MODE=_MODES.index(mode))
    return out


def softmax(x: Tensor, cu: Tensor, config: SegmentConfig | None = None) -> Tensor:
    """Softmax ``[N]`` float32 within each segment of ``x [N]``, any floating dtype."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    _launch(softmax_kernel, x, cu, out, (), config)
    return out


def scan(
    x: Tensor, cu: Tensor, gamma: float, forwards: bool, config: SegmentConfig | None = None
) -> Tensor:
    """Discounted scan ``[N]`` float32 within each segment of ``x [N]``, any floating dtype."""
    out = x.new_empty(x.shape, dtype=torch.float32)
    discount = torch.full((1,), gamma, dtype=torch.float64, device=x.device)
    _launch(scan_kernel, x, cu, out, (discount,), config, FORWARDS=forwards)
    return out


def _launch(
    kernel: triton.runtime.KernelInterface,
    x: Tensor,
    cu: Tensor,
    out: Tensor,
    more: tuple[Tensor, ...],
    config: SegmentConfig | None,
    **constants: int | bool,
) -> None:
    segments = len(cu) - 1
    if segments == 0:
        return
    config = config or segment_config(len(x), segments)
    with on_device(x):
        kernel[(triton.cdiv(segments, config.ROWS),)](
            *(x.contiguous(), cu.contiguous(), out, *more, segments, len(x)),
            **constants,
            **config.constants(),
        )
