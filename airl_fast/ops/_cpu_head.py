"""The head on a CPU: torch's matrix products into one buffer, and C++ kernels over its rows.

N rows (actions), D hidden size, V vocabulary, R rows of a chunk, K rows that are not ignored.

Without gradients, a tile ``[R, C]`` of the logits is written by the product and read once
(log-sum-exp, target, entropy: csrc/rows.h) before it has left the cache; `tile_shape` has the rule.
For gradients a chunk ``[R, V]`` has to be there whole: it is written, read once, overwritten by its
own gradient, and read by the products that need that; `chunk_rows` has the rule. Chunks are of
equal size, so that the last is not a sliver for which the products read the whole weight again.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from airl_fast import _C
from airl_fast.ops import _head
from airl_fast.ops._head import kept_rows
from airl_fast.ops._policy_terms import ActionLoss, Actions, pieces

_HUGE_PAGES = 4 * 2**20  # bytes from which a buffer asks for huge pages (of 2 MiB)


def serves(*tensors: Tensor) -> str | None:
    """Say why the C++ kernels cannot take this head, if they cannot."""
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it takes tensors in CPU memory, not on {tensor.device}"
        if tensor.dtype == torch.float64:
            return "its logits are float32, and float64 inputs ask for float64"
    return None


def chunk_rows(vocab: int, copied: int) -> int:
    """Rows of a chunk: as many as fit in ``CHUNK_BYTES`` (128 MiB unless changed); at least 1.

    A row costs its V logits, which become their gradient in place, and ``copied`` floats: its
    hidden state and that one's gradient, where ignored rows or half precision make copies of them,
    else nothing. This is all the memory that the head takes beyond its results and a float32 copy
    of a half-precision weight, at any N. At V = 49,152 a chunk has 682 rows, at 151,936 it has
    220. More is better: every chunk reads the whole weight again, and its gradient too.
    """
    return max(1, _head.CHUNK_BYTES // (4 * (vocab + copied)))


def tile_shape(count: int, vocab: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile of logits that are only read, never differentiated.

    An eighth of ``CHUNK_BYTES`` (16 MiB unless changed) is the most for each of the tile, its
    hidden states (copied if rows are ignored) and its rows of the weight (copied if they are in
    half precision): 48 MiB at any N. A tile that stays in the cache is read for little: at
    N = 256, V = 151,936, D = 896 (one thread of an EPYC with 32 MiB) tiles of 8, 32 and 128 MiB
    took 1.00, 1.04 and 1.29 times the product in one piece. All rows come first, up to 4,096:
    then the weight, which is the largest thing to read, is read once.
    """
    floats = max(1, _head.CHUNK_BYTES // 32)
    rows = even_limit(count, max(1, min(4096, floats // width, floats)))
    return rows, max(1, min(vocab, floats // rows, floats // width))


def even_limit(count: int, limit: int) -> int:
    """Rows of a chunk when ``count`` rows are cut into as few as ``limit`` allows, all alike."""
    chunks = max(1, -(-count // limit))
    return max(1, -(-count // chunks))


def empty(*shape: int) -> Tensor:
    """Uninitialised float32 on huge pages where it is large: a fault per 4 KiB costs more."""
    tensor = torch.empty(shape)
    if tensor.nbytes >= _HUGE_PAGES:
        _C.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


class CPUHead:
    """One chunk of the head at a time: log-probabilities, then, in place, the logits' gradient.

    The formulas are those of `_head.ChunkedHead`. Results in the buffer live until the next chunk.

    Args:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        temperature, softcap, logit_scale: as in `linear_logprob`.
        rows, columns: of the largest chunk.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        softcap: float | None,
        logit_scale: float,
        *,
        rows: int,
        columns: int,
    ) -> None:
        self.weight = weight
        self.bias = None if bias is None else bias.float().contiguous()
        slope = logit_scale / temperature
        inner, outer = (logit_scale / softcap, softcap / temperature) if softcap else (slope, 0.0)
        self._options = (inner, outer, slope)
        self._threads = torch.get_num_threads()
        self._buffer = empty(rows * columns)
        self._stats = torch.empty(rows, 4, dtype=torch.float64)  # RowStats of csrc/rows.h

    def read(
        self,
        x: Tensor,
        targets: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
        first: int = 0,
        stop: int | None = None,
    ) -> None:
        """Fill ``logp [R]`` and ``entropy [R]`` from hidden states ``x [R, D]`` and ``targets``.

        Of the columns from ``first`` to ``stop``; where first is above 0, these are the ones that
        follow those read last. The results are right once all columns have been read.
        """
        part = self.weight[first:stop].float()
        logits = self._logits(len(x), len(part))
        torch.mm(x, part.t(), out=logits)
        _C.read_rows(
            self._chunk(logits),
            (self._bias(first), *self._options),
            targets.data_ptr(),
            first,
            self._threads,
            self._stats.data_ptr(),
            logp.data_ptr(),
            0 if entropy is None else entropy.data_ptr(),
        )

    def differentiate(
        self, targets: Tensor, d_logp: Tensor | None, d_entropy: Tensor | None
    ) -> Tensor:
        """Overwrite the logits that were read last by their gradient ``[R, V]``, and return it.

        Given the gradients ``[R]`` at logp and entropy; None stands for zero. With ``d_entropy``
        the read must have asked for the entropy.
        """
        logits = self._logits(len(targets), len(self.weight))
        _C.differentiate_rows(
            self._chunk(logits),
            (self._bias(0), *self._options),
            targets.data_ptr(),
            self._threads,
            self._stats.data_ptr(),
            0 if d_logp is None else d_logp.data_ptr(),
            0 if d_entropy is None else d_entropy.data_ptr(),
        )
        return logits

    def _logits(self, rows: int, columns: int) -> Tensor:
        return self._buffer[: rows * columns].view(rows, columns)

    def _bias(self, first: int) -> int:
        return 0 if self.bias is None else self.bias[first:].data_ptr()

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


class Gradients:
    """Accumulates the gradients that are asked for; the others stay empty tensors ``[0]``."""

    def __init__(self, head: CPUHead, rows: Rows, needs: Sequence[bool]) -> None:
        self._head, self._rows = head, rows
        need_hidden, need_weight, need_bias = needs
        vocab, width = head.weight.shape
        self.hidden = empty(len(rows.hidden), width) if need_hidden else torch.empty(0)
        self.weight = empty(vocab, width) if need_weight else torch.empty(0)
        self.bias = torch.zeros(vocab if need_bias else 0)
        if not rows.everything:
            self.hidden.zero_()
        if len(rows.kept) == 0:
            self.weight.zero_()
        self._needs, self._first = needs, True

    def add(self, chunk: slice, x: Tensor, logit_gradient: Tensor) -> None:
        """Add a chunk of the kept rows: hidden states ``[R, D]`` and gradient ``[R, V]``."""
        need_hidden, need_weight, need_bias = self._needs
        if need_hidden and self._rows.everything:
            torch.mm(logit_gradient, self._head.weight, out=self.hidden[chunk])
        elif need_hidden:
            self.hidden[self._rows.kept[chunk]] = logit_gradient @ self._head.weight
        if need_weight and self._first:
            torch.mm(logit_gradient.t(), x, out=self.weight)
        elif need_weight:
            self.weight.addmm_(logit_gradient.t(), x)
        if need_bias:
            self.bias.add_(logit_gradient.sum(0))
        self._first = False


def logprob_forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_logprob`: one matrix product and one read of its result."""
    kept = kept_rows(targets, ignore_index)
    limit, columns = tile_shape(len(kept), *weight.shape)
    head = CPUHead(weight, bias, temperature, softcap, logit_scale, rows=limit, columns=columns)
    rows, targets = Rows(hidden, kept), targets[kept]
    logp = torch.empty(len(kept))
    entropy = torch.empty(len(kept)) if return_entropy else None
    for chunk in _chunks(len(kept), limit):
        x = rows.read(chunk)
        results = logp[chunk], None if entropy is None else entropy[chunk]
        for first in range(0, len(weight), columns):
            head.read(x, targets[chunk], *results, first, first + columns)
    return (
        _spread(logp, kept, len(hidden)),
        torch.empty(0) if entropy is None else _spread(entropy, kept, len(hidden)),
    )


def logprob_backward(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `linear_logprob`: the logits again, and a product for each matrix."""
    kept = kept_rows(targets, ignore_index)
    rows, targets, weight = Rows(hidden, kept), targets[kept], weight.float()
    limit, vocab = even_limit(len(kept), chunk_rows(len(weight), rows.copied)), len(weight)
    head = CPUHead(weight, bias, temperature, softcap, logit_scale, rows=limit, columns=vocab)
    gradients = Gradients(head, rows, needs)
    d_logp = None if d_logp is None else d_logp[kept].float()
    d_entropy = None if d_entropy is None else d_entropy[kept].float()
    logp, read_entropy = torch.empty(limit), None if d_entropy is None else torch.empty(limit)
    for chunk in _chunks(len(kept), limit):
        x = rows.read(chunk)
        head.read(x, targets[chunk], logp, read_entropy)
        d_logits = head.differentiate(
            targets[chunk],
            None if d_logp is None else d_logp[chunk],
            None if d_entropy is None else d_entropy[chunk],
        )
        gradients.add(chunk, x, d_logits)
    return gradients.hidden, gradients.weight, gradients.bias


def policy_loss_sweep(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    head_options: tuple[float, float | None, float],
    loss: ActionLoss,
    actions: Actions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Gradients]:
    """Logp ``[K]``, entropy ``[K]`` and gradients of `linear_policy_loss`, in one sweep."""
    rows, weight = Rows(hidden, actions.rows), weight.float()
    most = chunk_rows(len(weight), rows.copied)
    # Whole sequences pack best under the full limit; single rows can be cut into equal chunks.
    limit = most if loss.per_sequence else even_limit(len(actions.rows), most)
    limit = max(1, min(limit, len(actions.rows)))
    head = CPUHead(weight, bias, *head_options, rows=limit, columns=len(weight))
    gradients = Gradients(head, rows, needs)
    logp, entropy = torch.empty(len(actions.rows)), torch.empty(len(actions.rows))
    d_entropy = -loss.entropy_coef * actions.share if loss.entropy_coef else None
    for piece in pieces(actions, limit, loss.per_sequence):
        for chunk in piece:
            x = rows.read(chunk)
            head.read(x, actions.targets[chunk], logp[chunk], entropy[chunk])
        if not any(needs):
            continue
        whole = slice(piece[0].start, piece[-1].stop)
        d_logp = loss.terms(logp[whole], actions.part(whole)).d_logp
        for chunk in piece:
            if len(piece) > 1:  # the buffer holds the piece's last chunk only
                x = rows.read(chunk)
                head.read(x, actions.targets[chunk], logp[chunk], entropy[chunk])
            d_logits = head.differentiate(
                actions.targets[chunk],
                d_logp[chunk.start - whole.start : chunk.stop - whole.start],
                None if d_entropy is None else d_entropy[chunk],
            )
            gradients.add(chunk, x, d_logits)
    return logp, entropy, gradients


def _chunks(count: int, limit: int) -> Iterator[slice]:
    return (slice(start, min(start + limit, count)) for start in range(0, count, limit))


def _spread(values: Tensor, kept: Tensor, count: int) -> Tensor:
    """Values ``[K]`` at the kept rows of ``[N]``, 0 elsewhere."""
    return values if len(kept) == count else torch.zeros(count).index_copy_(0, kept, values)
