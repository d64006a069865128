"""The discriminator's loss, for telling the expert's spans from the policy's.

S spans. In AIRL (Fu et al. 2018, arXiv 1710.11248) the discriminator is
D = exp f / (exp f + pi) = sigmoid(f - log pi), so its logit, high for experts, is f - log pi.
"""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from airl_fast import _C
from airl_fast.ops import _cuda_spans, _triton
from airl_fast.ops._arguments import require_tensors
from airl_fast.ops._deferred import refuse_where
from airl_fast.ops._head import present
from airl_fast.ops.dispatch import implements, pick, register_autograd
from airl_fast.ops.segments import check_finite, check_option, check_vector, cpu_serves

FORMS = ("airl", "logit", "wgan")


class DiscriminatorStats(NamedTuple):
    """Unweighted means over spans: float32 scalars, detached, NaN where there are no spans.

    The logit is the one that the loss uses, after its temperature ("wgan": f), and
    D = sigmoid(logit). A positive logit votes for the expert, a logit of exactly 0 for the policy.
    """

    accuracy: Tensor
    accuracy_expert: Tensor  # over the spans of experts
    accuracy_policy: Tensor  # over all other spans
    d_expert: Tensor
    d_policy: Tensor
    d_entropy: Tensor  # of the coin that D is, in nats: log 2 where it cannot tell, 0 where sure
    mean_f_expert: Tensor
    mean_f_policy: Tensor
    mean_logit_expert: Tensor
    mean_logit_policy: Tensor


