"""The span kernels of csrc/cuda/ (`airl_fast._cuda`): reductions, scans, scores and losses.

N values, S spans, B sequences, F hidden size of the discriminator. Vectors are float32 (half
precision is converted), any stride; sums are float64. Nothing waits for the GPU.
"""

from typing import Any

import torch
from torch import Tensor

from airl_fast.ops._cuda_extension import ELEMENTS, address, extension, place, serves


def serves_spans(*tensors: Tensor) -> str | None:
    """Say why the kernels over spans cannot take these tensors, if they cannot."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "it reads float32 values, and float64 inputs ask for float64"
    return serves(*tensors)


def segment_sum(x: Tensor, cu: Tensor, mean: bool = False) -> Tensor:
    """Sum, or mean, of each span of ``x [N]``: ``[S]`` float32."""
    x, cu, out = x.float(), cu.contiguous(), _floats(x, len(cu) - 1)
    extension().segment_sum(place(x), _vector(x), _cuts(cu, len(x)), mean, out.data_ptr())
    return out


def segment_mean(x: Tensor, cu: Tensor) -> Tensor:
    """Mean of each span of ``x [N]``: ``[S]`` float32."""
    return segment_sum(x, cu, mean=True)


def segment_last(x: Tensor, cu: Tensor) -> Tensor:
    """Last value of each span of ``x [N]``: ``[S]`` float32."""
    x, cu, out = x.float(), cu.contiguous(), _floats(x, len(cu) - 1)
    extension().segment_last(place(x), _vector(x), _cuts(cu, len(x)), out.data_ptr())
    return out


def segment_softmax(x: Tensor, cu: Tensor) -> Tensor:
    """Softmax within each span of ``x [N]``: ``[N]`` float32."""
    x, cu, out = x.float(), cu.contiguous(), _floats(x, len(x))
    extension().segment_softmax(place(x), _vector(x), _cuts(cu, len(x)), out.data_ptr())
    return out


def discounted_returns(x: Tensor, cu: Tensor, gamma: float, transpose: bool) -> Tensor:
    """``y_i = x_i + gamma y_{i+1}`` within each span, ``[N]`` float32; or its transpose."""
    x, cu, out = x.float(), cu.contiguous(), _floats(x, len(x))
    cuts = _cuts(cu, len(x))
    extension().discounted_scan(place(x), _vector(x), cuts, gamma, transpose, out.data_ptr())
    return out


def span_scores(
    disc_hidden: Tensor,
    disc_weight: Tensor,
    disc_bias: Tensor | None,
    logp: Tensor,
    cu_spans: Tensor,
    mean: bool,
    form: str,
    shaping_gamma: float | None,
    cu_seq_spans: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Reward ``[S]`` and f ``[S]`` of the score head, as in `airl_score`, in one kernel.

    Args:
        disc_hidden: ``[N, F]``, not float64.
        disc_weight: ``[1 | 2, F]``, any floating dtype.
        disc_bias: ``[1 | 2]``, any floating dtype, or None.
        logp: ``[N]`` float32, of which each span's sum (or mean) is taken off f.
        cu_spans: ``[S + 1]`` int32, non-empty spans.
        mean: whether it is the mean.
        form: "airl", or "logit": then the reward is f.
        shaping_gamma: with two rows.
        cu_seq_spans: with two rows, ``[B + 1]`` int32.
    """
    x = disc_hidden if disc_hidden.stride(1) == 1 else disc_hidden.contiguous()
    weight = disc_weight.float().contiguous()
    bias = None if disc_bias is None else disc_bias.float().contiguous()
    subtracted = logp.contiguous() if form == "airl" else None
    cu, spans = cu_spans.contiguous(), len(cu_spans) - 1
    sequences = None if cu_seq_spans is None else cu_seq_spans.contiguous()
    reward, f = _floats(x, spans), _floats(x, spans)
    extension().score_spans(
        place(x),
        (x.data_ptr(), x.stride(0), *x.shape, ELEMENTS[x.dtype]),
        weight.data_ptr(),
        address(bias),
        len(weight),
        shaping_gamma or 0.0,
        _cuts(cu, len(x)),
        (0, 0, 0) if sequences is None else _cuts(sequences, spans),
        address(subtracted),
        mean,
        f.data_ptr(),
        reward.data_ptr(),
    )
    return reward, f


def discriminator_loss(f: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Loss ``[]`` and statistics ``[10]``, float32, as in `discriminator_loss`."""
    cuda = extension()
    described, _keep_alive = _spans(f, *arguments)
    scratch = f.new_empty(cuda.discriminator_scratch(len(f)), dtype=torch.float64)
    out = f.new_empty(11, dtype=torch.float64)
    cuda.discriminator_loss(place(f), described, scratch.data_ptr(), out.data_ptr())
    return out[0].float(), out[1:].float()


def discriminator_gradient(grad: Tensor, f: Tensor, *arguments: Any) -> Tensor:
    """Gradient ``[S]`` float64 at f, given that at the loss, a scalar in GPU memory."""
    cuda = extension()
    described, _keep_alive = _spans(f, *arguments)
    grad = grad.double()
    scratch = f.new_empty(cuda.discriminator_scratch(len(f)), dtype=torch.float64)
    out = f.new_empty(f.shape, dtype=torch.float64)
    pointers = grad.data_ptr(), scratch.data_ptr(), out.data_ptr()
    cuda.discriminator_gradient(place(f), described, *pointers)
    return out


def _spans(
    f: Tensor,
    logp: Tensor,
    is_expert: Tensor,
    weight: Tensor | None,
    form: str,
    label_smoothing: float,
    temperature: float,
) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """Describe the spans to C++, with the tensors that must outlive the call."""
    vectors = f.float(), logp.float(), *(() if weight is None else (weight.float(),))
    described = [_vector(x) for x in vectors] + ([(0, 0)] if weight is None else [])
    options = form == "airl", label_smoothing, temperature, form == "wgan"
    return (*described, _vector(is_expert), len(f), *options), vectors


def _vector(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.stride(0)


def _cuts(cu: Tensor, total: int) -> tuple[int, int, int]:
    return cu.data_ptr(), len(cu) - 1, total


def _floats(x: Tensor, count: int) -> Tensor:
    return x.new_empty(count, dtype=torch.float32)
