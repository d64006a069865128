"""Row kernels over a chunk of logits ``[R, V]``, in place: one program per row.

They implement `airl_fast.ops._gpu_rows.RowKernels`. A row is read in blocks; each lane keeps sums
relative to the largest z of the row so far, so that only the maximum is exchanged per block. The
blocks that lie wholly inside the row need no mask, whatever V is. A target outside ``[0, V)`` reads
nothing: its row's log p and gradient are NaN.
"""

import triton
import triton.language as tl
from torch import Tensor

from airl_fast.kernels._maths import column_of, rescale, shape_logits
from airl_fast.kernels.launch import RowConfig, on_device, row_config
from airl_fast.ops._gpu_rows import RowHead
from airl_fast.ops._policy_terms import ActionLoss, Actions


@triton.jit
def load_z(
    a, bias, column, vocab, head, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
):  # fmt: skip
    """Z and slope of a block of a row at address ``a``; logits past the end become -inf."""
    inner, outer = head
    b = 0.0
    if MASKED:
        logits = tl.load(a + column, mask=column < vocab, other=float("-inf")).to(tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + column, mask=column < vocab, other=0.0)
    else:
        logits = tl.load(a + column).to(tl.float32)
        if HAS_BIAS:
            b = tl.load(bias + column)
    z, slope = shape_logits(logits, b, inner, outer, CAPPED)
    if MASKED:
        z = tl.where(column < vocab, z, float("-inf"))
    return z, slope


