"""What the operators over the language-model head share: checks, chunks, logits and gradients.

N rows (actions), D hidden size, V vocabulary, R rows of a chunk, K rows that are not ignored.
The ``[N, V]`` logits never exist: the reference backends sweep over chunks of rows, and reuse
two buffers ``[R, V]`` for all of them (three to differentiate a soft-capped head).
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from airl_fast.ops._arguments import require_number, require_tensors
from airl_fast.ops._deferred import refuse_where
from airl_fast.ops._finite import NonFiniteValueError

CHUNK_BYTES = 128 * 2**20  # of one logits buffer; tests lower it to force many chunks

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class LinearHead(NamedTuple):
    """A linear head and its options: what makes log-probabilities of hidden states.

    With ``s = logit_scale``, ``c = softcap`` and ``t = temperature``,

        a = hidden W^T + bias,   z = c tanh(s a / c) (or s a),   log p = log_softmax(z / t)
    """

    weight: Tensor  # [V, D]
    bias: Tensor | None = None  # [V]
    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0


def slopes(
    temperature: float, softcap: float | None, logit_scale: float
) -> tuple[float, float, float]:
    """The numbers ``inner``, ``outer`` and ``slope`` with which kernels compute z / t.

    It is ``outer tanh(inner a)``, or ``inner a`` where outer is 0; slope is its derivative at 0.
    """
    slope = logit_scale / temperature
    if softcap is None:
        return slope, 0.0, slope
    return logit_scale / softcap, softcap / temperature, slope


def chunk_rows(vocab: int, itemsize: int = 4) -> int:
    """Rows whose logits fill one buffer of ``CHUNK_BYTES`` (128 MiB unless changed); at least 1.

    At V = 49,152 that is 682 rows, at V = 151,936 it is 220: enough rows for the matrix product
    to run at full speed, in memory that does not depend on N.

    Args:
        vocab: V, the number of logits of a row.
        itemsize: bytes of one logit: 4, or 8 when the inputs are float64.
    """
    return max(1, CHUNK_BYTES // (itemsize * max(1, vocab)))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype of logits and accumulators: float64 if any tensor is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def gradient_dtype(tensor: Tensor | None, computed: torch.dtype) -> torch.dtype:
    """Dtype in which a gradient at ``tensor`` waits for its backward; ``computed`` on a CPU.

    On a GPU that of bfloat16 tensors, whose range is float32's, waits in bfloat16: half the memory,
    and nothing left to do where the gradient of the loss is 1. Any other but a power of two rounds
    a second time.
    """
    narrow = tensor is not None and tensor.is_cuda and tensor.dtype == torch.bfloat16
    return torch.bfloat16 if narrow else computed


def present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Return those that are not None: what a backend looks at to say whether it serves a call."""
    return tuple(t for t in tensors if t is not None)


