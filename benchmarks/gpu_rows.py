"""Cases of the row kernels over a chunk of logits on a GPU: bound by memory.

R rows, V vocabulary. The yardstick is a copy of the chunk into memory that is already there: it
reads and writes the chunk once, as the policy kernel has to; reading needs half of that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from airl_fast.ops._gpu_rows import RowKernels, row_head
from airl_fast.ops._policy_terms import ActionLoss, Actions
from benchmarks.harness import Case, Outputs, Prepared, Sampled, UnavailableError, Variant
from tests import oracle

READ, POLICY = "row kernel (read)", "row kernel (policy loss, in place)"
OPERATORS = (READ, POLICY)
_LOSS = ActionLoss(0.2, 0.2, None, 0.0, 0.0, False)
_SMALL = (7, 131)
_CHECKED = 4  # rows that are held to the oracle on the timed inputs


@dataclass(frozen=True, eq=False)
class RowInputs:
    """A chunk ``[R, V]`` and what the loss says of its rows."""

    logits: Tensor
    actions: Actions

    def first(self, rows: int) -> "RowInputs":
        """The first rows, in CPU memory."""
        part = self.actions.part(slice(rows))
        cpu = Actions(*(x if x is None else x.cpu() for x in part))
        return RowInputs(self.logits[:rows].cpu(), cpu)


def row_inputs(rows: int, vocab: int, dtype: torch.dtype, seed: int, device: str) -> RowInputs:
    """Logits with a standard deviation of 3; ratios that leave the clip range on both sides."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logits = (3 * normal(rows, vocab)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    logp = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    count = torch.arange(rows, device=device)
    return RowInputs(
        logits,
        Actions(
            rows=count,
            targets=targets,
            sequence=count,
            advantages=normal(rows),
            old_logp=logp + 0.3 * normal(rows),
            ref_logp=None,
            share=torch.full((rows,), 1 / rows, device=device),
        ),
    )


def row_case(
    operator: str, rows: int, vocab: int, dtype: torch.dtype, seed: int, device: str = "cuda"
) -> Case:
    """One kernel at one size, by every backend that has it."""
    size = rows * vocab * dtype.itemsize
    return Case(
        operator=operator,
        shape={"R": rows, "V": vocab},
        dtype=dtype,
        inputs=partial(row_inputs, rows, vocab, dtype, seed, device),
        small=partial(row_inputs, *_SMALL, dtype, seed, device),
        oracle=lambda x: _oracle(operator, x.first(len(x.logits))),
        expected=lambda x: {
            name: Sampled(values, torch.arange(_CHECKED))
            for name, values in _oracle(operator, x.first(_CHECKED), len(x.logits)).items()
        },
        yardstick=("copy", _copy),
        variants=[
            *(Variant("airl_fast", partial(_ours, operator, b), b) for b in ("cuda", "triton")),
            Variant("plain torch", partial(_torch, operator)),
            Variant("torch.compile", partial(_compiled, operator), note="of plain torch"),
        ],
        traffic=size if operator == READ else 2 * size,
    )


def _copy(inputs: RowInputs) -> Callable[[], Tensor]:
    return partial(torch.empty_like(inputs.logits).copy_, inputs.logits)


def _kernels(backend: str) -> RowKernels:
    if backend == "triton":
        from airl_fast.kernels.rows import TritonRows

        return TritonRows()
    try:
        from airl_fast.ops._cuda_rows import CudaRows
    except ImportError as error:
        raise UnavailableError(f"airl_fast._cuda is not built: {error}") from error
    return CudaRows()


def _ours(operator: str, backend: str, inputs: RowInputs) -> Prepared:
    kernels, head, actions = _kernels(backend), row_head(None, 1.0, None, 1.0), inputs.actions
    chunk = inputs.logits.clone()
    logp, entropy = (torch.empty_like(actions.share) for _ in range(2))

    def read() -> Outputs:
        kernels.read(chunk, head, actions.targets, logp, entropy, None)
        return {"logp": logp, "entropy": entropy}

    def policy() -> Outputs:
        kernels.policy(chunk, head, actions, _LOSS, logp, entropy, chunk)
        return {"logp": logp, "gradient": chunk}

    def reset() -> None:
        chunk.copy_(inputs.logits)

    return Prepared(read) if operator == READ else Prepared(policy, reset=reset)


def _formulation(operator: str, logits: Tensor, actions: Actions) -> Outputs:
    """What one writes in plain torch."""
    log_probs = logits.float().log_softmax(-1)
    logp = log_probs.gather(1, actions.targets[:, None])[:, 0]
    if operator == READ:
        return {"logp": logp, "entropy": -(log_probs.exp() * log_probs).sum(-1)}
    d_logp = _LOSS.terms(logp, actions).d_logp
    gradient = log_probs.exp().mul_(-d_logp[:, None])
    gradient.scatter_add_(1, actions.targets[:, None], d_logp[:, None])
    return {"logp": logp, "gradient": gradient.to(logits.dtype)}


def _torch(operator: str, inputs: RowInputs) -> Prepared:
    return Prepared(partial(_formulation, operator, inputs.logits, inputs.actions))


def _compiled(operator: str, inputs: RowInputs) -> Prepared:
    torch._dynamo.reset()
    compiled = torch.compile(partial(_formulation, operator), dynamic=False, fullgraph=True)
    return Prepared(partial(compiled, inputs.logits, inputs.actions))


def _oracle(operator: str, inputs: RowInputs, rows: int | None = None) -> Outputs:
    """Float64, by tests/oracle.py: a head whose hidden states are the logits; of ``rows`` rows."""
    actions = inputs.actions
    logits = inputs.logits.double().requires_grad_()
    one = torch.eye(logits.shape[1], dtype=torch.float64) if logits.shape[1] < 999 else None
    if one is None:  # the identity would not fit: what the oracle does with it, by hand
        log_probs = logits.log_softmax(-1)
        logp = log_probs.gather(1, actions.targets[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
    else:
        logp, entropy = oracle.linear_logprob(logits, one, actions.targets)
    if operator == READ:
        return {"logp": logp.detach(), "entropy": entropy.detach()}
    d_logp = _LOSS.terms(logp.detach(), Actions(*map(_double, actions))).d_logp
    (gradient,) = torch.autograd.grad(logp, logits, d_logp)
    return {"logp": logp.detach(), "gradient": gradient}


def _double(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x
