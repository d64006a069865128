"""Reward of every span and log pi of every action, without gradients: the path that scores traces.

N actions, S spans, B sequences, V vocabulary, D and F hidden sizes of policy and discriminator.
The AIRL reward is log D - log(1 - D) = f - log pi (Fu et al. 2018, arXiv 1710.11248).
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from airl_fast.ops import _cpu_head, _cuda_extension, _cuda_spans, _triton
from airl_fast.ops._arguments import require_tensors
from airl_fast.ops._deferred import refuse_where
from airl_fast.ops._head import LinearHead, check_head, no_autocast, present
from airl_fast.ops.dispatch import implements, pick
from airl_fast.ops.linear_logprob import linear_logprob
from airl_fast.ops.segments import (
    check_finite,
    check_offset_tensor,
    check_offsets,
    check_option,
    segment_mean,
    segment_sum,
)

_OP = "airl_score"


class AIRLScore(NamedTuple):
    """What ``airl_score`` returns: float32, without gradients."""

    reward: Tensor  # [S]
    f: Tensor  # [S] the discriminator's energy, free of the policy
    logp: Tensor  # [N] log pi of each action, in nats
    entropy: Tensor  # [N] of the policy at each action, in nats


class SpanHead(NamedTuple):
    """The discriminator: what gives f of a span, and how a reward is made of it."""

    hidden: Tensor  # [N, F]
    weight: Tensor  # [1 | 2 | V, F]
    bias: Tensor | None  # [1 | 2], one number for "lm"
    scale: Tensor  # [1], for "lm"
    kind: str  # "score" or "lm"
    cu_spans: Tensor  # [S + 1]
    mean: bool  # over a span, where it is not the sum
    form: str  # "airl" or "logit"
    shaping_gamma: float | None  # with two rows
    cu_seq_spans: Tensor | None  # [B + 1], with two rows


_Scores = tuple[Tensor, Tensor, Tensor, Tensor]  # reward [S], f [S], logp [N], entropy [N]


def airl_score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    disc_hidden: Tensor,
    disc_weight: Tensor,
    cu_spans: Tensor,
    *,
    bias: Tensor | None = None,
    disc_bias: Tensor | float | None = None,
    disc_head: Literal["score", "lm"] = "score",
    disc_scale: Tensor | float = 1.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    span_logp: Literal["sum", "mean"] = "sum",
    form: Literal["airl", "logit"] = "airl",
    shaping_gamma: float | None = None,
    cu_seq_spans: Tensor | None = None,
) -> AIRLScore:
    """Score spans by a discriminator: ``reward = f - log pi`` ("airl") or ``f`` ("logit").

    ``disc_head="score"``: f is read at the span's last action, ``f = disc_weight . x + disc_bias``.
    With two rows these are g and the potential h, and
    ``f = g + shaping_gamma * h(after) - h(before)``: h after a span is read at its last action, h
    before it at the previous span's last action; h (its bias included) is 0 before a sequence's
    first span and after its last.

    ``disc_head="lm"``: ``f = disc_scale * log q + disc_bias`` per action, then reduced over the
    span as log pi is. q is the discriminator's own head under the policy's ``bias``, ``softcap``
    and ``logit_scale``, since it starts as a copy of the policy, but always at temperature 1: f
    does not depend on how the policy is sampled. At ``temperature=1`` a q that equals pi, at scale
    1 and bias 0, has a reward of exactly 0.

    No gradient reaches any input. Extra memory is that of ``linear_logprob``.

    Args:
        hidden: [N, D] the policy's hidden states at the states (the tokens before the actions).
        weight: [V, D] the policy's head.
        targets: [N] int64, the actions' token ids, all in [0, V).
        disc_hidden: [N, F] the discriminator's hidden states, read at the actions themselves for
            "score" and at the states, as the policy's, for "lm".
        disc_weight: [1, F] (f) or [2, F] (g and h) for "score"; [V, F] for "lm".
        cu_spans: [S + 1] int32 offsets of the spans into N.
        bias: [V] of the head, or None.
        disc_bias: "score": one per row of ``disc_weight``; "lm": one in all. None means 0.
        disc_head: "score" or "lm".
        disc_scale: one number; only for "lm".
        temperature: of pi; divides its logits, above 0.
        softcap: bounds the logits, before the temperature; None for none.
        logit_scale: multiplies the logits before soft-capping.
        span_logp: log pi (and log q) of a span is the sum or the mean of its actions'.
        form: "airl" or "logit".
        shaping_gamma: discount in [0, 1], given exactly when "score" has two rows.
        cu_seq_spans: [B + 1] int32 offsets of the sequences into S, needed with
            ``shaping_gamma`` and not read without it.

    Raises:
        ValueError: wrong shapes, dtypes, devices or options, offsets that are no partition, an
            empty span, a target outside [0, V), or a result that is not finite.
    """
    check_option(_OP, "disc_head", disc_head, ("score", "lm"))
    check_option(_OP, "span_logp", span_logp, ("sum", "mean"))
    check_option(_OP, "form", form, ("airl", "logit"))
    check_head(hidden, LinearHead(weight, bias, temperature, softcap, logit_scale), targets)
    check_offset_tensor(_OP, "cu_spans", cu_spans, hidden)
    require_tensors(_OP, disc_hidden=disc_hidden, disc_weight=disc_weight)
    _check_discriminator(weight, targets, disc_hidden, disc_weight, disc_head, disc_scale)
    _check_shaping(disc_weight, disc_head, shaping_gamma, cu_seq_spans, cu_spans)
    device = hidden.device
    with torch.no_grad():
        return AIRLScore(
            *torch.ops.airl_fast.airl_score(
                hidden,
                weight,
                targets,
                disc_hidden,
                disc_weight,
                cu_spans,
                bias,
                _as_row("disc_bias", disc_bias, disc_weight.shape[0], disc_head, device),
                _as_row("disc_scale", disc_scale, 1, "lm", device),
                disc_head,
                temperature,
                softcap,
                logit_scale,
                span_logp,
                form,
                shaping_gamma,
                cu_seq_spans if shaping_gamma is not None else None,
            )
        )


def _check_discriminator(
    weight: Tensor,
    targets: Tensor,
    disc_hidden: Tensor,
    disc_weight: Tensor,
    disc_head: str,
    disc_scale: Tensor | float,
) -> None:
    rows = (weight.shape[0],) if disc_head == "lm" else (1, 2)
    if disc_weight.ndim != 2 or disc_weight.shape[0] not in rows:
        raise ValueError(
            f"{_OP}: disc_head={disc_head!r} expects disc_weight of {' or '.join(map(str, rows))} "
            f"rows, received shape {tuple(disc_weight.shape)}; one row is f, two are g and h, and "
            "disc_head='lm' takes a row per token of the policy's vocabulary"
        )
    if disc_hidden.shape != (targets.shape[0], disc_weight.shape[1]):
        raise ValueError(
            f"{_OP}: expected disc_hidden of shape {(targets.shape[0], disc_weight.shape[1])}, one "
            f"row per action and as wide as disc_weight, received {tuple(disc_hidden.shape)}"
        )
    for name, x in {"disc_hidden": disc_hidden, "disc_weight": disc_weight}.items():
        if not x.is_floating_point() or x.device != weight.device:
            raise ValueError(
                f"{_OP}: expected {name} to be floating point on {weight.device}, received "
                f"{x.dtype} on {x.device}"
            )
    if disc_head == "score" and (isinstance(disc_scale, Tensor) or disc_scale != 1.0):
        raise ValueError(
            f"{_OP}: disc_scale goes with disc_head='lm', received {disc_scale} with 'score'; "
            "leave it out (the score head's weight has its own scale)"
        )


def _check_shaping(
    disc_weight: Tensor,
    disc_head: str,
    shaping_gamma: float | None,
    cu_seq_spans: Tensor | None,
    cu_spans: Tensor,
) -> None:
    shaped = disc_head == "score" and disc_weight.shape[0] == 2
    if shaped != (shaping_gamma is not None):
        raise ValueError(
            f"{_OP}: shaping_gamma goes with a score head of two rows (g and h) and only with one, "
            f"received {shaping_gamma} for disc_head={disc_head!r} with {disc_weight.shape[0]} rows"
        )
    if not shaped:
        return
    if cu_seq_spans is None:
        raise ValueError(
            f"{_OP}: shaping needs cu_seq_spans, the offsets [B + 1] of the sequences into the "
            "spans, to know where h is 0; received None"
        )
    check_offset_tensor(_OP, "cu_seq_spans", cu_seq_spans, cu_spans)
    if shaping_gamma is not None and not 0.0 <= shaping_gamma <= 1.0:
        raise ValueError(f"{_OP}: expected shaping_gamma in [0, 1], received {shaping_gamma}")


def _as_row(
    name: str, value: Tensor | float | None, rows: int, disc_head: str, device: torch.device
) -> Tensor | None:
    """Turn numbers of any form into a vector [rows] (one for "lm"); None stays."""
    if value is None:
        return None
    rows = 1 if disc_head == "lm" else rows
    if not isinstance(value, Tensor):
        value = torch.full((1,), float(value), device=device)
    if value.numel() != rows or value.device != device:
        raise ValueError(
            f"{_OP}: expected {name} to hold {rows} number(s) on {device}, received shape "
            f"{tuple(value.shape)} on {value.device}"
        )
    return value.reshape(rows)


@torch.library.custom_op("airl_fast::airl_score", mutates_args=())
def _score(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    disc_hidden: Tensor,
    disc_weight: Tensor,
    cu_spans: Tensor,
    bias: Tensor | None,
    disc_bias: Tensor | None,
    disc_scale: Tensor,
    disc_head: str,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    span_logp: str,
    form: str,
    shaping_gamma: float | None,
    cu_seq_spans: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return reward [S], f [S], logp [N] and entropy [N]."""
    cu_spans = check_offsets(_OP, "cu_spans", cu_spans, hidden.shape[0])
    if cu_seq_spans is not None:
        cu_seq_spans = check_offsets(_OP, "cu_seq_spans", cu_seq_spans, cu_spans.shape[0] - 1)
    refuse_where(
        targets < 0,
        targets,
        lambda row, target: (
            f"{_OP}: expected a token id for every action, received {target} as targets[{row}]; "
            "only actions are scored, so leave ignored rows out"
        ),
    )
    serving = pick("airl_score", *present(hidden, weight, disc_hidden, disc_weight, bias))
    head = LinearHead(weight, bias, temperature, softcap, logit_scale)
    disc = SpanHead(
        hidden=disc_hidden,
        weight=disc_weight,
        bias=disc_bias,
        scale=disc_scale,
        kind=disc_head,
        cu_spans=cu_spans,
        mean=span_logp == "mean",
        form=form,
        shaping_gamma=shaping_gamma,
        cu_seq_spans=cu_seq_spans,
    )
    with no_autocast(hidden.device):
        reward, f, logp, entropy = serving(hidden, head, targets, disc)
    check_finite(_OP, "f (from disc_hidden and disc_weight)", f)
    return reward, f, logp, entropy


