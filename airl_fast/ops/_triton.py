"""Backend "triton": when it serves a call, and the way from the operators to its kernels.

Triton and the kernels are imported when the first call is served, never by ``import airl_fast``.
N rows (actions), S spans, B sequences, V vocabulary, K rows that are not ignored.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from airl_fast.kernels.launch import interpreted
from airl_fast.ops import _gpu_operators, dispatch
from airl_fast.ops._gpu_rows import RowKernels, row_head
from airl_fast.ops._head import LinearHead

_LEAST_CAPABILITY = (8, 0)
_HALF = (torch.bfloat16, torch.float16)


def serves(*tensors: Tensor) -> str | None:
    """Say why the Triton kernels cannot take these tensors, if they cannot.

    CUDA tensors from sm_80 on. With ``TRITON_INTERPRET=1`` the kernels run on a CPU, one program
    after the other: slow, meant for tests, and therefore only where the backend is forced.
    """
    if not _installed():
        return "Triton is not installed (pip install triton)"
    if interpreted():
        if dispatch.forced() == "triton":
            return None
        return "TRITON_INTERPRET=1 makes it slow: it serves only where the backend is forced"
    for tensor in tensors:
        if not tensor.is_cuda:
            return f"it takes tensors on a CUDA device, not on {tensor.device}"
        if torch.cuda.get_device_capability(tensor.device) < _LEAST_CAPABILITY:
            return f"it needs compute capability 8.0, and {tensor.device} has less"
    return None


def serves_head(*tensors: Tensor) -> str | None:
    """As `serves`, for the head: float64 inputs ask for float64 logits."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "its logits are float32, and float64 inputs ask for float64"
    return serves(*tensors)


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def rows() -> RowKernels:
    """The row kernels."""
    from airl_fast.kernels.rows import TritonRows

    return TritonRows()


def _read(
    hidden: Tensor,
    kept: Tensor,
    head: LinearHead,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
) -> None:
    """Fill ``logp [K]`` and ``entropy [K]`` from ``targets [K]``.

    Half-precision heads go through the fused kernel, which keeps no logits. Float32 products have
    no tensor cores to feed: there torch's product and a read of the chunk are taken.
    """
    if hidden.dtype != head.weight.dtype or hidden.dtype not in _HALF:
        _gpu_operators.read_chunks(hidden, kept, head, targets, logp, entropy, rows())
        return
    from airl_fast.kernels.linear_logprob import read_head

    index = None if len(kept) == len(hidden) else kept
    pair = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, head.weight))
    read_head(*pair, targets, row_head(*head[1:]), index, logp, entropy)


HEAD = _gpu_operators.HeadOperators(rows, _read)


def serves_in_place(gradient: Tensor) -> bool:
    """Whether `scale` takes this gradient, float32 or narrower, and no other device's is forced."""
    return dispatch.forced() in (None, "triton", "cuda") and serves_head(gradient) is None


def scale(gradient: Tensor, factor: Tensor) -> None:
    """Multiply a contiguous gradient in place by ``factor []`` float32."""
    from airl_fast.kernels import scaling

    scaling.scale(gradient, factor)


def segment_sum(x: Tensor, cu: Tensor) -> Tensor:
    """Sums ``[S]`` float32 of the segments of ``x [N]``."""
    return _segments().reduce(x, cu, "sum")


def segment_mean(x: Tensor, cu: Tensor) -> Tensor:
    """Means ``[S]`` float32 of the segments of ``x [N]``."""
    return _segments().reduce(x, cu, "mean")


def segment_last(x: Tensor, cu: Tensor) -> Tensor:
    """Last values ``[S]`` float32 of the segments of ``x [N]``."""
    return _segments().reduce(x, cu, "last")


def segment_softmax(x: Tensor, cu: Tensor) -> Tensor:
    """Softmax ``[N]`` float32 within the segments of ``x [N]``."""
    return _segments().softmax(x, cu)


def discounted_returns(x: Tensor, cu: Tensor, gamma: float, transpose: bool) -> Tensor:
    """Discounted scan ``[S]`` float32 within the sequences, backwards in time, or forwards."""
    return _segments().scan(x, cu, gamma, transpose)


def discriminator_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss ``[]`` and statistics ``[10]``, float32; arguments of the op's implementations."""
    return _discriminator().loss(*arguments)


def discriminator_gradient(grad: Tensor, *arguments: Any) -> Tensor:
    """The gradient at f ``[S]``, float64; arguments of the op's implementations."""
    return _discriminator().gradient(grad, *arguments)


def span_scores(*arguments: Any) -> tuple[Tensor, Tensor]:
    """Reward and f ``[S]`` of the score head; see `airl_fast.kernels.discriminator.span_scores`."""
    return _discriminator().span_scores(*arguments)


@cache
def layer() -> Any:
    """What lies between a decoder's products: `airl_fast.kernels.layer`."""
    from airl_fast.kernels import layer

    return layer


def _segments() -> Any:
    from airl_fast.kernels import segments

    return segments


def _discriminator() -> Any:
    from airl_fast.kernels import discriminator

    return discriminator
