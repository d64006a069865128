"""Log-probabilities (and entropies) of given tokens under a linear head, without the logits.

N rows (actions), D hidden size, V vocabulary.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from airl_fast.ops import _cpu_gradients, _cpu_head, _cuda_head, _triton
from airl_fast.ops._head import (
    NON_FINITE_LOGITS,
    ChunkedHead,
    HeadGradients,
    LinearHead,
    check_finite,
    check_head,
    check_targets,
    chunk_rows,
    compute_dtype,
    kept_rows,
    no_autocast,
    present,
)
from airl_fast.ops.dispatch import implements, pick, register_autograd


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log softmax of a linear head at the targets; the ``[N, V]`` logits never exist.

        z = softcap * tanh(logit_scale * (hidden W^T + bias) / softcap)
        logp = log_softmax(z / temperature)[target]

    without softcap z is just the scaled logits, and the entropy is that of the same distribution.

    This is log pi of the whole distribution at the stated temperature: it is not renormalised
    over the tokens that a top-p or top-k sampler would have kept.

    Logits and sums are float32 whatever the inputs (float64 if any input is), autocast included.
    Both results are differentiable in hidden, weight and bias; the backward pass recomputes the
    logits and computes only the gradients that are required. Extra memory at any N: on a CPU
    48 MiB forward (`_cpu_head.tile_shape` has the rule) and at most 128 MiB backward
    (`_cpu_gradients`), half-precision weights included, and with AMX 16 MiB of tiles and 1 MiB a
    thread (csrc/products_amx.cpp), which stay for the next call; with the reference, two
    buffers of `_head.chunk_rows` rows of logits (128 MiB each; a third to differentiate a
    soft-capped head), and one float32 copy of a weight that is in half precision. With Triton
    64 MiB of partial sums forward in half precision, otherwise one chunk of 512 MiB, or
    more where that is less than a float32 gradient of the weight (`_gpu_head`).
    Then the gradients in float32; on a GPU those of bfloat16 tensors in bfloat16 (that of the
    weight up to four chunks).

    Args:
        hidden: ``[N, D]``, floating; the hidden states that predict the targets. Any strides.
        weight: ``[V, D]``, floating; may differ in dtype from hidden.
        targets: ``[N]`` int64, in ``[0, V)`` or ``ignore_index``.
        bias: ``[V]`` floating, or None.
        temperature: divides the logits; above 0.
        softcap: bound of the soft-capped logits (Gemma 2), above 0; None for none.
        logit_scale: multiplies the logits before soft-capping; above 0.
        ignore_index: rows with this target are never read: their result is 0, without gradient.
        return_entropy: also return the entropy, in nats.

    Returns:
        ``logp [N]`` float32, at most 0; with ``return_entropy`` the pair ``(logp, entropy [N])``,
        the entropy within ``[0, log V]`` up to rounding.

    Raises:
        ValueError: a wrong shape, dtype, device or option; a sharded weight; a target out of
            range; a result that is not finite.
    """
    check_head(hidden, LinearHead(weight, bias, temperature, softcap, logit_scale), targets)
    logp, entropy = torch.ops.airl_fast.linear_logprob(
        hidden,
        weight,
        targets,
        bias,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        return_entropy,
    )
    return (logp.float(), entropy.float()) if return_entropy else logp.float()


