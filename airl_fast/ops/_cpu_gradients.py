"""Gradients of the head on a CPU, in one sweep: each tile of logits is kept until it is needed.

N rows (actions), D hidden size, V vocabulary, R rows of a chunk, C columns of a tile, K rows that
are not ignored.

A row's coefficients are known once all of its logits have been read; then every tile ``[R, C]``
becomes its gradient and goes through the two products that need it, ``d hidden += g W`` and
``d W = g^T x``, while it is in the cache. Where do the logits wait? The result ``d W [V, D]`` is
as good as free memory until then: its rows of a tile have room for the tile's logits of up to D
rows. So the first chunk costs no memory but a tile of scratch, and its gradient of the weight is
written once, never read and added to. What does not fit there waits in a buffer of its own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from airl_fast.ops import _head
from airl_fast.ops._cpu_frozen import frozen_sweep
from airl_fast.ops._cpu_head import (
    CPUHead,
    Rows,
    chunks,
    empty,
    even_limit,
    read_all,
    tile_columns,
    tile_floats,
)
from airl_fast.ops._cpu_products import floats, multiply
from airl_fast.ops._head import LinearHead, kept_rows
from airl_fast.ops._policy_terms import ActionLoss, Actions, pieces

_HIDDEN = (True, False, False)  # what a frozen head asks for


def chunk_rows(vocab: int, copied: int, converted: bool = False) -> int:
    """Rows of a chunk in a buffer of its own: as many as fit in ``CHUNK_BYTES``; at least 1.

    That is 128 MiB unless changed, less a tile (16 MiB) where the weight is ``converted`` from
    half precision tile by tile. A row costs its V logits, which become their gradient in place,
    and ``copied`` floats: its hidden state and that one's gradient, where ignored rows or half
    precision make copies of them, else nothing. This is all the memory that the head takes beyond
    its results, at any N. At V = 49,152 a chunk has 682 rows, at 151,936 it has 220. More is
    better: every chunk reads the whole weight again, and its gradient too.
    """
    budget = _head.CHUNK_BYTES // 4 - (tile_floats() if converted else 0)
    return max(1, budget // (vocab + copied))


def home_rows(width: int, copied: int) -> int:
    """Rows of a chunk whose logits wait in the gradient of the weight: D, if the copies fit too.

    Those of `chunk_rows` have what ``CHUNK_BYTES`` leaves beside a tile of scratch and one of the
    weight.
    """
    budget = _head.CHUNK_BYTES // 4 - 2 * tile_floats()
    return max(1, min(width, budget // copied)) if copied else width


def plan(count: int, home: int, limit: int, whole: bool) -> tuple[int, int]:
    """Rows of a first chunk that waits in the gradient of the weight, and of the other chunks.

    As few chunks as possible, and none of them a sliver, unless they are to hold ``whole``
    sequences, which pack best under the full limits. 0 rows wait there if ``home`` is 0, or if
    a first chunk of so few would make for one more in all.
    """
    others = -(-max(0, count - home) // limit)
    if home == 0 or 1 + others > max(1, -(-count // limit)):
        return 0, limit if whole else even_limit(count, limit)
    if whole:
        return home, limit
    home = min(home, max(1, count - others * min(limit, -(-count // (1 + others)))))
    return home, even_limit(count - home, limit)


class GradientSweep:
    """Reads a head's chunks in turn, from the first row on, and accumulates their gradients.

    Args:
        rows, targets: the K rows that count, and their targets ``[K]``.
        head: the head.
        needs: which gradients are wanted, of hidden, weight and bias.
        whole: whether the chunks are to hold whole sequences.

    Attributes:
        home, limit: the `plan`.
        hidden, weight, bias: the gradients, float32; empty tensors ``[0]`` where not wanted.
    """

    def __init__(
        self,
        rows: Rows,
        targets: Tensor,
        head: LinearHead,
        needs: Sequence[bool],
        *,
        whole: bool = False,
    ) -> None:
        count, (vocab, width) = len(rows.kept), head.weight.shape
        self._rows, self._targets, self._needs = rows, targets, needs
        self._converted = head.weight.dtype != torch.float32
        limit = chunk_rows(vocab, rows.copied, self._converted)
        home = home_rows(width, rows.copied) if needs[1] else 0
        self.home, self.limit = plan(count, home, limit, whole)
        most = min(count, max(self.home, self.limit))
        self._head = CPUHead(head, rows=most)
        self.hidden = empty(len(rows.hidden), width) if needs[0] else floats(0)
        self.weight = empty(vocab, width) if needs[1] else floats(0)
        self.bias = floats(vocab if needs[2] else 0).zero_()
        if not rows.everything:
            self.hidden.zero_()
        if count == 0:
            self.weight.zero_()
        self._buffer = floats(0)
        self._x = floats(0)

    def read(self, chunk: slice, logp: Tensor, entropy: Tensor | None) -> None:
        """Fill ``logp [R]`` and ``entropy [R]`` of a chunk, whose logits are kept."""
        self._x = self._rows.read(chunk)
        for first, logits in self._tiles(chunk):
            self._head.read(self._x, self._targets[chunk], first, logits, logp, entropy)

    def differentiate(self, chunk: slice, d_logp: Tensor | None, d_entropy: Tensor | None) -> None:
        """Accumulate the gradients of the chunk that was read last, given those at its results.

        ``[R]`` each, None standing for zero; with ``d_entropy`` it was read for its entropy.
        """
        at_home, x, d_hidden = self._is_at_home(chunk), self._x, self._d_hidden(chunk)
        scratch = empty(len(x) * self._columns(len(x)) if at_home else 0)
        for first, logits in self._tiles(chunk):
            stop = first + logits.shape[1]
            g = scratch[: logits.numel()].view_as(logits) if at_home else logits
            self._head.differentiate(self._targets[chunk], first, logits, d_logp, d_entropy, g)
            if self._needs[0]:
                multiply(g, self._head.weight[first:stop], d_hidden, add=first > 0)
            if self._needs[1]:  # which overwrites the logits, if they are at home there
                multiply(g.t(), x, self.weight[first:stop], add=chunk.start > 0)
            if self._needs[2]:
                self.bias[first:stop] += g.sum(0)
        if self._needs[0] and not self._rows.everything:
            self.hidden[self._rows.kept[chunk]] = d_hidden

    def _d_hidden(self, chunk: slice) -> Tensor:
        """Where a chunk's d hidden ``[R, D]`` is summed: the result, or a copy of its rows."""
        if not self._needs[0] or self._rows.everything:
            return self.hidden[chunk]
        return torch.empty_like(self._x)

    def _tiles(self, chunk: slice) -> Iterator[tuple[int, Tensor]]:
        """First column and logits ``[R, C]`` of each tile of a chunk."""
        vocab, rows = len(self._head.weight), chunk.stop - chunk.start
        columns = self._columns(rows)
        if self._is_at_home(chunk):
            memory, pitch = self.weight.view(-1), self.weight.shape[1]
        else:
            if len(self._buffer) < rows * vocab:
                self._buffer = empty(min(self.limit, len(self._rows.kept)) * vocab)
            memory, pitch = self._buffer, rows
        for first in range(0, vocab, columns):
            shape = rows, min(columns, vocab - first)
            yield first, memory[first * pitch :][: shape[0] * shape[1]].view(shape)

    def _is_at_home(self, chunk: slice) -> bool:
        return chunk.start == 0 and chunk.stop <= self.home

    def _columns(self, rows: int) -> int:
        """As many as make a tile of logits, and one of a weight that has to be converted."""
        floats = tile_floats() // (
            max(rows, self._head.weight.shape[1]) if self._converted else rows
        )
        return max(1, min(floats, tile_columns(rows), len(self._head.weight)))


