"""Packed passes on a CPU whose bits do not depend on what is packed together.

    T tokens of a pass   n threads that an elementwise operation is cut over

What could make a token's bits depend on its neighbours, and what is done about it:

- Matrix products. MKL gives a row the same bits whatever the other rows, from some number of rows
  on: 8 on an EPYC with AVX2, 193 on a Xeon with AVX-512, where fewer may be summed in parts. On
  AMX's tiles (``ops._cpu_products``) no row depends on others, but few rows are left to MKL.
  ``least_rows`` tries it with a model's own layers; passes have as many rows.
- Attention. In the CPU's kernel (``ops._packed_attention``) no segment depends on others beside it;
  in torch's every segment attends by itself, prompts always as segments of their own
  (``layout.attend_separately``), so that the shapes of a call are the segment's.
- Elementwise operations. torch vectorises them, and computes what is left at the end of a thread's
  part by other code (another exp). A pass is padded until every part is whole vectors.
- The head. Its tiles have the same columns whatever the rows (``_cpu_head.alike_tiles``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from airl_fast.ops._cpu_head import alike_tiles, tile_shape
from airl_fast.ops._cpu_products import linear

SCORE_COLUMNS = 16  # of a score head's product: one column would be a product of another kind
_TRIED_ROWS = 8, 13, 41, 131, 256, 301, 515, 1003
_ROWS = 1024
_LEAST_ROWS = 8, 256  # a pass is made to have one or the other
_GRAIN = 32768  # elements below which torch does not cut an elementwise operation in two
_VECTORS = 32  # floats that its loops take at once, with AVX-512
_MOST = 4096  # tokens of padding that are tried


def padded(tokens: int, widths: frozenset[int], threads: int, least: int) -> int:
    """Tokens of a pass such that every elementwise operation is cut into whole vectors.

    The smallest count from ``tokens`` on that has none or at least two more, which is what a
    sequence takes.

    Args:
        tokens: T.
        widths: elements of a token in the model's activations.
        threads: of torch.
        least: tokens of a pass, as ``least_rows`` has it.
    """
    for count in range(max(tokens, least), max(tokens, least) + _MOST):
        if count != tokens + 1 and all(_whole(count * width, threads) for width in widths):
            return count
    raise AssertionError(f"no padding of {tokens} tokens of {sorted(widths)} for {threads} threads")


def _whole(elements: int, threads: int) -> bool:
    parts = min(threads, -(-elements // _GRAIN))
    return elements % parts == 0 and elements // parts % _VECTORS == 0


def widths(model: nn.Module) -> frozenset[int]:
    """Elements of a token in the activations: what linear layers give, and halves of heads."""
    config: Any = model.config
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    linear = {m.out_features for m in model.modules() if isinstance(m, nn.Linear)}
    return frozenset({text.hidden_size, head, *linear} - {text.vocab_size})


@torch.no_grad()
def least_rows(model: nn.Module) -> int | None:
    """From how many rows on a row of every layer's product has the same bits whatever the others.

    Tried here, with a layer of every shape. None if from no number, and for what is not made of
    plain linear layers: experts, whose rows are few and depend on the batch, or other modules with
    a matrix.
    """
    matrices = _matrices(model)
    if matrices is None or "expert" in " ".join(name for name, _ in model.named_modules()):
        return None
    found = [_least_alike(*one) for one in matrices]
    least = max(n or _ROWS for n in found)
    return next((n for n in _LEAST_ROWS if n >= least), None)


def _matrices(model: nn.Module) -> list[tuple[Tensor, Tensor | None]] | None:
    """A weight and bias of every shape that products are made of, or None."""
    config: Any = model.config
    text = config.get_text_config()
    found: dict[tuple[int, ...], tuple[Tensor, Tensor | None]] = {}

    def add(weight: Tensor, bias: Tensor | None = None) -> None:
        found.setdefault(tuple(weight.shape), (weight, bias))

    for module in model.modules():
        if not any(p.ndim > 1 for p in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Embedding):
            continue
        if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu":
            return None
        if module.out_features != text.vocab_size:
            add(module.weight, module.bias)
            continue
        with alike_tiles():
            _, columns = tile_shape(1, *module.weight.shape)
        add(module.weight[:columns])
        if rest := module.out_features % columns:
            add(module.weight[-rest:])
        add(module.weight[:SCORE_COLUMNS])
    return list(found.values())


def _least_alike(weight: Tensor, bias: Tensor | None) -> int | None:
    """From which number of those tried on rows have the bits that they have among 1,024."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_ROWS, weight.shape[1], generator=generator).to(weight.dtype)
    whole = linear(x, weight, bias)
    least = None
    for rows in reversed(_TRIED_ROWS):
        part = x[-rows - 11 : -11]
        if not torch.equal(linear(part.clone(), weight, bias), whole[-rows - 11 : -11]):
            break
        least = rows
    return least
