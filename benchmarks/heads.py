"""Cases of the operators over the language-model head.

N rows (actions), D hidden size, V vocabulary, S spans. The yardstick is the product
``hidden [N, D] x weight^T`` into memory that is already there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import airl_fast
from airl_fast.ops import _gpu_head
from benchmarks import truth
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant
from benchmarks.head_inputs import HeadInputs, Layout, flat_layout, head_inputs, padded_layout
from benchmarks.head_peers import (
    Formulation,
    chunked_cross_entropy,
    liger_log_probs,
    liger_policy_loss,
    materialised,
    require_compiler,
    trl_helper,
)
from tests import oracle

LOGPROB = "linear_logprob (no gradient)"
ENTROPY = "linear_logprob (no gradient, entropy)"
BACKWARD = "linear_logprob (forward and backward)"
POLICY = "linear_policy_loss (both gradients)"
FROZEN = "linear_policy_loss (frozen head)"
SCORE = "airl_score (score head)"
LM = "airl_score (lm head)"
# operator -> matrix products that it cannot do without
OPERATORS = {LOGPROB: 1, ENTROPY: 1, BACKWARD: 3, POLICY: 3, FROZEN: 2, SCORE: 1, LM: 2}
BACKENDS = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

SMALL = (37, 131, 24)  # N, V, D of the check against the oracle: nothing is a multiple of 8
_BLOCK = 128  # rows of a "sequence" for formulations that want sequences of one length
_CLIP = 0.2
_PADDED = "pads to the longest sequence, materialises the logits, gathers"


@contextmanager
def _chunks(**changed: Any) -> Iterator[None]:
    """The CUDA kernels over chunks of another kind than `_gpu_head` has."""
    before = {name: getattr(_gpu_head, name) for name in changed}
    for name, value in changed.items():
        setattr(_gpu_head, name, value)
    try:
        with airl_fast.backend("cuda"):
            yield
    finally:
        for name, value in before.items():
            setattr(_gpu_head, name, value)


# What float32 logits, and a budget of 512 MiB, cost on a GPU.
CHUNKS = {
    "bfloat16 logits": partial(_chunks, LOGITS=torch.bfloat16),
    "chunks of 2 GiB": partial(_chunks, CHUNK_BYTES=2 * 2**30),
}


def head_case(
    operator: str,
    n: int,
    v: int,
    d: int,
    dtype: torch.dtype,
    seed: int,
    group: str = "main",
    device: str = "cpu",
) -> Case:
    """One operator at one shape, with all its variants."""
    return Case(
        operator=operator,
        shape={"N": n, "V": v, "D": d},
        dtype=dtype,
        inputs=partial(head_inputs, n, v, d, dtype, seed, device),
        small=partial(head_inputs, *SMALL, dtype, seed, device),
        oracle=lambda inputs: _oracle(operator, inputs.cpu()),
        expected=partial(_expected, operator),
        yardstick=("product", head_product),
        variants=_variants(operator, device),
        least=OPERATORS[operator],
        group=group,
    )


def head_product(inputs: HeadInputs) -> Callable[[], Tensor]:
    out = inputs.hidden.new_zeros(len(inputs.hidden), len(inputs.weight))
    return partial(torch.mm, inputs.hidden, inputs.weight.T, out=out)


def _variants(operator: str, device: str) -> list[Variant]:
    trl, note = trl_helper()
    blocks = partial(flat_layout, block=_BLOCK)

    def peer(
        name: str, formulation: Formulation, layout: Callable[..., Layout], note: str = ""
    ) -> Variant:
        return Variant(name, partial(_peer, operator, formulation, layout), note=note)

    return [
        *(
            Variant("airl_fast", partial(_ours, operator), b, partial(airl_fast.backend, b))
            for b in BACKENDS[device]
        ),
        *(
            Variant(f"airl_fast ({name})", partial(_ours, operator), "cuda", context)
            for name, context in CHUNKS.items()
            if device == "cuda" and operator in (LOGPROB, POLICY)
        ),
        peer("plain torch", materialised, flat_layout),
        Variant("torch.compile", partial(_compiled, operator), note="of plain torch"),
        peer("torch linear_cross_entropy", chunked_cross_entropy, flat_layout, "default chunks"),
        peer("trl", trl, blocks, note),
        Variant(
            "liger-kernel",
            partial(_liger, operator),
            note="its chunked GRPO loss, not compiled" if operator in (POLICY, FROZEN) else "",
        ),
        peer("padded", materialised, padded_layout, _PADDED),
    ]


# What is computed, in terms of a formulation


def _ours(operator: str, inputs: HeadInputs) -> Prepared:
    x = inputs
    if operator in (LOGPROB, ENTROPY):
        with_entropy = operator == ENTROPY

        def logprob() -> Outputs:
            with torch.no_grad():
                result = airl_fast.linear_logprob(
                    x.hidden, x.weight, x.targets, return_entropy=with_entropy
                )
            return dict(
                zip(("logp", "entropy"), result if with_entropy else (result,), strict=False)
            )

        return Prepared(logprob)
    if operator in (SCORE, LM):

        def score() -> Outputs:
            lm = operator == LM
            scored = airl_fast.airl_score(
                x.hidden,
                x.weight,
                x.targets,
                x.disc_hidden,
                x.disc_weight if lm else x.disc_row,
                x.cu_spans,
                disc_head="lm" if lm else "score",
            )
            return {"reward": scored.reward, "f": scored.f, "logp": scored.logp}

        return Prepared(score)
    hidden, weight = _leaves(x.hidden, x.weight, operator)
    if operator == BACKWARD:
        return Prepared(
            lambda: _gradients(
                airl_fast.linear_logprob(hidden, weight, x.targets), hidden, weight, x.d_logp
            )
        )
    old_logp = x.old_logp

    def policy() -> Outputs:
        loss, _ = airl_fast.linear_policy_loss(
            hidden, weight, x.targets, x.advantages, cu_seqs=x.cu_seqs, old_logp=old_logp
        )
        return _gradients(loss, hidden, weight)

    return Prepared(policy)


def _peer(
    operator: str,
    formulation: Formulation,
    make_layout: Callable[[HeadInputs], Layout],
    inputs: HeadInputs,
) -> Prepared:
    layout = make_layout(inputs)
    hidden, weight = _leaves(layout.hidden, inputs.weight, operator)
    forward = partial(_forward, operator, formulation, layout, inputs)

    def call() -> Outputs:
        if operator in (BACKWARD, POLICY, FROZEN):
            result = forward(hidden, weight)["result"]
            upstream = layout.d_logp if operator == BACKWARD else None
            return _gradients(result, hidden, weight, upstream)
        with torch.no_grad():
            return forward(hidden, weight)

    return Prepared(call, partial(_read, operator, layout))


def _compiled(operator: str, inputs: HeadInputs) -> Prepared:
    """Compile the whole forward function of plain torch; autograd differentiates it compiled."""
    require_compiler()
    torch._dynamo.reset()  # every case is compiled for its own shape, never as a dynamic one

    def formulation(*args: Any) -> tuple[Tensor, Tensor | None]:
        return materialised(*args)

    layout = flat_layout(inputs)
    hidden, weight = _leaves(layout.hidden, inputs.weight, operator)
    forward = torch.compile(
        partial(_forward, operator, formulation, layout, inputs), dynamic=False, fullgraph=True
    )

    def call() -> Outputs:
        if operator in (BACKWARD, POLICY, FROZEN):
            result = forward(hidden, weight)["result"]
            upstream = layout.d_logp if operator == BACKWARD else None
            return _gradients(result, hidden, weight, upstream)
        with torch.no_grad():
            return forward(hidden, weight)

    _ = inputs.disc_weight if operator == LM else None  # cached here, outside the graph
    return Prepared(call)


def _liger(operator: str, inputs: HeadInputs) -> Prepared:
    if operator not in (POLICY, FROZEN):
        raise liger_log_probs()
    x, old_logp = inputs, inputs.old_logp
    hidden, weight = _leaves(x.hidden, x.weight, operator)
    rows = max(1, min(2048, len(hidden)))

    def call() -> Outputs:
        loss = liger_policy_loss(hidden, weight, x.targets, x.advantages, old_logp, rows)
        return _gradients(loss, hidden, weight)

    return Prepared(call)


def _forward(
    operator: str,
    formulation: Formulation,
    layout: Layout,
    inputs: HeadInputs,
    hidden: Tensor,
    weight: Tensor,
) -> dict[str, Tensor]:
    """The operator's results; "result" is what is differentiated."""
    logp, entropy = formulation(hidden, weight, layout.targets, operator == ENTROPY)
    if operator == ENTROPY:
        assert entropy is not None
        return {"logp": logp, "entropy": entropy}
    if operator in (POLICY, FROZEN):
        return {"result": _policy_loss(logp, layout)}
    if operator == BACKWARD:
        return {"result": logp}
    if operator == LOGPROB:
        return {"logp": logp}
    if operator == LM:
        log_q, _ = formulation(layout.disc_hidden, inputs.disc_weight, layout.targets, False)
        f = _span_sum(layout.flat(log_q), inputs.cu_spans)
    else:
        per_action = (layout.disc_hidden @ inputs.disc_row[0]).float()
        f = layout.flat(per_action)[inputs.cu_spans[1:].long() - 1]
    return {"reward": f - _span_sum(layout.flat(logp), inputs.cu_spans), "f": f, "logp": logp}


