"""The discriminator: spans scored from its head, and the loss that tells experts from the policy.

N actions, S spans, F hidden size of the discriminator. Per span everything is float64, as in the
definitions, but for the head's dot products (float32 sums) and the results.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from airl_fast.kernels.launch import on_device, options

_SPANS = 1024  # spans of a program
_SUMS = 16  # kinds of sums that a program of `sums_kernel` leaves
_WIDTH = 1024  # numbers of a hidden state, or of a span's log pi, that are read at a time


@triton.jit
def dot(x, w, width, WIDTH: tl.constexpr):
    """Dot product of two vectors, summed in float32 per lane and then over the lanes."""
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, width, WIDTH):
        lane = start + tl.arange(0, WIDTH)
        a = tl.load(x + lane, mask=lane < width, other=0.0).to(tl.float32)
        b = tl.load(w + lane, mask=lane < width, other=0.0).to(tl.float32)
        total += a * b
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["logp", "cu", "edges", "bias", "reward", "f", "total"])
def span_kernel(
    hidden,  # [N, F] of the discriminator
    weight,  # [1 or 2, F]
    bias,  # [1 or 2] float32
    logp,  # [N] float32
    cu,  # [S + 1] int32
    edges,  # [S] int32: 1 first of its sequence, 2 last, 3 both; anything without SHAPED
    reward,  # [S] float32
    f,  # [S] float32
    total,  # N
    width,
    hidden_stride,
    weight_stride,
    gamma,
    SHAPED: tl.constexpr,
    MEAN: tl.constexpr,
    AIRL: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """F and reward of one span, read at its last action; NaN where the offsets leave it none."""
    span = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(cu + span).to(tl.int64), tl.load(cu + span + 1).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), total)
    stop = tl.minimum(tl.maximum(stop, first), total)
    width = tl.where(stop > first, width, 0)  # of an empty span nothing is read
    last = hidden + (stop - 1) * hidden_stride
    energy = dot(last, weight, width, WIDTH) + tl.load(bias)
    energy = tl.where(stop > first, energy, float("nan"))
    if SHAPED:
        edge = tl.load(edges + span)
        h_bias = tl.load(bias + 1)
        potential = weight + weight_stride
        if edge < 2:  # not the last of its sequence
            energy += gamma * (dot(last, potential, width, WIDTH) + h_bias)
        if (edge % 2 == 0) & (first > 0):  # the span before ends where this one begins
            before = hidden + (first - 1) * hidden_stride
            energy -= dot(before, potential, width, WIDTH) + h_bias
    tl.store(f + span, energy)
    if AIRL:
        sums = tl.zeros((WIDTH,), tl.float64)
        for start in range(first, stop, WIDTH):
            place = start + tl.arange(0, WIDTH)
            sums += tl.load(logp + place, mask=place < stop, other=0.0).to(tl.float64)
        log_pi = tl.sum(sums, 0)
        if MEAN:
            log_pi = log_pi / (stop - first).to(tl.float64)
        energy -= log_pi.to(tl.float32)
    tl.store(reward + span, energy)


@triton.jit
def logit_expert_is_high(f, logp, at, inside, temperature, AIRL: tl.constexpr):
    """F and the logit of D at some spans, float64."""
    energy = tl.load(f + at, mask=inside, other=0.0).to(tl.float64)
    logit = energy
    if AIRL:
        logit = logit - tl.load(logp + at, mask=inside, other=0.0).to(tl.float64)
    return energy, logit / temperature


@triton.jit
def softplus(x):
    """``log(1 + exp x)``, which cannot overflow."""
    return tl.where(x > 0, x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit(do_not_specialize=["f", "logp", "expert", "weight", "numbers", "partial", "spans"])
def sums_kernel(
    f,  # [S]
    logp,  # [S]
    expert,  # [S] int8
    weight,  # [S], or anything without WEIGHTED
    numbers,  # [2] float64: label smoothing, temperature
    partial,  # [16, programs] float64
    spans,
    AIRL: tl.constexpr,
    WGAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Leave the sums over SPANS spans that loss and statistics are made of.

    Each over the policy's and then over the expert's: weighted losses, weights, spans, right votes,
    D, the entropy of the coin that D is, f, logits.
    """
    at = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)
    inside = at < spans
    energy, logit = logit_expert_is_high(f, logp, at, inside, tl.load(numbers + 1), AIRL)
    y = tl.load(expert + at, mask=inside, other=0).to(tl.float64)
    w = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if WEIGHTED:
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float64)
    loss = logit
    if not WGAN:
        smoothing = tl.load(numbers)
        target = y * (1.0 - smoothing) + smoothing * 0.5
        loss = target * softplus(-logit) + (1.0 - target) * softplus(logit)
    d = 1.0 / (1.0 + tl.exp(-logit))
    coin = softplus(logit) - logit * d
    right = tl.where((logit > 0) == (y > 0), 1.0, 0.0)
    one = tl.where(inside, 1.0, 0.0).to(tl.float64)
    columns = tl.num_programs(0)
    out = partial + tl.program_id(0)
    for i in tl.static_range(2):
        mine = one * (y if i == 1 else 1.0 - y)
        values = w * loss, w, one, right, d, coin, energy, logit
        for j in tl.static_range(8):
            kept = tl.where(mine > 0, values[j], 0.0)
            tl.store(out + (2 * j + i) * columns, tl.sum(kept, 0))


