"""What lies between a decoder's products: norm, gate and rotation, one read and one write each.

    T tokens   D width   H heads   E head size

Computed in float32 whatever the tensors' dtype, and rounded once. The formulas are those of
csrc/layer.h. Rows are independent; the gradient of a norm's weight is added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from airl_fast.kernels.launch import on_device, options

LARGEST_WIDTH = 8192  # of a norm: a row is in the registers of one program
GATE_BLOCK = 2048
_PARTS = 512  # programs that share the rows of a norm's gradient
_ROTATED = 2048  # pairs of one program


@triton.jit
def norm_kernel(
    x,  # [T, D]
    weight,  # [D]
    out,  # [T, D]
    scale,  # [T] float32
    width,
    epsilon,
    BLOCK: tl.constexpr,
):
    """Norm of one row, and what it was scaled by."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / tl.sqrt(tl.sum(a * a, 0) / width + epsilon)
    tl.store(out + row * width + column, (w * (a * s)).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, s)


@triton.jit(do_not_specialize=["rows"])
def norm_gradient_kernel(
    grad,  # [T, D]
    x,  # [T, D]
    weight,  # [D]
    scale,  # [T] float32
    d_x,  # [T, D], or anything without NEED_X
    parts,  # [programs, D] float32, or anything without NEED_WEIGHT
    rows,
    width,
    NEED_X: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient at every ``num_programs``-th row, and their part of that at the weight."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    part = tl.zeros((BLOCK,), tl.float32)
    first, step = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    for row in range(first, rows.to(tl.int64), step):
        at = row * width + column
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        s = tl.load(scale + row)
        if NEED_X:
            u = w * g
            d = s * u - a * (s * s * s * (tl.sum(u * a, 0) / width))
            tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=inside)
        if NEED_WEIGHT:
            part += g * (a * s)
    if NEED_WEIGHT:
        tl.store(parts + tl.program_id(0) * width + column, part, mask=inside)


@triton.jit(do_not_specialize=["count"])
def gate_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    """``silu(gate) * up`` of a block of [count] values."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    y = g / (1.0 + tl.exp(-g)) * u
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def gate_gradient_kernel(grad, gate, up, d_gate, d_up, count, BLOCK: tl.constexpr):
    """Gradients of the above at gate and up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    d = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    at_gate = d * u * s * (1.0 + g * (1.0 - s))
    tl.store(d_gate + at, at_gate.to(d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + at, (d * g * s).to(d_up.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["x"])
def rotate_kernel(
    x,  # [T, H, E], a token's heads together
    cos,  # [T, E]
    sin,  # [T, E]
    out,  # [T, H, E], contiguous
    stride,  # of x, from token to token
    heads,
    size,
    BACK: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn the pairs, half a head apart, of some heads of one token; BACK: the transpose."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    half = size // 2
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < heads) & (pair < half)
    known = pair < half
    at = head * size + pair
    a = tl.load(x + token * stride + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + token * stride + at + half, mask=inside, other=0.0).to(tl.float32)
    turn = token * size + pair
    cos_a = tl.load(cos + turn, mask=known, other=0.0).to(tl.float32)
    sin_a = tl.load(sin + turn, mask=known, other=0.0).to(tl.float32)
    cos_b = tl.load(cos + turn + half, mask=known, other=0.0).to(tl.float32)
    sin_b = tl.load(sin + turn + half, mask=known, other=0.0).to(tl.float32)
    if BACK:
        low, high = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        low, high = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    to = out + token * heads * size + at
    tl.store(to, low.to(out.dtype.element_ty), mask=inside)
    tl.store(to + half, high.to(out.dtype.element_ty), mask=inside)


def norm_launch(width: int) -> dict[str, int | bool]:
    """Block and warps for rows of ``width``: at most 16 values to a thread."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, **options(warps=max(4, block // 512))}


def rotate_launch(heads: int, size: int) -> dict[str, int | bool]:
    """Heads and pairs of a program."""
    pairs = triton.next_power_of_2(size // 2)
    some = min(triton.next_power_of_2(heads), max(1, _ROTATED // pairs))
    return {"HEADS": some, "PAIRS": pairs, **options(warps=4)}


def norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Norms [T, D] of rows of ``x [T, D]``, contiguous, and their scales [T] float32."""
    out, scale = torch.empty_like(x), torch.empty(len(x), dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            norm_kernel[(len(x),)](
                x, weight, out, scale, x.shape[1], epsilon, **norm_launch(x.shape[1])
            )
    return out, scale


def norm_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients at x [T, D] and weight [D], float32 the latter; None where not needed."""
    rows, width = x.shape
    need_x, need_weight = needs
    programs = min(rows, _PARTS)
    d_x = torch.empty_like(x) if need_x else None
    parts = None
    if need_weight:
        parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
    if x.numel():
        with on_device(x):
            norm_gradient_kernel[(programs,)](
                grad,
                x,
                weight,
                scale,
                x if d_x is None else d_x,
                scale if parts is None else parts,
                rows,
                width,
                NEED_X=need_x,
                NEED_WEIGHT=need_weight,
                **norm_launch(width),
            )
    return d_x, None if parts is None else parts.sum(0)


def gate(g: Tensor, up: Tensor) -> Tensor:
    """``silu(g) * up`` of contiguous tensors of one shape."""
    out = torch.empty_like(g)
    if g.numel():
        with on_device(g):
            grid = (triton.cdiv(g.numel(), GATE_BLOCK),)
            gate_kernel[grid](g, up, out, g.numel(), BLOCK=GATE_BLOCK, **options(warps=8))
    return out


def gate_gradient(grad: Tensor, g: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients at g and up."""
    d_gate, d_up = torch.empty_like(g), torch.empty_like(up)
    if g.numel():
        with on_device(g):
            gate_gradient_kernel[(triton.cdiv(g.numel(), GATE_BLOCK),)](
                grad, g, up, d_gate, d_up, g.numel(), BLOCK=GATE_BLOCK, **options(warps=8)
            )
    return d_gate, d_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Heads ``x [T, H, E]`` turned by ``cos`` and ``sin [T, E]``; contiguous."""
    tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        launch = rotate_launch(heads, size)
        with on_device(x):
            rotate_kernel[(tokens, triton.cdiv(heads, int(launch["HEADS"])))](
                x, cos, sin, out, x.stride(0), heads, size, BACK=back, **launch
            )
    return out
