"""One rank's rows of the vocabulary: what it reads of them, and the gradients that it owes.

N rows (actions), K rows that are not ignored, D hidden size, V_r rows of the weight on rank r.

With ``q = p restricted to the shard``, ``L_r`` its log-sum-exp and ``H_r`` its entropy, the chain
rule of a distribution that first picks a shard and then a token in it reads

    P_r = softmax over ranks of L_r         p_k = P_r q_k
    log p_target = log P_owner + log q_target
    H = sum over r of P_r (H_r - log P_r)

so that [K] numbers per rank are all that has to be exchanged. No term can change sign by rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from airl_fast.ops import _cpu_gradients, _cpu_head, _cuda_head, _triton, linear_logprob
from airl_fast.ops._head import ChunkedHead, LinearHead, chunk_rows, compute_dtype, present
from airl_fast.ops.dispatch import always, implements, pick

NOBODY = -1  # the local target of an ignored row
_COPIED_FLOATS = 2**22  # of the rows of hidden and weight that are held to correct a gradient

Forward = Callable[[Tensor, Tensor, LinearHead, Tensor, Tensor, Tensor | None, Tensor], None]
Gradients = tuple[Tensor, Tensor, Tensor]


class ShardRead(NamedTuple):
    """What a rank knows of the K kept rows after one pass over its logits."""

    log_sum: Tensor  # [K] float64: L_r
    logp: Tensor  # [K]: log q of the row's local target
    entropy: Tensor  # [K]: H_r; [0] unless asked for


def local_targets(targets: Tensor, first: int, size: int, ignore_index: int) -> Tensor:
    """Row of the shard ``[N]`` for every target: its own, else the nearest; NOBODY if ignored.

    A row whose target another rank owns gets some row of this shard: the operators want one, and
    `shard_gradients` takes it out again.
    """
    local = (targets - first).clamp(0, size - 1)
    return torch.where(targets == ignore_index, NOBODY, local)


def forward_for(hidden: Tensor, head: LinearHead) -> Forward:
    """The backend that reads this shard.

    Raises:
        RuntimeError: the forced backend cannot serve it.
    """
    return pick("linear_logprob_shard", *present(hidden, head.weight, head.bias))


def read_shard(
    forward: Forward, hidden: Tensor, head: LinearHead, local: Tensor, return_entropy: bool
) -> ShardRead:
    """Read the shard's logits once, in tiles or chunks that are forgotten."""
    kept = (local != NOBODY).nonzero().squeeze(-1)
    dtype = compute_dtype(hidden, head.weight, head.bias)
    logp = hidden.new_empty(len(kept), dtype=dtype)
    entropy = torch.empty_like(logp) if return_entropy else None
    log_sum = hidden.new_empty(len(kept), dtype=torch.float64)
    forward(hidden, kept, head, local[kept], logp, entropy, log_sum)
    return ShardRead(log_sum, logp, logp.new_empty(0) if entropy is None else entropy)


def shard_gradients(
    d_log_sum: Tensor,
    d_target: Tensor,
    d_entropy: Tensor | None,
    entropy: Tensor,
    hidden: Tensor,
    head: LinearHead,
    local: Tensor,
    needs: tuple[bool, bool, bool],
) -> Gradients:
    """Gradients at hidden, weight and bias, in the compute dtype; ``[0]`` where not needed.

    The operator's backward gives ``c (1[k = local] - q_k)``. With ``c = -d_log_sum`` that is right
    but at the local target, where ``d_target - c`` is added: a row of the weight, and of hidden.

    Args:
        d_log_sum: ``[N]`` gradient at L_r, where ``d L_r / d z_k = q_k``.
        d_target: ``[N]`` gradient at z of the target; 0 where another rank owns it.
        d_entropy: ``[N]`` gradient at H_r, or None for zero.
        entropy: ``[N]`` H_r, needed with ``d_entropy``.
        hidden: ``[N, D]``.
        head: this rank's rows.
        local: ``[N]``, of `local_targets`.
        needs: which gradients are wanted, of hidden, weight and bias.
    """
    backward = pick("linear_logprob_shard_backward", *present(hidden, head.weight, head.bias))
    gradients = backward(-d_log_sum, d_entropy, entropy, hidden, head, local, NOBODY, needs)
    _add_at_targets(gradients, d_target + d_log_sum, hidden, head, local, needs)
    return gradients


def _add_at_targets(
    gradients: Gradients,
    coefficient: Tensor,
    hidden: Tensor,
    head: LinearHead,
    local: Tensor,
    needs: tuple[bool, bool, bool],
) -> None:
    """Add ``coefficient [N]`` at z of the local targets to the gradients, in place."""
    d_hidden, d_weight, d_bias = gradients
    dtype = compute_dtype(hidden, head.weight, head.bias)
    kept = (local != NOBODY).nonzero().squeeze(-1)
    for rows in kept.split(max(1, _COPIED_FLOATS // hidden.shape[1])):
        at = local[rows]
        x, w = hidden[rows].to(dtype), head.weight[at].to(dtype)
        g = coefficient[rows].to(dtype) * (head.logit_scale / head.temperature)
        if head.softcap is not None:
            a = (x * w).sum(-1) if head.bias is None else (x * w).sum(-1) + head.bias[at]
            g = g * (1 - (a * (head.logit_scale / head.softcap)).tanh().square())
        if needs[0]:
            d_hidden[rows] += g[:, None] * w
        if needs[1]:
            d_weight.index_add_(0, at, (g[:, None] * x).to(d_weight.dtype))
        if needs[2]:
            d_bias.index_add_(0, at, g.to(d_bias.dtype))


@implements("linear_logprob_shard", "reference")
def _reference(
    hidden: Tensor,
    kept: Tensor,
    head: LinearHead,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    log_sum: Tensor,
) -> None:
    limit = max(1, min(chunk_rows(len(head.weight), logp.itemsize), len(kept)))
    chunks = ChunkedHead(head, dtype=logp.dtype, rows=limit, differentiate=False)
    for start in range(0, len(kept), limit):
        chunk = slice(start, start + limit)
        log_probs = chunks.log_probs(hidden[kept[chunk]].to(logp.dtype))
        log_sum[chunk] = chunks.log_sums(log_probs)
        logp[chunk] = log_probs.gather(1, targets[chunk, None]).squeeze(1)
        if entropy is not None:
            entropy[chunk] = chunks.entropy(log_probs)


@implements("linear_logprob_shard", "cpu", _cpu_head.serves)
def _cpu(
    hidden: Tensor,
    kept: Tensor,
    head: LinearHead,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    log_sum: Tensor,
) -> None:
    _cpu_head.read_all(_cpu_head.Rows(hidden, kept), targets, head, logp, entropy, log_sum)


implements("linear_logprob_shard", "triton", _triton.serves_head)(_triton.HEAD.shard_forward)
implements("linear_logprob_shard", "cuda", _cuda_head.serves)(_cuda_head.HEAD.shard_forward)


# In the compute dtype: more is added to what they return.
for _name, _serves, _function in (
    ("reference", always, linear_logprob.reference_backward),
    ("cpu", _cpu_head.serves, _cpu_gradients.logprob_backward),
    ("triton", _triton.serves_head, partial(_triton.HEAD.logprob_backward, narrow=False)),
    ("cuda", _cuda_head.serves, partial(_cuda_head.HEAD.logprob_backward, narrow=False)),
):
    implements("linear_logprob_shard_backward", _name, _serves)(_function)
