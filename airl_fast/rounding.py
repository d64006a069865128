"""How far rounding alone can move the gradients of a head: what an audit has to allow for.

R rows (actions), D hidden size, V vocabulary.

With ``c`` and ``e`` the weights of a row's log-prob and entropy in the loss, the gradient at its
scaled logit z_k is

    g_k = c (1[k = target] - p_k) - e p_k (log p_k + H)

A backend has log p from logits and a log-sum-exp L in float32: an absolute error of
r = eps (4 + |L|), where eps is 1.2e-7, |L| that of rounding L and 4 that of an exponential, the
sum, its logarithm and their difference. An error of r in log p is one of r p in p, hence of r c p_k
in g_k, however small 1 - p of a confident sample is; and of as much in c, which holds
exp(log p - old). Products in half precision round g_k itself, by half a unit in the last place.
These errors are added up over the vocabulary (for a hidden state) or over the rows (for a row of
the weight) by their absolute values, so that no luck and no independence is assumed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from airl_fast.ops._head import ChunkedHead, LinearHead, chunk_rows

_EPS = torch.finfo(torch.float32).eps


class Rounding(NamedTuple):
    """Bounds on the norm of what rounding adds to each row of a gradient, float32."""

    hidden: Tensor  # [R]
    weight: Tensor  # [V]


def gradient_rounding(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    of_logp: Tensor,
    of_entropy: float = 0.0,
    *,
    products: torch.dtype = torch.float32,
) -> Rounding:
    """Bound what rounding does to the gradients of a loss of log-probs and entropies.

    Memory: the reference's two buffers of logits (``_head.chunk_rows``), and five more like them.

    Args:
        hidden: [R, D] floating.
        head: the head; of any floating dtype.
        targets: [R] int64.
        of_logp: [R] the magnitude of d loss / d log p, the sum over its terms if it has several.
        of_entropy: the magnitude of d loss / d entropy of a row.
        products: the dtype of g where the backend multiplies it with the weight and the states.
    """
    unit = 0.0 if products == torch.float32 else torch.finfo(products).eps / 2
    limit = chunk_rows(len(head.weight))
    chunks = ChunkedHead(
        head, dtype=torch.float32, rows=min(limit, max(1, len(hidden))), differentiate=False
    )
    scale = head.logit_scale / head.temperature
    of_words, of_states = chunks.weight.norm(dim=1), hidden.float().norm(dim=1)
    at_hidden, at_weight = torch.zeros_like(of_states), torch.zeros_like(of_words)
    for start in range(0, len(hidden), limit):
        rows = slice(start, start + limit)
        log_p = chunks.log_probs(hidden[rows].float())
        r = (_EPS * scale * (4 + chunks.log_sums(log_p).abs())).float()[:, None]
        of_p = of_entropy * (log_p + chunks.entropy(log_p)[:, None]).abs_()
        p, column, c = log_p.exp(), targets[rows, None], of_logp[rows, None]
        g = p * (c + of_p)  # |g_k|, but at the target
        error = r * (g + p * (2 * of_entropy))
        error.scatter_add_(1, column, r * c)
        if unit:
            p_target = p.gather(1, column)
            g.scatter_add_(1, column, c * (1 - 2 * p_target))
            error += unit * scale * g
        at_hidden[rows] = error @ of_words
        at_weight += error.t() @ of_states[rows]
    return Rounding(at_hidden, at_weight)
