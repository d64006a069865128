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


# From sm_90 on, where products read their operands from shared memory, registers hold a tile of
# 128 x 256 sums (255 registers, no spills); before, they spill, and 128 x 128 is what fits.
_HOPPER_WIDE = DotConfig(128, 256, 64, 4, 16, warps=8, stages=4)
_SQUARE = DotConfig(128, 128, 64, 8, 16, warps=8, stages=3)
_FLOAT32 = DotConfig(64, 64, 32, 16, 16, warps=4, stages=3)
_SMALL = DotConfig(32, 64, 32, 16, 16, warps=4, stages=3)  # a vocabulary below one split's columns

WIDE_FROM = 2048  # hidden size from which the products outweigh the exponentials
SMALL_BELOW = 1024  # vocabulary


def dot_config(width: int, vocab: int, dtype: torch.dtype, capability: int) -> DotConfig:
    """Choose the tiles for hidden size D, vocabulary V, the products' dtype and the GPU.

    Raises:
        RuntimeError: they need more shared memory than the GPU has.
    """
    if vocab < SMALL_BELOW:
        config = _SMALL
    elif dtype == torch.float32:
        config = _FLOAT32
    elif width >= WIDE_FROM and capability >= 90:
        config = _HOPPER_WIDE
    else:
        config = _SQUARE
    needed, limit = config.shared_bytes(dtype), shared_limit(capability)
    if needed > limit:
        raise RuntimeError(
            f"configuration {config} needs {needed} bytes of shared memory, and compute capability "
            f"{capability} has {limit}: choose a smaller one in kernels/launch.py"
        )
    return config


@dataclass(frozen=True)
class RowConfig:
    """How one program reads a row: BLOCK elements at a time."""

    BLOCK: int
    warps: int

    def constants(self) -> dict[str, int | bool]:
        """What the kernel takes as constants, and what the compiler is told."""
        return {"BLOCK": self.BLOCK, **options(self.warps)}

    def __str__(self) -> str:
        return f"{self.BLOCK} w{self.warps}"


# 8 elements for each thread, two 16-byte reads of float32: with 16 the compiler spills to keep three
# programs on an SM. Many threads to a long row, so that few rows compete for the cache in between
# the read and the write.
ROW_CONFIGS = (RowConfig(1024, 4), RowConfig(4096, 16))
LONG_ROW_FROM = 16384  # vocabulary


def row_config(vocab: int) -> RowConfig:
    """Choose the configuration for rows of V logits."""
    return ROW_CONFIGS[vocab >= LONG_ROW_FROM]


@dataclass(frozen=True)
class SegmentConfig:
    """A program's segments, and how many values of each it reads at a time."""

    ROWS: int
    COLUMNS: int
    warps: int

    def constants(self) -> dict[str, int | bool]:
        """What the kernel takes as constants, and what the compiler is told."""
        return {"ROWS": self.ROWS, "COLUMNS": self.COLUMNS, **options(self.warps)}

    def __str__(self) -> str:
        return f"{self.ROWS}x{self.COLUMNS} w{self.warps}"


SEGMENT_CONFIGS = (SegmentConfig(32, 16, 4), SegmentConfig(1, 1024, 4))
LONG_SEGMENTS_FROM = 64  # values per segment, on average


def segment_config(values: int, segments: int) -> SegmentConfig:
    """Choose by the average length; both configurations serve any."""
    return SEGMENT_CONFIGS[values >= LONG_SEGMENTS_FROM * segments]


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
