"""Cases of what lies between a decoder's products on a GPU: bound by memory.

T tokens, D width, H heads of 64. Forward and backward together; the yardstick is a copy of the
operator's input into memory that is already there, and ``traffic`` the bytes that each must move.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import airl_fast
from airl_fast.ops import _layer
from benchmarks.harness import Case, Outputs, Prepared, Sampled, UnavailableError, Variant

NORM, GATE, ROTATION = (f"{name} (forward and backward)" for name in ("norm", "gate", "rotation"))
OPERATORS = (NORM, GATE, ROTATION)
_EPSILON = 1e-6
_HEAD = 64
_SMALL = (5, 128)
_CHECKED = 3  # rows that are held to float64 on the timed inputs
# elements of [T, D] that are read and written: forward, then backward
_MOVED = {NORM: 2 + 3, GATE: 3 + 5, ROTATION: 2 + 2}

Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class LayerInputs:
    """``x``, ``other`` and ``grad`` [T, D]; a weight [D]; cos and sin [T, 64]."""

    x: Tensor
    other: Tensor
    grad: Tensor
    weight: Tensor
    cos: Tensor
    sin: Tensor

    def given(self, operator: str) -> tuple[Tensor, ...]:
        """What the operator takes, in its shapes."""
        if operator == NORM:
            return self.x, self.weight
        if operator == GATE:
            return self.x, self.other
        return self.x.unflatten(1, (-1, _HEAD)), self.cos, self.sin

    def first(self, rows: int) -> "LayerInputs":
        """The first rows in float64, in CPU memory."""
        cut = (self.x, self.other, self.grad, self.cos, self.sin)
        x, other, grad, cos, sin = (t[:rows].double().cpu() for t in cut)
        return LayerInputs(x, other, grad, self.weight.double().cpu(), cos, sin)


def layer_inputs(
    tokens: int, width: int, dtype: torch.dtype, seed: int, device: str
) -> LayerInputs:
    """Normal values, and angles."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows = [normal(tokens, width).to(dtype) for _ in range(3)]
    angles = normal(tokens, _HEAD)
    return LayerInputs(
        *rows, normal(width).to(dtype), angles.cos().to(dtype), angles.sin().to(dtype)
    )


def layer_case(
    operator: str, tokens: int, width: int, dtype: torch.dtype, seed: int, device: str = "cuda"
) -> Case:
    """One operator with its gradients at one size."""
    return Case(
        operator=operator,
        shape={"T": tokens, "D": width},
        dtype=dtype,
        inputs=partial(layer_inputs, tokens, width, dtype, seed, device),
        small=partial(layer_inputs, *_SMALL, dtype, seed, device),
        oracle=partial(_exact, operator),
        expected=partial(_expected, operator),
        yardstick=("copy", _copy),
        variants=[
            Variant("airl_fast", partial(_ours, operator), "triton" if device == "cuda" else "cpu"),
            Variant("plain torch", partial(_prepared, operator, _FORMULAS[operator])),
            Variant("torch.compile", partial(_compiled, operator), note="of plain torch"),
            Variant("liger-kernel", partial(_liger, operator)),
        ],
        traffic=_MOVED[operator] * tokens * width * dtype.itemsize,
    )


def _copy(inputs: LayerInputs) -> Callable[[], Tensor]:
    return partial(torch.empty_like(inputs.x).copy_, inputs.x)


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)
    return weight * scaled.to(x.dtype)


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    return functional.silu(gate) * up


def _rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]


_FORMULAS: dict[str, Function] = {NORM: _norm, GATE: _gate, ROTATION: _rotation}


def _prepared(operator: str, function: Function, inputs: LayerInputs) -> Prepared:
    given = [x.detach().requires_grad_() for x in inputs.given(operator)]
    leaves = given[:1] if operator == ROTATION else given
    for constant in given[len(leaves) :]:
        constant.requires_grad_(False)
    grad = inputs.grad.reshape(given[0].shape)

    def call() -> Outputs:
        y = function(*given)
        gradients = torch.autograd.grad(y, leaves, grad)
        return {"y": y, **{f"gradient {i}": g for i, g in enumerate(gradients)}}

    return Prepared(call)


def _ours(operator: str, inputs: LayerInputs) -> Prepared:
    functions: dict[str, Function] = {
        NORM: lambda x, weight: _layer.rms_norm(x, weight, _EPSILON),
        GATE: _layer.gated,
        ROTATION: _layer.rotated,
    }
    if not _layer.serves(*inputs.given(operator)):
        raise UnavailableError(f"no kernel takes {inputs.x.dtype} on {inputs.x.device}")
    return _prepared(operator, functions[operator], inputs)


def _compiled(operator: str, inputs: LayerInputs) -> Prepared:
    torch._dynamo.reset()
    compiled = torch.compile(_FORMULAS[operator], dynamic=False, fullgraph=True)
    return _prepared(operator, compiled, inputs)


def _liger(operator: str, inputs: LayerInputs) -> Prepared:
    if not inputs.x.is_cuda:
        raise UnavailableError("liger-kernel's are Triton kernels for a GPU")
    try:
        from liger_kernel.ops import rms_norm, swiglu
    except ImportError as error:
        raise UnavailableError(f"liger-kernel is not installed: {error}") from error
    if operator == ROTATION:
        raise UnavailableError("liger-kernel turns queries and keys together, batched by sequence")
    functions: dict[str, Function] = {
        NORM: lambda x, w: rms_norm.LigerRMSNormFunction.apply(x, w, _EPSILON, 0.0, "llama", False),
        GATE: swiglu.LigerSiLUMulFunction.apply,
    }
    own = replace(inputs, x=inputs.x.clone(), other=inputs.other.clone())

    def reset() -> None:  # its backward of the gate overwrites what the forward was given
        own.x.copy_(inputs.x)
        own.other.copy_(inputs.other)

    return replace(_prepared(operator, functions[operator], own), reset=reset)


def _exact(operator: str, inputs: LayerInputs) -> Outputs:
    """Float64."""
    with airl_fast.backend("reference"):
        wide = _prepared(operator, _FORMULAS[operator], inputs.first(len(inputs.x)))
        return {name: value.detach() for name, value in wide.call().items()}


def _expected(operator: str, inputs: LayerInputs) -> dict[str, Sampled]:
    """Of the first rows; a norm's weight has a gradient from all of them."""
    rows = torch.arange(_CHECKED)
    exact = _exact(operator, inputs.first(_CHECKED))
    expected = {name: Sampled(value, rows) for name, value in exact.items()}
    if operator == NORM:
        expected["gradient 1"] = Sampled(_exact(operator, inputs)["gradient 1"])
    return expected
