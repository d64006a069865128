"""What the tests of several operators share."""

import pytest
import torch

import airl_fast
from airl_fast import _C

REFUSES_FLOAT64 = "float32, and float64 inputs ask for float64"


@pytest.fixture(params=["cpu", "reference"])
def served_by(request):
    """The backend that every operator in the test is forced to, one after the other."""
    with airl_fast.backend(request.param):
        yield request.param


@pytest.fixture
def refuses(served_by):
    """Whether the backend at hand refuses a head of this dtype; checks that it says why."""

    def check(dtype, call):
        if served_by != "cpu" or dtype != torch.float64:
            return False
        with pytest.raises(RuntimeError, match=REFUSES_FLOAT64):
            call()
        return True

    return check


@pytest.fixture(params=["avx512", "avx2", "portable"])
def path(request):
    """The vector path of the C++ kernels, one after the other."""
    if request.param not in _C.vector_paths():
        pytest.skip(f"this processor has no {request.param}")
    best = _C.vector_path()
    _C.use_vector_path(request.param)
    yield request.param
    _C.use_vector_path(best)
