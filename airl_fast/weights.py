"""Weights set by name: from a checkpoint, or other ones for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from airl_fast.distributed import place_like


class Trainable(Protocol):
    """A policy or a discriminator."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name."""
        ...


@torch.no_grad()
def copy_parameters(
    parameters: Mapping[str, Tensor], values: Mapping[str, Tensor], prefix: str
) -> None:
    """Set every parameter from ``values[prefix + name]``.

    Raises:
        ValueError: a value is missing or has another shape, naming it.
    """
    for name, parameter in parameters.items():
        value = values.get(prefix + name)
        if value is None or value.shape != parameter.shape:
            found = "nothing" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"{prefix + name}: expected shape {tuple(parameter.shape)}, found {found}; "
                "resume with the models that the run was started with, in its policy.dtype"
            )
        parameter.copy_(place_like(value, parameter))


@contextmanager
def swapped(model: Trainable, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights, for as long as the block lasts."""
    trainable = model.trainable()
    own = {name: p.detach().clone() for name, p in trainable.items()}
    copy_parameters(trainable, values, "")
    try:
        yield
    finally:
        copy_parameters(trainable, own, "")
