"""Cross entropy of a linear head, forward and backward: what most fused kernels compute.

N rows, D hidden size, V vocabulary. `linear_policy_loss` with every advantage 1 has its gradients,
since the ratio is 1 in value with the gradient of the log-probability. For a GPU, where
liger-kernel, cut-cross-entropy and QuACK run.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import airl_fast
from benchmarks import truth
from benchmarks.harness import Case, Outputs, Prepared, Sampled, UnavailableError, Variant
from benchmarks.head_inputs import HeadInputs, head_inputs
from benchmarks.heads import BACKENDS, SMALL, head_product
from tests import oracle

OPERATOR = "cross entropy (forward and both gradients)"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets -> the mean


def cross_entropy_case(
    n: int, v: int, d: int, dtype: torch.dtype, seed: int, device: str = "cuda"
) -> Case:
    """The gradients of the mean cross entropy at one shape, by everyone."""
    return Case(
        operator=OPERATOR,
        shape={"N": n, "V": v, "D": d},
        dtype=dtype,
        inputs=partial(head_inputs, n, v, d, dtype, seed, device),
        small=partial(head_inputs, *SMALL, dtype, seed, device),
        oracle=lambda inputs: _oracle(inputs.cpu()),
        expected=_expected,
        yardstick=("product", head_product),
        variants=[
            *(
                Variant("airl_fast", _ours, b, partial(airl_fast.backend, b))
                for b in BACKENDS[device]
            ),
            *(
                Variant(name, partial(_peer, make), note=note)
                for name, (make, note) in _PEERS.items()
            ),
        ],
        least=3,
    )


def _ours(x: HeadInputs) -> Prepared:
    ones = torch.ones_like(x.advantages)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return airl_fast.linear_policy_loss(hidden, weight, targets, ones, cu_seqs=x.cu_seqs)[0]

    return _prepared(loss, x)


def _peer(make: Callable[[], Loss], x: HeadInputs) -> Prepared:
    return _prepared(make(), x)


def _prepared(loss: Loss, x: HeadInputs) -> Prepared:
    hidden, weight = (t.detach().requires_grad_() for t in (x.hidden, x.weight))

    def call() -> Outputs:
        gradients = torch.autograd.grad(loss(hidden, weight, x.targets), [hidden, weight])
        return dict(zip(("d hidden", "d weight"), gradients, strict=True))

    return Prepared(call)


def _plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy((hidden @ weight.T).float(), targets)


def _compiled() -> Loss:
    torch._dynamo.reset()
    return torch.compile(_plain, dynamic=False, fullgraph=True)


def _torch_linear() -> Loss:
    if not hasattr(functional, "linear_cross_entropy"):
        raise UnavailableError(f"torch {torch.__version__} has no linear_cross_entropy (2.13 has)")
    return functional.linear_cross_entropy


def _liger() -> Loss:
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError as error:
        raise UnavailableError(f"liger-kernel cannot be imported: {error}") from error
    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, targets: fused(weight, hidden, targets)


def _cut() -> Loss:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"cut-cross-entropy cannot be imported: {error}") from error
    return lambda hidden, weight, targets: linear_cross_entropy(hidden, weight, targets)


def _quack() -> Loss:
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError as error:
        raise UnavailableError(f"QuACK cannot be imported: {error}") from error
    return lambda hidden, weight, targets: chunked_linear_cross_entropy(
        hidden, weight, targets, reduction="mean"
    )


_PEERS: Mapping[str, tuple[Callable[[], Loss], str]] = {
    "plain torch": (lambda: _plain, "all logits, float32 cross entropy"),
    "torch.compile": (_compiled, "of plain torch"),
    "torch linear_cross_entropy": (_torch_linear, "as it is called by default"),
    "liger-kernel": (_liger, "its fused linear cross entropy"),
    "cut-cross-entropy": (_cut, ""),
    "QuACK": (_quack, "chunked"),
}


def _oracle(x: HeadInputs) -> Outputs:
    hidden, weight = (t.double().requires_grad_() for t in (x.hidden, x.weight))
    logp, _ = oracle.linear_logprob(hidden, weight, x.targets)
    gradients = torch.autograd.grad(-logp.mean(), [hidden, weight])
    return dict(zip(("d hidden", "d weight"), gradients, strict=True))


def _expected(x: HeadInputs) -> Mapping[str, Sampled]:
    d_logp = torch.full_like(x.d_logp, -1 / len(x.d_logp))
    head = x.hidden, x.weight, x.targets, x.truth.lse, d_logp
    return {
        "d hidden": Sampled(truth.d_hidden(*head, x.rows), x.rows),
        "d weight": Sampled(truth.d_weight(*head, x.ids), x.ids),
    }
