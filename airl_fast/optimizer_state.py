"""The state of an optimizer as tensors and JSON values, for a checkpoint, and back, exactly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from airl_fast.checkpoint import check_json
from airl_fast.distributed import place_like


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors and JSON values, for ``save_checkpoint``.

    Parameters are numbered in the order in which the optimizer holds them, as in
    ``optimizer.state_dict()``.

    Returns:
        Tensors named ``{prefix}.{parameter}.{name}`` (moments, step counters) and
        ``{prefix}.group.{i}.{name}`` (a learning rate kept as a tensor); and the rest: the options
        of every parameter group, among them the learning rate, and state that is not a tensor.
    """
    saved = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for index, entries in saved["state"].items():
        values[str(index)] = _split(entries, f"{prefix}.{index}", tensors)
    for i, group in enumerate(saved["param_groups"]):
        groups.append(_split(group, f"{prefix}.group.{i}", tensors))
    return tensors, {"groups": groups, "values": values, "tensors": sorted(tensors)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
    prefix: str,
) -> None:
    """Put back what ``flatten_optimizer`` took out, exactly.

    Args:
        optimizer: an optimizer over the same parameters in the same order and groups.
        tensors: may hold more than this optimizer's tensors.
        scalars: the second value that ``flatten_optimizer`` returned.
        prefix: the one given to ``flatten_optimizer``.

    Raises:
        ValueError: the optimizer's parameters are not those that were saved, or a tensor is
            missing.
    """
    missing = [name for name in scalars["tensors"] if name not in tensors]
    if missing:
        raise ValueError(
            f"optimizer {prefix!r}: {len(missing)} tensors are missing, first {missing[0]!r}; pass "
            "all the tensors of the checkpoint, and the prefix they were saved with"
        )
    current = optimizer.param_groups
    if [len(g["params"]) for g in current] != [len(g["params"]) for g in scalars["groups"]]:
        raise ValueError(
            f"optimizer {prefix!r}: expected parameter groups of "
            f"{[len(g['params']) for g in scalars['groups']]} parameters as saved, got "
            f"{[len(g['params']) for g in current]}; build the model and the optimizer with the "
            "options of the run that is resumed"
        )
    state = {int(index): dict(entries) for index, entries in scalars["values"].items()}
    groups = [dict(group) for group in scalars["groups"]]
    for name in scalars["tensors"]:
        owner, key = name.removeprefix(f"{prefix}.").rsplit(".", 1)
        into = groups[int(owner[6:])] if owner.startswith("group.") else state[int(owner)]
        into[key] = tensors[name].clone()  # the optimizer updates it in place
    for group, now in zip(groups, current, strict=True):
        for key, value in now.items():
            if isinstance(value, tuple) and isinstance(group.get(key), list):
                group[key] = tuple(group[key])  # AdamW's betas: JSON has no tuples
    _check_shapes(optimizer, state, prefix)
    _cut(optimizer, state)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _split(entries: Mapping[str, Any], name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors of ``entries`` into ``tensors``; return the rest as JSON values."""
    rest: dict[str, Any] = {}
    for key, value in entries.items():
        if isinstance(value, Tensor):
            tensors[f"{name}.{key}"] = value
        else:
            rest[key] = list(value) if isinstance(value, tuple) else value
    check_json(rest, name)
    return rest


def _check_shapes(
    optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]], prefix: str
) -> None:
    """Refuse moments of another shape or dtype: load_state_dict would take or cast them."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            if not isinstance(value, Tensor) or key == "step":
                continue
            p = parameters[index]
            same_dtype = value.dtype == p.dtype or not p.is_floating_point()
            if (value.dim() > 0 and value.shape != p.shape) or not same_dtype:
                raise ValueError(
                    f"optimizer {prefix!r}: {key} of parameter {index} was saved as {value.dtype} "
                    f"{tuple(value.shape)}, the parameter here is {p.dtype} {tuple(p.shape)}; "
                    "build the model with the options and dtype of the run that is resumed"
                )


def _cut(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Any]]) -> None:
    """Keep this rank's piece of the moments of sharded parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, entries in state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor) and value.dim():
                entries[key] = place_like(value, parameters[index])
