"""A gradient times the gradient of the loss, in place, and untouched where that is 1."""

import triton
import triton.language as tl
from torch import Tensor

from airl_fast.kernels.launch import on_device, options

BLOCK = 4096
_PROGRAMS = 2048  # several a multiprocessor: where the factor is 1 they only have to look at it


@triton.jit(do_not_specialize=["count"])
def scale_kernel(
    x,  # [count]
    factor,  # [] float32
    count,
    BLOCK: tl.constexpr,
):
    """Multiply every ``num_programs``-th block of ``x``."""
    by = tl.load(factor).to(tl.float32)
    if by == 1.0:
        return
    end = count.to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, end, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        value = tl.load(x + place, mask=place < end)
        scaled = (by * value.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(x + place, scaled, mask=place < end)


def scale(x: Tensor, factor: Tensor) -> None:
    """Multiply ``x``, contiguous, by ``factor []`` float32, which the CPU does not wait for."""
    if x.numel() == 0:
        return
    grid = (min(triton.cdiv(x.numel(), BLOCK), _PROGRAMS),)
    with on_device(x):
        scale_kernel[grid](x, factor, x.numel(), BLOCK=BLOCK, **options(warps=8))
