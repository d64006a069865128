"""The per-action maths of the clipped policy-gradient loss, in closed form.

N rows (actions), K of them not ignored, R of those at hand, B sequences.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from airl_fast.ops._head import kept_rows

IGNORE_INDEX = -100


class Actions(NamedTuple):
    """The K actions that are not ignored, ``[K]`` each, in the compute dtype."""

    rows: Tensor  # their row numbers, int64
    targets: Tensor  # int64
    sequence: Tensor  # the sequence each belongs to, int64
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    share: Tensor  # the weight of each action's loss in the aggregated loss

    def part(self, where: slice) -> "Actions":
        """The actions of a slice."""
        return Actions(
            rows=self.rows[where],
            targets=self.targets[where],
            sequence=self.sequence[where],
            advantages=self.advantages[where],
            old_logp=None if self.old_logp is None else self.old_logp[where],
            ref_logp=None if self.ref_logp is None else self.ref_logp[where],
            share=self.share[where],
        )


Constants = tuple[Tensor, Tensor | None, Tensor | None]  # advantages, old_logp, ref_logp: [N]


class Terms(NamedTuple):
    """What the loss says about actions, given their logp; ``[R]`` each."""

    loss: Tensor  # without the entropy bonus, before aggregation
    d_logp: Tensor  # d (aggregated loss) / d logp
    ratio: Tensor
    clipped: Tensor
    kl_old: Tensor
    kl_ref: Tensor


@dataclass(frozen=True)
class ActionLoss:
    """The options of the per-action loss, and its closed-form derivative."""

    clip_low: float
    clip_high: float
    delta: float | None
    beta: float
    entropy_coef: float
    per_sequence: bool

    def terms(self, logp: Tensor, actions: Actions) -> Terms:
        """Evaluate the loss on ``logp [R]``: whole sequences, if the ratio is per sequence."""
        log_rho = torch.zeros_like(logp) if actions.old_logp is None else logp - actions.old_logp
        kl_old = log_rho.expm1() - log_rho
        if self.per_sequence:
            log_rho = _sequence_mean(log_rho, actions.sequence)
        rho = log_rho.exp()
        low, high = 1 - self.clip_low, 1 + self.clip_high
        a = actions.advantages
        bounded = rho.clamp(low, high) * a
        unclipped = (rho if self.delta is None else rho.clamp(max=self.delta)) * a

        # min() passes the gradient to the smaller side, each side where its own clamp is open.
        # On a tie both are open, or both are shut, or A is 0: no need to split it.
        open_bounded = (rho >= low) & (rho <= high)
        open_unclipped = torch.ones_like(open_bounded) if self.delta is None else rho <= self.delta
        is_open = torch.where(unclipped <= bounded, open_unclipped, open_bounded)
        d_logp = torch.where(is_open, -a * rho, 0) * actions.share
        if self.per_sequence:  # log rho is a mean over the sequence, so its gradient is one too
            d_logp = _sequence_mean(d_logp, actions.sequence)

        loss = -torch.minimum(unclipped, bounded)
        kl_ref = torch.zeros_like(logp)
        if actions.ref_logp is not None:
            gap = actions.ref_logp - logp
            kl_ref = gap.expm1() - gap
            if self.beta != 0:  # not 0 * inf: without beta, kl_ref is only reported
                loss = loss + self.beta * kl_ref
                d_logp = d_logp - self.beta * gap.expm1() * actions.share
        return Terms(loss, d_logp, rho, (bounded < rho * a).to(rho.dtype), kl_old, kl_ref)


def gather_actions(
    targets: Tensor,
    constants: Constants,
    cu_seqs: Tensor,
    aggregation: str,
    normaliser: float,
    dtype: torch.dtype,
) -> Actions:
    """Collect what belongs to the actions that are not ignored."""
    rows = kept_rows(targets, IGNORE_INDEX)
    numbers = torch.arange(len(cu_seqs) - 1, device=targets.device)
    sequence = numbers.repeat_interleave(cu_seqs.diff().long(), output_size=len(targets))[rows]
    if aggregation == "sequence":
        _, local, count = torch.unique_consecutive(
            sequence, return_inverse=True, return_counts=True
        )
        share = (1.0 / (len(count) * count.to(dtype)))[local]
    else:
        total = normaliser if aggregation == "constant" else max(1, len(rows))
        share = torch.full(rows.shape, 1.0 / total, dtype=dtype, device=rows.device)
    advantages, old_logp, ref_logp = constants
    return Actions(
        rows=rows,
        targets=targets[rows],
        sequence=sequence,
        advantages=advantages[rows].to(dtype),
        old_logp=None if old_logp is None else old_logp[rows].to(dtype),
        ref_logp=None if ref_logp is None else ref_logp[rows].to(dtype),
        share=share,
    )


def op_outputs(
    loss: ActionLoss,
    actions: Actions,
    logp: Tensor,
    entropy: Tensor,
    gradients: tuple[Tensor, Tensor, Tensor],
    rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the op returns, from logp ``[K]`` and entropy ``[K]`` of all actions."""
    terms = loss.terms(logp, actions)
    total = (actions.share * (terms.loss - loss.entropy_coef * entropy)).sum()
    means = [terms.ratio, terms.clipped, terms.kl_old, terms.kl_ref, entropy]
    zeros = total.new_zeros(rows)
    return (
        total,
        *gradients,
        torch.stack([x.mean() for x in means]),
        zeros.index_copy(0, actions.rows, logp),
        zeros.index_copy(0, actions.rows, entropy),
    )


def pieces(
    actions: Actions, limit: int, per_sequence: bool, first: int = 0
) -> Iterator[list[slice]]:
    """Cut the actions into pieces whose coefficients can be known before the next is read.

    A piece is a list of chunks of at most ``limit`` rows, or ``first`` for the first piece if that
    is above 0. It has one chunk, unless ``per_sequence`` and it is a single sequence longer than
    that.
    """
    count = len(actions.rows)
    bound = first or limit
    ends = [*range(bound, count, limit), count]
    if per_sequence:
        counts = torch.unique_consecutive(actions.sequence, return_counts=True)[1]
        ends = [*counts.cumsum(0).tolist(), count]
    start = stop = 0
    for end in ends:
        if end - start > bound and stop > start:
            yield _chunks(start, stop, bound, limit)
            start, bound = stop, limit
        stop = end
    if stop > start:
        yield _chunks(start, stop, bound, limit)


def _chunks(start: int, stop: int, bound: int, limit: int) -> list[slice]:
    step = stop - start if stop - start <= bound else limit
    return [slice(a, min(a + step, stop)) for a in range(start, stop, step)]


def _sequence_mean(x: Tensor, sequence: Tensor) -> Tensor:
    """Mean of ``x [R]`` over the actions of the same sequence, at every action."""
    _, local, count = torch.unique_consecutive(sequence, return_inverse=True, return_counts=True)
    return (x.new_zeros(len(count)).index_add_(0, local, x) / count)[local]
