"""Cases of the three products of a head that is cut into chunks of rows, alone.

N rows, D hidden size, V vocabulary, R rows of a chunk. What chunks cost the products themselves:
float32 logits have twice the bytes to write, and the weight's gradient is read and written again
for every chunk but the first, in its dtype. The yardstick is the same product in one piece.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from airl_fast.ops._gpu_head import multiply
from benchmarks.harness import Case, Outputs, Prepared, Sampled, Variant

LOGITS, D_HIDDEN, D_WEIGHT = "logits of chunks", "d hidden of chunks", "d weight of chunks"
OPERATORS = (LOGITS, D_HIDDEN, D_WEIGHT)
# R, and whether what is written, or added to, is float32; N stands for all rows at once
CUTS = {
    LOGITS: ((1024, True), (2048, False)),
    D_HIDDEN: ((1024, False), (2048, False)),
    D_WEIGHT: ((1024, True), (1024, False), (2048, False)),
}
_SMALL = (70, 131, 24)  # N, V, D; two chunks
_CHECKED = 4


@dataclass(frozen=True, eq=False)
class ProductInputs:
    """Hidden states ``[N, D]``, the weight ``[V, D]``, and a gradient ``[N, V]`` of logits."""

    hidden: Tensor
    weight: Tensor
    gradient: Tensor


def product_inputs(
    n: int, v: int, d: int, dtype: torch.dtype, seed: int, device: str
) -> ProductInputs:
    """Normal values; the weight's have a deviation of ``D ** -0.5``."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return ProductInputs(normal(n, d), normal(v, d).mul_(d**-0.5), normal(n, v))


def product_case(
    operator: str, n: int, v: int, d: int, dtype: torch.dtype, seed: int, device: str = "cuda"
) -> Case:
    """One product at one shape, in chunks of several sizes."""
    return Case(
        operator=operator,
        shape={"N": n, "V": v, "D": d},
        dtype=dtype,
        inputs=partial(product_inputs, n, v, d, dtype, seed, device),
        small=partial(product_inputs, *_SMALL, dtype, seed, device),
        oracle=partial(_exact, operator),
        expected=partial(_expected, operator),
        yardstick=("product", partial(_whole, operator)),
        variants=[
            Variant(
                f"{rows} rows, {'float32' if wide else 'bfloat16'}",
                partial(_chunked, operator, rows, wide),
            )
            for rows, wide in CUTS[operator]
        ],
        least=1,
        memory=False,
    )


def _whole(operator: str, x: ProductInputs) -> Callable[[], Tensor]:
    if operator == LOGITS:
        out = torch.empty_like(x.gradient)
        return partial(torch.mm, x.hidden, x.weight.t(), out=out)
    if operator == D_HIDDEN:
        return partial(torch.mm, x.gradient, x.weight, out=torch.empty_like(x.hidden))
    return partial(torch.mm, x.gradient.t(), x.hidden, out=torch.empty_like(x.weight))


def _chunked(operator: str, rows: int, wide: bool, x: ProductInputs) -> Prepared:
    n = len(x.hidden)
    rows = min(rows, -(-n // 2))
    chunks = [slice(first, first + rows) for first in range(0, n, rows)]
    dtype = torch.float32 if wide else x.hidden.dtype
    if operator == LOGITS:
        memory = torch.empty_like(x.gradient[:rows], dtype=dtype)

        def logits() -> Outputs:
            for chunk in chunks:
                out = memory[: len(x.hidden[chunk])]
                multiply(x.hidden[chunk], x.weight.t(), out)
            return {operator: out[-_CHECKED:]}

        return Prepared(logits)
    out = torch.empty_like(x.hidden if operator == D_HIDDEN else x.weight, dtype=dtype)

    def gradients() -> Outputs:
        for chunk in chunks:
            if operator == D_HIDDEN:
                multiply(x.gradient[chunk], x.weight, out[chunk])
            else:
                multiply(x.gradient[chunk].t(), x.hidden[chunk], out, add=chunk.start > 0)
        return {operator: out[-_CHECKED:]}

    return Prepared(gradients)


def _exact(operator: str, x: ProductInputs) -> Outputs:
    """Float64, of the last rows of the result, which every cut leaves last."""
    hidden, weight, gradient = (t.cpu() for t in (x.hidden, x.weight, x.gradient))
    if operator == LOGITS:
        result = hidden[-_CHECKED:].double() @ weight.double().t()
    elif operator == D_HIDDEN:
        result = gradient[-_CHECKED:].double() @ weight.double()
    else:
        result = gradient[:, -_CHECKED:].double().t() @ hidden.double()
    return {operator: result}


def _expected(operator: str, x: ProductInputs) -> dict[str, Sampled]:
    return {name: Sampled(values) for name, values in _exact(operator, x).items()}
