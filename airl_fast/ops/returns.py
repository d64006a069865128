"""Discounted returns within each sequence, as a scan.

S rewards (one per span), B sequences. R_i = r_i + gamma R_{i+1} is solved directly, never through
prefix sums divided by gamma^i, which underflow (gamma = 0.9 gives 0 / 0 after some 900 float32
steps). The adjoint of the scan is the same scan run forwards in time, so one operator is both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from airl_fast import _C
from airl_fast.ops import _cuda_spans, _triton
from airl_fast.ops._arguments import require_number
from airl_fast.ops._eager import recorded
from airl_fast.ops.dispatch import implements, pick, register_autograd
from airl_fast.ops.segments import (
    address,
    check_finite,
    check_offset_tensor,
    check_offsets,
    check_vector,
    cpu_serves,
    cuts,
    spread,
)


def discounted_returns(rewards: Tensor, cu: Tensor, gamma: float) -> Tensor:
    """Compute the discounted reward to go: ``R_i = r_i + gamma R_{i+1}`` within each sequence.

    Accumulated in float64; exact for any length and any gamma in [0, 1]. Differentiates
    ``rewards``.

    Args:
        rewards: [S] floating point, finite.
        cu: [B + 1] int32 offsets of the sequences into S; an empty sequence is refused, as an
            empty span is elsewhere.
        gamma: discount per span, in [0, 1].

    Returns:
        [S] float32.

    Raises:
        ValueError: wrong shapes, dtypes or devices, offsets that do not partition ``rewards``, an
            empty sequence, a non-finite reward, or gamma outside [0, 1].
    """
    if is_dynamo_compiling() or (out := _C.eager_returns(rewards, cu, gamma, False)) is None:
        check_vector("discounted_returns", "rewards", rewards)
        check_offset_tensor("discounted_returns", "cu", cu, rewards)
        check_gamma("discounted_returns", gamma)
        return torch.ops.airl_fast.discounted_returns(rewards, cu, float(gamma), False)
    return _returns_recorded(rewards, cu, gamma, False) if out is False else out


def check_gamma(op: str, gamma: float) -> None:
    """Refuse what is no discount."""
    require_number("gamma", gamma)
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(
            f"{op}: expected gamma in [0, 1], received {gamma}; 1 stands for no discount"
        )


@torch.library.custom_op("airl_fast::discounted_returns", mutates_args=())
def _returns(x: Tensor, cu: Tensor, gamma: float, transpose: bool) -> Tensor:
    cu = check_offsets("discounted_returns", "cu", cu, x.shape[0])
    if not transpose:  # gradients may overflow under loss scaling: the optimiser's to judge
        check_finite("discounted_returns", "rewards", x)
    return pick("discounted_returns", x)(x, cu, gamma, transpose)


@_returns.register_fake
def _(x: Tensor, cu: Tensor, gamma: float, transpose: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu, ctx.gamma, ctx.transpose = inputs
    ctx.save_for_backward(cu)
    ctx.dtype = x.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (cu,) = ctx.saved_tensors
    inputs = grad, cu, ctx.gamma, not ctx.transpose
    if is_dynamo_compiling() or not isinstance(dx := _C.eager_returns(*inputs), Tensor):
        dx = torch.ops.airl_fast.discounted_returns(*inputs)
    return dx.to(ctx.dtype), None, None, None


register_autograd(_returns, _backward, setup_context=_keep)

_returns_recorded = recorded(_C.eager_returns, _returns, _keep, _backward)


@implements("discounted_returns", "reference")
def _returns_reference(x: Tensor, cu: Tensor, gamma: float, transpose: bool) -> Tensor:
    """Double the reach of every partial sum until it spans the longest sequence.

    After k rounds y_i = sum over j < 2^k of gamma^j x_{i+j}; the next round adds
    gamma^(2^k) y_{i+2^k} where i + 2^k is still in the sequence. log2(longest) vector operations.
    """
    y, total = x.double(), x.shape[0]
    place = torch.arange(total, device=x.device)
    # How many elements lie ahead of each one, in the direction that the scan gathers from.
    ahead = (
        place - spread(cu[:-1], cu, total) if transpose else spread(cu[1:], cu, total) - 1 - place
    )
    longest = int(cu.diff().max()) if cu.shape[0] > 1 else 0
    reach, weight = 1, gamma
    while reach < longest:
        moved = torch.zeros_like(y)
        if transpose:
            moved[reach:] = y[:-reach]
        else:
            moved[:-reach] = y[reach:]
        y = y + weight * moved.where(ahead >= reach, 0.0)
        reach, weight = 2 * reach, weight * weight
    return y.float()


@implements("discounted_returns", "cpu", cpu_serves)
def _returns_cpu(x: Tensor, cu: Tensor, gamma: float, transpose: bool) -> Tensor:
    cu, out = cu.contiguous(), x.new_empty(x.shape[0], dtype=torch.float32)
    threads = torch.get_num_threads()
    _C.discounted_scan(address(x), cuts(cu), gamma, transpose, threads, out.data_ptr())
    return out


implements("discounted_returns", "cuda", _cuda_spans.serves_spans)(_cuda_spans.discounted_returns)
implements("discounted_returns", "triton", _triton.serves)(_triton.discounted_returns)
