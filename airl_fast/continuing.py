"""One text alone, and the texts that continue it: keys and values of every attention layer.

E head size   Hk key heads
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from airl_fast.layout import Bucket


@dataclass(eq=False)
class Continuation:
    """What ``attention.continued_forward`` keeps of a text, so that others continue it.

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
