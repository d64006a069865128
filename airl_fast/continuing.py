"""One text alone, and the texts that continue it: keys and values of every attention layer.

E head size   Hk key heads
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from airl_fast.attention import enabled, last_hidden, unmasked
from airl_fast.batch_checks import check_rope
from airl_fast.layout import Bucket


@dataclass(eq=False)
class Continuation:
    """What :func:`continued_forward` keeps of a text, so that others continue it.

    Attributes:
        length: tokens of the text.
        keys: [1, Hk, length, E] of every attention layer, in the order of their calls.
        values: [1, Hk, length, Ev] of the same.
    """

    length: int = 0
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class Pass:
    """A pass of ``length`` tokens over a text alone, which is kept or continues one that was.

    Attributes:
        bucket: which keys each of its tokens sees.
        ranges: the same, as ops/_packed_attention has it.
        kept: what is kept of it, unless it continues another.
    """

    def __init__(self, before: Continuation | None, length: int, device: torch.device) -> None:
        self.before = before
        self.kept = Continuation(length=length)
        self.layer = 0
        shared = before.length if before else 0
        self.bucket = Bucket(
            shape=(1, length, shared + length),
            query_positions=torch.arange(shared, shared + length, device=device)[None],
            causal=not shared,
        )
        self.ranges = torch.tensor([[0, length, 0, shared, shared]], device="cpu")

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put the next layer's keys [1, Hk, length, E] and values after those that it continues."""
        if self.before is None:
            self.kept.keys.append(key)
            self.kept.values.append(value)
            return key, value
        layer, self.layer = self.layer, self.layer + 1
        before = self.before
        return (
            torch.cat([before.keys[layer], key], 2),
            torch.cat([before.values[layer], value], 2),
        )


def continued_forward(
    trunk: nn.Module, input_ids: Tensor, before: Continuation | None = None
) -> tuple[Tensor, Continuation]:
    """Run a decoder's trunk on one text alone, or on what continues one.

    The shapes of a pass are those of its text and of what it continues, whatever else there is to
    run: so are its bits, which no other text can change.

    Args:
        trunk: as in :func:`airl_fast.attention.packed_forward`.
        input_ids: [C] int64, on the trunk's device.
        before: what an earlier pass, which continued nothing, returned.

    Returns:
        The last hidden states, after the final norm, [C, D]; and what further texts can continue
        (``before`` itself where it was given).

    Raises:
        ValueError: as :func:`airl_fast.attention.packed_forward`.
    """
    config = enabled(trunk)
    shared, length = before.length if before else 0, input_ids.numel()
    check_rope(config, shared + length)
    alone = Pass(before, length, input_ids.device)
    output = trunk(
        input_ids=input_ids[None],
        position_ids=torch.arange(shared, shared + length, device=input_ids.device)[None],
        attention_mask=unmasked(length, input_ids.device),
        use_cache=False,
        alone=alone,
    )
    return last_hidden(trunk, output), before or alone.kept
