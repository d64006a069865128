"""Backend "triton": when it serves a call, and the way from the operators to its kernels.

Triton and the kernels are imported when the first call is served, never by ``import airl_fast``.
N rows (actions), S spans, B sequences, V vocabulary, K rows that are not ignored.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from airl_fast.ops import _gpu_head, dispatch
from airl_fast.ops._gpu_rows import RowKernels, row_head
from airl_fast.ops._head import kept_rows
from airl_fast.ops._policy_terms import ActionLoss, Actions

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


def interpreted() -> bool:
    """Whether Triton interprets its kernels in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"


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
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: tuple[float, float | None, float],
    logp: Tensor,
    entropy: Tensor | None,
) -> None:
    """Fill ``logp [K]`` and ``entropy [K]`` from ``targets [K]``.

    Half-precision heads go through the fused kernel, which keeps no logits. Float32 products have
    no tensor cores to feed: there torch's product and a read of the chunk are taken.
    """
    if hidden.dtype != weight.dtype or hidden.dtype not in _HALF:
        _gpu_head.read_chunks(hidden, kept, weight, bias, targets, options, rows(), logp, entropy)
        return
    from airl_fast.kernels.linear_logprob import read_head

    index = None if len(kept) == len(hidden) else kept
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    read_head(hidden, weight, targets, row_head(bias, *options), index, logp, entropy)


def logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob`: logp ``[N]`` and entropy ``[N]``, or ``[0]`` if not asked for."""
    kept = kept_rows(targets, ignore_index)
    logp = hidden.new_empty(len(kept), dtype=torch.float32)
    entropy = torch.empty_like(logp) if return_entropy else None
    options = temperature, softcap, logit_scale
    _read(hidden, kept, weight, bias, targets[kept], options, logp, entropy)
    return (
        _gpu_head.spread(logp, kept, len(hidden)),
        logp.new_empty(0) if entropy is None else _gpu_head.spread(entropy, kept, len(hidden)),
    )


def logprob_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_logprob`; arguments and results of `_gpu_head.logprob_backward`."""
    return _gpu_head.logprob_backward(rows(), *arguments)


def policy_loss_sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[float, float | None, float],
    loss: ActionLoss,
    actions: Actions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Logp ``[K]``, entropy ``[K]`` and gradients of `linear_policy_loss`, in one sweep."""
    if any(needs):
        return _gpu_head.policy_loss_sweep(
            rows(), hidden, weight, bias, options, loss, actions, needs
        )
    logp, entropy = torch.empty_like(actions.share), torch.empty_like(actions.share)
    _read(hidden, actions.rows, weight, bias, actions.targets, options, logp, entropy)
    nothing = logp.new_empty(0)
    return logp, entropy, (nothing, nothing, nothing)


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


def _segments() -> Any:
    from airl_fast.kernels import segments

    return segments


def _discriminator() -> Any:
    from airl_fast.kernels import discriminator

    return discriminator
