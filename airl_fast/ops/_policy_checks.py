"""What `linear_policy_loss` refuses before it looks at any value."""

import math

from torch import Tensor

from airl_fast.ops._arguments import require_number
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