@triton.jit(do_not_specialize=["grad", "f", "logp", "expert", "weight", "numbers", "totals", "out"])
def gradient_kernel(
    grad,  # [1]
    f,  # [S]
    logp,  # [S]
    expert,  # [S] int8
    weight,  # [S], or anything without WEIGHTED
    numbers,  # [2] float64: label smoothing, temperature
    totals,  # [2] float64: the weights' sums over policy and expert spans
    out,  # [S] float64
    spans,
    AIRL: tl.constexpr,
    WGAN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SPANS: tl.constexpr,
):
    """Gradient at f: ``w / sum w (D - target) / temperature``; "wgan": the weights, signed."""
    at = tl.program_id(0).to(tl.int64) * SPANS + tl.arange(0, SPANS)
    inside = at < spans
    y = tl.load(expert + at, mask=inside, other=0).to(tl.float64)
    w = tl.zeros((SPANS,), tl.float64) + 1.0
    if WEIGHTED:
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float64)
    policy_total, expert_total = tl.load(totals), tl.load(totals + 1)
    if WGAN:
        total = tl.where(y > 0, expert_total, policy_total)
        slope = 1.0 - 2.0 * y
    else:
        total = policy_total + expert_total
        temperature = tl.load(numbers + 1)
        smoothing = tl.load(numbers)
        _, logit = logit_expert_is_high(f, logp, at, inside, temperature, AIRL)
        target = y * (1.0 - smoothing) + smoothing * 0.5
        slope = (1.0 / (1.0 + tl.exp(-logit)) - target) / temperature
    scale = tl.load(grad).to(tl.float64)
    tl.store(out + at, scale * w / tl.where(total > 0, total, 1.0) * slope, mask=inside)


def _options(form: str, weight: Tensor | None) -> dict[str, bool | int]:
    return {
        "AIRL": form == "airl",
        "WGAN": form == "wgan",
        "WEIGHTED": weight is not None,
        "SPANS": _SPANS,
        **options(warps=4),
    }


def _inputs(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    temperature: float,
) -> tuple[Tensor, ...]:
    # Filled on the GPU: a tensor made of Python's numbers would be copied there, and waited for.
    numbers = torch.full((2,), label_smoothing, dtype=torch.float64, device=f.device)
    numbers[1:].fill_(temperature)
    w = f if weight is None else weight.contiguous()
    return f.contiguous(), logp.contiguous(), is_expert.to(torch.int8).contiguous(), w, numbers


def loss(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Loss ``[]`` and DiscriminatorStats as a vector ``[10]``, float32.

    Spans ``[S]``: f, logp and weight (or None) of any floating dtype, is_expert bool. One kernel
    sums over blocks of spans; the few numbers it leaves are put together by torch, in fixed order.
    """
    blocks = triton.cdiv(len(f), _SPANS)
    partial = torch.empty(_SUMS, blocks, dtype=torch.float64, device=f.device)
    if blocks:
        inputs = _inputs(f, logp, is_expert, weight, label_smoothing, temperature)
        with on_device(f):
            sums_kernel[(blocks,)](*inputs, partial, len(f), **_options(form, weight))
    by_class = partial.sum(1).view(8, 2)
    total = by_class.sum(1)
    sums, weights, count = by_class[0], by_class[1], by_class[2]
    if form == "wgan":
        means = sums / torch.where(weights > 0, weights, 1.0)
        result = means[0] - means[1]
    else:
        result = total[0] / torch.where(total[1] > 0, total[1], 1.0)
    right, d, f_mean, logits = (by_class[i].flip(0) / count.flip(0) for i in (3, 4, 6, 7))
    everything = torch.stack([total[3], total[5]]) / total[2]
    stats = [everything[:1], right, d, everything[1:], f_mean, logits]
    return result.float(), torch.cat(stats).float()


def gradient(
    grad: Tensor,
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> Tensor:
    """Gradient of the loss at f, ``[S]`` float64, times ``grad []``; spans as in `loss`."""
    out = torch.empty(f.shape, dtype=torch.float64, device=f.device)
    if len(f) == 0:
        return out
    w = torch.ones_like(f, dtype=torch.float64) if weight is None else weight.double()
    totals = torch.stack([(w * ~is_expert).sum(), (w * is_expert).sum()])
    inputs = _inputs(f, logp, is_expert, weight, label_smoothing, temperature)
    with on_device(f):
        gradient_kernel[(triton.cdiv(len(f), _SPANS),)](
            grad.reshape(1), *inputs, totals, out, len(f), **_options(form, weight)
        )
    return out


def span_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logp: Tensor,
    cu_spans: Tensor,
    mean: bool,
    form: str,
    shaping_gamma: float | None,
    cu_seq_spans: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Reward and f ``[S]`` float32 of the score head; arguments as in `airl_score`.

    hidden ``[N, F]`` and weight ``[1 | 2, F]`` are the discriminator's, of any floating dtypes;
    bias ``[1 | 2]`` or None; logp ``[N]`` float32.
    """
    spans = len(cu_spans) - 1
    f = torch.empty(spans, dtype=torch.float32, device=hidden.device)
    reward = torch.empty_like(f)
    if spans == 0:
        return reward, f
    edges = cu_spans
    if cu_seq_spans is not None:
        edges = torch.zeros(spans, dtype=torch.int32, device=hidden.device)
        edges[cu_seq_spans[:-1].long()] = 1
        edges[cu_seq_spans[1:].long() - 1] += 2
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    bias = f.new_zeros(len(weight)) if bias is None else bias.float().contiguous()
    with on_device(hidden):
        span_kernel[(spans,)](
            hidden,
            weight,
            bias,
            logp.contiguous(),
            cu_spans.contiguous(),
            edges,
            reward,
            f,
            len(hidden),
            hidden.shape[1],
            hidden.stride(0),
            weight.stride(0),
            0.0 if shaping_gamma is None else shaping_gamma,
            SHAPED=cu_seq_spans is not None,
            MEAN=mean,
            AIRL=form == "airl",
            WIDTH=_WIDTH,
            **options(warps=4),
        )
    return reward, f