def _policy_loss(logp: Tensor, layout: Layout) -> Tensor:
    rho = (logp - layout.old_logp).exp()
    bounded = rho.clamp(1 - _CLIP, 1 + _CLIP)
    loss = -torch.minimum(rho * layout.advantages, bounded * layout.advantages)
    if layout.mask is None:
        return loss.mean()
    return (loss * layout.mask).sum() / layout.mask.sum()


def _span_sum(x: Tensor, cu: Tensor) -> Tensor:
    owner = torch.repeat_interleave(cu.diff(), output_size=len(x))
    return x.new_zeros(len(cu) - 1).index_add(0, owner, x)


def _leaves(hidden: Tensor, weight: Tensor, operator: str) -> tuple[Tensor, Tensor]:
    """Fresh leaves, with the gradients that the operator is asked for."""
    differentiate = operator in (BACKWARD, POLICY, FROZEN)
    trained = differentiate and operator != FROZEN
    return hidden.detach().requires_grad_(differentiate), weight.detach().requires_grad_(trained)


def _gradients(
    result: Tensor, hidden: Tensor, weight: Tensor, upstream: Tensor | None = None
) -> dict[str, Tensor]:
    asked = [hidden, weight] if weight.requires_grad else [hidden]
    gradients = torch.autograd.grad(result, asked, upstream)
    outputs = {"result": result.detach(), "d hidden": gradients[0]}
    return outputs if len(asked) == 1 else {**outputs, "d weight": gradients[1]}


