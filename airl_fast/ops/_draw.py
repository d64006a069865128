"""Tokens drawn from rows of logits by numbers that are given: csrc/draw.h, or torch.

R rows   V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from airl_fast import _C
from airl_fast.ops.dispatch import forced

_BLOCK = 256  # tokens whose probabilities are added up together, in torch


def draw(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The inverse of each row's distribution function: the first token whose sum passes u.

    Probabilities are softmax(logits / temperature); their sums are float64. A token of probability
    0 is never drawn, however sums and u were rounded.

    Args:
        logits: [R, V] float32.
        u: [R] float64 in [0, 1).
        temperature: above 0.

    Returns:
        The tokens [R] int64 and their log-probs [R] float32, NaN in a row whose logits hold NaN or
        infinity (its token is any).
    """
    if logits.device.type != "cpu" or forced() not in (None, "cpu"):
        return _in_torch(logits, u, temperature)
    logits, u = logits.contiguous(), u.contiguous()
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device="cpu")
    logp = torch.empty(rows, dtype=torch.float32, device="cpu")  # whatever the defaults are
    _C.draw_rows(
        logits.data_ptr(), vocab, rows, vocab, 1.0 / temperature, u.data_ptr(), tokens.data_ptr(),
        logp.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return tokens, logp


def _in_torch(logits: Tensor, u: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits / temperature, dim=-1)
    size = min(_BLOCK, logits.shape[1])
    blocks = pad(logp.exp(), (0, -logits.shape[1] % size)).unflatten(1, (-1, size))
    sums = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # [R, blocks]
    value = u[:, None] * sums[:, -1:]  # they add up to 1 but for rounding
    block = _first_above(sums, value)
    before = pad(sums, (1, 0)).gather(1, block)
    within = blocks.gather(1, block[..., None].expand(-1, -1, size))[:, 0].double().cumsum(-1)
    token = block * size + _first_above(within, value - before)
    token.clamp_(max=logits.shape[1] - 1)  # beyond it for NaN alone
    return token[:, 0], logp.gather(1, token)[:, 0]


def _first_above(sums: Tensor, value: Tensor) -> Tensor:
    """Where rising sums [R, n] first pass a value [R, 1]; never where nothing was added."""
    largest = sums[:, -1:]
    value = value.clamp(min=0).minimum(torch.nextafter(largest, torch.zeros_like(largest)))
    return torch.searchsorted(sums, value, right=True).clamp_(max=sums.shape[1] - 1)
