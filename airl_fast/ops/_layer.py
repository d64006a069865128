"""What lies between a decoder's products: norm, gate and rotation, one read and one write each.

    T tokens   D width   H heads   E head size

csrc/layer.h on a CPU, in float32; kernels/layer.py on a GPU, in float32 and half precision, summed
in float32. A gradient of a gradient is computed by torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from airl_fast import _C
from airl_fast.ops import _triton
from airl_fast.ops.dispatch import forced

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, torch.nn.Parameter)


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these: plain, of one dtype, on one device, and not forced off."""
    first = tensors[0]
    if any(
        type(x) not in _PLAIN or x.device != first.device or x.dtype != first.dtype for x in tensors
    ):
        return False
    if forced() in (None, "cpu") and first.device.type == "cpu":
        return first.dtype == torch.float32
    if forced() not in (None, "triton") or first.dtype not in _DTYPES:
        return False
    return _triton.serves(*tensors) is None and first.shape[-1] <= _triton.layer().LARGEST_WIDTH


def _in_triton(x: Tensor) -> bool:
    """Whether Triton takes it: on a GPU; in a CPU's memory where its interpreter is forced."""
    return x.is_cuda or (forced() == "triton" and _triton.serves(x) is None)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over rows [T, D] (arXiv 1910.07467).

    Args:
        x: [T, D].
        weight: [D].
        epsilon: added to the mean square.
    """
    result: Tensor = _Norm.apply(x.contiguous(), weight.contiguous(), epsilon)
    return result


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, [T, D] each (SwiGLU's middle, arXiv 2002.05202)."""
    result: Tensor = _Gate.apply(gate.contiguous(), up.contiguous())
    return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned by their positions (arXiv 2104.09864), pairs half a head apart.

    Args:
        x: [T, H, E]; a token's heads lie together.
        cos: [T, E].
        sin: [T, E].

    Returns:
        [T, H, E], contiguous. cos and sin get no gradients.
    """
    result: Tensor = _Rotation.apply(x, cos.contiguous(), sin.contiguous())
    return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        ctx.epsilon, ctx.triton = epsilon, _in_triton(x)
        if ctx.triton:
            out, scale = _triton.layer().norm(x, weight, epsilon)
        else:
            out, scale = torch.empty_like(x), x.new_empty(len(x))
            _C.norm_rows(
                _size(x), x.data_ptr(), weight.data_ptr(), epsilon, _threads(), out.data_ptr(),
                scale.data_ptr(),
            )  # fmt: skip
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        d_x = d_weight = None
        if torch.is_grad_enabled():
            wide, wide_grad = x.float(), grad.float()  # float16 squares overflow from 256 on
            scale = (wide.square().mean(-1) + ctx.epsilon).rsqrt()
            u = weight.float() * wide_grad
            d_x = scale[:, None] * u - wide * (scale.pow(3) * (u * wide).mean(-1))[:, None]
            d_x = d_x.to(x.dtype)
            if need_weight:
                d_weight = (wide_grad * wide * scale[:, None]).sum(0).to(weight.dtype)
        elif ctx.triton:
            given = grad.contiguous(), x, weight, scale
            d_x, d_weight = _triton.layer().norm_gradient(*given, (need_x, need_weight))
            d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        else:
            if need_x:
                grad, d_x = grad.contiguous(), torch.empty_like(x)
                _C.norm_gradient(
                    _size(x), grad.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(),
                    _threads(), d_x.data_ptr(),
                )  # fmt: skip
            if need_weight:
                d_weight = (grad * x * scale[:, None]).sum(0)
        return d_x, d_weight, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.triton = _in_triton(gate)
        if ctx.triton:
            result: Tensor = _triton.layer().gate(gate, up)
            return result
        out = torch.empty_like(gate)
        _C.gate_rows(_size(gate), gate.data_ptr(), up.data_ptr(), _threads(), out.data_ptr())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            s = gate.sigmoid()
            return grad * up * s * (1 + gate * (1 - s)), grad * gate * s
        grad = grad.contiguous()
        if ctx.triton:
            both: tuple[Tensor, Tensor] = _triton.layer().gate_gradient(grad, gate, up)
            return both
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _C.gate_gradient(
            _size(gate), grad.data_ptr(), gate.data_ptr(), up.data_ptr(), _threads(),
            d_gate.data_ptr(), d_up.data_ptr(),
        )  # fmt: skip
        return d_gate, d_up


class _Rotation(torch.autograd.Function):
    """A linear map and, with ``back``, its transpose: each is the other's gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False, triton: bool = False
    ) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back, ctx.triton = back, triton or _in_triton(x)
        tokens, heads, size = x.shape
        if x.stride()[1:] != (size, 1):
            x = x.contiguous()
        if ctx.triton:
            result: Tensor = _triton.layer().rotate(x, cos, sin, back)
            return result
        out = x.new_empty(x.shape)
        _C.rotate_heads(
            x.data_ptr(), x.stride(0), tokens, heads, size, cos.data_ptr(), sin.data_ptr(), back,
            _threads(), out.data_ptr(),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        back = _Rotation.apply(grad, *ctx.saved_tensors, not ctx.back, ctx.triton)
        return back, None, None, None, None


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _threads() -> int:
    return torch.get_num_threads()
