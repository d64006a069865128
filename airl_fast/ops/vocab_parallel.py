"""`linear_logprob` with the head's rows sharded over the ranks of a process group.

N rows (actions), D hidden size, V vocabulary, V_r the rows of rank r, K rows that are not ignored.
What a rank computes alone, and the formulas, are in `_vocab_shard`; here is what ranks exchange.
"""

import struct
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from airl_fast.ops._head import (
    NON_FINITE_LOGITS,
    LinearHead,
    check_finite,
    check_head,
    check_targets,
    compute_dtype,
    no_autocast,
)
from airl_fast.ops._vocab_shard import (
    NOBODY,
    Forward,
    ShardRead,
    forward_for,
    local_targets,
    read_shard,
    shard_gradients,
)
from airl_fast.ops.dispatch import forced_as_before, forced_backend

_NAME = "vocab_parallel_linear_logprob"


@overload
def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def vocab_parallel_linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `linear_logprob`, with the rows of the weight sharded over the ranks of a group.

    Rank r holds rows ``[sum of V_q for q < r, + V_r)`` of the weight; shards may differ in size.
    With ``L_r``, ``H_r`` and ``q`` the log-sum-exp, the entropy and the softmax of rank r's logits
    alone (z / temperature, soft-capped as in `linear_logprob`),

        P = softmax over ranks of L     logp = log P_owner + log q_target
        entropy = sum over r of P_r (H_r - log P_r)

    Forward, every rank reads its own logits once, in the tiles or chunks of `linear_logprob` (its
    memory, for V_r), and the ranks exchange three float64 numbers a row. Backward, every rank
    recomputes its logits; the gradients at weight and bias are local, the one at hidden is
    summed over the ranks: the same, and whole, on each.

    A collective call: every rank of the group makes it, with the same hidden, targets and options,
    and where hidden requires a gradient every rank runs its backward, with the same upstream
    gradient (as it has where each computes the same loss). That hidden is the same is not checked.

    Args:
        hidden: ``[N, D]``, floating; the same on every rank.
        weight: ``[V_r, D]``, floating; this rank's rows, at least one.
        targets: ``[N]`` int64, in ``[0, V)`` (V the sum of all V_r) or ``ignore_index``; the same
            on every rank.
        group: the process group; None for the default one.
        bias: ``[V_r]`` floating, or None on every rank.
        temperature: divides the logits; above 0.
        softcap: bound of the soft-capped logits, above 0; None for none.
        logit_scale: multiplies the logits before soft-capping; above 0.
        ignore_index: rows with this target are never read: their result is 0, without gradient.
        return_entropy: also return the entropy, in nats.

    Returns:
        ``logp [N]`` float32, at most 0, the same on every rank; with ``return_entropy`` the pair
        ``(logp, entropy [N])``.

    Raises:
        ValueError: (on every rank) an argument that some rank refuses, or that is not the same on
            all; a target out of range; a result that is not finite. (On this rank) no group.
        TypeError, RuntimeError: (on the rank itself; a ValueError on the others) an argument that
            is no tensor or number; the forced backend cannot serve the call.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{_NAME}: expected a process group, received none: call "
            "torch.distributed.init_process_group first, or use linear_logprob"
        )
    head = LinearHead(weight, bias, temperature, softcap, logit_scale)
    shard = _agree(hidden, head, targets, group, ignore_index, return_entropy)
    logp, entropy = _VocabParallel.apply(hidden, weight, bias, targets, shard)
    return (logp.float(), entropy.float()) if return_entropy else logp.float()


class _Shard(NamedTuple):
    """A call that all ranks agree on, and the place of this one in it."""

    group: dist.ProcessGroup | None
    sizes: list[int]  # V_r of every rank
    rank: int
    forward: Forward
    options: tuple[float, float | None, float]  # temperature, softcap, logit_scale
    ignore_index: int
    return_entropy: bool

    @property
    def first(self) -> int:
        """The first of this rank's rows."""
        return sum(self.sizes[: self.rank])

    def head(self, weight: Tensor, bias: Tensor | None) -> LinearHead:
        return LinearHead(weight, bias, *self.options)