def logprob_backward(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_logprob`: the logits again, and a product for each matrix."""
    kept = kept_rows(targets, ignore_index)
    rows = Rows(hidden, kept)
    d_entropy = None if d_entropy is None else d_entropy[kept].float()
    if d_logp is not None:
        d_logp = d_logp[kept].float()
        if d_entropy is None and needs == _HIDDEN:
            *_, d_hidden = frozen_sweep(rows, targets[kept], head, lambda _: d_logp)
            return d_hidden, floats(0), floats(0)
    sweep = GradientSweep(rows, targets[kept], head, needs)
    logp = floats(len(kept))
    read_entropy = None if d_entropy is None else floats(len(kept))
    for chunk in chunks(len(kept), sweep.limit, first=sweep.home):
        sweep.read(chunk, logp[chunk], None if read_entropy is None else read_entropy[chunk])
        sweep.differentiate(
            chunk,
            None if d_logp is None else d_logp[chunk],
            None if d_entropy is None else d_entropy[chunk],
        )
    return sweep.hidden, sweep.weight, sweep.bias


def policy_loss_sweep(
    hidden: Tensor,
    head: LinearHead,
    loss: ActionLoss,
    actions: Actions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Logp ``[K]``, entropy ``[K]`` and gradients of `linear_policy_loss`, in one sweep."""
    rows = Rows(hidden, actions.rows)
    logp, entropy = floats(len(actions.rows)), floats(len(actions.rows))
    if not any(needs):
        read_all(rows, actions.targets, head, logp, entropy)
        return logp, entropy, (floats(0), floats(0), floats(0))
    if needs == _HIDDEN and not loss.entropy_coef:
        logp, entropy, d_hidden = frozen_sweep(
            rows, actions.targets, head, lambda logp: loss.terms(logp, actions).d_logp
        )
        return logp, entropy, (d_hidden, floats(0), floats(0))
    sweep = GradientSweep(rows, actions.targets, head, needs, whole=loss.per_sequence)
    d_entropy = -loss.entropy_coef * actions.share if loss.entropy_coef else None
    for piece in pieces(actions, sweep.limit, loss.per_sequence, first=sweep.home):
        for chunk in piece:
            sweep.read(chunk, logp[chunk], entropy[chunk])
        start, stop = piece[0].start, piece[-1].stop
        d_logp = loss.terms(logp[start:stop], actions.part(slice(start, stop))).d_logp
        for chunk in piece:
            if len(piece) > 1:  # only the piece's last chunk is there
                sweep.read(chunk, logp[chunk], entropy[chunk])
            sweep.differentiate(
                chunk,
                d_logp[chunk.start - start : chunk.stop - start],
                None if d_entropy is None else d_entropy[chunk],
            )
    return logp, entropy, (sweep.hidden, sweep.weight, sweep.bias)
