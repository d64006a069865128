"""Float64 results of the linear head at shapes where its logits would not fit in memory.

N rows, D hidden size, V vocabulary. Blocks of the vocabulary are swept with a running maximum;
nothing here is shared with the package or with tests/oracle.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 4096  # of the vocabulary: 64 MiB of float64 logits at N = 2048


class HeadTruth(NamedTuple):
    """Float64, ``[N]`` each."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor


def head_truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> HeadTruth:
    """Log-probabilities, entropies and log-sum-exps of the rows of ``hidden``."""
    x = hidden.double()
    top = x.new_full((len(x),), -torch.inf)
    mass, weighted = torch.zeros_like(top), torch.zeros_like(top)  # sum e^(z-top), sum z e^(z-top)
    for block in weight.split(_BLOCK):
        z = x @ block.double().T
        raised = torch.maximum(top, z.amax(1))
        shrink = (top - raised).exp()
        e = (z - raised[:, None]).exp()
        mass = mass * shrink + e.sum(1)
        weighted = weighted * shrink + (z * e).sum(1)
        top = raised
    lse = top + mass.log()
    taken = (x * weight[targets].double()).sum(1)
    return HeadTruth(taken - lse, lse - weighted / mass, lse)


def d_hidden(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, d_logp: Tensor, rows: Tensor
) -> Tensor:
    """``d_logp_n (w_target - sum_v p_nv w_v)`` for the sampled rows, ``[rows, D]``."""
    x, gradient = hidden[rows].double(), weight[targets[rows]].double()
    for block in weight.split(_BLOCK):
        wide = block.double()
        gradient = gradient - (x @ wide.T - lse[rows, None]).exp() @ wide
    return d_logp[rows, None].double() * gradient


def d_weight(
    hidden: Tensor, weight: Tensor, targets: Tensor, lse: Tensor, d_logp: Tensor, ids: Tensor
) -> Tensor:
    """``sum_n d_logp_n (1[target_n = v] - p_nv) h_n`` for the sampled tokens, ``[ids, D]``."""
    x = hidden.double()
    p = (x @ weight[ids].double().T - lse[:, None]).exp()
    taken = (targets[:, None] == ids[None]).double()
    return (d_logp[:, None].double() * (taken - p)).T @ x