_SAME = (
    "the number of rows N",
    "the hidden size D",
    "targets",
    "whether there is a bias",
    "temperature",
    "softcap",
    "logit_scale",
    "ignore_index",
    "return_entropy",
    "whether hidden requires a gradient",
    "the bytes of a logit (8 if any input is float64)",
)


def _agree(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    group: dist.ProcessGroup | None,
    ignore_index: int,
    return_entropy: bool,
) -> _Shard:
    """Check the arguments on every rank, so that all raise or none does: no rank waits for ever.

    One exchange of a few integers. Afterwards targets and V are known to be the same everywhere,
    so that a target out of range is seen by every rank.
    """
    refusal: ValueError | RuntimeError | TypeError | None = None
    header = torch.zeros(2 + len(_SAME), dtype=torch.int64)
    forward: Forward | None = None
    try:
        check_head(hidden, head, targets)
        forward = forward_for(hidden, head)
        header = _header(hidden, head, targets, ignore_index, return_entropy)
    except (ValueError, RuntimeError, TypeError) as error:
        refusal = error
    ranks = dist.get_world_size(group)
    found = [torch.empty_like(header, device=hidden.device) for _ in range(ranks)]
    dist.all_gather(found, header.to(hidden.device), group)
    headers = torch.stack(found).tolist()
    if refusal is not None:
        raise refusal
    assert forward is not None
    refused = [rank for rank, (ok, *_) in enumerate(headers) if not ok]
    if refused:
        raise ValueError(
            f"{_NAME}: rank {', '.join(map(str, refused))} of the group refused its arguments; "
            "its own message says why"
        )
    for name, values in zip(_SAME, list(zip(*headers, strict=True))[2:], strict=True):
        if len(set(values)) > 1:
            raise ValueError(
                f"{_NAME}: expected {name} to be the same on every rank, received "
                f"{_listed(name, values)}; every rank holds the same hidden and targets, and its "
                "own rows of the weight"
            )
    sizes = [size for _, size, *_ in headers]
    check_targets(targets, sum(sizes), ignore_index)
    rank = dist.get_rank(group)
    return _Shard(group, sizes, rank, forward, head[2:], ignore_index, return_entropy)


def _header(
    hidden: Tensor, head: LinearHead, targets: Tensor, ignore_index: int, return_entropy: bool
) -> Tensor:
    """What a rank tells the others: 1, V_r, and the values of `_SAME`, floats by their bits."""
    place = torch.arange(1, len(targets) + 1, device=targets.device)
    numbers = [
        1,
        len(head.weight),
        *hidden.shape,
        int((targets * place * 0x9E3779B1 + targets).sum()),  # modulo 2^64
        int(head.bias is not None),
        _bits(head.temperature),
        _bits(0.0 if head.softcap is None else head.softcap),
        _bits(head.logit_scale),
        ignore_index,
        int(return_entropy),
        int(torch.is_grad_enabled() and hidden.requires_grad),
        compute_dtype(hidden, head.weight, head.bias).itemsize,
    ]
    return torch.tensor(numbers, dtype=torch.int64)


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _listed(name: str, values: tuple[int, ...]) -> str:
    """The ranks' values, in words; targets were sent as a sum that says nothing."""
    if name == "targets":
        return "different ones"
    if name in ("temperature", "softcap", "logit_scale"):
        floats = [struct.unpack("<d", struct.pack("<q", value))[0] for value in values]
        found = [None if name == "softcap" and value == 0 else value for value in floats]
    else:
        found = list(values)
    return ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(found))