def _read(operator: str, layout: Layout, outputs: Outputs) -> Outputs:
    """Take what is laid out as the actions are back to [N]."""
    per_action = {"logp", "entropy", "d hidden", *(["result"] if operator == BACKWARD else [])}
    return {
        name: layout.flat(value) if name in per_action else value for name, value in outputs.items()
    }


# What is right


def _oracle(operator: str, inputs: HeadInputs) -> Outputs:
    """Everything in float64, by tests/oracle.py and autograd."""
    x = inputs
    hidden, weight = _leaves(x.hidden, x.weight, operator)
    if operator in (LOGPROB, ENTROPY):
        logp, entropy = oracle.linear_logprob(hidden, weight, x.targets)
        return {"logp": logp, "entropy": entropy} if operator == ENTROPY else {"logp": logp}
    if operator in (SCORE, LM):
        lm = operator == LM
        head = x.disc_weight if lm else x.disc_row
        scored = oracle.airl_score(
            hidden, weight, x.targets, x.disc_hidden, head, x.cu_spans,
            disc_head="lm" if lm else "score",
        )  # fmt: skip
        return {"reward": scored.reward, "f": scored.f, "logp": scored.logp}
    if operator == BACKWARD:
        logp, _ = oracle.linear_logprob(hidden, weight, x.targets)
        return _doubled(_gradients(logp, hidden, weight, x.d_logp.double()))
    loss, _ = oracle.policy_loss(
        hidden, weight, x.targets, x.advantages, cu_seqs=x.cu_seqs, old_logp=x.old_logp
    )
    return _doubled(_gradients(loss, hidden, weight))


def _doubled(outputs: Outputs) -> Outputs:
    return {name: value.double() for name, value in outputs.items()}


def _expected(operator: str, inputs: HeadInputs) -> Mapping[str, Sampled]:
    x = inputs
    logp, entropy, lse = x.truth
    if operator in (LOGPROB, ENTROPY):
        both = {"logp": Sampled(logp), "entropy": Sampled(entropy)}
        return both if operator == ENTROPY else {"logp": both["logp"]}
    if operator in (SCORE, LM):
        return _expected_scores(operator, x)
    if operator == BACKWARD:
        result, d_logp = logp, x.d_logp
    else:
        leaf = logp.clone().requires_grad_()
        exact = replace(
            flat_layout(x), old_logp=x.old_logp.double(), advantages=x.advantages.double()
        )
        result = _policy_loss(leaf, exact)
        (d_logp,) = torch.autograd.grad(result, leaf)
        result = result.detach()
    head = (x.hidden, x.weight, x.targets, lse, d_logp)
    expected = {
        "result": Sampled(result),
        "d hidden": Sampled(truth.d_hidden(*head, x.rows), x.rows),
    }
    if operator != FROZEN:
        expected["d weight"] = Sampled(truth.d_weight(*head, x.ids), x.ids)
    return expected


def _expected_scores(operator: str, x: HeadInputs) -> Mapping[str, Sampled]:
    def summed(values: Tensor) -> Tensor:
        return oracle.segment_sum(values, x.cu_spans)

    if operator == LM:
        f = summed(truth.head_truth(x.disc_hidden, x.disc_weight, x.targets).logp)
    else:
        f = (x.disc_hidden.double() @ x.disc_row[0].double())[x.cu_spans[1:].long() - 1]
    logp = x.truth.logp
    return {"reward": Sampled(f - summed(logp)), "f": Sampled(f), "logp": Sampled(logp)}
