"""Backend "cuda" of the operators over the head: `_gpu_head` with the row kernels of csrc/cuda/.

N rows (actions), K rows that are not ignored, V vocabulary.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from airl_fast.ops import _gpu_head, dispatch
from airl_fast.ops._cuda_extension import serves_head as serves
from airl_fast.ops._cuda_rows import CudaRows
from airl_fast.ops._head import kept_rows
from airl_fast.ops._policy_terms import ActionLoss, Actions


def serves_reading(*tensors: Tensor) -> str | None:
    """As `serves`, for reading without gradients: Triton's fused kernel goes first."""
    reason = serves(*tensors)
    if reason is None and dispatch.forced() != "cuda" and find_spec("triton") is not None:
        return "it keeps chunks of logits, and Triton's kernel none: it serves where it is forced"
    return reason


@cache
def rows() -> CudaRows:
    """The row kernels."""
    return CudaRows()


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
    given = hidden, kept, weight, bias, targets[kept], options
    _gpu_head.read_chunks(*given, rows(), logp, entropy)
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
    given = hidden, weight, bias, options, loss, actions, needs
    if any(needs):
        return _gpu_head.policy_loss_sweep(rows(), *given)
    logp, entropy = torch.empty_like(actions.share), torch.empty_like(actions.share)
    head = hidden, actions.rows, weight, bias, actions.targets, options
    _gpu_head.read_chunks(*head, rows(), logp, entropy)
    return logp, entropy, (logp.new_empty(0), logp.new_empty(0), logp.new_empty(0))
