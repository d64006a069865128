"""The head on a GPU: torch's matrix products into one chunk buffer, and row kernels over it.

N rows (actions), D hidden size, V vocabulary, R rows of a chunk, K rows that are not ignored.

A chunk of logits ``[R, V]`` is float32 whatever the inputs: half-precision inputs are multiplied
in their dtype and accumulated and stored in float32 (``out_dtype``). A bfloat16 chunk would halve
the memory traffic and would do for the gradients, but rounds a logit of 10 by up to 0.03, which
goes straight into the ratio ``exp(logp - old_logp)``. The row kernels then turn the chunk into its
gradient in place, in the products' dtype, as plain torch has it.

d weight is written by the first chunk and added to by every other. Where all of the head is
bfloat16 and there are at most ``_NARROW_CHUNKS`` chunks it is bfloat16 from the start, as d hidden,
whose rows are written once, always is then: a float32 d weight has twice the bytes of the weight,
and to write, read, scale and round it costs a head of D = 4,096 about as much as a product.
Otherwise both are float32: in bfloat16 every addition rounds what the last one left, and float16
would overflow or lose what is small. Chunks are larger than the budget says where that makes them
few enough, and takes less memory than the float32 d weight beside chunks within it; not where
they end with sequences, which may make more of them.

Extra memory at any N: ``CHUNK_BYTES`` (512 MiB unless changed) for the chunk and copies of its rows
(if rows are ignored or converted); where the head is bfloat16 and the budget makes more chunks than
``_NARROW_CHUNKS``, at most a float32 d weight more; where hidden and weight differ in dtype also a
float32 copy of the weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from airl_fast.ops._cpu_head import even_limit
from airl_fast.ops._gpu_rows import ROW_STATS, RowKernels, gradient_view, row_head
from airl_fast.ops._head import LinearHead
from airl_fast.ops._policy_terms import ActionLoss, Actions

CHUNK_BYTES = 512 * 2**20  # tests lower it to force many chunks

LOGITS = torch.float32  # of a chunk of bfloat16 products; bfloat16 is for benchmarks/gpu.py

_ALIGNED = 64  # logits from one row to the next: a multiple, so that rows start on 16 bytes
_TILE = 128  # rows of a chunk: even ones go up to a multiple, if there is room, for whole tiles
# bfloat16 gradients: the most chunks that add up in it. If partial sums grow like a random walk,
# k roundings err by sqrt((k + 1) / 2) of plain torch's one: by 1.6 for 4.
_NARROW_CHUNKS = 4
_HALF_ROOM = 16.0  # float16 gradients: their largest share of the loss is scaled to at least this


class GPUHead:
    """Logits of a chunk, and the gradients that are accumulated from its gradient.

    Args:
        hidden: ``[N, D]``.
        kept: ``[K]`` row numbers, ascending, of the rows that count.
        head: the head.
        kernels: a backend's row kernels.
        needs: which gradients are wanted, of hidden, weight and bias.
        narrow: whether gradients of bfloat16 may be bfloat16.
        cut_anywhere: whether chunks may end at any row.

    Attributes:
        limit: the most rows of a chunk.
        hidden, weight, bias: the gradients, once `begin` was called; empty tensors ``[0]`` where
            not wanted. bias is float32, the others float32 or, narrow, bfloat16.
    """

    def __init__(
        self,
        hidden: Tensor,
        kept: Tensor,
        head: LinearHead,
        kernels: RowKernels,
        needs: Sequence[bool],
        *,
        narrow: bool = True,
        cut_anywhere: bool = True,
    ) -> None:
        self._states, self._kept, self._kernels = hidden, kept, kernels
        self._dtype = hidden.dtype if hidden.dtype == head.weight.dtype else torch.float32
        self._weight = head.weight.to(self._dtype)
        self._head = row_head(*head[1:])
        self._needs = needs
        vocab, width = head.weight.shape
        logits = LOGITS if self._dtype == torch.bfloat16 else torch.float32
        self._narrow = narrow and self._dtype == torch.bfloat16
        copied = self._copied_row_bytes(width)
        rows = chunk_rows(vocab, copied, logits)
        if self._narrow and needs[1] and cut_anywhere:
            row = row_bytes(vocab, copied, logits)
            rows = few_enough(rows, len(kept), row, float32_bytes=4 * vocab * width)
        self.limit = min(rows, -(-even_limit(len(kept), rows) // _TILE) * _TILE, max(1, len(kept)))
        pitch = -(-vocab // _ALIGNED) * _ALIGNED
        self._buffer = hidden.new_empty((self.limit, pitch), dtype=logits)
        self._stats = hidden.new_empty((self.limit, ROW_STATS), dtype=torch.float32)
        self._x = hidden[:0]
        self._logits = self._buffer[:0, :vocab]
        self.hidden = self.weight = self.bias = self._stats.new_empty(0)

    def _copied_row_bytes(self, width: int) -> int:
        """Bytes of what a row of a chunk has beside its logits: copies of its hidden state."""
        gathered = len(self._kept) < len(self._states)
        converted = self._states.dtype != self._dtype
        state = self._states.itemsize * gathered + self._dtype.itemsize * converted
        gradient = 4 if gathered and self._needs[0] else 0
        return width * (state + gradient)

    def begin(self, chunks: int) -> None:
        """Allocate the gradients, to which so many chunks will add."""
        once = self._dtype if self._narrow else torch.float32
        added = self._dtype if self._narrow and chunks <= _NARROW_CHUNKS else torch.float32
        # what the products write whole is not cleared before
        hidden = torch.empty if len(self._kept) == len(self._states) else torch.zeros
        weight = torch.empty if chunks else torch.zeros
        need_hidden, need_weight, need_bias = self._needs
        on = self._states.device
        self.hidden = hidden(self._states.shape if need_hidden else (0,), dtype=once, device=on)
        self.weight = weight(self._weight.shape if need_weight else (0,), dtype=added, device=on)
        self.bias = self._stats.new_zeros(len(self._weight) if need_bias else 0)

    def fill(self, chunk: slice) -> None:
        """Compute the logits of a chunk of the kept rows; they replace those of the last."""
        self._x = self._states[:0]  # a copy of the last chunk's rows goes before the next is made
        x = self._states[chunk if len(self._kept) == len(self._states) else self._kept[chunk]]
        self._x = x.to(self._dtype)
        self._logits = self._buffer[: len(x), : len(self._weight)]
        multiply(self._x, self._weight.t(), self._logits)

    def read(self, targets: Tensor, logp: Tensor, entropy: Tensor | None) -> None:
        """Fill ``logp [R]`` and ``entropy [R]`` of the chunk, whose statistics are kept."""
        stats = self._stats[: len(targets)]
        self._kernels.read(self._logits, self._head, targets, logp, entropy, stats)

    def log_sums(self) -> Tensor:
        """Log-sum-exps ``[R]`` float64 of the chunk that was read."""
        largest, total = self._stats[: len(self._logits), :2].double().unbind(1)
        return largest + total.log()

    def differentiate(
        self,
        chunk: slice,
        targets: Tensor,
        d_logp: Tensor | None,
        d_entropy: Tensor | None,
        *,
        was_read: bool,
    ) -> None:
        """Accumulate the gradients of the chunk, given those ``[R]`` at its logp and entropy.

        ``was_read``: by `read`, since it was filled; with ``d_entropy`` for its entropy too.
        """
        gradient = gradient_view(self._logits, self._dtype)
        stats = self._stats[: len(targets)] if was_read else None
        self._kernels.differentiate(
            self._logits, self._head, targets, d_logp, d_entropy, stats, gradient
        )
        self._accumulate(chunk, gradient)

    def policy(
        self, chunk: slice, actions: Actions, loss: ActionLoss, logp: Tensor, entropy: Tensor
    ) -> None:
        """Fill ``logp [R]`` and ``entropy [R]`` and accumulate the policy loss's gradients."""
        gradient = gradient_view(self._logits, self._dtype)
        self._kernels.policy(self._logits, self._head, actions, loss, logp, entropy, gradient)
        self._accumulate(chunk, gradient)

    def half_scale(self, *coefficients: Tensor | None) -> Tensor | None:
        """A power of two ``[]`` for the rows' coefficients, if float16 could lose them; or None.

        float16 ends at 6e-8, and a coefficient is a share 1 / N of a gradient: the largest is
        scaled to 16 to 32, which leaves room for another factor of 2,000 above it (advantages and
        ratios), and `unscale` divides the gradients by it.
        """
        given = [c.abs().amax() for c in coefficients if c is not None and len(c)]
        if self._dtype != torch.float16 or not given:
            return None
        exponent = torch.frexp(torch.stack(given).amax()).exponent
        return torch.ldexp(self._buffer.new_full((), 2 * _HALF_ROOM), -exponent)

    def unscale(self, scale: Tensor | None) -> None:
        """Divide the gradients by the power of two that the coefficients were multiplied by."""
        if scale is not None:
            for gradient in (self.hidden, self.weight, self.bias):
                gradient.div_(scale)

    def _accumulate(self, chunk: slice, gradient: Tensor) -> None:
        need_hidden, need_weight, need_bias = self._needs
        if need_hidden and len(self._kept) == len(self._states):
            multiply(gradient, self._weight, self.hidden[chunk])
        elif need_hidden:
            d_hidden = self.hidden.new_empty(self._x.shape)
            multiply(gradient, self._weight, d_hidden)
            self.hidden.index_copy_(0, self._kept[chunk], d_hidden)
        if need_weight:
            multiply(gradient.t(), self._x, self.weight, add=chunk.start > 0)
        if need_bias:
            self.bias += gradient.sum(0, dtype=torch.float32)


