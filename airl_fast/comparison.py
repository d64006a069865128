"""Values of an operator held against the reference's, and the error that says where they part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class AuditError(RuntimeError):
    """An operator's backend has drifted from the reference.

    Attributes:
        operator, backend: which.
        quantity: of its results.
        row: of the micro-batch (of the head, for its gradient).
        value, reference: the two values.
        tolerance: of their difference; of a gradient, of the norm of the row's difference.
    """

    def __init__(
        self,
        where: tuple[str, str, str],
        row: int,
        pair: tuple[float, float],
        difference: float,
        tolerance: float,
    ) -> None:
        self._given = where, row, pair, difference, tolerance
        self.operator, self.backend, self.quantity = where
        self.row = row
        self.value, self.reference = pair
        self.tolerance = tolerance
        super().__init__(
            f"audit: {self.operator}, backend {self.backend}: {self.quantity} of row {row} is "
            f"{self.value:.8g}, the reference in float32 says {self.reference:.8g}: expected a "
            f"difference of at most {tolerance:.3g}, received {difference:.3g}; nothing was "
            "updated. Run `airl-fast doctor`; AIRL_FAST_BACKEND=reference goes on without the "
            "backend, guards.audit_every=0 without the audit"
        )

    def __reduce__(self) -> tuple[type[AuditError], tuple[Any, ...]]:
        return AuditError, self._given  # for other processes: an error is made from its message


@dataclass
class Comparison:
    """What one operator's results are compared in.

    Attributes:
        operator: its name.
        backend: the one that served.
        worst: the largest difference so far, as a share of its tolerance.
    """

    operator: str
    backend: str
    worst: float = 0.0

    def values(
        self, quantity: str, got: Tensor, want: Tensor, rows: Tensor, *, atol: Tensor | float
    ) -> None:
        """Compare numbers [R]: at most ``atol`` and a ten-thousandth apart.

        Args:
            quantity: what they are.
            got: the backend's.
            want: the reference's.
            rows: [R] what each is called in the error.
            atol: one, or [R].

        Raises:
            AuditError: on the worst of those that are further apart, or not finite.
        """
        got, want = got.detach().float(), want.detach().float()
        tolerance = atol + 1e-4 * want.abs()
        self._check(quantity, got[:, None], want[:, None], (got - want).abs(), tolerance, rows)

    def gradients(
        self,
        quantity: str,
        got: Tensor,
        want: Tensor,
        rows: Tensor,
        *,
        rtol: float,
        floor: Tensor | float,
    ) -> None:
        """Compare gradients [R, D] row by row, by the norm of their difference.

        It may be ``rtol`` of the row's norm and, one or [R], ``floor``: what rounding can leave of
        a row that nearly cancels.

        Raises:
            AuditError: on the worst of the rows that are further apart, or not finite.
        """
        got, want = got.detach().float(), want.detach().float()
        tolerance = rtol * want.norm(dim=1) + floor
        self._check(quantity, got, want, (got - want).norm(dim=1), tolerance, rows)

    def _check(
        self,
        quantity: str,
        got: Tensor,
        want: Tensor,
        difference: Tensor,
        tolerance: Tensor,
        rows: Tensor,
    ) -> None:
        shares = difference / tolerance.clamp(min=1e-30)
        shares = torch.where(shares.isfinite(), shares, math.inf)
        row = int(shares.argmax())
        self.worst = max(self.worst, float(shares[row]))
        if self.worst > 1:
            apart = (got[row] - want[row]).abs()
            column = int(torch.where(apart.isfinite(), apart, math.inf).argmax())
            pair = float(got[row, column]), float(want[row, column])
            where = self.operator, self.backend, quantity
            numbers = float(difference[row]), float(tolerance[row])
            raise AuditError(where, int(rows[row]), pair, *numbers)
