"""The one float64 oracle: every operator's formula, written to be read rather than to be fast.

Each function has the argument names and the meaning of the public operator it stands for. Floating
inputs of any dtype are converted to float64, differentiably, so that gradients come from autograd;
every output is float64. Nothing here depends on any implementation. Shapes: N actions, S spans,
B sequences, V vocabulary, D and F hidden sizes; ``cu`` arrays are offsets, ``[n + 1]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

GROUP_EPS = 1e-6


def _f64(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x).double()


def _segments(cu: Tensor) -> Iterator[slice]:
    """The slices of rows that the offsets delimit, in order."""
    offsets = cu.tolist()
    return (slice(start, stop) for start, stop in pairwise(offsets))


def _stack(values: list[Tensor], x: Tensor) -> Tensor:
    return torch.stack(values) if values else _f64(x[:0])


def _mean(x: Tensor) -> float:
    """Mean of a statistic; NaN where there is nothing to average."""
    return x.double().mean().item()


# The linear head


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Logits ``[N, V]``: scaled, then soft-capped, then divided by the temperature."""
    z = _f64(hidden) @ _f64(weight).T
    z = logit_scale * (z if bias is None else z + _f64(bias))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, **head: Any
) -> tuple[Tensor, Tensor]:
    """``(logp [N], entropy [N])``; both 0, with no gradient, where the target is ignored."""
    (rows,) = torch.where(targets != ignore_index)
    log_probs = head_logits(hidden[rows], weight, **head).log_softmax(-1)
    taken = log_probs.gather(-1, targets[rows].long()[:, None]).squeeze(-1)
    zero = torch.zeros(len(targets), dtype=torch.float64, device=hidden.device)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return zero.index_put((rows,), taken), zero.index_put((rows,), entropy)


# Policy loss


def policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    cu_seqs: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    importance: str = "token",
    aggregation: str = "token",
    normaliser: float | None = None,
    ignore_index: int = -100,
    **head: Any,
) -> tuple[Tensor, dict[str, float]]:
    """The clipped policy-gradient loss ``[]`` and its statistics; ``head`` as in `head_logits`.

    Without ``old_logp`` the ratio is ``exp(logp - logp.detach())``: 1, with the gradient of logp.
    ``importance="sequence"`` replaces log rho by its mean over the sequence's actions, and the
    gradient flows through that mean. Advantages, ``old_logp`` and ``ref_logp`` are constants.

    Ignored actions contribute nothing and are counted nowhere: not in the token mean, not in a
    sequence's mean, not in the statistics. A sequence with no action left does not count as a
    sequence. With every action ignored the loss is 0. ``normaliser`` goes with
    ``aggregation="constant"`` and only with it; ``beta`` needs ``ref_logp``.

    Statistics, all means over actions: ``clip_fraction`` (where clipping lowered the objective,
    ``clip(rho) A < rho A``), ``ratio``, ``kl`` (0 without ``ref_logp``; before beta), ``entropy``;
    NaN when there is no action to average.
    """
    if (normaliser is None) == (aggregation == "constant"):
        raise ValueError('normaliser goes with aggregation="constant", and only with it')
    if beta != 0 and ref_logp is None:
        raise ValueError("beta needs ref_logp")
    logp, entropy = linear_logprob(hidden, weight, targets, ignore_index=ignore_index, **head)
    old = logp.detach() if old_logp is None else _f64(old_logp).detach()
    ref = None if ref_logp is None else _f64(ref_logp).detach()
    advantages = _f64(advantages).detach()

    losses, clipped, ratios, kls, entropies = [], [], [], [], []  # one tensor per counted sequence
    for rows in _segments(cu_seqs):
        valid = targets[rows] != ignore_index
        if not valid.any():
            continue
        lp, h, a = logp[rows][valid], entropy[rows][valid], advantages[rows][valid]
        log_rho = lp - old[rows][valid]
        means = log_rho.mean().expand_as(log_rho)
        rho = {"token": log_rho, "sequence": means}[importance].exp()
        unclipped = rho if delta is None else rho.clamp(max=delta)
        bounded = rho.clamp(1 - clip_low, 1 + clip_high)
        gap = torch.zeros_like(lp) if ref is None else ref[rows][valid] - lp
        kl = gap.exp() - gap - 1
        losses.append(-torch.minimum(unclipped * a, bounded * a) + beta * kl - entropy_coef * h)
        clipped.append(bounded * a < rho * a)
        ratios.append(rho)
        kls.append(kl)
        entropies.append(h)

    stats = {"clip_fraction": clipped, "ratio": ratios, "kl": kls, "entropy": entropies}
    if not losses:
        # Still attached to the inputs, so that backward() gives zeros rather than an error.
        return logp.sum(), dict.fromkeys(stats, float("nan"))
    flat = torch.cat(losses)
    loss = {
        "token": flat.mean(),
        "sequence": torch.stack([per_action.mean() for per_action in losses]).mean(),
        "constant": flat.sum() / (1.0 if normaliser is None else normaliser),
    }[aggregation]
    return loss, {name: _mean(torch.cat(values)) for name, values in stats.items()}


