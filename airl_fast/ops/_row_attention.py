"""Rows that go on a token at a time from prompts that they share attend: csrc/row_attention.h.

R rows   T tokens of all prompts   H query heads   Hk key heads   E head size
M tokens that a row has room for beyond its prompt
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from airl_fast import _C
from airl_fast.ops.dispatch import forced

_PLAIN = (Tensor, torch.nn.Parameter)


def serves(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel takes these: float32 in a CPU's memory, and not forced off."""
    return forced() in (None, "cpu") and all(
        type(x) in _PLAIN
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[-1] == query.shape[-1]
        for x in (query, key, value)
    )


@dataclass(frozen=True, eq=False)
class Held:
    """What rows hold in one layer, all contiguous float32 but for the offsets.

    Attributes:
        prompt_keys: [Hk, E, T].
        prompt_values: [Hk, T, E].
        starts: [R] int64, where the prompt of a row begins in the T tokens.
        counts: [R] int64, its tokens.
        own_keys: [R, Hk, E, M].
        own_values: [R, Hk, M, E].
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    starts: Tensor
    counts: Tensor
    own_keys: Tensor
    own_values: Tensor


def attend(
    held: Held, own: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int
) -> Tensor:
    """Put a token after every row and let it attend to all that its row holds.

    softmax(scale q K^T) V.

    Args:
        held: its own keys and values are written to, at ``own - 1``.
        own: tokens that every row holds beyond its prompt, the new one included; at most M.
        query: [R, H, E] of the new tokens.
        key: [R, Hk, E].
        value: [R, Hk, E].
        scale: of the scores.
        window: a token sees itself and the ``window - 1`` before it.

    Returns:
        [R, H, E].
    """
    rows, heads, size = query.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = torch.empty_like(query)
    _C.attend_rows(
        rows, heads, key.shape[1], size, held.prompt_values.shape[1], held.own_keys.shape[3], own,
        window, held.prompt_keys.data_ptr(), held.prompt_values.data_ptr(), held.starts.data_ptr(),
        held.counts.data_ptr(), held.own_keys.data_ptr(), held.own_values.data_ptr(),
        query.data_ptr(), key.data_ptr(), value.data_ptr(), scale, out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
