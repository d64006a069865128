"""What lies between a decoder's products on a CPU: norm, gate and rotation, csrc/layer.h.

    T tokens   D width   H heads   E head size

float32, one read and one write each. A gradient of a gradient is computed by torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from airl_fast import _C


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: plain, float32, in CPU memory."""
    return all(
        type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        for x in tensors
    )


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """``weight * x / sqrt(mean(x^2) + epsilon)`` over rows [T, D] (arXiv 1910.07467).

    Args:
        x: [T, D] float32.
        weight: [D] float32.
        epsilon: added to the mean square.
    """
    result: Tensor = _Norm.apply(x.contiguous(), weight.contiguous(), epsilon)
    return result


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, [T, D] float32 each (SwiGLU's middle, arXiv 2002.05202)."""
    result: Tensor = _Gate.apply(gate.contiguous(), up.contiguous())
    return result


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads turned by their positions (arXiv 2104.09864), pairs half a head apart.

    Args:
        x: [T, H, E] float32; a token's heads lie together.
        cos: [T, E] float32.
        sin: [T, E] float32.

    Returns:
        [T, H, E], contiguous. cos and sin get no gradients.
    """
    result: Tensor = _Rotation.apply(x, cos.contiguous(), sin.contiguous())
    return result


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, scale = torch.empty_like(x), x.new_empty(len(x))
        ctx.save_for_backward(x, weight, scale)
        ctx.epsilon = epsilon
        _C.norm_rows(
            _size(x), x.data_ptr(), weight.data_ptr(), epsilon, _threads(), out.data_ptr(),
            scale.data_ptr(),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        d_x = d_weight = None
        if torch.is_grad_enabled():
            scale = (x.square().mean(-1) + ctx.epsilon).rsqrt()
            u = weight * grad
            d_x = scale[:, None] * u - x * (scale.pow(3) * (u * x).mean(-1))[:, None]
        elif ctx.needs_input_grad[0]:
            grad, d_x = grad.contiguous(), torch.empty_like(x)
            _C.norm_gradient(
                _size(x), grad.data_ptr(), x.data_ptr(), weight.data_ptr(), scale.data_ptr(),
                _threads(), d_x.data_ptr(),
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            d_weight = (grad * x * scale[:, None]).sum(0)
        return d_x, d_weight, None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _C.gate_rows(_size(gate), gate.data_ptr(), up.data_ptr(), _threads(), out.data_ptr())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            s = gate.sigmoid()
            return grad * up * s * (1 + gate * (1 - s)), grad * gate * s
        grad, d_gate, d_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _C.gate_gradient(
            _size(gate), grad.data_ptr(), gate.data_ptr(), up.data_ptr(), _threads(),
            d_gate.data_ptr(), d_up.data_ptr(),
        )  # fmt: skip
        return d_gate, d_up


class _Rotation(torch.autograd.Function):
    """A linear map and, with ``back``, its transpose: each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.back = back
        tokens, heads, size = x.shape
        if x.stride()[1:] != (size, 1):
            x = x.contiguous()
        out = x.new_empty(x.shape)
        _C.rotate_heads(
            x.data_ptr(), x.stride(0), tokens, heads, size, cos.data_ptr(), sin.data_ptr(), back,
            _threads(), out.data_ptr(),
        )  # fmt: skip
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Rotation.apply(grad, *ctx.saved_tensors, not ctx.back), None, None, None


def _size(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[1]


def _threads() -> int:
    return torch.get_num_threads()
