"""Reductions over spans: sum, mean, last value and softmax of contiguous pieces of a flat tensor.

N values, S spans; span s holds x[cu[s]:cu[s + 1]]. Shapes and dtypes are checked by the public
functions (so that torch.compile traces through them), the offsets themselves inside the operators.
A non-finite value reaches the results of its own span and of no other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from airl_fast import _C
from airl_fast.ops import _cuda_spans, _triton
from airl_fast.ops._arguments import require_tensors
from airl_fast.ops._deferred import defers, refuse_where, sound_offsets
from airl_fast.ops._eager import recorded
from airl_fast.ops._finite import NonFiniteValueError
from airl_fast.ops.dispatch import implements, pick, register_autograd


def segment_sum(x: Tensor, cu: Tensor) -> Tensor:
    """Sum each span: ``out[s] = sum(x[cu[s]:cu[s + 1]])``, accumulated in float64.

    Args:
        x: [N] floating point.
        cu: [S + 1] int32 offsets on the device of ``x``, from 0, strictly increasing, to N.

    Returns:
        [S] float32.

    Raises:
        ValueError: wrong shapes, dtypes or devices, offsets that do not partition ``x``, or an
            empty span (named).
    """
    if is_dynamo_compiling() or (out := _C.eager_sum(x, cu)) is None:
        check_vector("segment_sum", "x", x)
        check_offset_tensor("segment_sum", "cu", cu, x)
        return torch.ops.airl_fast.segment_sum(x, cu)
    return _sum_recorded(x, cu) if out is False else out


def segment_mean(x: Tensor, cu: Tensor) -> Tensor:
    """Average each span: ``out[s] = mean(x[cu[s]:cu[s + 1]])``, accumulated in float64.

    Args:
        x: [N] floating point.
        cu: [S + 1] int32 offsets on the device of ``x``, from 0, strictly increasing, to N.

    Returns:
        [S] float32.

    Raises:
        ValueError: as for ``segment_sum``.
    """
    if is_dynamo_compiling() or (out := _C.eager_mean(x, cu)) is None:
        check_vector("segment_mean", "x", x)
        check_offset_tensor("segment_mean", "cu", cu, x)
        return torch.ops.airl_fast.segment_mean(x, cu)
    return _mean_recorded(x, cu) if out is False else out


def segment_last(x: Tensor, cu: Tensor) -> Tensor:
    """Take the last value of each span: ``out[s] = x[cu[s + 1] - 1]``.

    Args:
        x: [N] floating point.
        cu: [S + 1] int32 offsets on the device of ``x``, from 0, strictly increasing, to N.

    Returns:
        [S] float32.

    Raises:
        ValueError: as for ``segment_sum``.
    """
    if is_dynamo_compiling() or (out := _C.eager_last(x, cu)) is None:
        check_vector("segment_last", "x", x)
        check_offset_tensor("segment_last", "cu", cu, x)
        return torch.ops.airl_fast.segment_last(x, cu)
    return _last_recorded(x, cu) if out is False else out


def segment_softmax(x: Tensor, cu: Tensor) -> Tensor:
    """Softmax within each span; exact at any magnitude, since the span's maximum is taken off.

    Args:
        x: [N] floating point.
        cu: [S + 1] int32 offsets on the device of ``x``, from 0, strictly increasing, to N.

    Returns:
        [N] float32, which sums to 1 over each span.

    Raises:
        ValueError: as for ``segment_sum``.
    """
    if is_dynamo_compiling() or (out := _C.eager_softmax(x, cu)) is None:
        check_vector("segment_softmax", "x", x)
        check_offset_tensor("segment_softmax", "cu", cu, x)
        return torch.ops.airl_fast.segment_softmax(x, cu)
    return _softmax_recorded(x, cu) if out is False else out


# Checks, shared with the other operators over spans.


def check_vector(op: str, name: str, x: Tensor) -> None:
    """Refuse anything but a one-dimensional floating-point tensor."""
    require_tensors(op, **{name: x})
    if x.ndim != 1 or not x.is_floating_point():
        raise ValueError(
            f"{op}: expected {name} to be one-dimensional and floating point, received shape "
            f"{tuple(x.shape)} of {x.dtype}; pass one value per token or span, flat"
        )


def check_offset_tensor(op: str, name: str, cu: Tensor, x: Tensor) -> None:
    """Refuse offsets of the wrong shape, dtype or device; ``check_offsets`` reads their values."""
    require_tensors(op, **{name: cu})
    if cu.ndim != 1 or cu.shape[0] < 1 or cu.dtype != torch.int32:
        raise ValueError(
            f"{op}: expected {name} to hold int32 offsets of shape [spans + 1], received shape "
            f"{tuple(cu.shape)} of {cu.dtype}; a leading 0 and the running sum of the lengths, "
            "as torch.int32, is what is needed"
        )
    if cu.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {cu.device} and the values on {x.device}; move them to one device"
        )


def check_offsets(op: str, name: str, cu: Tensor, total: int) -> Tensor:
    """Refuse offsets that do not cut ``total`` values into non-empty spans.

    Returns:
        The offsets to work with. On a GPU, where the refusal comes late (`_deferred`), they are
        inside the values whatever was given.
    """
    late, spans = defers(cu.device), cu.shape[0] - 1
    if late and (spans > total or (spans == 0 and total > 0)):  # what no offsets could make good
        raise ValueError(
            f"{op}: expected {name} to cut {total} values into spans of one or more, received "
            f"{spans + 1} offsets; check that both describe the same batch"
        )
    refuse_where(
        ((cu[:1] != 0) | (cu[-1:] != total)),
        torch.stack([cu[0], cu[-1]])[None],
        lambda _, first, last: (
            f"{op}: expected {name} to run from 0 to {total}, the number of values, received "
            f"{first} to {last}; check that both describe the same batch"
        ),
    )
    refuse_where(
        cu[1:] <= cu[:-1],  # compared, not subtracted: a difference of int32 can overflow
        torch.stack([cu[:-1], cu[1:]], 1),
        lambda span, start, end: (
            f"{op}: span {span} of {name} is empty or reversed, received offsets {start} to {end}; "
            "every span needs at least one value: leave the empty ones out"
        ),
    )
    return sound_offsets(cu, total) if late else cu


def check_finite(op: str, name: str, x: Tensor) -> None:
    """Refuse NaN and infinities, naming the first; on a GPU late (`_deferred`)."""
    refuse_where(
        ~torch.isfinite(x),
        x,
        lambda at, value: (
            f"{op}: expected finite {name}, received {value} at index {at}; "
            "look for the overflow or the empty mean that made it"
        ),
        NonFiniteValueError,
    )


def check_option(op: str, name: str, value: object, known: Sequence[str]) -> None:
    """Refuse an unknown option by name."""
    if value not in known:
        raise ValueError(
            f"{op}: expected {name} to be one of {', '.join(map(repr, known))}, received {value!r}"
        )


def cpu_serves(*tensors: Tensor) -> str | None:
    """Say why the C++ kernels cannot take these values, if they cannot."""
    x = tensors[0]
    if x.device.type != "cpu":
        return f"it takes tensors in CPU memory, not on {x.device}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"it takes float32 and float64, not {str(x.dtype).removeprefix('torch.')}"
    return None


# The operators.


@torch.library.custom_op("airl_fast::segment_sum", mutates_args=())
def _sum(x: Tensor, cu: Tensor) -> Tensor:
    cu = check_offsets("segment_sum", "cu", cu, x.shape[0])
    return pick("segment_sum", x)(x, cu)


@torch.library.custom_op("airl_fast::segment_mean", mutates_args=())
def _mean(x: Tensor, cu: Tensor) -> Tensor:
    cu = check_offsets("segment_mean", "cu", cu, x.shape[0])
    return pick("segment_mean", x)(x, cu)


@torch.library.custom_op("airl_fast::segment_last", mutates_args=())
def _last(x: Tensor, cu: Tensor) -> Tensor:
    cu = check_offsets("segment_last", "cu", cu, x.shape[0])
    return pick("segment_last", x)(x, cu)


@torch.library.custom_op("airl_fast::segment_softmax", mutates_args=())
def _softmax(x: Tensor, cu: Tensor) -> Tensor:
    cu = check_offsets("segment_softmax", "cu", cu, x.shape[0])
    return pick("segment_softmax", x)(x, cu)


@_sum.register_fake
@_mean.register_fake
@_last.register_fake
def _(x: Tensor, cu: Tensor) -> Tensor:
    return x.new_empty(cu.shape[0] - 1, dtype=torch.float32)


@_softmax.register_fake
def _(x: Tensor, cu: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32)


# Gradients. d sum / dx_i = 1; d mean / dx_i = 1 / length; d last / dx_i = 1 at the last value;
# softmax p: dL/dx_i = p_i (g_i - sum over the span of p g).


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu = inputs
    ctx.save_for_backward(cu)
    ctx.dtype, ctx.total = x.dtype, x.shape[0]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (cu,) = ctx.saved_tensors
    if is_dynamo_compiling() or (dx := _C.eager_spread(grad, cu)) is None:
        dx = spread(grad, cu, ctx.total)
    return dx.to(ctx.dtype), None


def _mean_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (cu,) = ctx.saved_tensors
    if is_dynamo_compiling() or (dx := _C.eager_spread_mean(grad, cu)) is None:
        dx = spread(grad / cu.diff(), cu, ctx.total)
    return dx.to(ctx.dtype), None


def _last_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (cu,) = ctx.saved_tensors
    ends = (cu[1:].long() - 1).clamp(0, ctx.total - 1)  # on a GPU they may not be checked yet
    dx = grad.new_zeros(ctx.total).index_copy(0, ends, grad)
    return dx.to(ctx.dtype), None


def _keep_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cu = inputs
    ctx.save_for_backward(cu, output)
    ctx.dtype, ctx.total = x.dtype, x.shape[0]


def _softmax_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    cu, p = ctx.saved_tensors
    if is_dynamo_compiling() or (dx := _C.eager_softmax_gradient(grad, cu, p)) is None:
        pulled = torch.ops.airl_fast.segment_sum(p * grad, cu)
        dx = p * (grad - spread(pulled, cu, ctx.total))
    return dx.to(ctx.dtype), None


register_autograd(_sum, _sum_backward, setup_context=_keep_inputs)
register_autograd(_mean, _mean_backward, setup_context=_keep_inputs)
register_autograd(_last, _last_backward, setup_context=_keep_inputs)
register_autograd(_softmax, _softmax_backward, setup_context=_keep_output)

_sum_recorded = recorded(_C.eager_sum, _sum, _keep_inputs, _sum_backward)
_mean_recorded = recorded(_C.eager_mean, _mean, _keep_inputs, _mean_backward)
_softmax_recorded = recorded(_C.eager_softmax, _softmax, _keep_output, _softmax_backward)


def _last_recorded(x: Tensor, cu: Tensor) -> Tensor:
    """Leave the gradient to torch, whose index_select has one without a step in Python."""
    ends = _C.eager_ends(x, cu)
    return _last(x, cu) if ends is None else x.index_select(0, ends).float()


# Backend "reference": plain torch, any dtype and device.


def spread(values: Tensor, cu: Tensor, total: int) -> Tensor:
    """Give every element its span's value: [S] -> [N].

    On a GPU the offsets may not have been checked yet: there each element looks for its span, and
    finds one whatever they are.
    """
    if cu.device.type == "cpu" or cu.shape[0] < 2:
        return values.repeat_interleave(cu.diff(), output_size=total)
    return values.index_select(0, found_owner(cu, total))


def found_owner(cu: Tensor, total: int) -> Tensor:
    """Look for the span of each of the N elements, [N] int64: one of the spans, in any case."""
    place = torch.arange(total, dtype=cu.dtype, device=cu.device)
    return torch.searchsorted(cu[1:].contiguous(), place, right=True).clamp(max=cu.shape[0] - 2)


def _owner(cu: Tensor, total: int) -> Tensor:
    """Return the span of each of the N elements, [N] int64."""
    return spread(torch.arange(cu.shape[0] - 1, device=cu.device), cu, total)


@implements("segment_sum", "reference")
def _sum_reference(x: Tensor, cu: Tensor) -> Tensor:
    sums = x.new_zeros(cu.shape[0] - 1, dtype=torch.float64)
    return sums.index_add_(0, _owner(cu, x.shape[0]), x.double()).float()


@implements("segment_mean", "reference")
def _mean_reference(x: Tensor, cu: Tensor) -> Tensor:
    sums = x.new_zeros(cu.shape[0] - 1, dtype=torch.float64)
    return (sums.index_add_(0, _owner(cu, x.shape[0]), x.double()) / cu.diff()).float()


@implements("segment_last", "reference")
def _last_reference(x: Tensor, cu: Tensor) -> Tensor:
    return x[cu[1:].long() - 1].to(torch.float32, copy=True)


@implements("segment_softmax", "reference")
def _softmax_reference(x: Tensor, cu: Tensor) -> Tensor:
    x, owner = x.double(), _owner(cu, x.shape[0])
    largest = x.new_full((cu.shape[0] - 1,), -torch.inf).scatter_reduce_(0, owner, x, "amax")
    raised = (x - largest[owner]).exp()
    sums = torch.zeros_like(largest).index_add_(0, owner, raised)
    return (raised / sums[owner]).float()


# Backend "cpu": csrc/segments.cpp.


@implements("segment_sum", "cpu", cpu_serves)
def _sum_cpu(x: Tensor, cu: Tensor, mean: bool = False) -> Tensor:
    cu, out = cu.contiguous(), x.new_empty(cu.shape[0] - 1, dtype=torch.float32)
    _C.segment_sum(address(x), cuts(cu), mean, torch.get_num_threads(), out.data_ptr())
    return out


@implements("segment_mean", "cpu", cpu_serves)
def _mean_cpu(x: Tensor, cu: Tensor) -> Tensor:
    return _sum_cpu(x, cu, mean=True)


@implements("segment_last", "cpu", cpu_serves)
def _last_cpu(x: Tensor, cu: Tensor) -> Tensor:
    cu, out = cu.contiguous(), x.new_empty(cu.shape[0] - 1, dtype=torch.float32)
    _C.segment_last(address(x), cuts(cu), torch.get_num_threads(), out.data_ptr())
    return out


@implements("segment_softmax", "cpu", cpu_serves)
def _softmax_cpu(x: Tensor, cu: Tensor) -> Tensor:
    cu, out = cu.contiguous(), x.new_empty(x.shape[0], dtype=torch.float32)
    _C.segment_softmax(address(x), cuts(cu), torch.get_num_threads(), out.data_ptr())
    return out


def address(x: Tensor) -> tuple[int, int, int, int]:
    """Describe a vector to C++: address, stride in elements, bytes per element, elements."""
    return x.data_ptr(), x.stride(0), x.element_size(), x.shape[0]


def cuts(cu: Tensor) -> tuple[int, int]:
    """Describe contiguous offsets to C++: address, spans."""
    return cu.data_ptr(), cu.shape[0] - 1


# Backend "cuda": csrc/cuda/scan.cu.


implements("segment_sum", "cuda", _cuda_spans.serves_spans)(_cuda_spans.segment_sum)
implements("segment_mean", "cuda", _cuda_spans.serves_spans)(_cuda_spans.segment_mean)
implements("segment_last", "cuda", _cuda_spans.serves_spans)(_cuda_spans.segment_last)
implements("segment_softmax", "cuda", _cuda_spans.serves_spans)(_cuda_spans.segment_softmax)


# Backend "triton": kernels/segments.py.


implements("segment_sum", "triton", _triton.serves)(_triton.segment_sum)
implements("segment_mean", "triton", _triton.serves)(_triton.segment_mean)
implements("segment_last", "triton", _triton.serves)(_triton.segment_last)
implements("segment_softmax", "triton", _triton.serves)(_triton.segment_softmax)
