"""The operators over the head on a GPU: sweeps over chunks of logits (`_gpu_head`).

N rows (actions), K rows that are not ignored, R rows of a chunk.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from airl_fast.ops._cpu_head import chunks
from airl_fast.ops._gpu_head import GPUHead
from airl_fast.ops._gpu_rows import RowKernels
from airl_fast.ops._head import LinearHead, kept_rows
from airl_fast.ops._policy_terms import ActionLoss, Actions, pieces

Gradients = tuple[Tensor, Tensor, Tensor]  # at hidden, weight and bias; `[0]` where not wanted
# Fills logp [K] and entropy [K] of the kept rows: hidden, kept, head, targets [K], logp, entropy.
Reader = Callable[[Tensor, Tensor, LinearHead, Tensor, Tensor, Tensor | None], None]


def read_chunks(
    hidden: Tensor,
    kept: Tensor,
    head: LinearHead,
    targets: Tensor,
    logp: Tensor,
    entropy: Tensor | None,
    kernels: RowKernels,
    log_sums: Tensor | None = None,
) -> None:
    """Fill ``logp [K]`` and ``entropy [K]`` from ``targets [K]``: a product and a read a chunk.

    And ``log_sums [K]`` float64, unless None.
    """
    sweep = GPUHead(hidden, kept, head, kernels, (False, False, False))
    for chunk in chunks(len(kept), sweep.limit):
        sweep.fill(chunk)
        sweep.read(targets[chunk], logp[chunk], None if entropy is None else entropy[chunk])
        if log_sums is not None:
            log_sums[chunk] = sweep.log_sums()


class HeadOperators:
    """The operators over the head, as a GPU backend implements them.

    Args:
        rows: gives the row kernels; called when the first call is served.
        read: as `read_chunks` with those kernels, which it is by default.
    """

    def __init__(self, rows: Callable[[], RowKernels], read: Reader | None = None) -> None:
        self._rows = rows
        self._read = read or self._read_chunks

    def logprob_forward(
        self,
        hidden: Tensor,
        head: LinearHead,
        targets: Tensor,
        ignore_index: int,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """`linear_logprob`: logp ``[N]`` and entropy ``[N]``, or ``[0]`` if not asked for."""
        kept = kept_rows(targets, ignore_index)
        logp = hidden.new_empty(len(kept), dtype=torch.float32)
        entropy = torch.empty_like(logp) if return_entropy else None
        self._read(hidden, kept, head, targets[kept], logp, entropy)
        return (
            _spread(logp, kept, len(hidden)),
            logp.new_empty(0) if entropy is None else _spread(entropy, kept, len(hidden)),
        )

    def shard_forward(
        self,
        hidden: Tensor,
        kept: Tensor,
        head: LinearHead,
        targets: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
        log_sums: Tensor,
    ) -> None:
        """Fill what `_vocab_shard.read_shard` returns, a chunk of logits at a time."""
        read_chunks(hidden, kept, head, targets, logp, entropy, self._rows(), log_sums)

    def logprob_backward(
        self,
        d_logp: Tensor | None,
        d_entropy: Tensor | None,
        entropy: Tensor,
        hidden: Tensor,
        head: LinearHead,
        targets: Tensor,
        ignore_index: int,
        needs: tuple[bool, bool, bool],
        narrow: bool = True,
    ) -> Gradients:
        """Gradients of `linear_logprob`: the logits again, and a product for each matrix.

        ``narrow``: as of `GPUHead`.
        """
        kept = kept_rows(targets, ignore_index)
        sweep = GPUHead(hidden, kept, head, self._rows(), needs, narrow=narrow)
        targets = targets[kept]
        d_logp, d_entropy = (None if d is None else d[kept].float() for d in (d_logp, d_entropy))
        scale = sweep.half_scale(d_logp, d_entropy)
        if scale is not None:
            d_logp, d_entropy = (None if d is None else d * scale for d in (d_logp, d_entropy))
        cuts = list(chunks(len(kept), sweep.limit))
        sweep.begin(len(cuts))
        for chunk in cuts:
            sweep.fill(chunk)
            parts = (None if d is None else d[chunk] for d in (d_logp, d_entropy))
            sweep.differentiate(chunk, targets[chunk], *parts, was_read=False)
        sweep.unscale(scale)
        return sweep.hidden, sweep.weight, sweep.bias

    def policy_loss_sweep(
        self,
        hidden: Tensor,
        head: LinearHead,
        loss: ActionLoss,
        actions: Actions,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Gradients]:
        """Logp ``[K]``, entropy ``[K]`` and gradients of `linear_policy_loss`, in one sweep."""
        logp, entropy = torch.empty_like(actions.share), torch.empty_like(actions.share)
        if not any(needs):
            self._read(hidden, actions.rows, head, actions.targets, logp, entropy)
            return logp, entropy, (logp.new_empty(0), logp.new_empty(0), logp.new_empty(0))
        cut_anywhere = not loss.per_sequence
        sweep = GPUHead(hidden, actions.rows, head, self._rows(), needs, cut_anywhere=cut_anywhere)
        scale = sweep.half_scale(actions.share)
        if scale is not None:
            actions = actions._replace(share=actions.share * scale)
        cuts = list(pieces(actions, sweep.limit, loss.per_sequence))
        sweep.begin(sum(len(piece) for piece in cuts))
        for piece in cuts:
            if loss.per_sequence:
                _sequences(sweep, piece, actions, loss, logp, entropy)
            else:
                for chunk in piece:
                    sweep.fill(chunk)
                    sweep.policy(chunk, actions.part(chunk), loss, logp[chunk], entropy[chunk])
        sweep.unscale(scale)
        return logp, entropy, (sweep.hidden, sweep.weight, sweep.bias)

    def _read_chunks(
        self,
        hidden: Tensor,
        kept: Tensor,
        head: LinearHead,
        targets: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
    ) -> None:
        read_chunks(hidden, kept, head, targets, logp, entropy, self._rows())


def _sequences(
    sweep: GPUHead,
    piece: list[slice],
    actions: Actions,
    loss: ActionLoss,
    logp: Tensor,
    entropy: Tensor,
) -> None:
    """Sweep over whole sequences, whose coefficients need all of their rows.

    Only a sequence longer than a chunk, which is a piece of several, has its logits computed twice.
    """
    for chunk in piece:
        sweep.fill(chunk)
        sweep.read(actions.targets[chunk], logp[chunk], entropy[chunk])
    whole = slice(piece[0].start, piece[-1].stop)
    d_logp = loss.terms(logp[whole], actions.part(whole)).d_logp
    d_entropy = -loss.entropy_coef * actions.share if loss.entropy_coef else None
    for chunk in piece:
        if len(piece) > 1:
            sweep.fill(chunk)
        sweep.differentiate(
            chunk,
            actions.targets[chunk],
            d_logp[chunk.start - whole.start : chunk.stop - whole.start],
            None if d_entropy is None else d_entropy[chunk],
            was_read=len(piece) == 1,
        )


def _spread(values: Tensor, kept: Tensor, count: int) -> Tensor:
    """Values ``[K]`` at the kept rows of ``[N]``, 0 elsewhere."""
    everything = len(kept) == count
    return values if everything else values.new_zeros(count).index_copy_(0, kept, values)