@torch.library.custom_op("airl_fast::linear_logprob", mutates_args=())
def _linear_logprob(
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
    """Logp [N] and entropy [N] ([0] unless asked for), in the compute dtype."""
    check_targets(targets, len(weight), ignore_index)
    forward = pick("linear_logprob", *present(hidden, weight, bias))
    head = LinearHead(weight, bias, temperature, softcap, logit_scale)
    with no_autocast(hidden.device):
        logp, entropy = forward(hidden, head, targets, ignore_index, return_entropy)
    for name, result in (("logp", logp), ("entropy", entropy)):
        check_finite(name, result, NON_FINITE_LOGITS)
    return logp, entropy


@_linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(hidden, weight, bias)
    logp = hidden.new_empty((hidden.shape[0],), dtype=dtype)
    return logp, torch.empty_like(logp) if options[-1] else logp.new_empty((0,))


@torch.library.custom_op("airl_fast::linear_logprob_backward", mutates_args=())
def _linear_logprob_backward(
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
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """D hidden, d weight and d bias in the dtypes of the inputs; [0] where not needed."""
    check_targets(targets, len(weight), ignore_index)
    backward = pick("linear_logprob_backward", *present(hidden, weight, bias))
    head = LinearHead(weight, bias, temperature, softcap, logit_scale)
    needs = need_hidden, need_weight, need_bias
    with no_autocast(hidden.device):
        gradients = backward(d_logp, d_entropy, entropy, hidden, head, targets, ignore_index, needs)
    d_hidden, d_weight, d_bias = gradients
    return (
        d_hidden.to(hidden.dtype),
        d_weight.to(weight.dtype),
        d_bias if bias is None else d_bias.to(bias.dtype),
    )


@_linear_logprob_backward.register_fake
def _(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = options[-3:]
    dtype = compute_dtype(hidden, weight, bias)
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(
            (weight.shape[0] if need_bias else 0,), dtype=dtype if bias is None else bias.dtype
        ),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, targets, bias, *options, return_entropy = inputs
    ctx.set_materialize_grads(False)
    if not return_entropy:
        ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, targets, bias, output[1])
    ctx.options = options


def _backward(ctx: Any, d_logp: Tensor | None, d_entropy: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, targets, bias, entropy = ctx.saved_tensors
    if d_logp is None and d_entropy is None:
        return (None,) * 9
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 3)]
    gradients = torch.ops.airl_fast.linear_logprob_backward(
        d_logp, d_entropy, entropy, hidden, weight, targets, bias, *ctx.options, *needs
    )
    d_hidden, d_weight, d_bias = (
        g if need else None for g, need in zip(gradients, needs, strict=True)
    )
    return d_hidden, d_weight, None, d_bias, None, None, None, None, None


register_autograd(_linear_logprob, _backward, setup_context=_setup_context)


@implements("linear_logprob", "reference")
def _reference_forward(
    hidden: Tensor, head: LinearHead, targets: Tensor, ignore_index: int, return_entropy: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(hidden, head.weight, head.bias)
    rows = kept_rows(targets, ignore_index)
    limit = max(1, min(chunk_rows(len(head.weight), dtype.itemsize), len(rows)))
    chunks = ChunkedHead(head, dtype=dtype, rows=limit, differentiate=False)
    logp = hidden.new_zeros(len(hidden), dtype=dtype)
    entropy = hidden.new_zeros(len(hidden) if return_entropy else 0, dtype=dtype)
    for chunk in rows.split(limit):
        log_probs = chunks.log_probs(hidden[chunk].to(dtype))
        taken = log_probs.gather(1, targets[chunk, None]).squeeze(1)
        logp.index_copy_(0, chunk, taken)
        if return_entropy:
            entropy.index_copy_(0, chunk, chunks.entropy(log_probs))
    return logp, entropy


@implements("linear_logprob_backward", "reference")
def reference_backward(
    d_logp: Tensor | None,
    d_entropy: Tensor | None,
    entropy: Tensor,
    hidden: Tensor,
    head: LinearHead,
    targets: Tensor,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in the compute dtype: the definition."""
    dtype = compute_dtype(hidden, head.weight, head.bias)
    rows = kept_rows(targets, ignore_index)
    limit = max(1, min(chunk_rows(len(head.weight), dtype.itemsize), len(rows)))
    chunks = ChunkedHead(head, dtype=dtype, rows=limit, differentiate=True)
    gradients = HeadGradients(chunks, hidden, needs)
    for chunk in rows.split(limit):
        x = hidden[chunk].to(dtype)
        d_logits = chunks.logit_gradient(
            chunks.log_probs(x),
            targets[chunk],
            None if d_logp is None else d_logp[chunk],
            None if d_entropy is None else d_entropy[chunk],
            None if d_entropy is None else entropy[chunk],
        )
        gradients.add(chunk, x, d_logits)
    return gradients.hidden, gradients.weight, gradients.bias


implements("linear_logprob", "cpu", _cpu_head.serves)(_cpu_head.logprob_forward)
implements("linear_logprob_backward", "cpu", _cpu_head.serves)(_cpu_gradients.logprob_backward)
implements("linear_logprob", "triton", _triton.serves_head)(_triton.HEAD.logprob_forward)
implements("linear_logprob_backward", "triton", _triton.serves_head)(_triton.HEAD.logprob_backward)
implements("linear_logprob", "cuda", _cuda_head.serves_reading)(_cuda_head.HEAD.logprob_forward)
implements("linear_logprob_backward", "cuda", _cuda_head.serves)(_cuda_head.HEAD.logprob_backward)
