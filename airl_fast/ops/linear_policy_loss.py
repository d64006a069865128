"""The clipped policy-gradient loss over a linear head, and its gradients, in one sweep.

N rows (actions), K of them not ignored, B sequences, D hidden size, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from airl_fast.ops import _cpu_gradients, _cpu_head, _cuda_head, _triton
from airl_fast.ops._arguments import require_tensors
from airl_fast.ops._deferred import refuse_where
from airl_fast.ops._finite import NonFiniteValueError
from airl_fast.ops._head import (
    NON_FINITE_LOGITS,
    ChunkedHead,
    HeadGradients,
    LinearHead,
    check_finite,
    check_head,
    check_rows,
    check_targets,
    chunk_rows,
    compute_dtype,
    gradient_dtype,
    no_autocast,
    present,
)
from airl_fast.ops._policy_checks import (
    check_modes,
    check_options,
    check_sequences,
    sequence_offsets,
)
from airl_fast.ops._policy_terms import (
    IGNORE_INDEX,
    ActionLoss,
    Constants,
    gather_actions,
    op_outputs,
    pieces,
)
from airl_fast.ops._scaling import scaled
from airl_fast.ops.dispatch import implements, pick, register_autograd


class PolicyLossStats(NamedTuple):
    """What the sweep saw, detached, float32. Means are over the K actions; NaN when there is none.

    Attributes:
        ratio_mean: mean importance ratio rho ``[]`` (the sequence's with importance="sequence").
        clip_fraction: share of actions where clipping to ``[1 - clip_low, 1 + clip_high]`` lowered
            the objective, ``[]``.
        kl_old: mean of ``rho - 1 - log rho`` per token ``[]``, an estimate of KL(old || policy)
            that is never negative; 0 without ``old_logp``.
        kl_ref: mean of ``exp(ref - logp) - (ref - logp) - 1`` ``[]``, an estimate of
            KL(policy || ref) that is never negative; before ``beta``; 0 without ``ref_logp``.
        entropy_mean: mean entropy ``[]`` in nats.
        logp: log pi of the targets ``[N]``; 0 where ignored.
        entropy: entropy ``[N]`` in nats; 0 where ignored.
    """

    ratio_mean: Tensor
    clip_fraction: Tensor
    kl_old: Tensor
    kl_ref: Tensor
    entropy_mean: Tensor
    logp: Tensor
    entropy: Tensor


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    cu_seqs: Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    beta: float = 0.0,
    entropy_coef: float = 0.0,
    importance: Literal["token", "sequence"] = "token",
    aggregation: Literal["token", "sequence", "constant"] = "token",
    normaliser: float | None = None,
) -> tuple[Tensor, PolicyLossStats]:
    """Clipped policy-gradient loss (PPO, GRPO, GSPO) of a linear head, never holding its logits.

    With logp and entropy as in `linear_logprob`, per action:

        rho  = exp(logp - old_logp)                (1 without old_logp, with the gradient of logp)
        loss = -min(min(rho, delta) * A, clip(rho, 1 - clip_low, 1 + clip_high) * A)
               + beta * (exp(ref_logp - logp) - (ref_logp - logp) - 1) - entropy_coef * entropy

    ``importance="sequence"`` replaces log rho by its mean over the sequence (GSPO, arXiv
    2507.18071). Aggregation: "token", the mean over the actions; "sequence", the mean over
    sequences of the mean over their actions; "constant", the sum over ``normaliser``, the one whose
    value does not depend on how a batch is cut into micro-batches. Rows with target -100 are
    counted nowhere, and a sequence with no other row is not counted as a sequence; with no row
    left the loss is 0.

    The gradients are computed in the forward sweep and only scaled by ``backward``: three matrix
    products in all (logits, d hidden, d weight), two with a frozen head, one when nothing requires
    a gradient. A chunk holds whole sequences when importance="sequence", because a row's
    coefficient then depends on all of its sequence; only a sequence longer than a chunk is
    read twice, at the cost of one more product for its rows.

    Logits and sums are float32 whatever the inputs (float64 if any input is), autocast included.
    Extra memory, at any N: on a CPU at most 128 MiB, half-precision weights included; the logits
    of up to D rows wait in the memory of the weight's gradient, those of others in one chunk,
    overwritten by its gradient (`_cpu_gradients` has the rules); on a GPU one chunk of 512 MiB, or
    more where that is less than a float32 gradient of the weight (`_gpu_head`). With the reference
    two buffers of `_head.chunk_rows` rows of logits (128 MiB each; a third to differentiate a
    soft-capped head), and one float32 copy of a weight that is in half precision. From here until
    ``backward`` also the gradients, in float32, so that a loss scale still finds what float16 would
    have rounded to zero; on a GPU those of bfloat16 tensors in bfloat16 (where more than four
    chunks add up, in float32 until the sweep has ended).

    Args:
        hidden: ``[N, D]``, floating; the hidden states that predict the targets. Any strides.
        weight: ``[V, D]``, floating; may differ in dtype from hidden.
        targets: ``[N]`` int64, in ``[0, V)``, or -100 to ignore the row.
        advantages: ``[N]`` floating; constants.
        cu_seqs: ``[B + 1]`` int32; rows ``cu_seqs[b]`` to ``cu_seqs[b + 1]`` are sequence b.
        old_logp: ``[N]`` floating, log pi at sampling, at the same temperature; None: on policy.
        ref_logp: ``[N]`` floating, log pi of the reference model; needed if beta is not 0.
        bias: ``[V]`` floating, or None.
        temperature: divides the logits; above 0.
        softcap: bound of the soft-capped logits, above 0; None for none.
        logit_scale: multiplies the logits before soft-capping; above 0.
        clip_low: rho is clipped below at ``1 - clip_low``; at least 0.
        clip_high: rho is clipped above at ``1 + clip_high``; at least 0.
        delta: with ``delta > 1 + clip_high``, bounds rho where the advantage is negative, which
            clipping alone leaves unbounded (two-sided clipping, arXiv 2505.07291). None for none.
        beta: weight of the divergence from the reference; at least 0.
        entropy_coef: weight of the entropy bonus.
        importance: "token" or "sequence".
        aggregation: "token", "sequence" or "constant".
        normaliser: above 0, with aggregation="constant" and only with it.

    Returns:
        The loss, ``[]`` float32, differentiable in hidden, weight and bias; and `PolicyLossStats`.

    Raises:
        ValueError: a wrong shape, dtype, device, option or combination of them; a sharded weight;
            a target out of range; wrong offsets; an input or result that is not finite.
    """
    check_head(hidden, LinearHead(weight, bias, temperature, softcap, logit_scale), targets)
    constants = {"advantages": advantages, "old_logp": old_logp, "ref_logp": ref_logp}
    for name, tensor in constants.items():
        _check_constant(name, tensor, hidden)
    check_sequences(cu_seqs, hidden)
    check_options(clip_low, clip_high, delta, beta, entropy_coef, ref_logp)
    check_modes(importance, aggregation, normaliser)
    differentiate = torch.is_grad_enabled()
    outputs = torch.ops.airl_fast.linear_policy_loss(
        hidden,
        weight,
        targets,
        advantages,
        cu_seqs,
        old_logp,
        ref_logp,
        bias,
        temperature,
        softcap,
        logit_scale,
        clip_low,
        clip_high,
        delta,
        beta,
        entropy_coef,
        importance,
        aggregation,
        1.0 if normaliser is None else normaliser,
        differentiate and hidden.requires_grad,
        differentiate and weight.requires_grad,
        differentiate and bias is not None and bias.requires_grad,
    )
    loss, _, _, _, *seen = outputs
    means, logp, entropy = (x.float() for x in seen)
    ratio, clipped, kl_old, kl_ref, mean = means.unbind()
    return loss.float(), PolicyLossStats(ratio, clipped, kl_old, kl_ref, mean, logp, entropy)


def _check_constant(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    require_tensors("linear_policy_loss", **{name: tensor})
    check_rows(name, tensor, hidden, None)
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient but is a constant of the loss: detach it")


_DIFFERENTIABLE = {"hidden": 0, "weight": 1, "bias": 7}  # positions among the op's inputs


@torch.library.custom_op("airl_fast::linear_policy_loss", mutates_args=())
def _linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    cu_seqs: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    clip_low: float,
    clip_high: float,
    delta: float | None,
    beta: float,
    entropy_coef: float,
    importance: str,
    aggregation: str,
    normaliser: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return everything in the compute dtype, but the gradients in that of `gradient_dtype`.

    The loss [], its gradients at hidden, weight and bias ([0] where not needed), the means [5] in
    the order of PolicyLossStats, logp [N] and entropy [N].
    """
    check_targets(targets, len(weight), IGNORE_INDEX)
    cu_seqs = sequence_offsets(cu_seqs, len(hidden))
    kept = targets != IGNORE_INDEX
    constants = {"advantages": advantages, "old_logp": old_logp, "ref_logp": ref_logp}
    for name, tensor in constants.items():
        if tensor is not None:
            check_finite(name, tensor.where(kept, 0), "look for NaN or overflow where it is made")
    loss = ActionLoss(clip_low, clip_high, delta, beta, entropy_coef, importance == "sequence")
    with no_autocast(hidden.device):
        total, *gradients, means, logp, entropy = pick(
            "linear_policy_loss", *present(hidden, weight, bias)
        )(
            hidden,
            LinearHead(weight, bias, temperature, softcap, logit_scale),
            targets,
            (advantages, old_logp, ref_logp),
            cu_seqs,
            loss,
            aggregation,
            normaliser,
            (need_hidden, need_weight, need_bias),
        )
    for name, result in (("logp", logp), ("entropy", entropy)):
        check_finite(name, result, NON_FINITE_LOGITS)
    refuse_where(
        ~total.isfinite()[None],
        total[None],
        lambda _, loss: (
            f"the loss is {loss}: exp(logp - old_logp) or exp(ref_logp - logp) overflows; compute "
            "old_logp and ref_logp with these targets and this temperature"
        ),
        NonFiniteValueError,
    )
    d_hidden, d_weight, d_bias = (
        g.to(gradient_dtype(x, g.dtype))
        for g, x in zip(gradients, (hidden, weight, bias), strict=True)
    )
    return total, d_hidden, d_weight, d_bias, means, logp, entropy


@_linear_policy_loss.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    bias = others[_DIFFERENTIABLE["bias"] - 2]
    need_hidden, need_weight, need_bias = others[-3:]
    dtype = compute_dtype(hidden, weight, bias)
    loss = hidden.new_empty((), dtype=dtype)
    shapes = (
        hidden.shape if need_hidden else (0,),
        weight.shape if need_weight else (0,),
        (weight.shape[0] if need_bias else 0,),
    )
    gradients = [
        loss.new_empty(shape, dtype=gradient_dtype(x, dtype))
        for x, shape in zip((hidden, weight, bias), shapes, strict=True)
    ]
    return (
        loss,
        *gradients,
        loss.new_empty((5,)),
        loss.new_empty((hidden.shape[0],)),
        loss.new_empty((hidden.shape[0],)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *gradients, means, logp, entropy = output
    ctx.set_materialize_grads(False)  # or backward is handed zeros as large as the gradients
    ctx.mark_non_differentiable(*gradients, means, logp, entropy)
    ctx.save_for_backward(*gradients)
    ctx.dtypes = [None if inputs[i] is None else inputs[i].dtype for i in _DIFFERENTIABLE.values()]
    ctx.computed = inputs[-3:]


def _backward(ctx: Any, d_loss: Tensor | None, *_: None) -> tuple[Any, ...]:
    results: list[Tensor | None] = [None] * 22
    if d_loss is None:
        return tuple(results)
    gradients = zip(
        _DIFFERENTIABLE.items(), ctx.saved_tensors, ctx.dtypes, ctx.computed, strict=True
    )
    for (name, position), gradient, dtype, computed in gradients:
        if ctx.needs_input_grad[position]:
            if not computed:
                raise RuntimeError(
                    f"the gradient at {name} was not computed in the forward sweep: call "
                    "airl_fast.linear_policy_loss, and let it see what requires a gradient"
                )
            results[position] = scaled(gradient, d_loss).to(dtype)
    return tuple(results)


register_autograd(_linear_policy_loss, _backward, setup_context=_setup_context)


@implements("linear_policy_loss", "reference")
def _reference(
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    constants: Constants,
    cu_seqs: Tensor,
    loss: ActionLoss,
    aggregation: str,
    normaliser: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = compute_dtype(hidden, head.weight, head.bias)
    actions = gather_actions(targets, constants, cu_seqs, aggregation, normaliser, dtype)
    limit = max(1, min(chunk_rows(len(head.weight), dtype.itemsize), len(actions.rows)))
    chunks = ChunkedHead(head, dtype=dtype, rows=limit, differentiate=any(needs))
    gradients = HeadGradients(chunks, hidden, needs)
    logp, entropy = torch.zeros_like(actions.share), torch.zeros_like(actions.share)
    d_entropy = -loss.entropy_coef * actions.share if loss.entropy_coef else None

    for piece in pieces(actions, limit, loss.per_sequence):
        for chunk in piece:
            x = hidden[actions.rows[chunk]].to(dtype)
            log_probs = chunks.log_probs(x)
            logp[chunk] = log_probs.gather(1, actions.targets[chunk, None]).squeeze(1)
            entropy[chunk] = chunks.entropy(log_probs)
        if not any(needs):
            continue
        whole = slice(piece[0].start, piece[-1].stop)
        d_logp = loss.terms(logp[whole], actions.part(whole)).d_logp
        for chunk in piece:
            if len(piece) > 1:  # the buffers hold the piece's last chunk only
                x = hidden[actions.rows[chunk]].to(dtype)
                log_probs = chunks.log_probs(x)
            d_logits = chunks.logit_gradient(
                log_probs,
                actions.targets[chunk],
                d_logp[chunk.start - whole.start : chunk.stop - whole.start],
                None if d_entropy is None else d_entropy[chunk],
                None if d_entropy is None else entropy[chunk],
            )
            gradients.add(actions.rows[chunk], x, d_logits)

    found = gradients.hidden, gradients.weight, gradients.bias
    return op_outputs(loss, actions, logp, entropy, found, len(hidden))


def _swept(sweep: Callable[..., tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]]) -> Any:
    """The implementation that a backend's sweep makes: float32 actions in, the op's outputs out."""

    def implementation(
        hidden: Tensor,
        head: LinearHead,
        targets: Tensor,
        constants: Constants,
        cu_seqs: Tensor,
        loss: ActionLoss,
        aggregation: str,
        normaliser: float,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = torch.float32
        actions = gather_actions(targets, constants, cu_seqs, aggregation, normaliser, dtype)
        logp, entropy, gradients = sweep(hidden, head, loss, actions, needs)
        return op_outputs(loss, actions, logp, entropy, gradients, len(hidden))

    return implementation


for _backend, _serves, _sweep in (
    ("cpu", _cpu_head.serves, _cpu_gradients.policy_loss_sweep),
    ("triton", _triton.serves_head, _triton.HEAD.policy_loss_sweep),
    ("cuda", _cuda_head.serves, _cuda_head.HEAD.policy_loss_sweep),
):
    implements("linear_policy_loss", _backend, _serves)(_swept(_sweep))