@_score.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    disc_hidden: Tensor,
    disc_weight: Tensor,
    cu_spans: Tensor,
    *options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    actions, spans = hidden.shape[0], cu_spans.shape[0] - 1
    per_span = [hidden.new_empty(spans, dtype=torch.float32) for _ in range(2)]
    per_action = [hidden.new_empty(actions, dtype=torch.float32) for _ in range(2)]
    return per_span[0], per_span[1], per_action[0], per_action[1]


@implements("airl_score", "cpu", _cpu_head.serves)
@implements("airl_score", "reference")
def _score_composed(hidden: Tensor, head: LinearHead, targets: Tensor, disc: SpanHead) -> _Scores:
    """Compose the other operators; each takes the best backend, or the one that is forced."""
    reduce = segment_mean if disc.mean else segment_sum
    logp, entropy = _policy(hidden, head, targets)
    if disc.kind == "lm":
        q = head._replace(weight=disc.weight, temperature=1.0)
        per_action = disc.scale.float() * linear_logprob(
            disc.hidden, targets=targets, **q._asdict()
        )
        if disc.bias is not None:
            per_action = per_action + disc.bias.float()
        f = reduce(per_action, disc.cu_spans)
    else:
        at_last_action = disc.hidden[disc.cu_spans[1:].long() - 1].float()
        rows = at_last_action @ disc.weight.float().T  # [S, 1 | 2]
        rows = rows if disc.bias is None else rows + disc.bias.float()
        f = rows[:, 0].clone()
        if disc.shaping_gamma is not None and disc.cu_seq_spans is not None:
            f += _shaping(rows[:, 1], disc.cu_seq_spans.long(), disc.shaping_gamma)
    reward = f - reduce(logp, disc.cu_spans) if disc.form == "airl" else f.clone()
    return reward, f, logp, entropy


