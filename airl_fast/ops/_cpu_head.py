"""The head on a CPU: torch's matrix products into tiles, and C++ kernels over their rows.

N rows (actions), D hidden size, V vocabulary, R rows of a chunk, C columns of a tile, K rows that
are not ignored.

A tile ``[R, C]`` of the logits is written by the product and read at once (log-sum-exp, target,
entropy: csrc/rows.h), before it has left the cache. Without gradients it is then forgotten, and
`tile_shape` has the rule; for gradients `_cpu_gradients` keeps it until the coefficients are known.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor

from airl_fast import _C
from airl_fast.ops import _cpu_products, _head
from airl_fast.ops._cpu_products import floats
from airl_fast.ops._head import LinearHead, kept_rows, slopes

TILE_COLUMNS = 2048  # of a tile whose columns do not depend on the rows
_alike: ContextVar[bool] = ContextVar("alike", default=False)
_HUGE_PAGES = 4 * 2**20  # bytes from which a buffer asks for huge pages (of 2 MiB)


def serves(*tensors: Tensor) -> str | None:
    """Say why the C++ kernels cannot take this head, if they cannot."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it takes tensors in CPU memory, not on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "its logits are float32, and float64 inputs ask for float64"
    return None


@contextmanager
def alike_tiles() -> Iterator[None]:
    """Cut the head into the same columns whatever the rows: a row's sums are then added alike."""
    token = _alike.set(True)
    try:
        yield
    finally:
        _alike.reset(token)