# Discriminator


def discriminator(f: Tensor, logp: Tensor) -> Tensor:
    """``D = exp f / (exp f + pi) = sigmoid(f - log pi)``: the probability of an expert span."""
    return torch.sigmoid(_f64(f) - _f64(logp))


def discriminator_loss(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    *,
    form: str = "airl",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, dict[str, float]]:
    """The loss ``[]`` over S spans, and its statistics.

    Means are weighted, ``sum(w x) / sum(w)``, and 0 where the weights sum to 0 (no spans at all
    included). ``form="wgan"`` is the policy spans' mean f minus the expert spans'; a class that
    is absent counts as 0 there, logp is not used, and label smoothing and temperature are errors.
    Gradients reach f and, with ``form="airl"``, logp; ``weight`` is a constant.

    Statistics, unweighted: ``accuracy`` (a positive logit is a vote for the expert, a logit of
    exactly 0 for the policy), ``d_expert`` and ``d_policy`` (mean sigmoid of the logit over each
    class); NaN for a mean over nothing.
    """
    f, y = _f64(f), _f64(is_expert)
    w = torch.ones_like(f) if weight is None else _f64(weight).detach()

    def mean(x: Tensor, w: Tensor) -> Tensor:
        total = w.sum()
        return (w * x).sum() / (total if total > 0 else 1.0)

    if form == "wgan":
        if label_smoothing != 0 or temperature != 1:
            raise ValueError('label_smoothing and temperature have no meaning with form="wgan"')
        logit = f
        loss = mean(f, w * (1 - y)) - mean(f, w * y)
    else:
        logit = {"airl": f - _f64(logp), "logit": f}[form] / temperature
        target = y * (1 - label_smoothing) + label_smoothing / 2
        loss = mean(-target * logsigmoid(logit) - (1 - target) * logsigmoid(-logit), w)
    d = torch.sigmoid(logit)
    return loss, {
        "accuracy": _mean((logit > 0) == is_expert.bool()),
        "d_expert": _mean(d[is_expert.bool()]),
        "d_policy": _mean(d[~is_expert.bool()]),
    }


class AIRLScore(NamedTuple):
    """Per span ``reward`` and ``f`` ``[S]``; per action ``logp`` and ``entropy`` ``[N]``."""

    reward: Tensor
    f: Tensor
    logp: Tensor
    entropy: Tensor


def airl_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    disc_hidden: Tensor,
    disc_weight: Tensor,
    cu_spans: Tensor,
    *,
    disc_bias: Tensor | float | None = None,
    disc_head: str = "score",
    disc_scale: Tensor | float = 1.0,
    span_logp: str = "sum",
    form: str = "airl",
    shaping_gamma: float | None = None,
    cu_seq_spans: Tensor | None = None,
    **head: Any,
) -> AIRLScore:
    """Reward ``f - log pi`` (``form="airl"``) or ``f`` (``form="logit"``) of every span.

    ``disc_head="score"``: ``f = disc_hidden . disc_weight + disc_bias`` at the span's last action,
    with one bias per row (``disc_scale`` must be 1). Two rows, and only two, are g and h and need
    ``shaping_gamma`` and ``cu_seq_spans``:
    ``f = g + gamma h(after) - h(before)``, h being 0 (bias included) before a sequence's first
    span and after its last.
    ``disc_head="lm"``: ``disc_scale log q + disc_bias`` (two scalars) per action, reduced over the
    span as log pi is. The head options (vocabulary bias, softcap, logit_scale) hold for q as for
    pi, but the temperature is pi's alone: f does not depend on how the policy is sampled. At
    temperature 1 a q that is a copy of pi, at scale 1 and bias 0, gives a reward of exactly 0.
    """
    if (shaping_gamma is not None) != (disc_head == "score" and len(disc_weight) == 2):
        raise ValueError("shaping_gamma goes with two discriminator rows, and only with them")
    reduce = SPAN_REDUCTIONS[span_logp]
    logp, entropy = linear_logprob(hidden, weight, targets, **head)
    bias = _f64(0.0 if disc_bias is None else disc_bias)
    if disc_head == "lm":
        own = {**head, "temperature": 1.0}
        log_q, _ = linear_logprob(disc_hidden, disc_weight, targets, **own)
        f = reduce(_f64(disc_scale) * log_q + bias, cu_spans)
    elif disc_head == "score":
        if disc_scale != 1:
            raise ValueError('disc_scale goes with disc_head="lm"')
        rows = _f64(disc_hidden) @ _f64(disc_weight).T + bias
        f = segment_last(rows[:, 0], cu_spans)
        if shaping_gamma is not None:
            if cu_seq_spans is None:
                raise ValueError("shaping needs cu_seq_spans")
            f = f + _shaping(segment_last(rows[:, 1], cu_spans), cu_seq_spans, shaping_gamma)
    else:
        raise ValueError(f"disc_head must be score or lm, not {disc_head}")
    reward = {"airl": f - reduce(logp, cu_spans), "logit": f}[form]
    return AIRLScore(reward, f, logp, entropy)