def kept_rows(targets: Tensor, ignore_index: int) -> Tensor:
    """Row numbers ``[K]`` that count. Ignored rows are never read, whatever they hold."""
    return (targets != ignore_index).nonzero().squeeze(-1)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Keep autocast, which reaches into the body of a custom op, from rounding the logits."""
    return torch.autocast(device.type, enabled=False)


def check_head(hidden: Tensor, head: LinearHead, targets: Tensor) -> None:
    """Check everything about the head's arguments that needs no look at their values.

    Raises:
        ValueError: a wrong shape, dtype, device or option; a sharded weight.
    """
    weight, bias, temperature, softcap, logit_scale = head
    require_tensors("the head", hidden=hidden, weight=weight, targets=targets, bias=bias)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            _check_float(name, tensor)
    if weight.numel() == 0:
        raise ValueError(
            f"weight has no elements (shape {_shape(weight)}): if ZeRO-3 has sharded it, run "
            "forward and backward inside deepspeed.zero.GatheredParameters([weight])"
        )
    if weight.dim() != 2:
        raise ValueError(
            f"weight: expected shape [V, D], received {_shape(weight)}; pass the weight of the "
            "language-model head"
        )
    vocab, width = weight.shape
    if hidden.dim() != 2:
        raise ValueError(
            f"hidden: expected shape [N, D], received {_shape(hidden)}; "
            "flatten batch and time first: hidden.reshape(-1, hidden.shape[-1])"
        )
    if hidden.shape[1] != width:
        hint = (
            "hidden's last dimension is the vocabulary, so these look like logits: "
            "pass hidden states"
            if hidden.shape[1] == vocab
            else "expected equal last dimensions"
        )
        raise ValueError(f"hidden {_shape(hidden)} does not fit weight {_shape(weight)}: {hint}")
    check_rows("targets", targets, hidden, torch.int64)
    if bias is not None and tuple(bias.shape) != (vocab,):
        raise ValueError(
            f"bias: expected shape ({vocab},), received {_shape(bias)}; "
            "pass one value per row of weight"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_device(name, tensor, hidden)
    check_positive("temperature", temperature)
    check_positive("logit_scale", logit_scale)
    if softcap is not None:
        check_positive("softcap", softcap, "use None for no soft-capping")


def check_rows(name: str, tensor: Tensor | None, hidden: Tensor, dtype: torch.dtype | None) -> None:
    """Check a tensor with one element per row; ``dtype`` None stands for any floating dtype."""
    if tensor is None:
        return
    if tuple(tensor.shape) != (hidden.shape[0],):
        raise ValueError(
            f"{name}: expected shape ({hidden.shape[0]},), received {_shape(tensor)}; "
            "pass one value per row of hidden"
        )
    if dtype is None:
        _check_float(name, tensor)
    elif tensor.dtype != dtype:
        raise ValueError(
            f"{name}: expected {dtype}, received {tensor.dtype}; convert with .to({dtype})"
        )
    _check_device(name, tensor, hidden)


def check_positive(name: str, value: float, remedy: str = "pass a finite number above 0") -> None:
    """Refuse zero, negative, infinite and NaN values of an option."""
    require_number(name, value)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number above 0, received {value}; {remedy}")


def check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    """Refuse targets outside ``[0, V)``. Reads values, so it belongs inside a custom op's body.

    On a GPU the refusal comes late (`_deferred`), and the kernels make NaN of such a row.
    """
    bad = ((targets < 0) | (targets >= vocab)) & (targets != ignore_index)
    refuse_where(
        bad,
        targets,
        lambda row, target: (
            f"targets[{row}] = {target} is outside [0, {vocab}), the rows of weight, and is not "
            f"ignore_index ({ignore_index}): check that the tokenizer is the model's, and mask "
            "rows without a target with ignore_index"
        ),
    )


def check_finite(name: str, values: Tensor, remedy: str) -> None:
    """Refuse NaN and infinity in ``values [N]``. Reads values: for a custom op's body."""
    refuse_where(
        ~values.isfinite(),
        values,
        lambda first, value: f"{name}[{first}] is {value}: {remedy}",
        NonFiniteValueError,
    )


NON_FINITE_LOGITS = (
    "hidden, weight or bias holds a value that is not finite, or the logits overflow float32; "
    "to mask a token use a finite bias such as -1e4"
)


def _check_float(name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{name} is a sharded DTensor: pass {name}.full_tensor(), which also reduces its "
            "gradient, or call inside the module that fully_shard gathers"
        )
    if tensor.dtype not in _FLOATS:
        raise ValueError(
            f"{name}: expected bfloat16, float16, float32 or float64, received {tensor.dtype}; "
            "convert with .float()"
        )


