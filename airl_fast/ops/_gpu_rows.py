"""What a GPU backend's row kernels do, so that `_gpu_head` can sweep over chunks with any of them.

R rows of a chunk, V vocabulary. A chunk holds the logits ``a = hidden W^T`` of R rows. With
``s = logit_scale``, ``c = softcap`` and ``t = temperature``, as in `_head.LinearHead`,

    z = (c / t) tanh(s (a + bias) / c)    or (s / t) (a + bias),    log p = log_softmax(z)

Sums are relative to the row's maximum (csrc/rows.h has the formulas), so that log p is at most 0
and the entropy at least 0, and both are as precise for logits of 1e4 as for small ones.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from airl_fast.ops._head import slopes
from airl_fast.ops._policy_terms import ActionLoss, Actions

ROW_STATS = 4  # float32 numbers per row that `read` leaves for `differentiate`


class RowHead(NamedTuple):
    """How a logit ``a`` becomes ``z``: ``outer tanh(inner (a + bias))`` or ``inner (a + bias)``."""

    bias: Tensor | None  # [V] float32, contiguous
    inner: float  # s / c, or s / t without a soft-cap
    outer: float  # c / t; 0 stands for no soft-cap
    slope: float  # s / t: dz / da where tanh is 0


class RowKernels(Protocol):
    """The row kernels of one backend.

    ``logits [R, V]`` are float32, bfloat16 or float16, contiguous within a row; rows start on
    multiples of 16 bytes and lie ``logits.stride(0)`` elements apart, which may be more than V.

    ``gradient [R, V]`` lies in the same memory: each of its rows begins at the address where that
    row of logits begins. Its dtype is that of the logits, or a narrower one (float32 logits, half
    precision gradient): then element k is written where logit k / 2 was, and a kernel has to have
    read both before. What is past the end of a row is never read or written.

    ``targets [R]`` int64 lie in ``[0, V)``: of another nothing is read, and its row's logp and
    gradient are NaN. ``logp``, ``entropy``, ``d_logp`` and ``d_entropy``
    ``[R]`` are float32 and contiguous. Every value of an output is overwritten, whatever it held.
    Rows are independent: no result depends on R or on the launch. NaN and infinities come through
    to logp or the entropy. R may be 0.
    """

    def read(
        self,
        logits: Tensor,
        head: RowHead,
        targets: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
        stats: Tensor | None,
    ) -> None:
        """Fill logp and entropy in one read of the chunk.

        ``stats [R, ROW_STATS]`` float32, unless None, gets what `differentiate` needs: first the
        row's maximum m of z and the sum of exp(z - m); the rest of the layout is the backend's
        own. With the entropy None they do for a ``d_entropy`` of None.
        """
        ...

    def differentiate(
        self,
        logits: Tensor,
        head: RowHead,
        targets: Tensor,
        d_logp: Tensor | None,
        d_entropy: Tensor | None,
        stats: Tensor | None,
        gradient: Tensor,
    ) -> None:
        """Overwrite the chunk by its gradient at ``a``, given those at logp and entropy.

        ``slope' (d_logp (1[k = target] - p_k) - d_entropy p_k (log p_k + H))``, slope' being
        ``dz/da``. None stands for zero. ``stats`` is what `read` left for these rows; None: the
        kernel reads the rows for it first.
        """
        ...

    def policy(
        self,
        logits: Tensor,
        head: RowHead,
        actions: Actions,
        loss: ActionLoss,
        logp: Tensor,
        entropy: Tensor,
        gradient: Tensor,
    ) -> None:
        """Both in one kernel, for ``importance="token"``, where a row's coefficients are its own.

        Fills logp and entropy, computes ``d_logp = ActionLoss.terms(...).d_logp`` and
        ``d_entropy = -entropy_coef * share`` from the actions' float32 ``[R]`` advantages,
        old_logp, ref_logp (None as there) and share, and overwrites the chunk by its gradient.
        ``actions.rows`` and ``actions.sequence`` are not read.
        """
        ...


def row_head(
    bias: Tensor | None, temperature: float, softcap: float | None, logit_scale: float
) -> RowHead:
    """Describe a head to the row kernels; ``bias [V]`` of any floating dtype, or None."""
    numbers = slopes(temperature, softcap, logit_scale)
    return RowHead(None if bias is None else bias.float().contiguous(), *numbers)


def gradient_view(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient ``[R, V]`` of a ``dtype`` no wider than that of ``logits``, in their memory."""
    if dtype == logits.dtype:
        return logits
    rows, vocab = logits.shape
    wide = logits.as_strided((rows, logits.stride(0)), (logits.stride(0), 1))
    return wide.view(dtype)[:, :vocab]