def tile_floats() -> int:
    """Floats of a tile, or of what is copied for one: an eighth of ``CHUNK_BYTES`` (16 MiB)."""
    return max(1, _head.CHUNK_BYTES // 32)


def tile_shape(count: int, vocab: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile of logits that are only read, never differentiated.

    `tile_floats` is the most for each of the tile, its hidden states (copied if rows are ignored)
    and its rows of the weight (copied if they are in half precision): 48 MiB at any N. All rows
    come first, up to 4,096: then the weight, which is the largest thing to read, is read once.
    The columns are those of `tile_columns`.
    """
    floats = tile_floats()
    if _alike.get():
        columns = min(vocab, TILE_COLUMNS, floats // 1024, floats // width)
        return even_limit(count, 1024), max(1, columns)
    rows = even_limit(count, max(1, min(4096, floats // width, floats)))
    return rows, max(1, min(vocab, tile_columns(rows), floats // rows, floats // width))


def tile_columns(rows: int) -> int:
    """Columns that make a tile of ``rows`` rows fast: 1,024, or 1 MiB of them if that is more.

    A small tile is still in the cache, of which others want their part, when it is read; one of few
    columns makes the product itself slow, and with few rows the calls show. Two threads of an EPYC
    without AVX-512, in products in one piece, for 256, 512, 1,024, 2,048 and 4,096 columns: scoring
    at N = 2,048, D = 576 0.89, 0.85, 0.89, 0.94, 0.92; at N = 512, D = 2,048 0.84, 0.85, 0.80,
    1.03, 1.02; at N = 256, D = 896 0.70, 0.66, 0.78, 0.77, 0.95. Loss and gradients likewise.
    """
    return max(1024, 2**18 // rows)


def even_limit(count: int, limit: int) -> int:
    """Rows of a chunk when ``count`` rows are cut into as few as ``limit`` allows, all alike.

    The last is then not a sliver for which the products read the whole weight again.
    """
    chunks = max(1, -(-count // limit))
    return max(1, -(-count // chunks))


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 on huge pages where it is large: a fault per 4 KiB costs more."""
    tensor = floats(shape)
    if tensor.nbytes >= _HUGE_PAGES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


class CPUHead:
    """One tile of the head at a time: its logits read for log-probabilities, and differentiated.

    The formulas are those of `_head.LinearHead`.

    Args:
        head: the head.
        rows: of the largest chunk.
    """

    def __init__(self, head: LinearHead, *, rows: int) -> None:
        self.weight = head.weight
        self._bias = None if head.bias is None else head.bias.float().contiguous()
        self._options = slopes(*head[2:])
        self._threads = torch.get_num_threads()
        self._stats = torch.empty(
            rows, 4, dtype=torch.float64, device="cpu"
        )  # RowStats of csrc/rows.h

    def read(
        self,
        x: Tensor,
        targets: Tensor,
        first: int,
        logits: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
    ) -> None:
        """Fill ``logits [R, C]`` for the columns from ``first`` on, ``logp [R]``, ``entropy [R]``.

        From hidden states ``x [R, D]`` and ``targets [R]``. The columns follow those read last,
        unless ``first`` is 0; logp and entropy are right once all of them have been read.
        """
        _cpu_products.multiply(x, self.weight[first : first + logits.shape[1]].t(), logits)
        _C.read_rows(
            self._chunk(logits),
            self._head(first),
            targets.data_ptr(),
            first,
            self._threads,
            self._stats.data_ptr(),
            logp.data_ptr(),
            0 if entropy is None else entropy.data_ptr(),
        )

    def log_sums(self, rows: int) -> Tensor:
        """Log-sum-exps ``[R]`` float64 of the rows that were read, all columns of them."""
        largest, total = self._stats[:rows, :2].unbind(1)
        return largest + total.log()

    def differentiate(
        self,
        targets: Tensor,
        first: int,
        logits: Tensor,
        d_logp: Tensor | None,
        d_entropy: Tensor | None,
        gradient: Tensor,
    ) -> None:
        """Fill ``gradient [R, C]`` from a tile of ``logits``, which may be the same memory.

        Given the gradients ``[R]`` at logp and entropy; None stands for zero. The chunk's rows are
        those read last, all columns of them; with ``d_entropy`` also for the entropy.
        """
        _C.differentiate_rows(
            self._chunk(logits),
            self._head(first),
            targets.data_ptr(),
            first,
            self._threads,
            self._stats.data_ptr(),
            0 if d_logp is None else d_logp.data_ptr(),
            0 if d_entropy is None else d_entropy.data_ptr(),
            gradient.data_ptr(),
        )

    def weigh(
        self,
        x: Tensor,
        targets: Tensor,
        first: int,
        logits: Tensor,
        logp: Tensor,
        entropy: Tensor,
        tangent: Tensor,
        sums: Tensor,
    ) -> None:
        """Read a tile as `read` does, and add it to ``sums [R, D]``; fill ``tangent [R]``.

        Once all columns have been read, `settle` turns the sums into the gradient at ``x``.
        """
        part = self.weight[first : first + logits.shape[1]]
        _cpu_products.multiply(x, part.t(), logits)
        _C.weigh_rows(
            self._chunk(logits),
            self._head(first),
            targets.data_ptr(),
            first,
            self._threads,
            self._stats.data_ptr(),
            logp.data_ptr(),
            entropy.data_ptr(),
            tangent.data_ptr(),
            sums.data_ptr(),
            sums.shape[1],
        )
        _cpu_products.multiply(logits, part, sums, add=first > 0)

    def settle(self, targets: Tensor, d_logp: Tensor, tangent: Tensor, sums: Tensor) -> None:
        """Turn sums into ``slope d_logp (tangent (1 - p) W_target - sums / s)`` (csrc/rows.h)."""
        largest, total, _, target = self._stats[: len(sums)].unbind(1)
        scale = d_logp * self._options[2]
        others = 1 - (target - largest).exp() / total
        sums.mul_((-scale / total).float()[:, None])
        sums.addcmul_(self.weight[targets].float(), (scale * tangent * others).float()[:, None])

    def _head(self, first: int) -> tuple[int, float, float, float]:
        return 0 if self._bias is None else self._bias[first:].data_ptr(), *self._options

    @staticmethod
    def _chunk(logits: Tensor) -> tuple[int, int, int, int, int]:
        rows, columns = logits.shape
        return logits.data_ptr(), columns, rows, columns, 0


class Rows:
    """The K rows of hidden that count, in float32: views where nothing is ignored, else copies."""

    def __init__(self, hidden: Tensor, kept: Tensor) -> None:
        self.hidden, self.kept = hidden, kept
        self.everything = len(kept) == len(hidden)
        # Floats of a row's hidden state and of its gradient, where they are copies.
        in_place = self.everything and hidden.dtype == torch.float32 and hidden.is_contiguous()
        self.copied = 0 if in_place else 2 * hidden.shape[1]

    def read(self, chunk: slice) -> Tensor:
        """Hidden states ``[R, D]`` of a chunk of the kept rows, contiguous float32."""
        x = self.hidden[chunk if self.everything else self.kept[chunk]]
        return x.float().contiguous()


def read_all(
    rows: Rows,
    targets: Tensor,
    head: LinearHead,
    logp: Tensor,
    entropy: Tensor | None,
    log_sums: Tensor | None = None,
) -> None:
    """Fill ``logp [K]``, ``entropy [K]`` and ``log_sums [K]`` float64, the last two unless None.

    One matrix product and one read of its result.
    """
    limit, columns = tile_shape(len(rows.kept), *head.weight.shape)
    tiles = CPUHead(head, rows=limit)
    buffer = empty(limit * columns)
    for chunk in chunks(len(rows.kept), limit):
        x = rows.read(chunk)
        results = logp[chunk], None if entropy is None else entropy[chunk]
        for first in range(0, len(head.weight), columns):
            shape = len(x), min(columns, len(head.weight) - first)
            logits = buffer[: shape[0] * shape[1]].view(shape)
            tiles.read(x, targets[chunk], first, logits, *results)
        if log_sums is not None:
            log_sums[chunk] = tiles.log_sums(len(x))


def logprob_forward(
    hidden: Tensor, head: LinearHead, targets: Tensor, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    """`linear_logprob`: one matrix product and one read of its result."""
    kept = kept_rows(targets, ignore_index)
    logp = floats(len(kept))
    entropy = floats(len(kept)) if return_entropy else None
    read_all(Rows(hidden, kept), targets[kept], head, logp, entropy)
    return (
        _spread(logp, kept, len(hidden)),
        floats(0) if entropy is None else _spread(entropy, kept, len(hidden)),
    )


def chunks(count: int, limit: int, first: int = 0) -> Iterator[slice]:
    """Slices of at most ``limit`` rows; before them one of ``first``, if that is above 0."""
    cuts = [0, *range(first or limit, count, limit), count] if count else []
    return (slice(start, stop) for start, stop in pairwise(cuts))


def _spread(values: Tensor, kept: Tensor, count: int) -> Tensor:
    """Values ``[K]`` at the kept rows of ``[N]``, 0 elsewhere."""
    return values if len(kept) == count else floats(count).zero_().index_copy_(0, kept, values)