def _check_device(name: str, tensor: Tensor | None, hidden: Tensor) -> None:
    if tensor is not None and tensor.device != hidden.device:
        raise ValueError(
            f"{name} is on {tensor.device} but hidden is on {hidden.device}: "
            "move them to one device"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


class ChunkedHead:
    """The head's log-probabilities and their gradient, one chunk of rows at a time.

    The formulas are those of `LinearHead`.

    Memory: the buffers named at the top of this file, and, when the weight is not in the compute
    dtype, one converted copy of it per call. Results live in the buffers until the next call.

    Args:
        head: the head.
        dtype: of logits and accumulators.
        rows: the most rows of a chunk.
        differentiate: whether `logit_gradient` will be called.
    """

    def __init__(
        self,
        head: LinearHead,
        *,
        dtype: torch.dtype,
        rows: int,
        differentiate: bool,
    ) -> None:
        self.weight = head.weight.to(dtype)
        self.bias = None if head.bias is None else head.bias.to(dtype)
        self.temperature, self.softcap, self.logit_scale = head[2:]
        shape = (rows, len(self.weight))
        self._scratch = self.weight.new_empty(shape)
        self._log_probs = self.weight.new_empty(shape)
        capped = differentiate and self.softcap is not None
        self._slope = self.weight.new_empty(shape) if capped else None

    def log_probs(self, x: Tensor) -> Tensor:
        """Log-probabilities ``[R, V]`` of hidden states ``x [R, D]`` in the compute dtype.

        `torch.log_softmax` subtracts the row's maximum before anything else, so log p is at most
        0, and as precise for logits of 1e4 as for small ones.
        """
        z = self._scratch[: len(x)]
        torch.mm(x, self.weight.t(), out=z)
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is None:
            z.mul_(self.logit_scale / self.temperature)
        else:
            z.mul_(self.logit_scale / self.softcap).tanh_()
            if self._slope is not None:  # d z / d (s a) = 1 - tanh^2
                torch.mul(z, z, out=self._slope[: len(x)]).neg_().add_(1)
            z.mul_(self.softcap / self.temperature)
        return torch.log_softmax(z, -1, out=self._log_probs[: len(x)])

    def log_sums(self, log_probs: Tensor) -> Tensor:
        """Log-sum-exps ``[R]`` float64 of the rows; to be asked for before the entropy."""
        z = self._scratch[: len(log_probs)]
        return z.amax(-1).double() - log_probs.amax(-1).double()

    def entropy(self, log_probs: Tensor) -> Tensor:
        """Entropy ``[R]``; a sum of terms of one sign, so it is never negative."""
        terms = torch.exp(log_probs, out=self._scratch[: len(log_probs)]).mul_(log_probs)
        return terms.sum(-1).neg_()

    def logit_gradient(
        self,
        log_probs: Tensor,
        targets: Tensor,
        d_logp: Tensor | None,
        d_entropy: Tensor | None,
        entropy: Tensor | None,
    ) -> Tensor:
        """Gradient ``[R, V]`` at ``a``, given those of the rows' logp and entropy.

        ``d logp / d z_k = (1[k = target] - p_k) / t`` and ``d H / d z_k = -p_k (log p_k + H) / t``.

        Args:
            log_probs: what `log_probs` returned last; overwritten.
            targets: ``[R]``.
            d_logp: ``[R]``, or None for zero.
            d_entropy: ``[R]``, or None for zero.
            entropy: ``[R]``, needed with ``d_entropy``.
        """
        scale = self.logit_scale / self.temperature
        p = torch.exp(log_probs, out=self._scratch[: len(log_probs)])
        if d_entropy is not None:
            assert entropy is not None
            per_token = log_probs.add_(entropy[:, None]).mul_((d_entropy * -scale)[:, None])
            if d_logp is not None:
                per_token.sub_((d_logp * scale)[:, None])
            gradient = p.mul_(per_token)
        else:
            assert d_logp is not None
            gradient = p.mul_((d_logp * -scale)[:, None])
        if d_logp is not None:
            gradient.scatter_add_(1, targets[:, None], (d_logp * scale)[:, None])
        return gradient if self._slope is None else gradient.mul_(self._slope[: len(log_probs)])


class HeadGradients:
    """Accumulates the gradients that are asked for, in the compute dtype.

    Those not asked for cost nothing and stay empty tensors ``[0]``.
    """

    def __init__(self, head: ChunkedHead, hidden: Tensor, needs: Sequence[bool]) -> None:
        self.head = head
        self.need_hidden, self.need_weight, self.need_bias = needs
        vocab, width = head.weight.shape
        new = head.weight.new_zeros
        self.hidden = new((len(hidden), width) if self.need_hidden else (0,))
        self.weight = new((vocab, width) if self.need_weight else (0,))
        self.bias = new((vocab,) if self.need_bias else (0,))

    def add(self, rows: Tensor, x: Tensor, logit_gradient: Tensor) -> None:
        """Add a chunk: row numbers ``[R]``, hidden states ``[R, D]``, gradient ``[R, V]``."""
        if self.need_hidden:
            self.hidden.index_copy_(0, rows, logit_gradient @ self.head.weight)
        if self.need_weight:
            self.weight.addmm_(logit_gradient.t(), x)
        if self.need_bias:
            self.bias.add_(logit_gradient.sum(0))
