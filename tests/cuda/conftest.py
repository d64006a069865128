"""The CUDA kernels on a CPU, in place of the extension."""

import pytest

from airl_fast.ops import _cuda_rows
from tests.cuda import emulation


@pytest.fixture(scope="session")
def emulated():
    """The extension, emulated; built once per version of its sources."""
    return emulation.build()


@pytest.fixture
def rows(emulated, monkeypatch):
    """`CudaRows` over tensors in the CPU's memory."""
    monkeypatch.setattr(_cuda_rows, "extension", lambda: emulated)
    monkeypatch.setattr(_cuda_rows, "place", lambda tensor: (0, 0))
    return _cuda_rows.CudaRows()