def _fused(span_scores: Callable[..., tuple[Tensor, Tensor]]) -> Any:
    """The implementation of a backend with one kernel for f and reward of a score head."""

    def implementation(
        hidden: Tensor, head: LinearHead, targets: Tensor, disc: SpanHead
    ) -> _Scores:
        if disc.kind == "lm":
            return _score_composed(hidden, head, targets, disc)
        logp, entropy = _policy(hidden, head, targets)
        reward, f = span_scores(
            *(disc.hidden, disc.weight, disc.bias, logp, disc.cu_spans),
            *(disc.mean, disc.form, disc.shaping_gamma, disc.cu_seq_spans),
        )
        return reward, f, logp, entropy

    return implementation


implements("airl_score", "triton", _triton.serves_head)(_fused(_triton.span_scores))
implements("airl_score", "cuda", _cuda_extension.serves_head)(_fused(_cuda_spans.span_scores))


def _policy(hidden: Tensor, head: LinearHead, targets: Tensor) -> tuple[Tensor, Tensor]:
    return linear_logprob(hidden, targets=targets, **head._asdict(), return_entropy=True)


def _shaping(h: Tensor, cu_seq_spans: Tensor, gamma: float) -> Tensor:
    """Compute ``gamma h(after) - h(before)`` per span, from h [S] at every span's last action."""
    after = h.clone()
    after[cu_seq_spans[1:] - 1] = 0.0
    before = h.roll(1)
    before[cu_seq_spans[:-1]] = 0.0
    return gamma * after - before