def _shaping(h: Tensor, cu_seq_spans: Tensor, gamma: float) -> Tensor:
    """``gamma h(after) - h(before)`` per span, from h ``[S]`` at every span's last action."""
    pieces = [h.new_zeros(0)]
    for spans in _segments(cu_seq_spans):
        if spans.start == spans.stop:
            continue
        zero, inner = h.new_zeros(1), h[spans][:-1]
        pieces.append(gamma * torch.cat([inner, zero]) - torch.cat([zero, inner]))
    return torch.cat(pieces)


# Segments, returns, advantages


def segment_sum(x: Tensor, cu: Tensor) -> Tensor:
    """Sum over each segment; 0 for an empty one."""
    return _stack([_f64(x[rows]).sum() for rows in _segments(cu)], x)


def segment_mean(x: Tensor, cu: Tensor) -> Tensor:
    """Mean over each segment; an empty segment is an error."""
    _require_nonempty(cu)
    return _stack([_f64(x[rows]).mean() for rows in _segments(cu)], x)


def segment_last(x: Tensor, cu: Tensor) -> Tensor:
    """Last row of each segment; an empty segment is an error."""
    _require_nonempty(cu)
    return _stack([_f64(x[rows][-1]) for rows in _segments(cu)], x)


def segment_softmax(x: Tensor, cu: Tensor) -> Tensor:
    """Softmax within each segment, ``[N]``; an empty segment has no rows to fill."""
    return torch.cat([_f64(x[:0]), *(_f64(x[rows]).softmax(0) for rows in _segments(cu))])


def _require_nonempty(cu: Tensor) -> None:
    if (cu.diff() < 1).any():
        raise ValueError("every segment needs at least one row")


SPAN_REDUCTIONS = {"sum": segment_sum, "mean": segment_mean}


def span_logp(logp: Tensor, cu: Tensor, mode: str = "sum") -> Tensor:
    """log pi of every span ``[S]``: the sum or the mean of its actions'."""
    return SPAN_REDUCTIONS[mode](logp, cu)


def discounted_returns(rewards: Tensor, cu: Tensor, gamma: float) -> Tensor:
    """``R_i = r_i + gamma R_{i+1}`` within each sequence, ``[S]``."""
    r = _f64(rewards)
    returns: list[Tensor] = []
    for rows in _segments(cu):
        following, backwards = r.new_zeros(()), []
        for reward in reversed(r[rows].unbind()):
            following = reward + gamma * following
            backwards.append(following)
        returns += reversed(backwards)
    return _stack(returns, r)


def group_advantages(
    rewards: Tensor, group: Tensor, *, baseline: str = "mean", scale: str = "std"
) -> Tensor:
    """``A = (r - baseline) / (std + 1e-6)`` within each group of equal labels (any order).

    std is the population standard deviation (correction 0) of the group's rewards, whatever the
    baseline; ``scale="none"`` divides by nothing. The leave-one-out baseline of a reward is the
    mean of the group's others, so a group of one is an error there. With ``baseline="mean"`` a
    group of one gets 0; with ``"none"`` and ``"std"`` the result is ``r / (std + 1e-6)``.
    """
    r = _f64(rewards)
    advantages = torch.zeros_like(r)
    for label in group.unique():
        (rows,) = torch.where(group == label)
        x, n = r[rows], len(rows)
        if baseline == "leave_one_out" and n == 1:
            raise ValueError(f"group {label.item()} has one member: leave_one_out needs two")
        leave_one_out = (x.sum() - x) / max(n - 1, 1)
        base = {"mean": x.mean(), "leave_one_out": leave_one_out, "none": r.new_zeros(())}[baseline]
        divisor = {"std": x.std(correction=0) + GROUP_EPS, "none": r.new_ones(())}[scale]
        advantages = advantages.index_put((rows,), (x - base) / divisor)
    return advantages


# Attention


def attention(
    segments: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> Tensor:
    """Attention of a packed batch, ``[T, H, Ev]``, segment by segment, every score written out.

    Args:
        segments: ``[P, 5]``: the first of a segment's queries, how many, the first of the keys that
            all of them see, how many, and the first of its own keys.
        query: ``[T, H, E]``.
        key: ``[U, Hk, E]``.
        value: ``[U, Hk, Ev]``.
        scale: of the scores.
        window: a token sees itself and the ``window - 1`` before it.
    """
    outs, group = [], query.shape[1] // key.shape[1]
    for first, n, first_shared, shared, own in segments.tolist():
        seen = [*range(first_shared, first_shared + shared), *range(own, own + n)]
        keys, values = (_f64(x[seen]).repeat_interleave(group, 1) for x in (key, value))
        scores = scale * torch.einsum("ihe,jhe->hij", _f64(query[first : first + n]), keys)
        place = torch.arange(shared, shared + n, device=query.device)[:, None]
        at = torch.arange(shared + n, device=query.device)
        hidden = at > place
        if window is not None:
            hidden |= at <= place - window
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hij,jhe->ihe", weights, values))
    return torch.cat(outs)
