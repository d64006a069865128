"""The CUDA extension, where it was built, and which tensors it can take."""

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # Element of csrc/rows.h

_NOT_BUILT = (
    "airl_fast was installed without its CUDA kernels; with nvcc in PATH, "
    "install it again with AIRL_FAST_CUDA=1"
)


def extension() -> ModuleType:
    """Import `airl_fast._cuda`, which needs neither a GPU nor a CUDA library.

    Raises:
        ImportError: it was not built.
    """
    if find_spec("airl_fast._cuda") is None:
        raise ImportError(_NOT_BUILT)
    return import_module("airl_fast._cuda")


def serves(*tensors: Tensor) -> str | None:
    """Say why the CUDA kernels cannot take these tensors, if they cannot."""
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it takes tensors on a CUDA device, not on {tensor.device}"
    if find_spec("airl_fast._cuda") is None:
        return _NOT_BUILT
    built = extension().architectures
    capability = torch.cuda.get_device_capability(tensors[0].device)
    if not runs_on(built, capability):
        major, minor = capability
        return (
            f"its kernels were built for {built}, not for compute capability {major}.{minor}; "
            f"install it again with AIRL_FAST_CUDA_ARCHS='{built};{major}{minor}'"
        )
    return None


def serves_head(*tensors: Tensor) -> str | None:
    """As `serves`, for a head: its logits are float32, so float64 inputs are refused too."""
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "its logits are float32, and float64 inputs ask for float64"
    return serves(*tensors)


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code built for ``architectures``, such as "80;90a", runs on a device.

    Code for 8.0 also runs on 8.6 and 8.9; an architecture with a letter is for itself alone.
    """
    major, minor = capability
    for name in architectures.split(";"):
        digits = name.rstrip("af")
        if digits.isdecimal() and int(digits[:-1]) == major:
            exact = int(digits[-1]) == minor
            if exact or (name == digits and int(digits[-1]) < minor):
                return True
    return False


def place(tensor: Tensor) -> tuple[int, int]:
    """Device index and stream that a kernel over ``tensor`` is launched on."""
    if tensor.device.type != "cuda":
        raise ValueError(f"expected a tensor on a CUDA device, received one on {tensor.device}")
    index = tensor.device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def address(tensor: Tensor | None) -> int:
    """Address of a tensor's first element; 0 stands for None."""
    return 0 if tensor is None else tensor.data_ptr()
