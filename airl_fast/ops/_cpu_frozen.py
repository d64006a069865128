"""The gradient at the hidden states alone, on a CPU: two products, whatever becomes of the rows.

N rows (actions), D hidden size, V vocabulary, R rows of a chunk, C columns of a tile, K rows that
are not ignored.

With a frozen head and no entropy term a row's gradient is a number times a vector,

    d hidden = slope d_logp (W_target - sum over k of p_k W_k)        (softcap's slopes left out)

and the vector needs no coefficient: it is summed up tile by tile relative to the largest logit so
far, and made relative to the next one when a larger comes (as attention is in FlashAttention,
arXiv 2205.14135). The coefficients are asked for at the end, with the log-probabilities of all rows
at hand. No logits are kept, and the weight is read once for up to 4,096 rows.
"""

from collections.abc import Callable

from torch import Tensor

from airl_fast.ops._cpu_head import CPUHead, Rows, chunks, empty, tile_shape
from airl_fast.ops._cpu_products import floats
from airl_fast.ops._head import LinearHead


def frozen_sweep(
    rows: Rows,
    targets: Tensor,
    head: LinearHead,
    coefficients: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies, and the gradient at the hidden states.

    Memory beyond the results: that of `tile_shape`.

    Args:
        rows: the K rows that count.
        targets: ``[K]``.
        head: the head.
        coefficients: ``logp [K] -> d_logp [K]``, called once.

    Returns:
        ``logp [K]``, ``entropy [K]`` and ``d hidden [N, D]``, float32.
    """
    count, (vocab, width) = len(rows.kept), head.weight.shape
    logp, entropy, tangent = (floats(count) for _ in range(3))
    sums = empty(count, width)
    limit, columns = tile_shape(count, vocab, width)
    buffer = empty(limit * columns)
    read = []
    for chunk in chunks(count, limit):
        x, tiles = rows.read(chunk), CPUHead(head, rows=limit)
        results = logp[chunk], entropy[chunk], tangent[chunk], sums[chunk]
        for first in range(0, vocab, columns):
            shape = len(x), min(columns, vocab - first)
            logits = buffer[: shape[0] * shape[1]].view(shape)
            tiles.weigh(x, targets[chunk], first, logits, *results)
        read.append((tiles, chunk))
    d_logp = coefficients(logp)
    for tiles, chunk in read:
        tiles.settle(targets[chunk], d_logp[chunk], tangent[chunk], sums[chunk])
    if rows.everything:
        return logp, entropy, sums
    return logp, entropy, sums.new_zeros(rows.hidden.shape).index_copy_(0, rows.kept, sums)
