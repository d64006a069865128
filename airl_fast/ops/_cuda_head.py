"""Backend "cuda" of the operators over the head, with the row kernels of csrc/cuda/."""

from functools import cache
from importlib.util import find_spec

from torch import Tensor

from airl_fast.ops import dispatch
from airl_fast.ops._cuda_extension import serves_head as serves
from airl_fast.ops._cuda_rows import CudaRows
from airl_fast.ops._gpu_operators import HeadOperators


def serves_reading(*tensors: Tensor) -> str | None:
    """As `serves`, for reading without gradients: Triton's fused kernel goes first."""
    reason = serves(*tensors)
    if reason is None and dispatch.forced() != "cuda" and find_spec("triton") is not None:
        return "it keeps chunks of logits, and Triton's kernel none: it serves where it is forced"
    return reason


@cache
def rows() -> CudaRows:
    """The row kernels."""
    return CudaRows()


HEAD = HeadOperators(rows)
