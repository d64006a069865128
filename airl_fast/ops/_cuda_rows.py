"""The row kernels of csrc/cuda/ (`airl_fast._cuda`), as the protocol of `_gpu_rows` wants them.

R rows of a chunk, V vocabulary. `policy` reads a row from memory once and writes its gradient
once: it waits in the shared memory of the blocks that share it (csrc/cuda/rows.h).
"""

import math

import torch
from torch import Tensor

from airl_fast.ops._cuda_extension import ELEMENTS, address, extension, place
from airl_fast.ops._gpu_rows import ROW_STATS, RowHead
from airl_fast.ops._policy_terms import ActionLoss, Actions


class CudaRows:
    """`RowKernels` on the current stream of the tensors' device; nothing waits for the GPU.

    Rows need not be aligned, except where the gradient is narrower than the logits.
    """

    def __init__(self) -> None:
        self._cuda = extension()

    def read(
        self,
        logits: Tensor,
        head: RowHead,
        targets: Tensor,
        logp: Tensor | None,
        entropy: Tensor | None,
        stats: Tensor | None,
    ) -> None:
        """Fill ``logp [R]``, ``entropy [R]`` and ``stats [R, ROW_STATS]``, each unless None.

        ``stats``: the row's maximum m of z, s = sum exp(z - m), sum exp(z - m) (m - z), and z of
        the target.
        """
        if len(logits) == 0:
            return
        self._cuda.read_rows(
            place(logits),
            _chunk(logits),
            _head(head),
            _vector("targets", targets, logits, torch.int64),
            address(stats),
            address(logp),
            address(entropy),
        )

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
        """Overwrite the chunk by its gradient, given those ``[R]`` at logp and entropy."""
        if len(logits) == 0:
            return
        if stats is None:
            stats = logits.new_empty((len(logits), ROW_STATS), dtype=torch.float32)
            self.read(logits, head, targets, None, None, stats)
        self._cuda.differentiate_rows(
            place(logits),
            _chunk(logits),
            _head(head),
            _vector("targets", targets, logits, torch.int64),
            stats.data_ptr(),
            _vector("d_logp", d_logp, logits),
            _vector("d_entropy", d_entropy, logits),
            _element("gradient", gradient),
        )

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
        """Fill ``logp [R]`` and ``entropy [R]``, and overwrite the chunk by the loss's gradient.

        Raises:
            ValueError: the loss's importance is per sequence: a row's coefficient is then not its
                own.
        """
        if loss.per_sequence:
            raise ValueError(
                'policy: expected importance="token", received "sequence"; read the rows, '
                "compute d_logp for whole sequences, and differentiate"
            )
        if len(logits) == 0:
            return
        given = actions.advantages, actions.old_logp, actions.ref_logp, actions.share
        names = "advantages", "old_logp", "ref_logp", "share"
        self._cuda.policy_rows(
            place(logits),
            _chunk(logits),
            _head(head),
            _vector("targets", actions.targets, logits, torch.int64),
            tuple(_vector(name, x, logits) for name, x in zip(names, given, strict=True)),
            (
                loss.clip_low,
                loss.clip_high,
                math.inf if loss.delta is None else loss.delta,
                loss.beta,
                loss.entropy_coef,
            ),
            _vector("logp", logp, logits),
            _vector("entropy", entropy, logits),
            _element("gradient", gradient),
        )


def _chunk(logits: Tensor) -> tuple[int, int, int, int, int]:
    if logits.ndim != 2 or logits.stride(1) != 1:
        raise ValueError(
            "logits: expected [R, V], contiguous within a row, received shape "
            f"{tuple(logits.shape)} of strides {logits.stride()}"
        )
    rows, vocab = logits.shape
    return logits.data_ptr(), logits.stride(0), rows, vocab, _element("logits", logits)


def _head(head: RowHead) -> tuple[int, float, float, float]:
    return address(head.bias), head.inner, head.outer, head.slope


def _element(name: str, tensor: Tensor) -> int:
    if tensor.dtype not in ELEMENTS:
        raise ValueError(
            f"{name}: expected float32, bfloat16 or float16, received {tensor.dtype}; "
            "the reference backend takes float64"
        )
    return ELEMENTS[tensor.dtype]


def _vector(
    name: str, tensor: Tensor | None, logits: Tensor, dtype: torch.dtype = torch.float32
) -> int:
    if tensor is None:
        return 0
    rows = len(logits)
    if tensor.shape != (rows,) or tensor.dtype != dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected {rows} contiguous {dtype} numbers, one per row of logits, "
            f"received {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.data_ptr()
