"""Between the CPU and a GPU without waiting for it.

To read a number from a GPU, or to copy pageable memory there, the CPU waits for all that was asked
of the GPU before: within an update, until it has nothing left to do while the next micro-batch is
packed.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the CPU's memory on ``device``; on a GPU before what its stream does next.

    Args:
        x: any shape and dtype; not to be changed afterwards.
        device: where to.
    """
    if x.device.type != "cpu" or torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Readings:
    """Weighted sums of numbers on a device, which are read once, together.

    Args:
        names: what is summed; what is never added to is 0.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._totals = dict.fromkeys(names, 0.0)
        self._added: list[tuple[str, float, Tensor]] = []

    def add(self, weight: float = 1.0, **values: Tensor) -> None:
        """Add ``weight`` times each value, a tensor of one element, to the sum of its name."""
        self._added += [(name, weight, value.detach()) for name, value in values.items()]

    def totals(self) -> dict[str, float]:
        """The sums, added up in float64 in the order in which they came."""
        if self._added:
            numbers = torch.stack([value.double().reshape(()) for _, _, value in self._added])
            for (name, weight, _), number in zip(self._added, numbers.tolist(), strict=True):
                self._totals[name] += weight * number
            self._added.clear()
        return dict(self._totals)
