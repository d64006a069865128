"""What `linear_policy_loss` refuses: before it looks at any value, and of its offsets."""

import math

import torch
from torch import Tensor

from airl_fast.ops._arguments import require_number, require_tensors
from airl_fast.ops._deferred import defers, refuse_where, sound_offsets
from airl_fast.ops._head import check_positive


def check_options(
    clip_low: float,
    clip_high: float,
    delta: float | None,
    beta: float,
    entropy_coef: float,
    ref_logp: Tensor | None,
) -> None:
    """Refuse numbers outside their range.

    Raises:
        ValueError: one is, or ``beta`` has no ``ref_logp`` to act on.
    """
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        require_number(name, clip)
        if not clip >= 0:
            raise ValueError(
                f"{name}: expected a number of at least 0, received {clip}; pass the distance from "
                "1 at which the ratio is clipped"
            )
    if delta is not None:
        check_positive("delta", delta, "use None for no bound")
    require_number("beta", beta)
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(
            f"beta: expected a finite number, at least 0, received {beta}; pass 0 for no divergence"
        )
    require_number("entropy_coef", entropy_coef)
    if not math.isfinite(entropy_coef):
        raise ValueError(
            f"entropy_coef: expected a finite number, received {entropy_coef}; pass 0 for no bonus"
        )
    if beta != 0 and ref_logp is None:
        raise ValueError(f"beta = {beta} needs ref_logp: pass the reference's log-probs, or beta=0")


def check_sequences(cu_seqs: Tensor, hidden: Tensor) -> None:
    """Refuse offsets of the wrong type, shape, dtype or device.

    Raises:
        TypeError: no tensor.
        ValueError: another shape, dtype or device.
    """
    require_tensors("linear_policy_loss", cu_seqs=cu_seqs)
    if cu_seqs.dim() != 1 or cu_seqs.shape[0] < 1 or cu_seqs.dtype != torch.int32:
        raise ValueError(
            f"cu_seqs: expected int32 offsets of shape [B + 1], received {cu_seqs.dtype} of shape "
            f"{tuple(cu_seqs.shape)}; pass the running sum of the sequences' lengths, with a 0 "
            "before it, as torch.int32"
        )
    if cu_seqs.device != hidden.device:
        raise ValueError(
            f"cu_seqs is on {cu_seqs.device} but hidden is on {hidden.device}: "
            "move them to one device"
        )


def check_modes(importance: str, aggregation: str, normaliser: float | None) -> None:
    """Refuse unknown modes, and a normaliser that the aggregation does not ask for.

    Raises:
        ValueError: as said.
    """
    if importance not in ("token", "sequence"):
        raise ValueError(f'importance: expected "token" or "sequence", received {importance!r}')
    if aggregation not in ("token", "sequence", "constant"):
        raise ValueError(
            f'aggregation: expected "token", "sequence" or "constant", received {aggregation!r}'
        )
    if (normaliser is not None) != (aggregation == "constant"):
        raise ValueError(
            f"aggregation={aggregation!r} with normaliser={normaliser}: pass a normaliser with "
            'aggregation="constant", and only with it'
        )
    if normaliser is not None:
        check_positive("normaliser", normaliser)


def sequence_offsets(cu_seqs: Tensor, rows: int) -> Tensor:
    """Refuse offsets that do not cut the rows into sequences, of which some may be empty.

    Returns:
        The offsets to work with: on a GPU, where the refusal comes late, inside the rows always.
    """
    late = defers(cu_seqs.device)
    first, last = cu_seqs[:1], cu_seqs[-1:]
    before = torch.cat([first, cu_seqs[:-1]])
    refuse_where(
        torch.cat([(first != 0) | (last != rows), cu_seqs[1:] < cu_seqs[:-1]]),
        torch.stack([first.expand_as(before), last.expand_as(before), before, cu_seqs], 1),
        lambda at, first, last, before, here: (
            f"cu_seqs: expected offsets that start at 0, never decrease and end at N = {rows}, "
            f"received {f'{first} to {last}' if late else _shown(cu_seqs)}"
            f"{f', with {here} after {before}' if at else ''}; they are the running sum of the "
            "sequences' lengths, with a 0 before it"
        ),
    )
    if late and cu_seqs.shape[0] == 1 and rows > 0:
        raise ValueError(
            f"cu_seqs: expected two offsets or more for N = {rows} rows, received one; pass "
            "[0, N] for one sequence"
        )
    return sound_offsets(cu_seqs, rows) if late else cu_seqs


def _shown(cu_seqs: Tensor) -> str:
    offsets = cu_seqs.tolist()
    return str(offsets if len(offsets) < 9 else [*offsets[:4], "...", *offsets[-4:]])
