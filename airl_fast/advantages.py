"""Rewards per span -> advantages per token.

N actions (tokens), S spans, B sequences. The reward of a span is discounted to go, a baseline is
taken from the other completions of the same prompt, and every token gets its span's advantage.
"""

from typing import Literal

import torch
from torch import Tensor

from airl_fast.ops.group_advantages import BASELINES, EPSILON, SCALES, check_group, check_others
from airl_fast.ops.returns import check_gamma, discounted_returns
from airl_fast.ops.segments import check_offset_tensor, check_offsets, check_option, spread

_NAME = "token_advantages"


def token_advantages(
    rewards: Tensor,
    *,
    cu_spans: Tensor,
    cu_seq_spans: Tensor,
    group: Tensor,
    gamma: float = 1.0,
    baseline: Literal["mean", "leave_one_out", "none"] = "mean",
    scale: Literal["std", "none"] = "std",
    level: Literal["sequence", "span"] = "sequence",
) -> Tensor:
    """Compute ``A = (R - baseline) / (std + 1e-6)`` per span, given to each of its tokens.

    R is the discounted reward to go, ``R_i = r_i + gamma R_{i+1}`` within a sequence: the discount
    is per span, whatever its length.

    ``level="sequence"``: the baseline of every span is the group's mean (or the others' mean) of
    the whole sequences' returns, and std is theirs; with one span per sequence that is
    ``group_advantages``. ``level="span"``: the baseline of the k-th span is that mean over R of the
    group's k-th spans, where a member that has already ended counts as 0, which is its true return
    to go; std is that of all R of the group's spans, pooled. Both are population deviations about
    their own mean.

    Advantages are constants: no gradient reaches ``rewards``.

    Args:
        rewards: [S] floating point, finite.
        cu_spans: [S + 1] int32 offsets of the spans into the N tokens.
        cu_seq_spans: [B + 1] int32 offsets of the sequences into the S spans.
        group: [B] int64, equal for the completions of one prompt; any values, in any order.
        gamma: discount per span, in [0, 1].
        baseline: the group's mean, the mean of the group's other members, or 0.
        scale: divide by the group's standard deviation, or by nothing.
        level: where baseline and deviation are taken, "sequence" or "span".

    Returns:
        [N] float32.

    Raises:
        ValueError: wrong shapes, dtypes or devices, offsets that are no partition, an empty span or
            sequence, a non-finite reward, an unknown option, gamma outside [0, 1], or
            "leave_one_out" with a group of one (named).
    """
    check_advantages(gamma, baseline, level)
    check_option(_NAME, "scale", scale, SCALES)
    returns = discounted_returns(rewards.detach(), cu_seq_spans, gamma)  # [S]
    check_group(_NAME, group, cu_seq_spans.shape[0] - 1, rewards.device)
    check_offset_tensor(_NAME, "cu_spans", cu_spans, rewards)
    if cu_spans.shape[0] != rewards.shape[0] + 1:
        raise ValueError(
            f"{_NAME}: expected cu_spans of {rewards.shape[0] + 1} offsets for "
            f"{rewards.shape[0]} rewards, received {cu_spans.shape[0]}; pass one span for each "
            "reward"
        )
    tokens = int(cu_spans[-1])
    cu_spans = check_offsets(_NAME, "cu_spans", cu_spans, tokens)
    if baseline == "leave_one_out":
        check_others(_NAME, group)

    r, spans = returns.double(), returns.shape[0]
    owner = group.unique(return_inverse=True)[1]  # [B] the group of a sequence, as an index
    size = _sum_by(owner, torch.ones_like(owner, dtype=r.dtype))  # [B] members of its group
    owner_of_span = spread(owner, cu_seq_spans, spans)
    if level == "sequence":
        whole = r[cu_seq_spans[:-1].long()]  # [B] a sequence's return is that of its first span
        base = spread(_baseline(whole, _sum_by(owner, whole), size, baseline), cu_seq_spans, spans)
        std = spread(_population_std(owner, whole), cu_seq_spans, spans)
    else:
        place = torch.arange(spans, device=r.device) - spread(
            cu_seq_spans[:-1], cu_seq_spans, spans
        )
        column = owner_of_span * (spans + 1) + place  # equal for the k-th spans of one group
        column = column.unique(return_inverse=True)[1]
        total = _sum_by(column, r)  # those that have ended add 0
        base = _baseline(r, total, spread(size, cu_seq_spans, spans), baseline)
        std = _population_std(owner_of_span, r)
    advantages = r - base
    if scale == "std":
        advantages = advantages / (std + EPSILON)
    return spread(advantages.float(), cu_spans, tokens)


def check_advantages(gamma: float, baseline: str, level: str) -> None:
    """Refuse what `token_advantages` would, before there are any rewards.

    Raises:
        ValueError: gamma outside [0, 1], an unknown baseline or level.
    """
    check_option(_NAME, "baseline", baseline, BASELINES)
    check_option(_NAME, "level", level, ("sequence", "span"))
    check_gamma(_NAME, gamma)


def _sum_by(label: Tensor, x: Tensor) -> Tensor:
    """Sum x over the elements of equal label (an index below their number), given to each."""
    return torch.zeros_like(x).index_add_(0, label, x)[label]


def _baseline(x: Tensor, total: Tensor, size: Tensor, baseline: str) -> Tensor:
    """Mean of a group (or of its others) for each element, from its sum and its size."""
    if baseline == "mean":
        return total / size
    if baseline == "leave_one_out":
        return (total - x) / (size - 1)
    return torch.zeros_like(x)


def _population_std(label: Tensor, x: Tensor) -> Tensor:
    """Deviation of the elements of equal label about their mean, given to each."""
    count = _sum_by(label, torch.ones_like(x))
    deviation = x - _sum_by(label, x) / count
    return (_sum_by(label, deviation * deviation) / count).sqrt()
