"""Float32 copies of the bfloat16 weights that are trained: what updates add up in.

A bfloat16 weight has 8 significant bits: an update of less than a 512th of it is rounded away. So
AdamW works on float32 copies ("master weights", arXiv 1710.03740), and the model has them rounded.
The gradients of micro-batches add up in float32 too: in bfloat16 their sum would depend on how a
batch is cut.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from airl_fast.distributed import local_piece
from airl_fast.weights import copy_parameters


class WideWeights:
    """A float32 parameter for every one that is trained: itself, or its copy.

    Args:
        parameters: of the model, of any floating dtype, sharded or not.

    Attributes:
        updated: what an optimizer updates, in the order of ``parameters``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.updated = [
            nn.Parameter(p.detach().float()) if p.dtype.itemsize < 4 else p for p in parameters
        ]
        pairs = zip(parameters, self.updated, strict=True)
        self._copies = {i: pair for i, pair in enumerate(pairs) if pair[0] is not pair[1]}
        self._seen = {i: _version(narrow) for i, (narrow, _) in self._copies.items()}

    def collect(self) -> None:
        """Move the gradients of the weights to their copies, added to what is there."""
        for narrow, wide in self._copies.values():
            if narrow.grad is None:
                continue
            if wide.grad is None:
                wide.grad = narrow.grad.float()
            else:
                wide.grad += narrow.grad
            narrow.grad = None

    @torch.no_grad()
    def adopt(self) -> None:
        """Take over the weights that were set since `publish`, by somebody else."""
        for i, (narrow, wide) in self._copies.items():
            if _version(narrow) == self._seen[i]:
                continue
            same = wide.to(narrow.dtype) == narrow
            wide.copy_(torch.where(same, wide, narrow.to(wide.dtype)))

    @torch.no_grad()
    def publish(self) -> None:
        """Set the weights to their copies, rounded."""
        for i, (narrow, wide) in self._copies.items():
            narrow.copy_(wide)
            self._seen[i] = _version(narrow)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The copies, by the numbers of their weights, for a checkpoint."""
        return {f"{prefix}.wide.{name}": value.detach() for name, value in self._named().items()}

    def restore(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Set what ``state`` gave.

        Raises:
            ValueError: a copy is missing or has another shape.
        """
        copy_parameters(self._named(), tensors, f"{prefix}.wide.")

    def _named(self) -> dict[str, Tensor]:
        return {str(i): wide for i, (_, wide) in self._copies.items()}


def _version(parameter: Tensor) -> int:
    """A number that grows whenever the values are set in place."""
    return parameter._version + local_piece(parameter)._version