def chunk_rows(vocab: int, copied: int = 0, logits: torch.dtype = torch.float32) -> int:
    """Rows of a chunk: as many as ``CHUNK_BYTES`` holds; at least 1.

    At V = 128,256 without copies that is 1,046 rows.
    """
    return max(1, CHUNK_BYTES // row_bytes(vocab, copied, logits))


def row_bytes(vocab: int, copied: int, logits: torch.dtype) -> int:
    """A row's V logits (rounded up to a multiple of 64), its statistics, and ``copied`` bytes."""
    pitch = -(-vocab // _ALIGNED) * _ALIGNED
    return logits.itemsize * pitch + 4 * ROW_STATS + copied


def few_enough(rows: int, count: int, row: int, *, float32_bytes: int) -> int:
    """Rows of a chunk, more than ``rows`` where few chunks can then add up in bfloat16.

    Args:
        rows: of a chunk within the budget.
        count: K, of all chunks.
        row: bytes of a row.
        float32_bytes: of the d weight that more chunks would have to add up in; where the larger
            chunk takes more than that, it stays at ``rows``.
    """
    if count <= rows * _NARROW_CHUNKS:
        return rows
    wanted = -(-count // (_NARROW_CHUNKS * _TILE)) * _TILE
    return wanted if (wanted - rows) * row <= float32_bytes else rows


def multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """Write ``a b``, or add it to what is there, into ``out``; summed in float32.

    ``out`` is float32 or of the operands' dtype; into that, a product that is split along its sum
    may be put together in it (torch's ``allow_bf16_reduced_precision_reduction``). Half-precision
    operands go through the tensor cores of a CUDA device; a float32 ``out`` of them (``out_dtype``)
    has no CPU kernel: in CPU memory, where only Triton's interpreter gets, they are converted.
    """
    if not a.is_cuda:
        out.copy_(torch.addmm(out.float(), a.float(), b.float(), beta=float(add)))
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
