"""Tensors that the rows of the operators are made of, and why some cells make no sense."""

from __future__ import annotations

import torch

NO_FILE = "takes tensors, no file"
NO_MODEL = "takes tensors, no model"
NO_OFFSETS = "has no offsets"
NO_TARGETS = "has neither targets nor indices"
META = torch.device("meta")


def ints(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def filled(shape: tuple[int, ...], value: float) -> torch.Tensor:
    return torch.full(shape, value)


def first_is(value: float, *shape: int) -> torch.Tensor:
    x = torch.zeros(shape)
    x.view(-1)[0] = value
    return x