def discriminator_loss(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    *,
    form: Literal["airl", "logit", "wgan"] = "airl",
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, DiscriminatorStats]:
    """Tell expert spans from policy spans by f, and say how well it went.

    "airl" and "logit" are binary cross-entropy with logits ``(f - logp) / temperature`` and
    ``f / temperature``, targets ``y (1 - s) + s / 2`` with s = ``label_smoothing``, averaged as
    ``sum(weight * loss) / sum(weight)``. "wgan" is the mean f of policy spans minus the mean f of
    expert spans, each weighted; a class that is absent counts as 0. Differentiates ``f``, and
    ``logp`` with "airl" (the other forms do not read it but for its shape).

    Args:
        f: [S] the discriminator's energy per span, floating point, finite.
        logp: [S] log pi of each span, in nats, floating point, finite.
        is_expert: [S] bool.
        form: "airl", "logit" or "wgan".
        label_smoothing: in [0, 1); 0 with "wgan".
        weight: [S] floating point, at least 0, a constant; None means 1 for every span.
        temperature: above 0; 1 with "wgan".

    Returns:
        The loss, a float32 scalar (0 if S is 0), and its statistics.

    Raises:
        ValueError: wrong shapes, dtypes or devices, non-finite values, negative weights, weights
            that sum to 0, or an unknown or contradictory option.
    """
    _check(f, logp, is_expert, weight)
    check_option("discriminator_loss", "form", form, FORMS)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(
            f"discriminator_loss: expected label_smoothing in [0, 1), received {label_smoothing}"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(
            f"discriminator_loss: expected a finite temperature above 0, received {temperature}"
        )
    if form == "wgan" and (label_smoothing != 0.0 or temperature != 1.0):
        raise ValueError(
            "discriminator_loss: form='wgan' has neither labels to smooth nor a temperature, "
            f"received label_smoothing={label_smoothing} and temperature={temperature}; "
            "leave both out"
        )
    loss, stats = torch.ops.airl_fast.discriminator_loss(
        f, logp, is_expert, weight, form, float(label_smoothing), float(temperature)
    )
    return loss, DiscriminatorStats(*stats.detach().unbind())


def _check(f: Tensor, logp: Tensor, is_expert: Tensor, weight: Tensor | None) -> None:
    named = {"f": f, "logp": logp} if weight is None else {"f": f, "logp": logp, "weight": weight}
    for name, x in named.items():
        check_vector("discriminator_loss", name, x)
        if x.shape != f.shape or x.device != f.device:
            raise ValueError(
                f"discriminator_loss: expected {name} of shape {tuple(f.shape)} on {f.device}, as "
                f"f is, received {tuple(x.shape)} on {x.device}; pass one value per span"
            )
    require_tensors("discriminator_loss", is_expert=is_expert)
    if is_expert.shape != f.shape or is_expert.dtype != torch.bool or is_expert.device != f.device:
        raise ValueError(
            f"discriminator_loss: expected is_expert to be bool of shape {tuple(f.shape)} on "
            f"{f.device}, received {is_expert.dtype} of shape {tuple(is_expert.shape)} on "
            f"{is_expert.device}; True marks the expert's spans"
        )


@torch.library.custom_op("airl_fast::discriminator_loss", mutates_args=())
def _loss(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss [] and the statistics [10], in the order of DiscriminatorStats."""
    check_finite("discriminator_loss", "f", f)
    check_finite("discriminator_loss", "logp", logp)
    if weight is not None:
        check_finite("discriminator_loss", "weight", weight)
        _check_weights(weight)
    serving = pick("discriminator_loss", *present(f, logp, weight))
    return serving(f, logp, is_expert, weight, form, label_smoothing, temperature)


def _check_weights(weight: Tensor) -> None:
    """Refuse weights that are negative, or all 0."""
    if weight.shape[0] == 0:
        return
    least, most = weight.aminmax()
    refuse_where(
        ((least < 0) | (most <= 0))[None],
        torch.stack([least, most])[None],
        lambda _, least, most: (
            "discriminator_loss: expected weights of at least 0, some above it, received "
            f"{least} to {most}; leave out a batch that counts for nothing"
        ),
    )


@_loss.register_fake
def _(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    fields = len(DiscriminatorStats._fields)
    return f.new_empty((), dtype=torch.float32), f.new_empty(fields, dtype=torch.float32)


def _logits_expert_is_high(f: Tensor, logp: Tensor, form: str, temperature: float) -> Tensor:
    """Return the logit of D [S], in float64: f - log pi in AIRL's own form."""
    f = f.double()
    return (f - logp.double() if form == "airl" else f) / temperature


def _weights(f: Tensor, weight: Tensor | None) -> Tensor:
    return torch.ones_like(f, dtype=torch.float64) if weight is None else weight.double()


def _normalised(weight: Tensor) -> Tensor:
    """Weights that sum to 1, or to 0 if they do already."""
    total = weight.sum()
    return weight / torch.where(total > 0, total, 1.0)


@implements("discriminator_loss", "reference")
def _loss_reference(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    logits = _logits_expert_is_high(f, logp, form, temperature)
    w, y = _weights(f, weight), is_expert.double()
    if form == "wgan":
        loss = (_normalised(w * (1 - y)) * logits).sum() - (_normalised(w * y) * logits).sum()
    else:
        # -y log D - (1 - y) log(1 - D), each term by a softplus that cannot overflow.
        target = y * (1 - label_smoothing) + label_smoothing / 2
        losses = target * softplus(-logits) + (1 - target) * softplus(logits)
        loss = (_normalised(w) * losses).sum()
    return loss.float(), _statistics(f.double(), logits, is_expert)


def _statistics(f: Tensor, logits: Tensor, is_expert: Tensor) -> Tensor:
    """Compute DiscriminatorStats as one vector [10]; the mean of nothing is NaN."""
    right = ((logits > 0) == is_expert).double()
    d = logits.sigmoid()
    entropy = softplus(logits) - logits * d
    expert, policy = is_expert, ~is_expert
    by_class = [x[c].mean() for x in (right, d, f, logits) for c in (expert, policy)]
    right_and_d, f_and_logits = by_class[:4], by_class[4:]
    return torch.stack([right.mean(), *right_and_d, entropy.mean(), *f_and_logits]).float()


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    f, logp, is_expert, weight, ctx.form, ctx.label_smoothing, ctx.temperature = inputs
    ctx.save_for_backward(f, logp, is_expert, weight)


def _backward(ctx: Any, grad: Tensor, _stats: Tensor) -> tuple[Tensor | None, ...]:
    f, logp, is_expert, weight = ctx.saved_tensors
    options = (ctx.form, ctx.label_smoothing, ctx.temperature)
    # Only torch's own operators have derivatives to build a graph of second ones from.
    gradient = _gradient if torch.is_grad_enabled() else torch.ops.airl_fast.discriminator_gradient
    df = gradient(grad, f, logp, is_expert, weight, *options)
    dlogp = -df.to(logp.dtype) if ctx.form == "airl" and ctx.needs_input_grad[1] else None
    return df.to(f.dtype), dlogp, None, None, None, None, None


@torch.library.custom_op("airl_fast::discriminator_gradient", mutates_args=())
def _gradient_op(
    grad: Tensor,
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> Tensor:
    """Return the gradient at f [S], float64."""
    serving = pick("discriminator_gradient", *present(f, logp, weight))
    return serving(grad, f, logp, is_expert, weight, form, label_smoothing, temperature)


@_gradient_op.register_fake
def _(grad: Tensor, f: Tensor, *others: Any) -> Tensor:
    return f.new_empty(f.shape, dtype=torch.float64)


@implements("discriminator_gradient", "reference")
def _gradient(
    grad: Tensor,
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> Tensor:
    """D BCE / d logit = D - target; d wgan / d f = the normalised weights, minus for experts."""
    w, y = _weights(f, weight), is_expert.double()
    if form == "wgan":
        return grad * (_normalised(w * (1 - y)) - _normalised(w * y))
    d = _logits_expert_is_high(f, logp, form, temperature).sigmoid()
    target = y * (1 - label_smoothing) + label_smoothing / 2
    return grad * _normalised(w) * (d - target) / temperature


register_autograd(_loss, _backward, setup_context=_keep)


# Backend "cpu": csrc/discriminator.cpp.


def _cpu_serves(*tensors: Tensor) -> str | None:
    """Any floating dtype will do: vectors of spans are short enough to be converted."""
    return cpu_serves(tensors[0].float())


def _spans(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Describe the spans to C++, in one dtype; with the tensors that must outlive the call."""
    dtype = torch.float32 if all(x.element_size() == 4 for x in present(f, logp, weight)) else None
    f, logp, *weights = (x.to(dtype or torch.float64) for x in present(f, logp, weight))
    vectors = [(x.data_ptr(), x.stride(0)) for x in (f, logp, *weights)]
    vectors += [] if weights else [(0, 0)]
    expert = (is_expert.data_ptr(), is_expert.stride(0))
    options = (form == "airl", label_smoothing, temperature, form == "wgan")
    described = (*vectors, f.element_size(), expert, f.shape[0], *options)
    return described, (f, logp, *weights)


@implements("discriminator_loss", "cpu", _cpu_serves)
def _loss_cpu(f: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    spans, _keep_alive = _spans(f, *arguments)
    out = torch.empty(1 + len(DiscriminatorStats._fields), dtype=torch.float64)
    _C.discriminator_loss(spans, out.data_ptr())
    return out[0].float(), out[1:].float()


@implements("discriminator_gradient", "cpu", _cpu_serves)
def _gradient_cpu(grad: Tensor, f: Tensor, *arguments: Any) -> Tensor:
    spans, _keep_alive = _spans(f, *arguments)
    out = torch.empty(f.shape, dtype=torch.float64)
    _C.discriminator_gradient(spans, float(grad), out.data_ptr())
    return out


# Backend "cuda": csrc/cuda/discriminator.cu.


implements("discriminator_loss", "cuda", _cuda_spans.serves_spans)(_cuda_spans.discriminator_loss)
implements("discriminator_gradient", "cuda", _cuda_spans.serves_spans)(
    _cuda_spans.discriminator_gradient
)
implements("discriminator_loss", "triton", _triton.serves)(_triton.discriminator_loss)
implements("discriminator_gradient", "triton", _triton.serves)(_triton.discriminator_gradient)