@triton.jit
def take_in(
    a, bias, column, vocab, head, stats, MASKED: tl.constexpr, HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Carry a row's statistics over one more block."""
    largest, total, gap = stats
    z, _ = load_z(a, bias, column, vocab, head, MASKED, HAS_BIAS, CAPPED)
    top = tl.maximum(largest, tl.max(z, 0))
    base, shrink, rise = rescale(largest, top)
    x = z - base
    e = tl.exp(x)
    if ENTROPY:
        if MASKED:
            x = tl.where(column < vocab, x, 0.0)
        gap = shrink * (gap + rise * total) - e * x
    return top, shrink * total + e, gap


@triton.jit
def read_row(
    a, bias, vocab, target, head, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Largest z, sum of exp(z - largest), mean gap, and z of the target, of the row at ``a``."""
    lanes = tl.arange(0, BLOCK)
    taken, _ = load_z(a, bias, tl.maximum(target, 0), vocab, head, False, HAS_BIAS, CAPPED)
    taken = tl.where(target < 0, float("nan"), taken)
    stats = (
        tl.full((), float("-inf"), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
        tl.zeros((BLOCK,), tl.float32),
    )
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        stats = take_in(
            a, bias, start + lanes, vocab, head, stats, False, HAS_BIAS, CAPPED, ENTROPY
        )
    if whole < vocab:
        stats = take_in(a, bias, whole + lanes, vocab, head, stats, True, HAS_BIAS, CAPPED, ENTROPY)
    largest, totals, gaps = stats
    total = tl.sum(totals, 0)
    return largest, total, tl.sum(gaps, 0) / total, taken


@triton.jit
def log_prob(stats):
    """Log p of the target and the entropy, float32, from what `read_row` returned."""
    largest, total, gap, taken = stats
    # The target's z was computed apart: one unit above the largest would make log p positive.
    below = tl.where(taken > largest, 0.0, taken - largest)
    # float64: the fast float32 logarithm is off by 1e-7 near 1, where log p nears 0.
    log_total = tl.log(total.to(tl.float64))
    return (below - log_total).to(tl.float32), (log_total + gap).to(tl.float32)


@triton.jit
def write_block(
    a, out, bias, column, vocab, target, head, stats, coefficients, MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Gradient at the logits of one block of a row."""
    largest, gap = stats
    c0, c1, at_target = coefficients
    z, slope = load_z(a, bias, column, vocab, head, MASKED, HAS_BIAS, CAPPED)
    x = z - largest
    g = tl.exp(x) * (c0 + c1 * (x + gap))
    g = tl.where(column == target, at_target, g) * slope
    if NARROW:  # the gradient of this block overlaps logits that other threads are to read
        tl.debug_barrier()
    if MASKED:
        tl.store(out + column, g.to(out.dtype.element_ty), mask=column < vocab)
    else:
        tl.store(out + column, g.to(out.dtype.element_ty))


@triton.jit
def write_row(
    a, out, bias, vocab, target, head, slope, stats, d_logp, d_entropy, HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr, NARROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Overwrite a row by its gradient, in ascending order.

    With x = z - m, p = exp(x) / s and the mean gap g, log p + H = x + g, and the gradient at z is
    ``-p (d_logp + d_entropy (x + g))``, at the target d_logp more.
    """
    largest, total, gap, taken = stats
    scale = slope / total
    # 1 - p in float64: it loses digits in float32 where p nears 1.
    x = tl.where(taken > largest, 0.0, taken - largest)
    p = tl.exp(x.to(tl.float64)) / total.to(tl.float64)
    at_target = (slope * (d_logp * (1.0 - p) - d_entropy * p * (x + gap))).to(tl.float32)
    everywhere = tl.where(target < 0, float("nan"), -scale * d_logp)
    coefficients = everywhere, -scale * d_entropy, at_target
    lanes = tl.arange(0, BLOCK)
    whole = vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        write_block(
            a, out, bias, start + lanes, vocab, target, head, (largest, gap), coefficients, False,
            HAS_BIAS, CAPPED, NARROW,
        )  # fmt: skip
    if whole < vocab:
        write_block(
            a, out, bias, whole + lanes, vocab, target, head, (largest, gap), coefficients, True,
            HAS_BIAS, CAPPED, NARROW,
        )  # fmt: skip


@triton.jit(do_not_specialize=["targets", "logp", "entropy", "stats"])
def read_kernel(
    logits,  # [R, V]
    bias,  # [V] float32, or anything without HAS_BIAS
    targets,  # [R] int64
    logp,  # [R] float32
    entropy,  # [R] float32, or anything without ENTROPY
    stats,  # [R, 4] float32, or anything without KEEP
    stride,
    vocab,
    inner,
    outer,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log p and entropy of one row, and what `differentiate_kernel` needs of it."""
    row = tl.program_id(0).to(tl.int64)
    head = inner, outer
    target = column_of(tl.load(targets + row), vocab)
    found = read_row(
        logits + row * stride, bias, vocab, target, head, HAS_BIAS, CAPPED, ENTROPY, BLOCK
    )
    log_p, h = log_prob(found)
    tl.store(logp + row, log_p)
    if ENTROPY:
        tl.store(entropy + row, h)
    if KEEP:
        for i in tl.static_range(4):
            tl.store(stats + row * 4 + i, found[i])


@triton.jit(do_not_specialize=["targets", "d_logp", "d_entropy", "stats"])
def differentiate_kernel(
    logits,  # [R, V]
    gradient,  # [R, V], in the same memory
    bias,
    targets,  # [R] int64
    d_logp,  # [R] float32, or anything without D_LOGP
    d_entropy,  # [R] float32, or anything without D_ENTROPY
    stats,  # [R, 4] float32, or anything without KEPT
    stride,
    gradient_stride,
    vocab,
    inner,
    outer,
    slope,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    D_LOGP: tl.constexpr,
    D_ENTROPY: tl.constexpr,
    KEPT: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Overwrite one row by its gradient, given that at its log p and entropy."""
    row = tl.program_id(0).to(tl.int64)
    head = inner, outer
    a = logits + row * stride
    target = column_of(tl.load(targets + row), vocab)
    if KEPT:
        at = stats + row * 4
        found = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    else:
        found = read_row(a, bias, vocab, target, head, HAS_BIAS, CAPPED, D_ENTROPY, BLOCK)
    dl = tl.zeros((), tl.float32)
    dh = tl.zeros((), tl.float32)
    if D_LOGP:
        dl = tl.load(d_logp + row)
    if D_ENTROPY:
        dh = tl.load(d_entropy + row)
    tl.debug_barrier()  # the whole row has been read before any of it is overwritten
    out = gradient + row * gradient_stride
    write_row(
        a, out, bias, vocab, target, head, slope, found, dl, dh, HAS_BIAS, CAPPED, NARROW, BLOCK
    )  # fmt: skip


@triton.jit(do_not_specialize=["targets", "advantages", "old", "ref", "share", "logp", "entropy"])
def policy_kernel(
    logits,  # [R, V]
    gradient,  # [R, V], in the same memory
    bias,
    targets,  # [R] int64
    advantages,  # [R] float32
    old,  # [R] float32, or anything without HAS_OLD
    ref,  # [R] float32, or anything without HAS_REF
    share,  # [R] float32
    logp,  # [R] float32
    entropy,  # [R] float32
    stride,
    gradient_stride,
    vocab,
    inner,
    outer,
    slope,
    low,  # 1 - clip_low
    high,  # 1 + clip_high
    delta,
    beta,
    entropy_coef,
    HAS_BIAS: tl.constexpr,
    CAPPED: tl.constexpr,
    HAS_OLD: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Log p, entropy and the policy loss's gradient of one row (`ActionLoss.terms`)."""
    row = tl.program_id(0).to(tl.int64)
    head = inner, outer
    a = logits + row * stride
    target = column_of(tl.load(targets + row), vocab)
    found = read_row(a, bias, vocab, target, head, HAS_BIAS, CAPPED, True, BLOCK)
    log_p, h = log_prob(found)
    tl.store(logp + row, log_p)
    tl.store(entropy + row, h)

    advantage = tl.load(advantages + row)
    rho = tl.full((), 1.0, tl.float32)
    if HAS_OLD:
        rho = tl.exp((log_p - tl.load(old + row)).to(tl.float64)).to(tl.float32)
    # min() passes the gradient to the smaller side, each side where its own clamp is open.
    bounded = tl.where(rho < low, low, tl.where(rho > high, high, rho)) * advantage
    unclipped = rho * advantage
    open_unclipped = rho == rho
    if HAS_DELTA:
        unclipped = tl.where(rho > delta, delta, rho) * advantage
        open_unclipped = rho <= delta
    open_bounded = (rho >= low) & (rho <= high)
    is_open = ((unclipped <= bounded) & open_unclipped) | ((unclipped > bounded) & open_bounded)
    weight = tl.load(share + row)
    d_logp = tl.where(is_open, -advantage * rho, 0.0)
    if HAS_REF:
        apart = (tl.load(ref + row) - log_p).to(tl.float64)
        d_logp -= (beta * (tl.exp(apart) - 1.0)).to(tl.float32)
    tl.debug_barrier()  # the whole row has been read before any of it is overwritten
    write_row(
        a, gradient + row * gradient_stride, bias, vocab, target, head, slope, found,
        d_logp * weight, -entropy_coef * weight, HAS_BIAS, CAPPED, NARROW, BLOCK,
    )  # fmt: skip


class TritonRows:
    """`RowKernels` in Triton; the configuration is that of the table unless given."""

    def __init__(self, config: RowConfig | None = None) -> None:
        self._config = config

    def read(
        self,
        logits: Tensor,
        head: RowHead,
        targets: Tensor,
        logp: Tensor,
        entropy: Tensor | None,
        stats: Tensor | None,
    ) -> None:
        """Fill logp, entropy and stats; see `RowKernels.read`."""
        if len(logits) == 0:
            return
        with on_device(logits):
            read_kernel[(len(logits),)](
                logits,
                logits if head.bias is None else head.bias,
                targets,
                logp,
                logp if entropy is None else entropy,
                logp if stats is None else stats,
                logits.stride(0),
                logits.shape[1],
                head.inner,
                head.outer,
                ENTROPY=entropy is not None,
                KEEP=stats is not None,
                **self._constants(logits, head),
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
        """Overwrite the chunk by its gradient; see `RowKernels.differentiate`."""
        if len(logits) == 0:
            return
        with on_device(logits):
            differentiate_kernel[(len(logits),)](
                logits,
                gradient,
                logits if head.bias is None else head.bias,
                targets,
                targets if d_logp is None else d_logp,
                targets if d_entropy is None else d_entropy,
                targets if stats is None else stats,
                logits.stride(0),
                gradient.stride(0),
                logits.shape[1],
                head.inner,
                head.outer,
                head.slope,
                D_LOGP=d_logp is not None,
                D_ENTROPY=d_entropy is not None,
                KEPT=stats is not None,
                NARROW=gradient.dtype != logits.dtype,
                **self._constants(logits, head),
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
        """Read the chunk and overwrite it by the loss's gradient; see `RowKernels.policy`."""
        if len(logits) == 0:
            return
        old, ref = actions.old_logp, actions.ref_logp if loss.beta != 0 else None
        with on_device(logits):
            policy_kernel[(len(logits),)](
                logits,
                gradient,
                logits if head.bias is None else head.bias,
                actions.targets,
                actions.advantages,
                actions.share if old is None else old,
                actions.share if ref is None else ref,
                actions.share,
                logp,
                entropy,
                logits.stride(0),
                gradient.stride(0),
                logits.shape[1],
                head.inner,
                head.outer,
                head.slope,
                1 - loss.clip_low,
                1 + loss.clip_high,
                0.0 if loss.delta is None else loss.delta,
                loss.beta,
                loss.entropy_coef,
                HAS_OLD=old is not None,
                HAS_REF=ref is not None,
                HAS_DELTA=loss.delta is not None,
                NARROW=gradient.dtype != logits.dtype,
                **self._constants(logits, head),
            )

    def _constants(self, logits: Tensor, head: RowHead) -> dict[str, int | bool]:
        config = row_config(logits.shape[1]) if self._config is None else self._config
        return {"HAS_BIAS": head.bias is not None, "CAPPED": head.outer != 0, **config.constants()}
