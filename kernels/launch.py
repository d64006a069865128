"""Launch configurations: a small table, looked up by shape bucket, dtype and compute capability.

No token count is part of any key, and every argument that depends on one is marked
``do_not_specialize`` by its kernel: nothing is compiled again as N varies. The table is fixed, not
timed at run time, so that a run's bits do not depend on what else the GPU was doing.
"""

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

# Shared memory that one program may have, by compute capability (CUDA C++ Programming Guide,
# "Technical Specifications per Compute Capability"; 1 KiB of an SM's goes to the system).
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}


@dataclass(frozen=True)
class DotConfig:
    """Tiles of a product ``[BM, D] x [BN, D]^T`` whose result is reduced over BN at once."""

    BM: int
    BN: int
    BK: int
    TILES: int  # tiles of a split of the vocabulary
    GROUP: int  # row blocks that share a split of the weight in the cache
    warps: int
    stages: int

    @property
    def split_columns(self) -> int:
        """Columns of the vocabulary that one program takes."""
        return self.BN * self.TILES

    def constants(self) -> dict[str, int]:
        """What the kernel takes as compile-time constants."""
        return {name: getattr(self, name) for name in ("BM", "BN", "BK", "TILES", "GROUP")}

    def options(self) -> dict[str, int | bool]:
        """What the compiler is told."""
        return options(self.warps, self.stages)

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the stages of hidden and weight tiles that are in flight."""
        return self.stages * (self.BM + self.BN) * self.BK * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.BM}x{self.BN}x{self.BK} w{self.warps} s{self.stages}"


def options(warps: int, stages: int = 1) -> dict[str, int | bool]:
    """Compiler options; contraction is stated, because Triton's default for it changes."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


# The first that fits is taken. Wide hidden states: the largest tile that registers hold, which
# reads least per multiplication. Narrow ones: tiles small enough for two programs on an SM, so that
# the exponentials of one hide behind the products of the other.
_WIDE = (
    DotConfig(128, 256, 64, 4, 16, warps=8, stages=4),
    DotConfig(128, 256, 64, 4, 16, warps=8, stages=3),
    DotConfig(128, 128, 32, 8, 16, warps=8, stages=4),
)
_NARROW = (
    DotConfig(128, 128, 64, 8, 16, warps=8, stages=3),
    DotConfig(128, 128, 32, 8, 16, warps=8, stages=4),
)
_FLOAT32 = (DotConfig(64, 64, 32, 16, 16, warps=4, stages=3),)
_SMALL = DotConfig(32, 64, 32, 16, 16, warps=4, stages=3)  # a vocabulary below one split's columns

WIDE_FROM = 2048  # hidden size
SMALL_BELOW = 1024  # vocabulary


def dot_configs(width: int, vocab: int, dtype: torch.dtype) -> tuple[DotConfig, ...]:
    """Candidates for hidden size D and vocabulary V, the best first."""
    if vocab < SMALL_BELOW:
        return (_SMALL,)
    if dtype == torch.float32:
        return _FLOAT32
    return _WIDE if width >= WIDE_FROM else _NARROW


def dot_config(width: int, vocab: int, dtype: torch.dtype, tensor: Tensor) -> DotConfig:
    """Pick the first candidate that fits the shared memory of the device of ``tensor``."""
    limit = shared_limit(capability(tensor))
    return next(c for c in dot_configs(width, vocab, dtype) if c.shared_bytes(dtype) <= limit)


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's GPU, as 10 major + minor; 80 in the interpreter."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def shared_limit(capability: int) -> int:
    """Bytes of shared memory for one program; of the largest known capability not above it."""
    return SHARED_BYTES[max(known for known in SHARED_BYTES if known <= max(80, capability))]


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the tensor's GPU the current one, where Triton launches; nothing for CPU memory."""
    return torch.cuda.device_of(tensor)


def interpreted() -> bool:
    """Whether Triton interprets its kernels on a CPU (``TRITON_INTERPRET=1``) in this process."""
    return os.environ.get("TRITON_INTERPRET") == "1"
