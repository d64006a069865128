"""Packed passes on a CPU whose bits do not depend on what is packed together.

    T tokens of a pass   n threads that an elementwise operation is cut over

What could make a token's bits depend on its neighbours, and what is done about it:

- Matrix products. MKL gives a row the same bits whatever the other rows, from 8 rows on (fewer take
  other kernels). ``rows_alike`` tries it with a model's own layers; passes have 8 rows or more.
- Attention. Every segment attends by itself, prompts always as segments of their own
  (``layout.attend_separately``), so that the shapes of a call are the segment's.
- Elementwise operations. torch vectorises them, and computes what is left at the end of a thread's
  part by other code (another exp). A pass is padded until every part is whole vectors.
- The head. Its tiles have the same columns whatever the rows (``_cpu_head.alike_tiles``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from airl_fast.ops._cpu_head import TILE_COLUMNS

LEAST_ROWS = 8
_GRAIN = 32768  # elements below which torch does not cut an elementwise operation in two
_VECTORS = 32  # floats that its loops take at once, with AVX-512
_MOST = 4096  # tokens of padding that are tried
_ROWS = 160


def padded(tokens: int, widths: frozenset[int], threads: int) -> int:
    """Tokens of a pass such that every elementwise operation is cut into whole vectors.

    The smallest count from ``tokens`` on that has none or at least two more, which is what a
    sequence takes.

    Args:
        tokens: T.
        widths: elements of a token in the model's activations.
        threads: of torch.
    """
    for count in range(max(tokens, LEAST_ROWS), tokens + _MOST):
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
def rows_alike(model: nn.Module) -> bool:
    """Whether a row of every layer's product has the same bits among any 8 rows or more, here.

    Tried with a layer of every shape. False for what is not made of plain linear layers: experts,
    whose rows are few and depend on the batch, or other modules with a matrix.
    """
    seen: set[tuple[int, int]] = set()
    config: Any = model.config
    vocabulary = config.get_text_config().vocab_size
    for module in model.modules():
        matrices = [p for p in module.parameters(recurse=False) if p.ndim > 1]
        if not matrices or isinstance(module, nn.Embedding):
            continue
        if not isinstance(module, nn.Linear) or module.weight.device.type != "cpu":
            return False
        shape = (module.out_features, module.in_features)
        if shape in seen:
            continue
        seen.add(shape)
        weight: torch.Tensor = module.weight
        bias: torch.Tensor | None = module.bias
        if module.out_features == vocabulary:  # read in tiles
            weight, bias = weight[:TILE_COLUMNS], None
        x = torch.randn(_ROWS, module.in_features, generator=torch.Generator().manual_seed(0)).to(
            module.weight.dtype
        )
        whole = nn.functional.linear(x, weight, bias)
        for first, last in ((0, 8), (11, 24), (_ROWS - 41, _ROWS), (0, 131)):
            part = nn.functional.linear(x[first:last].clone(), weight, bias)
            if not torch.equal(part, whole[first:last]):
                return False
    return "expert" not in " ".join(name for name, _ in model.named_modules())
