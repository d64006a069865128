"""Matrix products on a CPU, of float32 or bfloat16 in and float32 out: csrc/products.h, or MKL.

Where the processor multiplies tiles of bfloat16 (AMX: Xeons since 2023), a float32 is cut into
three bfloat16 numbers that add up to it, and six products of such parts are summed in float32: as
exact as a float32 product, and faster than one. ``torch.set_float32_matmul_precision`` means here
what it means in torch: "highest" (its default) is that, "high" takes two parts and three products
(16 of 24 bits), "medium" one.

M rows, K inner, N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from airl_fast import _C
from airl_fast.ops.dispatch import forced, implements

floats = partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever the defaults are

_PARTS = {"highest": 3, "high": 2, "medium": 1}
_ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}
# Cutting up the other operand costs as much as some rows of the product: two threads of a Xeon take
# as long as MKL at about 128 rows of a product with [576, 1536].
LEAST_ROWS = 256
_LEAST_COLUMNS = 64
_LEAST_INNER = 32


def serves(a: Tensor, b: Tensor) -> str | None:
    """Say why the tiles cannot take ``a [M, K] @ b [K, N]``, if they cannot."""
    if a.shape[1] != b.shape[0]:
        return "the shapes do not agree"  # which torch says in its own words
    return _unfit(a) or serves_rows(a.shape[0], b.t())


def serves_rows(rows: int, weight: Tensor) -> str | None:
    """Say why the tiles cannot take so many rows [K] times ``weight [N, K]``, if they cannot."""
    if forced() not in (None, "cpu"):
        return f"backend {forced()!r} is forced"
    columns, inner = weight.shape
    if rows < LEAST_ROWS or columns < _LEAST_COLUMNS or inner < _LEAST_INNER:
        return "the product is too small to gain"
    return _ready(weight)


def _ready(x: Tensor) -> str | None:
    return _unfit(x) or (None if _C.products_ready() else "it needs a processor with AMX")


def _unfit(x: Tensor) -> str | None:
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu":
        return "it takes plain tensors in CPU memory"
    if x.dtype not in _ELEMENTS:
        return f"it takes float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    return None if 1 in x.stride() else "it takes matrices with a stride of 1"


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """``out [M, N] float32 = a [M, K] @ b [K, N]``, or added to what is there.

    On the tiles where they serve, else by torch. A row's bits do not depend on the other rows, as
    long as there are at least ``LEAST_ROWS``, nor on the threads. Values that are not finite, or
    above bfloat16's largest (3.39e38), give results that are infinite or NaN.

    Args:
        a: float32, or bfloat16, which is not rounded further.
        b: as ``a``.
        out: float32, contiguous within a row; it shares no memory with a and b.
        add: whether to add to ``out``; else what it holds is not read.
    """
    if serves(a, b) is not None:
        torch.addmm(out, a.float(), b.float(), beta=float(add), out=out)
        return
    _run(a, [Factor(b, out)], add=add)


@dataclass(frozen=True)
class Factor:
    """A matrix that others are multiplied with, and what becomes of the product.

    Attributes:
        b: [K, N].
        out: [M, N] float32, contiguous within a row.
        plus: [M, N] or [N] float32 that is added, or None.
    """

    b: Tensor
    out: Tensor
    plus: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """``weight * x / sqrt(mean(x^2) + epsilon)``, applied to the rows that are multiplied."""

    weight: Tensor  # [K] float32
    epsilon: float


def multiply_all(a: Tensor, factors: Sequence[Factor], *, norm: Norm | None = None) -> None:
    """``out_i = norm(a) @ b_i + plus_i`` of one to three factors; the tiles must serve."""
    _run(a, factors, norm=norm)


def multiply_gated(a: Tensor, gate: Factor, up: Tensor, norm: Norm) -> bool:
    """``gate.out = silu(norm(a) @ gate.b) * (norm(a) @ up)`` on the tiles, if K is short enough.

    Returns:
        Whether it is done: False for K above 1,536, whose sums are not finished in one go.
    """
    if a.shape[1] > _C.GATE_INNER:
        return False
    _run(a, [gate, Factor(up, gate.out)], gate=True, norm=norm)
    return True


def _run(
    a: Tensor,
    factors: Sequence[Factor],
    *,
    add: bool = False,
    gate: bool = False,
    norm: Norm | None = None,
) -> None:
    _C.multiply(
        _operand(a),
        [
            (
                _operand(f.b),
                f.b.shape[1],
                f.out.data_ptr(),
                f.out.stride(0),
                0 if f.plus is None else f.plus.data_ptr(),
                0 if f.plus is None or f.plus.ndim == 1 else f.plus.stride(0),
            )
            for f in factors
        ],
        a.shape[0],
        a.shape[1],
        add,
        gate,
        0 if norm is None else norm.weight.data_ptr(),
        0.0 if norm is None else norm.epsilon,
        _PARTS[torch.get_float32_matmul_precision()],
        torch.get_num_threads(),
    )


@implements("linear", "cpu", _ready)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` of float32 on the tiles where they serve, else torch's own.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N] or None.

    Returns:
        [..., N], differentiable any number of times.
    """
    ours = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    rows = x.reshape(-1, x.shape[-1]) if ours and fits_bias(bias, len(weight)) else None
    if rows is None or serves(rows, weight.t()) is not None or torch.is_autocast_enabled("cpu"):
        # A slice of a batch (the states that generate() reads) beside a weight without gradient:
        # torch would copy the weight for each row of the batch.
        return torch.nn.functional.linear(x.contiguous(), weight, bias)
    inputs = (rows, weight) if bias is None else (rows, weight, bias)
    if torch.is_grad_enabled() and any(one.requires_grad for one in inputs):
        result: Tensor = _Product.apply(rows, weight.t())
        result = result if bias is None else result + bias
    else:
        result = floats(len(rows), len(weight))
        _run(rows, [Factor(weight.t(), result, bias)])
    return result.view(*x.shape[:-1], len(weight))


def fits_bias(bias: Tensor | None, columns: int) -> bool:
    """Whether a bias can be added to the rows of a product on the tiles: none, or float32 [N]."""
    return bias is None or (
        _unfit(bias) is None
        and bias.dtype == torch.float32
        and bias.shape == (columns,)
        and bias.is_contiguous()
    )


def _operand(x: Tensor) -> tuple[int, int, int, int]:
    return x.data_ptr(), x.stride(0), x.stride(1), _ELEMENTS[x.dtype]


@implements("linear", "reference")
def _linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


class _Product(torch.autograd.Function):
    """``a [M, K] @ b [K, N]`` in float32, and its gradients by products of the same kind."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        out = floats(a.shape[0], b.shape[1])
        multiply(a, b, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        grad = grad if 1 in grad.stride() else grad.contiguous()
        d_a = _Product.apply(grad, b.t()) if ctx.needs_input_grad[0] else None
        # b is a weight transposed: so its gradient lies in memory as the weight does.
        d_b = _Product.apply(grad.t(), a).t() if ctx.needs_input_grad[1] else None
        return d_a, d_b