class _VocabParallel(torch.autograd.Function):
    """Logp ``[N]`` and entropy ``[N]`` (``[0]`` unless asked for), in float64."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shard: _Shard,
    ) -> tuple[Tensor, Tensor]:
        head, rank = shard.head(weight, bias), shard.rank
        local = local_targets(targets, shard.first, shard.sizes[rank], shard.ignore_index)
        with no_autocast(hidden.device):
            read = read_shard(shard.forward, hidden, head, local, shard.return_entropy)
        kept = (local != NOBODY).nonzero().squeeze(-1)
        owner = _owner(targets[kept], shard.sizes)
        log_share, logp, entropy = _combine(read, owner, shard)
        check_finite("logp", logp, NON_FINITE_LOGITS)
        check_finite("entropy", entropy, NON_FINITE_LOGITS)
        whole = [
            _spread(x, kept, len(hidden)) for x in (logp, entropy, read.entropy, log_share[rank])
        ]
        owned = _spread((owner == rank).double(), kept, len(hidden))
        ctx.set_materialize_grads(False)
        if not shard.return_entropy:
            ctx.mark_non_differentiable(whole[1])
        ctx.save_for_backward(hidden, weight, bias, local, owned, *whole[1:])
        ctx.shard, ctx.forced_backend = shard, forced_backend.get()
        return whole[0], whole[1]

    @staticmethod
    @once_differentiable
    @forced_as_before
    def backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Any, ...]:
        """``d z_k = d_logp (1[k = target] - p_k) - d_entropy p_k (log p_k + H)``, shard by shard.

        With ``p_k = P_r q_k`` that is ``d_logp`` at the target's z, ``P_r d_entropy`` at H_r and
        ``P_r (d_entropy (H_r - log P_r - H) - d_logp)`` at L_r.
        """
        hidden, weight, bias, local, owned, entropy, own_entropy, log_share = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if d_logp is None and d_entropy is None:
            return (None,) * 5
        share, dtype = log_share.exp(), compute_dtype(hidden, weight, bias)
        d_log_sum, d_target = torch.zeros_like(share), torch.zeros_like(share)
        if d_logp is not None:
            d_log_sum -= d_logp
            d_target += d_logp * owned
        if d_entropy is not None:
            d_log_sum += d_entropy * (own_entropy - log_share - entropy)
            d_entropy = (d_entropy * share).to(dtype)
        with no_autocast(hidden.device):
            gradients = shard_gradients(
                (d_log_sum * share).to(dtype),
                d_target,
                d_entropy,
                own_entropy.to(dtype),
                hidden,
                ctx.shard.head(weight, bias),
                local,
                needs,
            )
        if needs[0]:
            dist.all_reduce(gradients[0], group=ctx.shard.group)
        inputs = hidden, weight, bias
        return (
            *(
                g.to(x.dtype) if need else None
                for g, x, need in zip(gradients, inputs, needs, strict=True)
            ),
            None,
            None,
        )


def _combine(read: ShardRead, owner: Tensor, shard: _Shard) -> tuple[Tensor, Tensor, Tensor]:
    """Log P ``[ranks, K]``, logp ``[K]`` and entropy ``[K]`` or ``[0]``, from what every rank read.

    Log-softmax subtracts the largest first, so that log P is at most 0, and so is logp.
    """
    columns = [read.log_sum, read.logp, *([read.entropy] if shard.return_entropy else [])]
    mine = torch.stack([column.double() for column in columns])
    found = [torch.empty_like(mine) for _ in shard.sizes]
    dist.all_gather(found, mine, shard.group)
    everyone = torch.stack(found, 1)  # [2 or 3, ranks, K]
    log_share = everyone[0].log_softmax(0)
    logp = (log_share + everyone[1]).gather(0, owner[None]).squeeze(0)
    if not shard.return_entropy:
        return log_share, logp, logp.new_empty(0)
    entropy = (log_share.exp() * (everyone[2] - log_share)).sum(0)
    return log_share, logp, entropy


def _owner(targets: Tensor, sizes: list[int]) -> Tensor:
    """The rank that owns each target ``[K]``."""
    ends = torch.tensor(sizes, device=targets.device).cumsum(0)
    return torch.bucketize(targets, ends, right=True)


def _spread(values: Tensor, kept: Tensor, count: int) -> Tensor:
    """Values ``[K]`` at the kept rows of ``[N]`` in float64, 0 elsewhere; ``[0]`` if none."""
    if len(values) != len(kept):
        return values.new_empty(0, dtype=torch.float64)
    return values.new_zeros(count, dtype=torch.float64).index_copy_(0, kept, values.double())
