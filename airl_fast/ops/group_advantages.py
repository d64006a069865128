"""Advantages of the completions of one prompt, relative to each other.

B rewards, one per completion. With baseline "mean" and scale "std" this is GRPO (arXiv 2402.03300);
"leave_one_out" and "none" is RLOO (arXiv 2402.14740).
"""

from typing import Any, Literal

import torch
from torch import Tensor

from airl_fast.ops._arguments import require_tensors
from airl_fast.ops.dispatch import implements, pick, register_autograd
from airl_fast.ops.segments import check_finite, check_option, check_vector

BASELINES = ("mean", "leave_one_out", "none")
SCALES = ("std", "none")
EPSILON = 1e-6  # keeps a group whose rewards are all equal at 0 rather than 0 / 0


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    baseline: Literal["mean", "leave_one_out", "none"] = "mean",
    scale: Literal["std", "none"] = "std",
) -> Tensor:
    """Compute ``A = (r - baseline) / (std + 1e-6)`` within each group.

    The standard deviation is the population's (divided by the group's size), about the group's
    mean whatever the baseline. A group of one gets 0 with the baseline "mean". Differentiates
    ``rewards``, through baseline and scale; detach them for a plain policy gradient.

    Args:
        rewards: [B] floating point, finite.
        group: [B] int64, equal for the members of a group; any values, in any order.
        baseline: the group's mean, the mean of the group's other members, or 0.
        scale: divide by the group's standard deviation, or by nothing.

    Returns:
        [B] float32.

    Raises:
        ValueError: wrong shapes, dtypes or devices, a non-finite reward, an unknown option, or
            "leave_one_out" with a group of one (named).
    """
    check_vector("group_advantages", "rewards", rewards)
    check_group("group_advantages", group, rewards.shape[0], rewards.device)
    check_option("group_advantages", "baseline", baseline, BASELINES)
    check_option("group_advantages", "scale", scale, SCALES)
    return torch.ops.airl_fast.group_advantages(rewards, group, baseline, scale)[0]


def check_group(op: str, group: Tensor, members: int, device: torch.device) -> None:
    """Refuse group labels of the wrong shape, dtype or device."""
    require_tensors(op, group=group)
    if group.shape != (members,) or group.dtype != torch.int64 or group.device != device:
        raise ValueError(
            f"{op}: expected group to hold {members} int64 labels on {device}, received shape "
            f"{tuple(group.shape)} of {group.dtype} on {group.device}; pass one label for each "
            "reward, such as the number of its prompt"
        )


def check_others(op: str, group: Tensor) -> None:
    """Refuse a group of one, which has no others to leave in (one device sync)."""
    labels, counts = group.unique(return_counts=True)
    if bool((counts == 1).any()):
        raise ValueError(
            f"{op}: group {int(labels[counts == 1][0])} has one member, and "
            "baseline='leave_one_out' needs two; sample more completions or use baseline='mean'"
        )


@torch.library.custom_op("airl_fast::group_advantages", mutates_args=())
def _advantages(rewards: Tensor, group: Tensor, baseline: str, scale: str) -> tuple[Tensor, Tensor]:
    """Return the advantages [B] float32, and each member's group as an index below B [B] int64."""
    check_finite("group_advantages", "rewards", rewards)
    if baseline == "leave_one_out":
        check_others("group_advantages", group)
    return pick("group_advantages", rewards)(rewards, group, baseline, scale)


@_advantages.register_fake
def _(rewards: Tensor, group: Tensor, baseline: str, scale: str) -> tuple[Tensor, Tensor]:
    return rewards.new_empty(rewards.shape, dtype=torch.float32), group.new_empty(group.shape)


@implements("group_advantages", "reference")
def _advantages_reference(
    rewards: Tensor, group: Tensor, baseline: str, scale: str
) -> tuple[Tensor, Tensor]:
    owner = group.unique(return_inverse=True)[1]
    r = rewards.double()
    centred = r - _baseline(r, owner, baseline)
    return (centred / _divisor(r, owner, scale)).float(), owner


def _total(x: Tensor, owner: Tensor) -> Tensor:
    """Sum x over each member's group, given to every member: [B] -> [B]."""
    return torch.zeros_like(x).index_add(0, owner, x)[owner]


def _baseline(r: Tensor, owner: Tensor, baseline: str) -> Tensor:
    size = _total(torch.ones_like(r), owner)
    if baseline == "mean":
        return _total(r, owner) / size
    if baseline == "leave_one_out":
        return (_total(r, owner) - r) / (size - 1)
    return torch.zeros_like(r)


def _spread_and_deviation(r: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Return each member's group standard deviation, and its own deviation from the mean."""
    deviation = r - _baseline(r, owner, "mean")
    return _baseline(deviation * deviation, owner, "mean").sqrt(), deviation


def _divisor(r: Tensor, owner: Tensor, scale: str) -> Tensor:
    return _spread_and_deviation(r, owner)[0] + EPSILON if scale == "std" else torch.ones_like(r)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rewards, _, ctx.baseline, ctx.scale = inputs
    ctx.save_for_backward(rewards, output[1])


def _backward(ctx: Any, grad: Tensor, _owner: None) -> tuple[Tensor, None, None, None]:
    """A = c / d with c = r - b(r), d = std(r) + eps, by the chain rule.

    b is linear and symmetric, so its adjoint is itself; d std / d r_i = deviation_i / (n std),
    taken as 0 where std is 0 (the kink), as torch.std does.
    """
    rewards, owner = ctx.saved_tensors
    r, g = rewards.double(), grad.double()
    divisor = _divisor(r, owner, ctx.scale)
    dc = g / divisor
    dr = dc - _baseline(dc, owner, ctx.baseline)
    if ctx.scale == "std":
        std, deviation = _spread_and_deviation(r, owner)
        advantages = (r - _baseline(r, owner, ctx.baseline)) / divisor
        slope = torch.where(std > 0, deviation / std, 0.0)
        dr = dr - slope * _baseline(dc * advantages, owner, "mean")
    return dr.to(rewards.dtype), None, None, None


register_autograd(_advantages, _backward, setup_context=_keep)
